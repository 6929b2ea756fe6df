#!/usr/bin/env python3
"""Widths of their own against one width for all: the tiny teacher cut to the same number of parameters with and without
--per-layer, several seeds (they choose the calibration windows), divergence from the teacher on held-out text.

  tests/bench/per_layer.py PARE TEACHER TEXTS OUT.json [--seeds 3] [--samples N] [--windows N] [--shapes NAME ...]

TEXTS: the folder that examples/teacher/make_text.sh writes.
"""
import argparse
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

SHAPES = {"192 of 256 neurons": ["--ffn", "192"], "160 of 256 neurons": ["--ffn", "160"],
          "128 of 256 neurons": ["--ffn", "128"]}
ARMS = {"one width": [], "per layer": ["--per-layer"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("pare", "teacher", "texts", "out"):
        parser.add_argument(name)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    args = parser.parse_args()
    texts = pathlib.Path(args.texts)

    def pare(*options):
        done = subprocess.run([args.pare, *map(str, options), "--json", "--quiet"], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"pare {' '.join(map(str, options))} ended with {done.returncode}: {done.stderr[-800:]}")
        return json.loads(done.stdout)

    runs = []
    with tempfile.TemporaryDirectory() as work:
        out = pathlib.Path(work) / "cut"
        for name in args.shapes:
            for seed in range(1, args.seeds + 1):
                for arm, options in ARMS.items():
                    shutil.rmtree(out, ignore_errors=True)
                    result = pare("prune", "--model", args.teacher, "--out", out, "--method", "shape", *SHAPES[name],
                                  *options, "--multiple-of", 16, "--text", texts / "manual", "--text",
                                  texts / "novels_sample", "--samples", args.samples, "--seed", seed)["result"]
                    run = {"shape": name, "arm": arm, "seed": seed, "parameters": result["parameters"],
                           "neurons": json.loads((out / "config.json").read_text())["intermediate_size"]}
                    for text in ("manual", "novels"):
                        rows = pare("eval", out, "--against", args.teacher, "--text", texts / f"{text}_held_out",
                                    "--ctx", 512, "--limit", args.windows)["rows"]
                        run[text] = next(row["after"] for row in rows if row["metric"] == "mean_kl")
                    runs.append(run)
                    print(json.dumps(run), flush=True)
    table = []
    for name in args.shapes:
        for arm in ARMS:
            of = [run for run in runs if run["shape"] == name and run["arm"] == arm]
            row = [name, arm, of[0]["parameters"]]
            for text in ("manual", "novels"):
                values = [run[text] for run in of]
                row += [statistics.fmean(values),
                        statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else "one seed"]
            table.append(row)
            print(row)
    folder = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    machine = next((l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "unknown")
    result = {"benchmark": "per_layer", "command": "tests/bench/per_layer.py build/pare examples/teacher TEXTS OUT.json "
              f"--seeds {args.seeds} --samples {args.samples} --windows {args.windows}",
              "commit": git.stdout.strip() or "unknown", "machine": machine,
              "columns": ["cut to a mean of", "widths", "parameters", "manual: KL to the teacher", "over seeds",
                          "novels: KL to the teacher", "over seeds"],
              "table": table, "runs": runs}
    pathlib.Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
