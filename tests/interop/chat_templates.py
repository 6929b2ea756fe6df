#!/usr/bin/env python3
"""Compares pare's chat templates with transformers on template files, text for text.

usage: chat_templates.py RENDER_CHAT FILE.jinja|tokenizer_config.json... [--json OUT] [--mutate N] [--seed S]

Every template meets every conversation of tests/golden/chat_conversations.py with and without tools, generation prompt
and thinking. A text that differs, or one where transformers raises, is a failure (exit code 1); what pare refuses
although transformers renders it is counted and listed. --mutate also compares N randomly damaged templates.
"""

import argparse
import collections
import hashlib
import json
import pathlib
import random
import re
import signal
import subprocess
import sys

import jinja2
import transformers
from transformers.utils import chat_template_utils

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "golden"))
from chat_conversations import CONVERSATIONS, SPECIAL, VARIANTS, at_fixed_time  # noqa: E402

GROUPS = {"Llama 3.x, 4": r"llama-?3|llama4", "Qwen 2.5, Qwen 3": r"qwen|qwq", "DeepSeek and its R1 distills": r"deepseek",
          "Phi 3, 3.5, 4": r"phi", "Gemma 1 to 4": r"gemma", "Mistral": r"mistral|devstral|pixtral", "others": r""}
PIECE = re.compile(r"\{\{-?|-?\}\}|-?%\}|\{%-?|\w+|\s+|'[^']*'|\"[^\"]*\"|.", re.S)


class Endless(Exception):
    pass


def endless(*_):
    raise Endless


def table_of(rows):
    """One row a family: templates, texts that are equal, both refuse, refused by pare alone, different."""
    table = {group: [0] * 5 for group in GROUPS}
    for row in rows:
        group = next(name for name, pattern in GROUPS.items() if re.search(pattern, row["template"].lower()))
        counts = [1, row.get("equal", 0), row.get("both refuse", 0), row.get("refused by pare", 0),
                  row.get("DIFFERENT", 0) + row.get("ACCEPTED", 0)]
        table[group] = [a + b for a, b in zip(table[group], counts)]
    return [[group, *counts] for group, counts in table.items()]


def commit():
    here = pathlib.Path(__file__).resolve().parent
    git = ["git", "-C", here, "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def templates_of(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return [(path.name, text)]
    held = json.loads(text).get("chat_template")
    if isinstance(held, list):
        return [(f"{path.parent.name}: {entry['name']}", entry["template"]) for entry in held]
    return [(path.parent.name, held)] if held else []


class Comparison:
    def __init__(self, program):
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ours(self, source, variables):
        self.process.stdin.write(json.dumps({"template": source, "variables": variables}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def theirs(self, source, variables):
        signal.alarm(10)
        try:
            compiled = chat_template_utils._compile_jinja_template(source)
            return compiled.render(**json.loads(json.dumps(variables)))
        except Endless:
            return None
        except Exception as problem:
            return problem
        finally:
            signal.alarm(0)

    def compare(self, source, variables):
        got = self.ours(source, variables)
        want = self.theirs(source, variables)
        if want is None:
            return "endless", got, want
        if isinstance(want, Exception):
            return ("both refuse" if "error" in got else "ACCEPTED"), got, want
        if "error" in got:
            return "refused by pare", got, want
        return ("equal" if got["text"] == want else "DIFFERENT"), got, want


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program")
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--mutate", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    at_fixed_time(chat_template_utils)
    signal.signal(signal.SIGALRM, endless)
    comparison = Comparison(arguments.program)
    total, rows, failures = collections.Counter(), [], 0

    def settings():
        for conversation, messages in CONVERSATIONS.items():
            for number, variant in enumerate(VARIANTS):
                yield (f"{conversation}, variant {number}",
                       {**SPECIAL, "messages": messages, "tools": None, "documents": None, **variant})

    def report(name, what, kind, got, want):
        ours = got.get("text", got.get("error"))
        print(f"{kind} {name} ({what})\n  transformers: {want!r:.400}\n  pare: {ours!r:.400}")

    sources = [entry for path in arguments.files for entry in templates_of(path)]
    for name, source in sources:
        counts, reasons = collections.Counter(), set()
        for what, variables in settings():
            kind, got, want = comparison.compare(source, variables)
            counts[kind] += 1
            if kind in ("DIFFERENT", "ACCEPTED"):
                report(name, what, kind, got, want)
            if kind == "refused by pare":
                reasons.add(got["error"].split("\n")[0])
        total.update(counts)
        rows.append({"template": name, "sha256": hashlib.sha256(source.encode()).hexdigest(),
                     **dict(sorted(counts.items())), **({"reasons": sorted(reasons)} if reasons else {})})
        for reason in sorted(reasons):
            print(f"refused {name}: {reason}")
    print(f"{len(sources)} templates:", dict(total))
    failures += total["DIFFERENT"] + total["ACCEPTED"]

    rng, mutated = random.Random(arguments.seed), collections.Counter()
    usual = [source for _, source in sources if len(source) < 6000]
    pieces = [piece for source in usual for piece in PIECE.findall(source)]
    everything = list(settings())
    for _ in range(arguments.mutate):
        damaged = PIECE.findall(rng.choice(usual))
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            at, other = rng.randrange(len(damaged)), rng.randrange(len(damaged))
            how = rng.randrange(4)
            if how == 0:
                damaged.insert(at, rng.choice(pieces))
            elif how == 1:
                damaged[at] = rng.choice(pieces)
            elif how == 2:
                damaged[at], damaged[other] = damaged[other], damaged[at]
            elif len(damaged) > 1:
                del damaged[at]
        what, variables = rng.choice(everything)
        kind, got, want = comparison.compare("".join(damaged), variables)
        mutated[kind] += 1
        if kind in ("DIFFERENT", "ACCEPTED"):
            report("".join(damaged), what, kind, got, want)
    if arguments.mutate:
        print(f"{arguments.mutate} damaged templates:", dict(mutated))
    failures += mutated["DIFFERENT"] + mutated["ACCEPTED"]
    if arguments.json:
        damaged = f" --mutate {arguments.mutate} --seed {arguments.seed}" if arguments.mutate else ""
        arguments.json.write_text(json.dumps({
            "command": f"tests/interop/chat_templates.py render_chat TEMPLATES/*.jinja{damaged}", "commit": commit(),
            "machine": f"transformers {transformers.__version__}, jinja2 {jinja2.__version__}",
            "conversations": len(CONVERSATIONS), "variants": len(VARIANTS), "total": dict(sorted(total.items())),
            "damaged": dict(sorted(mutated.items())),
            "columns": ["family", "published templates", "texts equal", "refused by both", "refused by pare alone",
                        "different"],
            "table": table_of(rows), "templates": rows}, indent=1, ensure_ascii=False) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
