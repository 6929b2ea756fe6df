#!/usr/bin/env python3
"""What guessing ahead (`pare run --draft`, `--lookup`) gains and what `--fallback` costs, as a results file.

usage: ahead.py --figures build/tests/ahead_figures --model M.pare --draft D.pare --out FOLDER --text FOLDER...
                [--prompts 5] [--tokens 192] [--rounds 9] [--windows 60] [--large L.pare --small S.pare] [--note TEXT]

Each FOLDER holds texts that neither model was trained on (*.txt); of each its longest ones are the prompts. A second is
one that the program had a processor, on one thread, so that other work on the machine counts little. Greedy tokens are
compared with those of the plain way: where one differs, nothing is written. `predicted` is tokens a pass / (v + k c):
v, the cost of the checking pass, and c, that of one guess, both in passes over one token and measured by themselves; k
guesses a pass on average. Of --large and --small only passes over 1 to 9 tokens are measured. `expected` is what
follows for a share alpha of guesses that stand: (1 - alpha^(k+1)) / ((1 - alpha) (v + k c)) at the best k.
Writes FOLDER/ahead.json and FOLDER/fallback.json.
"""
import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys


def figures(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def described(rows, cost, guess):
    plain = {row["temperature"]: row["seconds"] for row in rows if row["way"] == "plain"}
    for row in rows:
        out = {"way": row["way"], "temperature": row["temperature"], "seconds": round(row["seconds"], 4)}
        if row["way"] != "plain":
            per_pass, length = row["tokens"] / row["passes"], row["drafted"] / row["passes"]
            low = min(int(length), len(cost) - 2)  # a pass over 1 + length tokens
            check = cost[low] + (length - low) * (cost[low + 1] - cost[low])
            out["guesses_per_pass"] = round(length, 3)
            out["alpha"] = round(row["accepted"] / max(1, row["tested"]), 3)
            out["tokens_per_pass"] = round(per_pass, 3)
            out["predicted"] = round(per_pass / (check + row["draft_passes"] / row["passes"] * guess), 3)
            out["speed_up"] = round(plain[row["temperature"]] / row["seconds"], 3)
        yield out


def expected(cost, guess):
    rows = []
    for alpha in (0.5, 0.6, 0.7, 0.8, 0.9):
        best = max(((1 - alpha ** (k + 1)) / ((1 - alpha) * (cost[k] + k * guess)), k) for k in range(1, len(cost)))
        rows.append({"alpha": alpha, "guesses": best[1], "speed_up": round(best[0], 2)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("figures", "model", "draft", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    for name, value in (("prompts", 5), ("tokens", 192), ("rounds", 9), ("windows", 60)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name in ("large", "small", "note"):
        parser.add_argument(f"--{name}", default="")
    given = parser.parse_args()
    texts = {}
    for folder in map(pathlib.Path, given.text):
        found = sorted(folder.glob("*.txt"), key=lambda path: (-path.stat().st_size, path.name))
        if not found:
            sys.exit(f"{folder}: no *.txt")
        texts[folder.name.replace("_held_out", "")] = found
    pairs = {"model": (given.model, given.draft, 400)}
    if given.large and given.small:
        pairs[pathlib.Path(given.large).stem] = (given.large, given.small, 15)
    costs = {}
    for name, (large, small, rounds) in pairs.items():
        passes = figures(given.figures, "passes", large, rounds)
        guesses = figures(given.figures, "passes", small, rounds)
        cost, guess = [row["of_one"] for row in passes], guesses[0]["seconds"] / passes[0]["seconds"]
        costs[name] = {"draft": pathlib.Path(small).stem, "seconds_of_one": passes[0]["seconds"],
                       "passes_over_1_to_9": [round(each, 3) for each in cost], "guess": round(guess, 3),
                       "expected": expected(cost, guess)}
    cost, guess = costs["model"]["passes_over_1_to_9"], costs["model"]["guess"]
    runs = {name: list(described(figures(given.figures, "runs", given.model, given.draft, given.tokens, given.rounds,
                                         *found[:given.prompts]), cost, guess)) for name, found in texts.items()}
    curves = {name: figures(given.figures, "curve", given.draft, given.model, given.windows, *found)
              for name, found in texts.items()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    head = {"command": "python3 tests/bench/ahead.py", "commit": commit, "note": given.note,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}; processor time of one thread"}
    shown = ("draft, 1 guess", "draft, 3 guesses", "draft, while all stand with 0.5", "look-up of 3, 4 guesses")
    ahead = {**head, "tokens": given.tokens, "rounds": given.rounds, "costs": costs, "runs": runs,
             "columns": ["text", "temperature", "way", "guesses that stand", "tokens a pass", "predicted", "measured"],
             "table": [[name, row["temperature"], row["way"], row["alpha"], row["tokens_per_pass"], row["predicted"],
                        row["speed_up"]] for name, rows in runs.items() for row in rows if row["way"] in shown]}
    columns = ["threshold"] + [f"{name}: {what}" for name in curves
                               for what in ("handed over", "top-1 as the large one's", "loss, nats")]
    fallback = {**head, "curves": curves, "columns": columns,
                "table": [[rows[0]["threshold"]] + [round(row[key], 3) for row in rows
                                                    for key in ("handed_over", "top1_as_large", "loss")]
                          for rows in list(zip(*(curve["rows"] for curve in curves.values())))[::2]]}
    for name, result in (("ahead", ahead), ("fallback", fallback)):
        (pathlib.Path(given.out) / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


main()
