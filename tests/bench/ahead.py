#!/usr/bin/env python3
"""What guessing ahead (`pare run --draft`, `--lookup`) gains and `--fallback` costs, as a results file.

usage: ahead.py --pare pare-edge --figures ahead_figures --model M.pare --draft D.pare --text FOLDER
                --out FILE.json [--prompts 6] [--tokens 192] [--windows 40] [--passes FILE.pare ...]

FOLDER holds texts that neither model was trained on (*.txt). Prompts are the first 240 bytes of the longest of them.
A second is one that the program had a processor, on one thread, so that other work on the machine counts little; what
a run that makes one token takes (opening, prompt) is subtracted. At temperature 0 every way must give the tokens of
the plain one, or nothing is written. `predicted` is tokens a pass / (v + k c): v, the cost of the checking pass, and c,
that of one guess, in passes over one token, both measured by themselves; k guesses a pass on average.
--passes: further files of which only the cost of passes over 1 to 9 tokens is measured.
"""
import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile


def timed(command):
    """Seconds of processor time of the whole program, and the result that it printed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for stream in (out, errors):
            stream.seek(0)
        if process.returncode != 0:
            sys.exit(f"{' '.join(map(str, command))}: exit {process.returncode}\n{errors.read()[-2000:].decode()}")
        return used.ru_utime + used.ru_stime, json.loads(out.read())["result"]


def printed(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def ways(draft):
    yield "plain", []
    for tokens in (1, 2, 3, 4, 6, 8):
        yield f"draft, {tokens} guesses", ["--draft", draft, "--draft-tokens", tokens, "--draft-confidence", 0]
    for confidence in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        yield f"draft, while it gives {confidence}", ["--draft", draft, "--draft-tokens", 8,
                                                      "--draft-confidence", confidence]
    for tokens in (2, 4, 8):
        yield f"lookup of 3, {tokens} guesses", ["--lookup", 3, "--draft-tokens", tokens]


def measure(given, prompts, temperature, passes):
    sampling = ["--temp", temperature] + (["--top-p", 0.95] if temperature > 0 else [])
    cost = {name: [row["of_one"] for row in rows] for name, rows in passes.items()}
    guess = passes["draft"][0]["seconds"] / passes["model"][0]["seconds"]
    rows, plain_ids, plain_seconds = [], {}, 0.0
    for name, options in ways(given.draft):
        seconds, totals = 0.0, {}
        for number, prompt in enumerate(prompts):
            command = [given.pare, "run", given.model, "-p", prompt, "--ignore-eos", "--threads", 1, "--json", "-q",
                       "--seed", number, *sampling, *options]
            opening, _ = timed([*command, "-n", 1])
            whole, result = timed([*command, "-n", given.tokens])
            seconds += whole - opening
            if name == "plain":
                plain_ids[number] = result["ids"]
            elif temperature == 0 and result["ids"] != plain_ids[number]:
                sys.exit(f"{name}: not the tokens of plain decoding")
            for key, value in result.get("ahead", {}).items():
                if isinstance(value, (int, float)):
                    totals[key] = totals.get(key, 0) + value
        row = {"way": name, "temperature": temperature, "seconds": round(seconds, 3)}
        if name == "plain":
            plain_seconds = seconds
        else:
            per_pass = totals["tokens"] / totals["passes"]
            length = totals["drafted"] / totals["passes"]
            low = min(int(length), len(cost["model"]) - 2)  # a pass over 1 + length tokens
            check = cost["model"][low] + (length - low) * (cost["model"][low + 1] - cost["model"][low])
            row.update({
                "tokens_per_pass": round(per_pass, 3),
                "guesses_per_pass": round(length, 3),
                "alpha": round(totals["accepted"] / max(1, totals["tested"]), 3),
                "speed_up": round(plain_seconds / seconds, 3),
                "predicted": round(per_pass / (check + (length * guess if "draft_passes" in totals else 0)), 3),
            })
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pare", "figures", "model", "draft", "text", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--passes", nargs="*", default=[])
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    texts = sorted(pathlib.Path(given.text).glob("*.txt"), key=lambda path: (-path.stat().st_size, path.name))
    prompts = [path.read_bytes()[:240].decode(errors="ignore") for path in texts[:given.prompts]]
    if len(prompts) < given.prompts:
        sys.exit(f"{given.text}: {given.prompts} texts needed")
    passes = {"model": printed([given.figures, "passes", given.model, 400]),
              "draft": printed([given.figures, "passes", given.draft, 400])}
    rows = [row for temperature in (0, 0.8) for row in measure(given, prompts, temperature, passes)]
    for file in given.passes:
        passes[pathlib.Path(file).name] = printed([given.figures, "passes", file, 15])
    result = {
        "command": "python3 tests/bench/ahead.py",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, one thread; processor time",
        "note": given.note,
        "prompts": given.prompts, "tokens": given.tokens,
        "cost_of_passes": passes,
        "cost_of_a_guess": round(passes["draft"][0]["seconds"] / passes["model"][0]["seconds"], 3),
        "runs": rows,
        "fallback": printed([given.figures, "curve", given.draft, given.model, given.windows, *texts]),
    }
    pathlib.Path(given.out).write_text(json.dumps(result, indent=1) + "\n")


main()
