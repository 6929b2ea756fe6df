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

PIECE = re.compile(r"\{\{-?|-?\}\}|-?%\}|\{%-?|\w+|\s+|'[^']*'|\"[^\"]*\"|.", re.S)


class Endless(Exception):
    pass


def endless(*_):
    raise Endless


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
            # Not the cached form: damaged templates are seen once.
            return chat_template_utils._cached_compile_jinja_template(source).render(**json.loads(json.dumps(variables)))
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
        print(f"{kind} {name} ({what})\n  transformers: {want!r:.400}\n  pare: {got.get('text', got.get('error'))!r:.400}")

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
        rows.append({"template": name, "sha256": hashlib.sha256(source.encode()).hexdigest(), **dict(sorted(counts.items())),
                     **({"reasons": sorted(reasons)} if reasons else {})})
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
        arguments.json.write_text(json.dumps({
            "command": "tests/interop/chat_templates.py", "transformers": transformers.__version__,
            "jinja2": jinja2.__version__, "conversations": len(CONVERSATIONS), "variants": len(VARIANTS),
            "total": dict(sorted(total.items())), "damaged": dict(sorted(mutated.items())), "seed": arguments.seed,
            "templates": rows}, indent=1, ensure_ascii=False) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
