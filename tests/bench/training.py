#!/usr/bin/env python3
"""Tokens/s and peak memory of training and distillation: pare built on one LibTorch or several, beside the same model in
PyTorch's Python, one after the other in alternating rounds. Writes the JSON of which README.md shows the table.

usage: training.py SCRATCH OUT.json TEXT PYTHON PARE=LABEL [PARE=LABEL ...]
  TEXT    a file of English text
  PYTHON  an interpreter with torch and transformers
  PARE    a pare program and the LibTorch it was built on, such as build/pare=2.13
ROUNDS (3), THREADS (all cores), CASES (a regular expression of task, precision and shape), STEPS (as the shape has).

pare's rate is of steps that follow its start, as it reports them; of PyTorch the first quarter of the steps is left out,
and the better of two sizes of micro-batch counts: the whole batch, and as many sequences as pare takes at a time."""
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 64}
SHAPES = {"1.7 M": ({}, 16, 512, 20), "26 M": (SMALL, 8, 512, 6)}  # changes to the tiny teacher, batch, context, steps
CASES = [(task, precision, shape) for shape in SHAPES for task, precision in
         (("train", "f32"), ("train", "bf16"), ("distill", "f32"))]


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def shape_folder(scratch, name, pare):
    folder = scratch / name.replace(" ", "")
    if (folder / "model.safetensors").exists():
        return folder
    config = json.loads((ROOT / "examples/teacher/architecture.json").read_text()) | SHAPES[name][0]
    file = scratch / "config.json"
    file.write_text(json.dumps(config))
    text = scratch / "few.txt"
    text.write_text("a few words to begin with, and a few more of them. " * 40)
    run([pare, "train", "--config", file, "--tokenizer", ROOT / "examples/teacher", "--text", text, "--steps", "1",
         "--batch", "1", "--context", "64", "--lr", "1e-6", "--out", folder, "--json", "-q"])
    return folder


def ours(pare, task, precision, folder, text, batch, context, steps, threads, scratch):
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [pare, task, "--model", folder, "--text", text, "--steps", str(steps), "--batch", str(batch), "--context",
               str(context), "--lr", "1e-4", "--precision", precision, "--out", out, "--json", "-q", "--threads", threads]
    if task == "distill":
        command += ["--teacher", folder]
    with open(scratch / "ours.json", "w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.PIPE)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{command}\n{process.stderr.read().decode()}")
    result = json.loads((scratch / "ours.json").read_text())["result"]
    return {"tokens_per_second": result["tokens_per_second"], "peak_bytes": usage.ru_maxrss * 1024}


def theirs(python, task, precision, folder, text, batch, context, steps, threads):
    micro = max(1, min(batch, 4096 // context))
    tries = [run(list(map(str, [python, HERE / "training_torch.py", task, precision, folder, text, batch, context, m, steps,
                                threads]))) for m in sorted({micro, batch})]
    return max(tries, key=lambda t: t["tokens_per_second"])


def main():
    scratch, out, text, python = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    builds = dict(reversed(argument.rsplit("=", 1)) for argument in sys.argv[5:])
    rounds, threads = int(os.environ.get("ROUNDS", "3")), os.environ.get("THREADS", str(os.cpu_count()))
    scratch.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    measured, loads = {}, []
    for number in range(rounds):
        for task, precision, shape in CASES:
            case = f"{task} {precision} {shape}"
            if not re.search(os.environ.get("CASES", ""), case):
                continue
            folder = shape_folder(scratch, shape, next(iter(builds.values())))
            _, batch, context, steps = SHAPES[shape]
            steps = int(os.environ.get("STEPS", steps))
            rows = measured.setdefault(case, {})
            programs = [(f"pare, LibTorch {label}", lambda p=p: ours(p, task, precision, folder, text, batch, context, steps,
                                                                     threads, scratch)) for label, p in builds.items()]
            programs.append(("PyTorch", lambda: theirs(python, task, precision, folder, text, batch, context, steps, threads)))
            for name, program in programs if number % 2 == 0 else reversed(programs):
                loads.append(os.getloadavg()[0])
                row = program()
                rows.setdefault(name, []).append(row)
                print(case, name, row, f"load {loads[-1]:.2f}", flush=True)
    table = []
    for case, rows in measured.items():
        for name, tries in rows.items():
            rate = statistics.median(t["tokens_per_second"] for t in tries)
            beside = statistics.median(t["tokens_per_second"] / p["tokens_per_second"] for t, p in zip(tries, rows["PyTorch"]))
            table.append([case, name, round(rate), round(beside, 3),
                          round(max(t["peak_bytes"] for t in tries) / 1e6)])
    result = {"command": "tests/bench/training.py", "commit": commit,
              "machine": {"cpu": next((line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), ""),
                          "cores": os.cpu_count(), "threads": int(threads), "kernel": platform.release(), "nice": os.getpriority(os.PRIO_PROCESS, 0),
                          "autogroup": pathlib.Path("/proc/self/autogroup").read_text().strip().split(" ", 1)[-1],
                          "load_before_each_run": [round(value, 2) for value in loads]},
              "rounds": rounds, "shapes": {name: {"batch": s[1], "context": s[2], "steps": s[3]} for name, s in SHAPES.items()},
              "columns": ["task, precision, parameters", "program", "tokens/s", "of PyTorch's", "peak memory, MB"],
              "table": table, "measured": measured}
    out.write_text(json.dumps(result, indent=1) + "\n")


main()
