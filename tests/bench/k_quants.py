#!/usr/bin/env python3
"""K-quants that `pare export` writes beside llama-quantize's of the same types, tensor by tensor, with and without the same
importances of llama-imatrix: KL divergence to the float32 file on held-out text, by llama-perplexity --kl-divergence.
Writes a results file.

usage: k_quants.py PROGRAM --llama DIR --calibration FOLDER... --held-out FOLDER... --out FILE
                   [--model examples/teacher] [--types q2_k ...] [--tokens 12800] [--note TEXT]

PROGRAM: pare or pare-edge. DIR: a checkout of llama.cpp with a build in it. What pare puts where rows are no multiples of 256
is asked of llama-quantize too; that both files have the same types is checked.
"""
import argparse
import json
import os
import pathlib
import platform
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from llama_perplexity import ROOT, joined, measured, run, tensor_types  # noqa: E402

FTYPES = {"q2_k": "Q2_K", "q3_k": "Q3_K_S", "q4_k": "Q4_K_S", "q5_k": "Q5_K_S", "q6_k": "Q6_K"}
NUMBERS = {0: "f32", 2: "q4_0", 3: "q4_1", 7: "q5_1", 8: "q8_0", 10: "q2_k", 11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=pathlib.Path)
    parser.add_argument("--llama", type=pathlib.Path, default=os.environ.get("PARE_LLAMA_CPP"))
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "examples/teacher")
    parser.add_argument("--calibration", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--types", nargs="+", default=list(FTYPES), choices=list(FTYPES))
    for name, value in (("samples", 128), ("context", 512), ("tokens", 12800), ("threads", 2), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    given = parser.parse_args()
    if given.llama is None:
        sys.exit("name a checkout of llama.cpp with a build in it in --llama or PARE_LLAMA_CPP")
    tool, pare = given.llama / "build/bin", given.program.resolve()
    with tempfile.TemporaryDirectory(prefix="pare-k-") as scratch:
        work = pathlib.Path(scratch)
        base, matrix, calibration = work / "base.gguf", work / "imatrix.gguf", work / "calibration.txt"
        run(pare, "export", given.model, "--to", "gguf", "--codec", "f32", "--out", base, "--quiet")
        calibration.write_text("".join(joined(folder, given.samples * given.context * 6 // len(given.calibration), given.seed)
                                       for folder in given.calibration))
        run(tool / "llama-imatrix", "-m", base, "-f", calibration, "-o", matrix, "-c", given.context, "--chunks",
            given.samples, "-t", given.threads, "-ngl", 0)
        files = {}
        for kind in given.types:
            for importances in (False, True):
                ours, theirs = work / f"ours-{kind}-{importances}.gguf", work / f"theirs-{kind}-{importances}.gguf"
                run(pare, "export", given.model, "--to", "gguf", "--codec", kind, "--out", ours, "--quiet",
                    *(["--imatrix", matrix] if importances else []))
                others = sorted({(name.split(".")[2], NUMBERS[type_]) for name, (type_, shape) in tensor_types(ours).items()
                                 if len(shape) > 1 and NUMBERS[type_] != kind})
                run(tool / "llama-quantize", "--pure", *(["--imatrix", matrix] if importances else []),
                    *[word for name, type_ in others for word in ("--tensor-type", f"{name}={type_}")], base, theirs,
                    FTYPES[kind], given.threads)
                if tensor_types(ours) != tensor_types(theirs):
                    sys.exit(f"{kind}: {sorted(set(tensor_types(ours).items()) ^ set(tensor_types(theirs).items()))[:6]}")
                files[kind, "llama-quantize", importances] = theirs
                files[kind, "pare export", importances] = ours
        rows = {key: {"file_bytes": file.stat().st_size} for key, file in files.items()}
        for folder in given.held_out:
            domain = folder.name.replace("_held_out", "")
            held_out, logits = work / f"{domain}.txt", work / f"{domain}.kld"
            held_out.write_text(joined(folder, given.tokens * 6, 1))
            common = ["-f", held_out, "-c", 256, "-b", 256, "--chunks", given.tokens // 256, "-t", given.threads, "-ngl", 0,
                      "--kl-divergence-base", logits]
            run(tool / "llama-perplexity", "-m", base, *common)
            for key, file in files.items():
                rows[key][domain] = measured(tool / "llama-perplexity", "-m", file, *common, "--kl-divergence")
                print(*key, domain, rows[key][domain], flush=True)
    domains = [folder.name.replace("_held_out", "") for folder in given.held_out]
    columns = ["type", "importances"] + [f"{domain}: {who}" for domain in domains for who in ("llama-quantize", "pare export")]
    table = [[kind.upper(), "llama-imatrix" if importances else "none"] +
             [f"{rows[kind, who, importances][d]['kl']:.5f} ± {rows[kind, who, importances][d]['kl_error']:.5f}"
              for d in domains for who in ("llama-quantize", "pare export")]
             for kind in given.types for importances in (False, True)]

    def revision(folder):
        return run("git", "-C", folder, "rev-parse", "--short", "HEAD").strip()

    result = {"command": "python3 tests/bench/k_quants.py", "commit": revision(ROOT), "llama_cpp": revision(given.llama),
              "note": given.note, "machine": f"{os.cpu_count()} cores, {platform.machine()}",
              "calibration": f"{given.samples} windows of {given.context} tokens, seed {given.seed}",
              "scored": f"the second halves of {given.tokens // 256} windows of 256 tokens of each text",
              "rows": [{"type": k, "by": who, "importances": i, **row} for (k, who, i), row in rows.items()],
              "columns": columns, "table": table}
    given.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
