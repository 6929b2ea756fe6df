#!/usr/bin/env python3
"""What --activation-checkpointing saves and costs: the same training steps of a published shape with random weights, with
and without; processor time, peak memory, and whether the bytes are equal.

  tests/bench/activation_checkpointing.py PARE TEXT OUT.json [--shape SmolLM2-135M] [--batch 8] [--steps 4]

PARE is the full program; one thread. TEXT: a file of at least --batch times 512 tokens.
"""
import argparse
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile

root = pathlib.Path(__file__).resolve().parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("pare", "text", "out"):
        parser.add_argument(name)
    parser.add_argument("--shape", default="SmolLM2-135M")
    parser.add_argument("--batch", default="8")
    parser.add_argument("--steps", default="4")
    args = parser.parse_args()
    table, hashes = [], set()
    with tempfile.TemporaryDirectory() as work:
        tokenizer, model = os.path.join(work, "tokenizer"), os.path.join(work, "model")
        os.mkdir(tokenizer)
        shutil.copy(root / "tests/golden/tokenizers/smollm.json", os.path.join(tokenizer, "tokenizer.json"))
        subprocess.run([args.pare, "new", args.shape, "--tokenizer", tokenizer, "--out", model, "--quiet"],
                       check=True, stdout=subprocess.DEVNULL)
        for name, more in (("kept", []), ("computed again", ["--activation-checkpointing"])):
            out = os.path.join(work, name)
            command = [args.pare, "train", "--model", model, "--out", out, "--text", args.text, "--steps", args.steps,
                       "--batch", args.batch, "--micro-batch", args.batch, "--context", "512", "--threads", "1", "--json",
                       "--quiet", *more]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)
            if os.waitstatus_to_exitcode(status) != 0:
                raise SystemExit(f"exit {os.waitstatus_to_exitcode(status)}: {' '.join(command)}")
            hashes.add(hashlib.sha256(pathlib.Path(out, "model.safetensors").read_bytes()).hexdigest())
            table.append([name, round(used.ru_maxrss / 1024), round(used.ru_utime + used.ru_stime, 1)])
            print(table[-1], flush=True)
    if len(hashes) != 1:
        raise SystemExit("the trained weights differ")
    with open("/proc/cpuinfo") as file:
        machine = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    result = {"benchmark": "activation checkpointing",
              "command": f"tests/bench/activation_checkpointing.py build/pare TEXT OUT.json --shape {args.shape} "
                         f"--batch {args.batch} --steps {args.steps}",
              "columns": ["inside of blocks", "peak memory, MB", "processor time, s"], "table": table,
              "commit": commit.strip() or "unknown", "machine": machine}
    with open(args.out, "w") as file:
        file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
