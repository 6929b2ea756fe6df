#!/usr/bin/env python3
"""Removing a third of the parameters, learning from the original and rounding to int4, against rounding alone to int4,
int3 and int2: bytes of the compact file, KL to the original and held-out loss on two texts.

  tests/bench/chain.py PARE TEACHER STUDENT TEXTS OUT.json WORK [--seeds N] [--tuned N]

STUDENT: the folder that structure.py left, distilled from TEACHER. TEXTS: what examples/teacher/make_text.sh writes.
Every arm is `quantize --preset balanced` on the training part of both texts, with one seed of calibration after the
other; arms named "tuned" follow the original's KL for N steps more, codes and scales, with the first seed alone.
Intervals are 95 %, by a bootstrap over held-out windows of 512 tokens, differences over the same windows and seeds;
they do not cover the choice of the seed. What WORK holds is not made again.
"""
import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys

# model, codec of the blocks, of the embedding, tuned
ARMS = {
    "int4": ("teacher", "q4", "q8", False),
    "int4, groups of 128, embedding int4": ("teacher", "q4g128", "q4g128", False),
    "int4, groups of 128, embedding int4, tuned": ("teacher", "q4g128", "q4g128", True),
    "int3": ("teacher", "q3", "q8", False),
    "int3, groups of 128": ("teacher", "q3g128", "q8", False),
    "int3, groups of 128, tuned": ("teacher", "q3g128", "q8", True),
    "int3, embedding int4": ("teacher", "q3", "q4", False),
    "int3, embedding int4, tuned": ("teacher", "q3", "q4", True),
    "int2": ("teacher", "q2", "q8", False),
    "int2, tuned": ("teacher", "q2", "q8", True),
    "int2, embedding int4": ("teacher", "q2", "q4", False),
    "pruned, int8": ("student", "q8", "q8", False),
    "pruned, int4": ("student", "q4", "q8", False),
    "pruned, int4, tuned": ("student", "q4", "q8", True),
    "pruned, int4, embedding int4": ("student", "q4", "q4", False),
    "pruned, int4, embedding int4, tuned": ("student", "q4", "q4", True),
    "pruned, int3": ("student", "q3", "q8", False),
    "pruned, int3, embedding int4": ("student", "q3", "q4", False),
}


def interval(values, weights, rounds=2000):
    """Mean of values summed over windows by predictions, with the middle 95 % of its bootstrap."""
    chance = random.Random(0)
    n, means = len(values), []
    for _ in range(rounds):
        picked = chance.choices(range(n), k=n)
        means.append(sum(values[i] for i in picked) / sum(weights[i] for i in picked))
    means.sort()
    return sum(values) / sum(weights), means[round(rounds * 0.025)], means[round(rounds * 0.975) - 1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pare", "teacher", "student", "texts", "out", "work"):
        parser.add_argument(name, type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tuned", type=int, default=300, help="steps over the codes; a third as many over scales alone")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=48, help="held-out windows of each text")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)

    def pare(*words):
        done = subprocess.run([str(w) for w in (given.pare, *words, "--json", "--quiet")], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"pare {' '.join(map(str, words))}: exit {done.returncode}\n{done.stderr[-1000:]}")
        return json.loads(done.stdout)["result"]

    def made(arm, seed):
        subject, codec, embedding, tuned = ARMS[arm]
        name = f"{arm.replace(', ', '_').replace(' ', '-')}.{seed}"
        folder, file = given.work / name, given.work / f"{name}.pare"
        if not folder.exists():
            pare("quantize", "--model", given.student if subject == "student" else given.teacher, "--out", folder,
                 "--preset", "balanced", "--codec", codec, "--embedding-codec", embedding, "--samples", given.samples,
                 "--text", given.texts / "manual", "--text", given.texts / "novels_sample", "--seed", seed,
                 *(("--tune-codes", given.tuned, "--tune", given.tuned // 3) if tuned else ()))
        if not file.exists():
            pare("export", folder, "--to", "compact", "--out", file)
        return file

    def scored(file, text):
        cache = given.work / f"{file.stem}.{text}.json"
        if not cache.exists():
            found = pare("eval", file, "--against", given.teacher, "--text", given.texts / f"{text}_held_out", "--ctx", 512,
                         "--limit", given.windows, "--per", "window", "--no-speed")["text"]["per_window"]
            cache.write_text(json.dumps([{key: window[key] for key in ("predictions", "original_loss", "compressed_loss",
                                                                       "kl", "same_top1")} for window in found]))
        return json.loads(cache.read_text())

    settings = {name: str(getattr(given, name)) for name in ("teacher", "student", "texts", "tuned", "samples", "windows")}
    record = given.work / "settings.json"
    if record.exists() and json.loads(record.read_text()) != settings:
        sys.exit(f"{record}: made with other settings; name another WORK")
    record.write_text(json.dumps(settings))

    runs = {}
    for seed in range(1, given.seeds + 1):
        for arm in ARMS:
            if ARMS[arm][3] and seed > 1:
                continue
            file = made(arm, seed)
            run = runs.setdefault(arm, {"bytes": file.stat().st_size, "seeds": []})
            run["seeds"].append({text: scored(file, text) for text in ("manual", "novels")})
            means = [sum(w["kl"] for w in windows) / sum(w["predictions"] for w in windows)
                     for windows in run["seeds"][-1].values()]
            print(f"seed {seed} {arm}: {run['bytes']} bytes, KL {means[0]:.4f} {means[1]:.4f}", flush=True)

    def of(run, text, key, seeds=None):
        """By window, mean over the first seeds; windows are the same in every run."""
        chosen = run["seeds"][:seeds]
        return [statistics.fmean(seed[text][i][key] for seed in chosen) for i in range(len(chosen[0][text]))]

    table = []
    for arm, run in sorted(runs.items(), key=lambda item: -item[1]["bytes"]):
        cells = [arm, run["bytes"], len(run["seeds"])]
        for text in ("manual", "novels"):
            weights = of(run, text, "predictions")
            mean, low, high = run[f"kl_{text}"] = interval(of(run, text, "kl"), weights)
            lost = [a - b for a, b in zip(of(run, text, "compressed_loss"), of(run, text, "original_loss"))]
            run[f"loss_{text}"] = interval(lost, weights)
            cells += [f"{mean:.4f}", f"{low:.4f} to {high:.4f}", f"{run[f'loss_{text}'][0]:+.4f}"]
        # On the front: no file of at most these bytes is closer to the original, on either text.
        cells.append("")
        table.append(cells)
    for cells in table:
        run = runs[cells[0]]
        ahead = [other for other in runs.values() if other is not run and other["bytes"] <= run["bytes"]]
        best = [text for text in ("manual", "novels") if all(o[f"kl_{text}"][0] >= run[f"kl_{text}"][0] for o in ahead)]
        cells[-1] = "both" if len(best) == 2 else best[0] if best else ""

    # Pairs of about the same bytes, window by window.
    pairs = []
    for arm, run in runs.items():
        if ARMS[arm][0] != "student":
            continue
        for other, rival in runs.items():
            alike = ARMS[other][3] == ARMS[arm][3]
            if ARMS[other][0] != "teacher" or not alike or abs(rival["bytes"] / run["bytes"] - 1) > 0.06:
                continue
            seeds = min(len(run["seeds"]), len(rival["seeds"]))
            pair = {"pruned": arm, "alone": other, "bytes": [run["bytes"], rival["bytes"]], "seeds": seeds}
            for text in ("manual", "novels"):
                difference = [a - b for a, b in zip(of(run, text, "kl", seeds), of(rival, text, "kl", seeds))]
                pair[text] = interval(difference, of(run, text, "predictions"))
            pairs.append(pair)
            print(json.dumps(pair), flush=True)
    for run in runs.values():
        run["by_seed"] = [{text: sum(w["kl"] for w in windows) / sum(w["predictions"] for w in windows)
                           for text, windows in seed.items()} for seed in run.pop("seeds")]
    root = pathlib.Path(__file__).resolve().parents[2]
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    with open("/proc/cpuinfo") as file:
        machine = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    result = {"benchmark": "chain",
              "command": f"tests/bench/chain.py build/pare {given.teacher} STUDENT TEXTS OUT.json WORK --seeds {given.seeds} "
                         f"--tuned {given.tuned} --samples {given.samples} --windows {given.windows}",
              "commit": commit.stdout.strip() or "unknown", "machine": machine,
              "columns": ["file", "bytes", "seeds", "KL, manual", "95 %", "loss more, manual", "KL, novels", "95 %",
                          "loss more, novels", "on the front"],
              "table": table, "pairs": pairs, "runs": runs}
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
