#!/usr/bin/env python3
"""Measures round-to-nearest and GPTQ on one model and writes one JSON file that README's table is checked against.

usage: quantize_table.py PARE NAME MODEL CALIBRATION HELD_OUT RESULT.json [--split S] [--samples N] [--max-windows N]
Every row: the same codec for all methods, three calibration seeds, KL and perplexity of the compact file by the
runtime that ships, on text no method has seen. Standard errors are the evaluator's, over documents.
"""
import argparse
import json
import pathlib
import platform
import subprocess
import tempfile

CODECS = ["q4g32", "q4g128"]
METHODS = ["rtn-absmax", "rtn", "gptq"]


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\nexit {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout)


def processor():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main():
    parser = argparse.ArgumentParser()
    for name in ["pare", "name", "model", "calibration", "held_out", "result"]:
        parser.add_argument(name)
    parser.add_argument("--split")
    parser.add_argument("--samples", default="64")
    parser.add_argument("--limit", default="60")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--codecs", nargs="+", default=CODECS)
    given = parser.parse_args()
    split = ["--split", given.split] if given.split else []
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for codec in given.codecs:
            for method in METHODS:
                for seed in range(given.seeds if method == "gptq" or method == "rtn" else 1):
                    folder, file = pathlib.Path(work, f"{codec}-{method}-{seed}"), pathlib.Path(work, f"{codec}-{method}-{seed}.pare")
                    run([given.pare, "quantize", "--json", "--quiet", "--model", given.model, "--out", folder, "--codec", codec,
                         "--method", method, "--text", given.calibration, "--samples", given.samples, "--seed", str(seed)] + split)
                    run([given.pare, "export", "--json", "--quiet", folder, "--to", "compact", "--out", file])
                    scored = run([given.pare, "eval", "--json", "--quiet", file, "--against", given.model, "--text", given.held_out,
                                  "--limit", given.limit] + split)
                    values = {row["metric"]: row for row in scored["rows"] if row["stage"] != "original" and row["after"] is not None}
                    rows.append({
                        "codec": codec, "method": method, "seed": seed,
                        "bits_per_weight": values["bits_per_weight"]["after"],
                        "mean_kl": values["mean_kl"]["after"], "mean_kl_stderr": values["mean_kl"]["stderr"],
                        "p999_kl": values["p999_kl"]["after"], "top1": values["top1_agreement"]["after"],
                        "perplexity": values["perplexity"]["after"], "perplexity_original": values["perplexity"]["before"],
                    })
                    print(rows[-1], flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    table = []
    for codec in given.codecs:
        for method in METHODS:
            mine = [row for row in rows if row["codec"] == codec and row["method"] == method]
            mean = lambda key: sum(row[key] for row in mine) / len(mine)
            table.append([codec, method, mean("bits_per_weight"), mean("mean_kl"), min(r["mean_kl"] for r in mine),
                          max(r["mean_kl"] for r in mine), mean("top1"), mean("perplexity")])
    pathlib.Path(given.result).write_text(json.dumps({
        "name": given.name,
        "command": "python3 tests/bench/quantize_table.py build/pare " + given.name + " ... --samples " + given.samples + " --limit " + given.limit,
        "commit": commit,
        "machine": f"{processor()}, {platform.system()} {platform.machine()}",
        "perplexity_original": rows[0]["perplexity_original"],
        "columns": ["codec", "method", "bits/weight", "mean KL", "KL min", "KL max", "top-1", "perplexity"],
        "table": table,
        "runs": rows,
    }, indent=1) + "\n")


if __name__ == "__main__":
    main()
