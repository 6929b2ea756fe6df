#!/usr/bin/env python3
"""Q4_0 files made from pare's codes beside llama-quantize's own, with and without its importance matrix: KL divergence
to the float32 file on text that none of them was made with, measured by llama-perplexity --kl-divergence.
Writes a results file.

usage: llama_perplexity.py BUILD --llama DIR --calibration FOLDER... --held-out FOLDER... --out FILE
                           [--model examples/teacher] [--presets fast balanced] [--tokens 25600] [--note TEXT]

BUILD: where `pare` is. DIR: a checkout of llama.cpp with a build in it. Both sides see --samples windows of --context
tokens of the same calibration text; embedding and head are Q8_0 in all files, the blocks' matrices Q4_0, which is checked
tensor by tensor: files differ in their codes and scales alone.
"""
import argparse
import json
import os
import pathlib
import platform
import random
import re
import struct
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))}: exit {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def joined(folder, characters, seed):
    """Whole documents of a folder in a random order, until there is enough."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        sys.exit(f"{folder}: no *.txt")
    random.Random(seed).shuffle(files)
    text = ""
    for file in files:
        if len(text) >= characters:
            break
        text += file.read_text(encoding="utf-8", errors="replace") + "\n"
    return text[:characters]


def tensor_types(path):
    """{name: (type, shape)} of a GGUF file, by its header alone."""
    data = pathlib.Path(path).read_bytes()
    at = 4

    def number(form):
        nonlocal at
        at += struct.calcsize(form)
        return struct.unpack_from("<" + form, data, at - struct.calcsize(form))[0]

    def text():
        nonlocal at
        size = number("Q")
        at += size
        return data[at - size:at].decode()

    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def skip(kind):
        nonlocal at
        if kind == 8:
            text()
        elif kind == 9:
            element, count = number("I"), number("Q")
            for _ in range(count):
                skip(element)
        else:
            at += sizes[kind]

    number("I")
    tensors, pairs = number("Q"), number("Q")
    for _ in range(pairs):
        text()
        skip(number("I"))
    found = {}
    for _ in range(tensors):
        name = text()
        shape = tuple(number("q") for _ in range(number("I")))
        found[name] = (number("I"), shape)
        number("Q")
    return found


def measured(*command):
    # Its summary goes through a thread of its own, which a busy machine may not let finish.
    for _ in range(5):
        output = run(*command)
        if "Same top p" in output and re.search(r"^Mean\s+KLD", output, re.M):
            break

    def one(label):
        found = re.search(rf"^{label}\s*:\s*([-+0-9.e]+)\s*±\s*([0-9.e]+)", output, re.M)
        if not found:
            sys.exit(f"llama-perplexity says nothing of {label}:\n{output[-2000:]}")
        return float(found.group(1)), float(found.group(2))

    kl, top, ratio = one(r"Mean\s+KLD"), one(r"Same top p"), one(r"Mean PPL\(Q\)/PPL\(base\)")
    return {"kl": kl[0], "kl_error": kl[1], "same_top_percent": top[0], "perplexity_ratio": ratio[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--llama", type=pathlib.Path, default=os.environ.get("PARE_LLAMA_CPP"))
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "examples/teacher")
    parser.add_argument("--calibration", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--presets", nargs="+", default=["fast", "balanced"])
    for name, value in (("samples", 128), ("context", 512), ("tokens", 25600), ("threads", 2), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    given = parser.parse_args()
    if given.llama is None:
        sys.exit("name a checkout of llama.cpp with a build in it in --llama or PARE_LLAMA_CPP")
    tool = given.llama / "build/bin"
    pare = given.build.resolve() / "pare"
    work = pathlib.Path(tempfile.mkdtemp(prefix="pare-kl-"))
    calibration = []
    for folder in given.calibration:
        calibration.append(work / f"{folder.name}.txt")
        calibration[-1].write_text(joined(folder, given.samples * given.context * 6 // len(given.calibration), given.seed))
    together = work / "calibration.txt"
    together.write_text("".join(file.read_text() for file in calibration))

    base = work / "base.gguf"
    run(pare, "export", given.model, "--to", "gguf", "--codec", "f32", "--out", base, "--quiet")
    tables = ["--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
    files = {}

    def quantized(name, kind, *options):
        files[name] = work / f"{len(files)}.gguf"
        run(tool / "llama-quantize", *tables, *options, base, files[name], kind, given.threads)

    quantized("llama-quantize Q8_0", "Q8_0")
    quantized("llama-quantize Q4_0", "Q4_0")
    matrix = work / "imatrix.gguf"
    run(tool / "llama-imatrix", "-m", base, "-f", together, "-o", matrix, "-c", given.context, "--chunks", given.samples,
        "-t", given.threads, "-ngl", 0)
    quantized("llama-quantize Q4_0 with imatrix", "Q4_0", "--imatrix", matrix)
    text = [part for file in calibration for part in ("--text", file)]
    for preset in given.presets:
        name = f"pare quantize --preset {preset}"
        folder = work / preset
        run(pare, "quantize", "--model", given.model, "--out", folder, "--codec", "q4", "--preset", preset, *text,
            "--samples", given.samples, "--context", given.context, "--seed", given.seed, "--quiet")
        files[name] = work / f"{preset}.gguf"
        run(pare, "export", folder, "--to", "gguf", "--out", files[name], "--quiet")
        ours, theirs = tensor_types(files[name]), tensor_types(files["llama-quantize Q4_0"])
        if ours != theirs:
            sys.exit(f"{name}: other types than llama-quantize: {sorted(set(ours.items()) ^ set(theirs.items()))[:6]}")

    rows = {name: {"file_bytes": file.stat().st_size} for name, file in files.items()}
    for folder in given.held_out:
        domain = folder.name.replace("_held_out", "")
        held_out, logits = work / f"{domain}-held-out.txt", work / f"{domain}.kld"
        held_out.write_text(joined(folder, given.tokens * 6, 1))
        window = 256
        common = ["-f", held_out, "-c", window, "-b", window, "--chunks", given.tokens // window, "-t", given.threads,
                  "-ngl", 0, "--kl-divergence-base", logits]
        run(tool / "llama-perplexity", "-m", base, *common)
        for name, file in files.items():
            rows[name][domain] = measured(tool / "llama-perplexity", "-m", file, *common, "--kl-divergence")
            print(name, domain, rows[name][domain], flush=True)
    domains = [folder.name.replace("_held_out", "") for folder in given.held_out]
    columns = ["blocks' matrices"] + [f"{d}: mean KL, nats" for d in domains] + [f"{d}: same top token, %" for d in domains]
    table = [[name] + [f"{row[d]['kl']:.5f} ± {row[d]['kl_error']:.5f}" for d in domains] +
             [f"{row[d]['same_top_percent']:.1f}" for d in domains] for name, row in rows.items()]

    def revision(folder):
        return run("git", "-C", folder, "rev-parse", "--short", "HEAD").strip()

    result = {"command": "python3 tests/bench/llama_perplexity.py", "commit": revision(ROOT),
              "llama_cpp": revision(given.llama), "note": given.note,
              "machine": f"{os.cpu_count()} cores, {platform.machine()}",
              "calibration": f"{given.samples} windows of {given.context} tokens, seed {given.seed}",
              "scored": f"the second halves of {given.tokens // 256} windows of 256 tokens of each text",
              "rows": rows, "columns": columns, "table": table}
    given.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
