#!/usr/bin/env python3
"""How much faster two ranks train than one: one rank on core 0, two ranks on cores 0 and 1 with the same command, and two
independent processes on these cores at once, which is what the machine itself allows. Alternating rounds. Writes the
JSON of which README.md shows the table.

usage: ranks.py PARE SCRATCH OUT.json MODEL TEXT
ROUNDS (5), STEPS (12), CASES (a regular expression)."""
import json
import os
import pathlib
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
CASES = {"train f32": ["train", "--precision", "f32"], "train bf16": ["train", "--precision", "bf16"],
         "distill f32": ["distill", "--precision", "f32"]}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(pare, case, model, text, out, core, steps, environment):
    shutil.rmtree(out, ignore_errors=True)
    command = ["taskset", "-c", str(core), pare, *CASES[case], "--model", model, "--text", text, "--steps", str(steps),
               "--batch", "16", "--context", "512", "--lr", "1e-4", "--out", str(out), "--json", "-q", "--threads", "1"]
    if case.startswith("distill"):
        command += ["--teacher", model]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def rate(process):
    out, errors = process.communicate()
    if process.returncode != 0:
        sys.exit(errors)
    return json.loads(out)["result"]["tokens_per_second"] if out.strip() else None


def main():
    pare, scratch, target, model, text = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), *sys.argv[4:6]
    rounds, steps = int(os.environ.get("ROUNDS", "5")), int(os.environ.get("STEPS", "12"))
    scratch.mkdir(parents=True, exist_ok=True)
    rows, loads = {}, []
    for _ in range(rounds):
        for case in CASES:
            if not re.search(os.environ.get("CASES", ""), case):
                continue
            loads.append(os.getloadavg()[0])
            one = rate(start(pare, case, model, text, scratch / "one", 0, steps, {}))
            port = str(free_port())
            both = [start(pare, case, model, text, scratch / "two", r, steps,
                          {"RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
                    for r in (0, 1)]
            two = [rate(p) for p in both][0]
            apart = sum(rate(p) for p in [start(pare, case, model, text, scratch / f"apart{r}", r, steps, {}) for r in (0, 1)])
            rows.setdefault(case, []).append({"one": one, "two": two, "independent": apart})
            print(case, rows[case][-1], f"scaling {two / one / 2:.3f} load {loads[-1]:.2f}", flush=True)
    table = []
    for case, tries in rows.items():
        median = lambda f: statistics.median(map(f, tries))
        table.append([case, round(median(lambda t: t["one"])), round(median(lambda t: t["two"])),
                      round(median(lambda t: t["two"] / t["one"] / 2), 3),
                      round(median(lambda t: t["independent"] / t["one"] / 2), 3)])
    commit = subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {"command": "tests/bench/ranks.py", "commit": commit, "rounds": rounds, "steps": steps,
              "machine": {"cpu": next((line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), ""),
                          "cores": os.cpu_count(), "kernel": platform.release(), "nice": os.getpriority(os.PRIO_PROCESS, 0),
                          "autogroup": pathlib.Path("/proc/self/autogroup").read_text().strip().split(" ", 1)[-1],
                          "load_before_each_round": [round(value, 2) for value in loads]},
              "columns": ["task", "one rank, tokens/s", "two ranks, tokens/s", "of linear",
                          "two independent processes, of linear"],
              "table": table, "measured": rows}
    target.write_text(json.dumps(result, indent=1) + "\n")


main()
