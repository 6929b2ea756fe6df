#!/usr/bin/env python3
"""Other quantizers on the same model and calibration text, scored by the same evaluator on the same test text.

  python3 tests/bench/accuracy/peers.py --work out/accuracy --venv llmcompressor=/path/to/venv --only llmcompressor

Each peer runs outside this repository: the Python packages in virtual environments of their own (--venv NAME=DIR),
llama.cpp as the programs llama-quantize and llama-imatrix (--llama DIR) with the Python package gguf (--venv gguf=DIR).
Its result is brought to a plain float32 folder, the embedding is given this project's q8 codes as in all rows of the
harness, and the compact file is scored. Bits per weight: those of the peer's own layout for the block linears, q8 for
the embedding. What cannot run is written down with the reason. Results go to WORK/peers, where harness.py finds them.
The other options are the harness's: give the same ones, so that the text and the evaluation are the same.
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import harness
import rows

HERE = pathlib.Path(__file__).resolve().parent

# name -> the environment it runs in, the method of peer_worker.py or llama.cpp's type, and whether it is calibrated.
# `format`: the label in the tables, where it is not q4g32, whose layout costs the same bits.
PEERS = {
    "llm-compressor RTN": {"venv": "llmcompressor", "worker": "llmcompressor-rtn", "calibrated": False},
    "llm-compressor GPTQ": {"venv": "llmcompressor", "worker": "llmcompressor-gptq", "calibrated": True},
    "GPTQModel GPTQ": {"venv": "gptqmodel", "worker": "gptqmodel-gptq", "calibrated": True},
    "AutoRound": {"venv": "autoround", "worker": "autoround", "calibrated": True},
    "llama.cpp Q4_0": {"venv": "gguf", "llama": "q4_0", "calibrated": False},
    "llama.cpp Q4_0 imatrix": {"venv": "gguf", "llama": "q4_0", "calibrated": True},
    "llama.cpp Q4_K imatrix": {"venv": "gguf", "llama": "q4_K", "calibrated": True, "format": "Q4_K"},
}


class CannotRun(Exception):
    pass


def call(words, log, extra, place):
    """Runs another project's program in `place`, where it may leave files; its output goes into `log` and back."""
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, cwd=place,
                          env=dict(os.environ, **extra))
    log.append(done.stdout + done.stderr)
    if done.returncode != 0:
        tail = [line for line in (done.stdout + done.stderr).strip().splitlines() if line.strip()][-3:]
        raise CannotRun(f"{pathlib.Path(words[0]).name} {pathlib.Path(words[1]).name}: exit {done.returncode}: "
                        + " / ".join(tail)[-400:])
    return done.stdout


def python_of(given, name):
    found = given.venv.get(name)
    if not found:
        raise CannotRun(f"no environment: --venv {name}=DIR was not given")
    return pathlib.Path(found) / "bin" / "python"


def commands_of(peer, given, task, out):
    """The command lines of another project's programs, in order; the first word is what `programs` finds."""
    model, corpus, place = task["folder"], task["corpus"], out.parent
    if "worker" in peer:
        return [["python", HERE / "peer_worker.py", peer["worker"], model, corpus.calibration, out, "--samples",
                 given.samples, "--context", task["context"], "--seed", task["seed"], "--iters", given.iters]]
    source, quantized, words = place / "f32.gguf", place / "quantized.gguf", []
    imatrix = ["--imatrix", place / "imatrix.gguf"] if peer["calibrated"] else []
    if imatrix:
        words += [["python", HERE / "peer_gguf.py", "text", corpus.calibration, place / "calibration.txt", "--seed",
                   task["seed"]],
                  ["llama-imatrix", "-m", source, "-f", place / "calibration.txt", "-o", place / "imatrix.gguf", "-c",
                   task["context"], "--chunks", given.samples, "-t", 2, "-ngl", 0]]
    return words + [["llama-quantize", "--pure", "--token-embedding-type", "q8_0", *imatrix, source, quantized,
                     peer["llama"]],
                    ["python", HERE / "peer_gguf.py", "folder", quantized, model, out]]


def make(peer, given, task, out, log, program):
    """Runs them. Returns (versions, bits per block linear weight as the peer's file has them or None)."""
    if "llama" in peer and not given.llama:
        raise CannotRun("no programs: --llama DIR was not given")
    python = python_of(given, peer["venv"])
    if "llama" in peer:
        program.run(["export", task["folder"], "--to", "gguf", "--codec", "f32", "--out", out.parent / "f32.gguf"], [])
    # HF_HUB_OFFLINE: nothing is looked up. GPTQModel asks for at least two workers.
    extra = {"HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2", "TOKENIZERS_PARALLELISM": "false"}
    for words in commands_of(peer, given, task, out):
        shown = call([python if words[0] == "python" else given.llama / words[0], *words[1:]], log, extra, out.parent)
    result = json.loads(shown.strip().splitlines()[-1])
    if "worker" in peer:
        return result, None
    return {"llama.cpp": given.llama_version, "types": result["types"]}, result["bits"]


def run(bench, task, name, given):
    """One peer and seed: {model, format, method, seed, bits..., tests}."""
    peer, corpus = PEERS[name], task["corpus"]
    folder, key_parts = task["folder"], [name, task["hash"], harness.file_digest(corpus.calibration), given.samples]
    key = harness.digest(*key_parts, task["seed"], given.iters if name == "AutoRound" else None, given.llama_version)
    place = bench.work / "runs" / f"{key}-{os.getpid()}"
    file = place / "result.pare"
    made, log = bench.lookup("peer-" + key), []

    def subject():
        nonlocal made
        if file.is_file():
            return file
        place.mkdir(parents=True, exist_ok=True)
        out, began = place / "float", time.time()
        versions, linear_bits = make(peer, given, task, out, log, bench.program)
        seconds = time.time() - began
        commands = []
        bench.program.run(["quantize", "--model", out, "--out", place / "step-0", "--codec", "keep",
                           "--embedding-codec", "q8", "--method", "rtn"], commands)
        bench.program.run(["export", place / "step-0", "--to", "compact", "--out", file], commands)
        tensors = harness.compact_header(file)
        for tensor, entry in tensors.items():
            if ".layers." in tensor and len(entry["shape"]) == 2:
                entry["codec"] = "q4g32"
        everything, linears = harness.bits_per_weight(tensors)
        if linear_bits is not None:  # the file's own types
            weights = {t: e["shape"][0] * (e["shape"][1] if len(e["shape"]) > 1 else 1) for t, e in tensors.items()}
            own = sum(w for t, w in weights.items() if ".layers." in t and len(tensors[t]["shape"]) == 2)
            everything += (linear_bits - linears) * own / sum(weights.values())
            linears = linear_bits
        made = bench.store("peer-" + key, {"commands": commands, "seconds": seconds, "versions": versions,
                                           "bits_per_weight": everything, "bits_per_block_linear_weight": linears})
        return file

    try:
        original = bench.original(folder, task["hash"])
        tests = bench.evaluations("peer-" + key, corpus.tests, subject, original, task["context"])
        if made is None:
            subject()
    finally:
        if log:
            (bench.work / "peers").mkdir(parents=True, exist_ok=True)
            (bench.work / "peers" / f"{slug(name)}-{task['model']}-{task['seed']}.log").write_text("\n".join(log))
        shutil.rmtree(place, ignore_errors=True)
    bench.say(task | {"method": name}, tests, 0)
    commands = [harness.shown_command(words, bench.work) for words in commands_of(peer, given, task, place / "float")]
    return {"model": task["model"], "format": peer.get("format", "q4g32"), "method": name, "seed": task["seed"],
            "peer": True} | made | {"commands": commands + made["commands"], "tests": tests}


def slug(name):
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def main():
    parser = harness.options(__doc__)
    parser.add_argument("--venv", action="append", default=[], metavar="NAME=DIR", help="an environment of a peer")
    parser.add_argument("--llama", type=pathlib.Path, help="folder of llama-quantize and llama-imatrix")
    parser.add_argument("--llama-version", default="unknown", help="commit of llama.cpp, recorded")
    parser.add_argument("--only", help="only peers whose name this regular expression finds")
    parser.add_argument("--iters", type=int, default=200, help="AutoRound's steps a block [200, its default]")
    parser.set_defaults(models=["teacher"], seeds=1)
    given = parser.parse_args()
    given.venv = {name: os.path.abspath(place) for name, place in (entry.split("=", 1) for entry in given.venv)}
    given.llama = given.llama and given.llama.absolute()
    bench = harness.Bench(given, harness.Program(given.pare, max(1, (os.cpu_count() or 1)), given.work))
    given.rows, given.formats = "^$", ["q4g32"]
    names = harness.chosen(PEERS, given.only)
    bases, _ = harness.plan(bench, given, bases=True)
    for base in bases:
        bench.total += sum(given.seeds if PEERS[name]["calibrated"] else 1 for name in names)
    for base in bases:
        for name in names:
            for seed in range(given.seeds if PEERS[name]["calibrated"] else 1):
                task = base | {"format": "q4g32", "seed": seed}
                out = bench.work / "peers" / f"{slug(name)}-{base['model']}-{seed}.json"
                try:
                    harness.write_json(out, run(bench, task, name, given), indent=1)
                except (CannotRun, harness.Failed) as error:
                    reason = str(error).replace(str(bench.work), "WORK")
                    print(f"cannot run: {name}: {reason}", flush=True)
                    if not out.is_file():
                        absent = {"model": base["model"], "format": PEERS[name].get("format", "q4g32"),
                                  "method": name, "seed": seed, "absent": reason, "tests": {}}
                        harness.write_json(out, absent, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
