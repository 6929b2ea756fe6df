#!/usr/bin/env python3
"""Time and memory of `pare quantize --preset balanced` beside other projects' GPTQ on the same folder, in turns.

  python3 tests/bench/accuracy/cost.py --pare build/pare --work out/cost --venv llmcompressor=DIR --venv gptqmodel=DIR

A model of a published shape with random weights (`pare new`), random calibration tokens, 4 bits in groups of 32. Of the
others the seconds of their quantizing call alone are counted, of pare the whole program; memory is the peak resident
size of the process. Ratios are of medians over the rounds.
"""
import argparse
import datetime
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import time

import harness

HERE = pathlib.Path(__file__).resolve().parent
PEERS = {"llmcompressor": ("llm-compressor GPTQ", "llmcompressor-gptq"), "gptqmodel": ("GPTQModel GPTQ", "gptqmodel-gptq")}


def run(words, environment=None, folder=None):
    """(stdout, seconds, CPU seconds, peak bytes) of a program and all that it starts."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    child = subprocess.Popen([str(w) for w in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=dict(os.environ, **(environment or {})), cwd=folder)
    out, err = child.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))}: exit {child.returncode}\n{err[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return out, time.time() - began, cpu


def ours(given, folder, seed):
    out = given.work / "quantized"
    shutil.rmtree(out, ignore_errors=True)
    words = [given.pare, "quantize", "--quiet", "--model", folder, "--out", out, "--preset", "balanced", "--codec", "q4",
             "--random-tokens", "--samples", given.samples, "--context", given.context, "--seed", seed]
    # GNU time: the peak of this process alone.
    note = given.work / "peak"
    _, seconds, cpu = run(["/usr/bin/time", "-f", "%M", "-o", note, *words])
    shutil.rmtree(out)
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": int(note.read_text().split()[-1]) * 1024}


def theirs(given, venv, worker, folder, seed):
    words = [pathlib.Path(venv).absolute() / "bin" / "python", HERE / "peer_worker.py", worker, folder.absolute(),
             "random", "none", "--samples", given.samples, "--context", given.context, "--seed", seed]
    out, seconds, cpu = run(words, {"HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2", "TOKENIZERS_PARALLELISM": "false"},
                            given.work)  # where they leave logs
    found = json.loads(out.strip().splitlines()[-1])
    return {"seconds": found.pop("seconds"), "cpu_seconds": cpu, "program_seconds": seconds,
            "peak_bytes": found.pop("peak_bytes"), "versions": found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pare", type=pathlib.Path, default=harness.ROOT / "build" / "pare")
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--venv", action="append", default=[], metavar="NAME=DIR", help="llmcompressor, gptqmodel")
    parser.add_argument("--shape", default="SmolLM2-135M")
    parser.add_argument("--layers", type=int, help="blocks, where not all of the shape's")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=harness.ROOT / "../shared/tokenizers/llama2",
                        help="folder of one that fits the vocabulary: llm-compressor will not start without")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--publish", action="store_true", help="write tests/bench/results/accuracy_cost.json")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    venvs = dict(entry.split("=", 1) for entry in given.venv)
    folder = given.work / f"{given.shape}-{given.layers or 'all'}"
    if not folder.is_dir():
        layers = ["--layers", given.layers] if given.layers else []
        run([given.pare, "new", given.shape, "--out", folder, "--tokenizer", given.tokenizer, *layers])
    programs = {"pare balanced": lambda seed: ours(given, folder, seed)}
    for name, venv in venvs.items():
        label, worker = PEERS[name]
        programs[label] = lambda seed, venv=venv, worker=worker: theirs(given, venv, worker, folder, seed)
    runs = {name: [] for name in programs}
    for seed in range(given.rounds):
        for name, program in programs.items():
            runs[name].append(program(seed))
            found = runs[name][-1]
            print(f"{name}: {found['seconds']:.0f} s, {found['cpu_seconds']:.0f} CPU s, "
                  f"{found['peak_bytes'] / 2**20:.0f} MiB", flush=True)
    median = {name: {key: statistics.median(r[key] for r in rows) for key in ("seconds", "cpu_seconds", "peak_bytes")}
              for name, rows in runs.items()}
    base = median["pare balanced"]
    ratios = {name: {key: values[key] / base[key] for key in values} for name, values in median.items()}
    result = {"shape": given.shape, "layers": given.layers, "samples": given.samples, "context": given.context,
              "machine": harness.machine(), "commit": harness.commit(), "date": datetime.date.today().isoformat(),
              "runs": runs, "median": median, "times_pare": ratios}
    harness.write_json(given.work / "cost.json", result, indent=1)
    if given.publish:
        harness.write_json(harness.RESULTS / "accuracy_cost.json", result, indent=1)
    for name, values in ratios.items():
        print(f"{name}: {values['seconds']:.2f} x the time, {values['cpu_seconds']:.2f} x the CPU time, "
              f"{values['peak_bytes']:.2f} x the memory")
    return 0


if __name__ == "__main__":
    sys.exit(main())
