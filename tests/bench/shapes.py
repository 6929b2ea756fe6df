#!/usr/bin/env python3
"""Time and memory of the verbs on published shapes (random weights, `pare new`): measured on few blocks, hours of the
whole model from the fixed part and the part of one block. Writes a JSON of which README.md shows the tables.

usage: shapes.py PARE SCRATCH OUT.json

A run's figures stay in SCRATCH/NAME.json and SCRATCH/NAME.err, so an interrupted measurement goes on where it was.
The limit of the cgroup needs a version 1 memory controller that may be written; without it that run has none."""
import json
import os
import pathlib
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

CALIBRATION = ["--random-tokens", "--samples", "32", "--context", "512"]
VERBS = {
    "quantize rtn": ["quantize", "--method", "rtn"],
    "quantize gptq, 32 x 512": ["quantize", *CALIBRATION],
    "prune wanda 2:4, 32 x 512": ["prune", "--method", "wanda", "--pattern", "2:4", *CALIBRATION],
}
SHAPES = {"SmolLM2-135M": 30, "Llama-3.2-1B": 16, "Llama-3.1-8B": 32}  # blocks of the whole model
RUNS = [  # name, shape, blocks of the folder, verb, --max-ram, blocks after which it is interrupted
    ("sm_rtn1", "SmolLM2-135M", 1, "quantize rtn", None, None),
    ("sm_rtn4", "SmolLM2-135M", 4, "quantize rtn", None, None),
    ("sm_gptq1", "SmolLM2-135M", 1, "quantize gptq, 32 x 512", None, None),
    ("sm_gptq4", "SmolLM2-135M", 4, "quantize gptq, 32 x 512", None, None),
    ("sm_wanda1", "SmolLM2-135M", 1, "prune wanda 2:4, 32 x 512", None, None),
    ("sm_wanda4", "SmolLM2-135M", 4, "prune wanda 2:4, 32 x 512", None, None),
    ("l_rtn4", "Llama-3.2-1B", 4, "quantize rtn", "4G", None),
    ("l_rtn8", "Llama-3.2-1B", 8, "quantize rtn", "4G", None),
    ("l_rtn16", "Llama-3.2-1B", 16, "quantize rtn", "4G", None),
    ("l_gptq16", "Llama-3.2-1B", 16, "quantize gptq, 32 x 512", None, None),
    ("l_wanda1", "Llama-3.2-1B", 1, "prune wanda 2:4, 32 x 512", "4G", None),
    ("e_rtn8", "Llama-3.1-8B", 8, "quantize rtn", "4G", None),
    ("e_gptq8", "Llama-3.1-8B", 8, "quantize gptq, 32 x 512", "4G", 1),
]
CGROUP = pathlib.Path("/sys/fs/cgroup/memory/pare")  # the last run above is made under this limit
CGROUP_LIMIT = 4 << 30


def head():
    return subprocess.run(["git", "-C", pathlib.Path(__file__).parent, "rev-parse", "--short", "HEAD"],
                          capture_output=True, text=True).stdout.strip()


def measure(name, command, scratch, stop_after, in_cgroup):
    """Peak anonymous and mapped memory by sampling, seconds and CPU seconds when each progress line came."""
    start = time.time()
    enter = None
    if in_cgroup:
        CGROUP.mkdir(exist_ok=True)
        (CGROUP / "memory.limit_in_bytes").write_text(str(CGROUP_LIMIT))
        enter = lambda: (CGROUP / "cgroup.procs").write_text(str(os.getpid()))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=enter)

    def read():
        with open(scratch / f"{name}.err", "w") as log:
            for line in process.stderr:
                try:
                    stat = open(f"/proc/{process.pid}/stat").read().rsplit(")", 1)[1].split()
                    cpu = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
                except OSError:
                    cpu = -1
                log.write(f"{time.time() - start:.1f} {cpu:.1f} {line}")
                log.flush()
                if stop_after and re.search(rf"\bblocks {stop_after}/", line):
                    process.send_signal(signal.SIGINT)

    reader = threading.Thread(target=read)
    reader.start()
    peaks = {"RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        try:
            for line in open(f"/proc/{process.pid}/status"):
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]))
        except OSError:
            pass
        time.sleep(0.02)
    reader.join()
    if process.returncode not in ([0, 130] if stop_after else [0]):
        sys.exit(f"{' '.join(command)}: exit {process.returncode}; see {scratch / name}.err")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {"rc": process.returncode, "anon_mib": peaks["RssAnon"] >> 10, "file_mib": peaks["RssFile"] >> 10,
               "max_mib": used.ru_maxrss >> 10, "wall": round(time.time() - start, 1),
               "cpu": round(used.ru_utime + used.ru_stime, 1), "commit": head()}
    if in_cgroup:
        (scratch / f"{name}.cgroup").write_text((CGROUP / "memory.max_usage_in_bytes").read_text())
    (scratch / f"{name}.json").write_text(json.dumps(figures))


def run_all(pare, scratch):
    for name, shape, blocks, verb, max_ram, stop_after in RUNS:
        if (scratch / f"{name}.json").exists():
            continue
        model, out = scratch / f"{shape}-{blocks}", scratch / "out"
        if not model.exists():
            subprocess.run([pare, "new", shape, "--layers", str(blocks), "--out", model], check=True)
        command = [str(pare), *VERBS[verb], "--model", str(model), "--out", str(out)]
        command += ["--max-ram", max_ram] if max_ram else []
        # A process of its own: its children's use is then that of this run alone.
        child = os.fork()
        if child == 0:
            measure(name, command, scratch, stop_after, bool(stop_after) and os.access(CGROUP.parent, os.W_OK))
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            sys.exit(f"{name} failed")
        for left in (out, pathlib.Path(f"{out}.partial")):
            shutil.rmtree(left, ignore_errors=True)


def cpu_after(scratch, name, stage):
    """{steps done: CPU seconds since the run began} from the stamps of a stage's progress lines."""
    after = {}
    for line in (scratch / f"{name}.err").read_text().splitlines():
        found = re.match(rf"\S+ (\S+) (?:{stage}) (\d+)/", line)
        if found and int(found.group(2)) not in after and float(found.group(1)) >= 0:
            after[int(found.group(2))] = float(found.group(1))
    return after


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    pare, scratch, out = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    scratch.mkdir(parents=True, exist_ok=True)
    run_all(pare, scratch)
    runs, linear = {}, {}
    for name, shape, blocks, verb, max_ram, stop_after in RUNS:
        figures = json.loads((scratch / f"{name}.json").read_text())
        figures |= {"shape": shape, "blocks": blocks, "verb": verb, "max_ram": max_ram, "interrupted_after": stop_after,
                    "cpu_after_blocks": cpu_after(scratch, name, "blocks|quantize"),
                    "cpu_after_measured": cpu_after(scratch, name, "measure")}
        if (scratch / f"{name}.cgroup").exists():
            figures["cgroup_limit_mib"] = CGROUP_LIMIT >> 20
            figures["cgroup_peak_mib"] = int((scratch / f"{name}.cgroup").read_text()) >> 20
        runs[name] = figures
        linear.setdefault((shape, verb), []).append(figures)
    table = []
    for (shape, verb), measured in linear.items():
        whole = SHAPES[shape]
        most = max(measured, key=lambda r: r["blocks"])
        if len(measured) > 1:  # least and most blocks
            least = min(measured, key=lambda r: r["blocks"])
            block = (most["cpu"] - least["cpu"]) / (most["blocks"] - least["blocks"])
            fixed = most["cpu"] - block * most["blocks"]
        elif max(most["cpu_after_blocks"]) > 1:  # from the end of the first block to that of the last
            stamps = most["cpu_after_blocks"]
            block = (stamps[max(stamps)] - stamps[1]) / (max(stamps) - 1)
            fixed = most["cpu"] - block * max(stamps)
        elif most["cpu_after_measured"]:  # one block, pruned and then measured in both models
            stamps = most["cpu_after_measured"]
            block = stamps[max(stamps)] - most["cpu_after_blocks"][0]
            fixed = most["cpu"] - block
        else:  # one block: the fixed part is that of rtn
            fixed = next(row[3] for row in table if row[:2] == [shape, "quantize rtn"])
            block = most["cpu"] - fixed
        seconds = fixed + block * whole
        made = most["interrupted_after"] or most["blocks"]
        table.append([shape, verb, made, round(fixed, 1), round(block, 2), round(seconds / 3600, 3),
                      "measured" if made == whole else "extrapolated",
                      max(r["anon_mib"] for r in measured), max(r["file_mib"] for r in measured)])
    out.write_text(json.dumps({
        "command": "python3 tests/bench/shapes.py build/pare SCRATCH tests/bench/results/shapes.json",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}", "runs": runs,
        "columns": ["shape", "verb", "blocks run", "fixed, CPU s", "a block, CPU s", "whole model, CPU hours", "",
                    "anonymous MiB", "mapped MiB"],
        "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
