#!/usr/bin/env python3
"""Every family: a folder that pare saved loads in transformers without a missing or unused tensor and gives the logits
of the golden files; a folder that pare quantized to q8c loads too and stays close. Models and weights are those of
tests/golden/make_families.py.

usage: families.py BUILD_DIR [NAME ...] [--json FILE]     exit code 1 on any difference, 77 when transformers is missing
--json: {NAME: largest difference of the saved folder's logits, null where something failed}"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

try:
    import torch
    import transformers
except ImportError as problem:
    print(f"SKIPPED: families.py needs torch, transformers and safetensors ({problem})")
    sys.exit(77)

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
sys.path[0] = str(GOLDEN)  # and not this folder: it has a compressed_tensors.py
import make_families  # noqa: E402


def logits(folder, texts):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
    problems = [f"{kind} {info[kind]}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]]
    if problems:
        raise RuntimeError("; ".join(problems))
    with torch.no_grad():
        return [model.eval()(torch.tensor([text["ids"]]), use_cache=False).logits[0][text["rows"]] for text in texts]


def saved_folders(build, out):
    """Folders of all goldens as pare's decoder module writes them."""
    subprocess.run([build / "tests/test_model", "--gtest_filter=*FamilyGolden.SavedFolder*"], check=True,
                   capture_output=True, text=True, env={**os.environ, "PARE_KEEP_FAMILIES": str(out)})


def quantize_to_q8(pare, model, out):
    tied = json.loads((model / "config.json").read_text()).get("tie_word_embeddings", True)
    head = [] if tied else ["--head-codec", "keep"]
    subprocess.run([pare, "quantize", "--model", model, "--out", out, "--codec", "q8c", "--embedding-codec", "keep",
                    *head, "--method", "rtn", "--quiet"], check=True, capture_output=True, text=True)


def check(build, name, kept, work):
    golden = json.loads((GOLDEN / "families" / f"{name}.json").read_text())
    texts = golden["texts"]
    exact = [torch.tensor(text["logits"]) for text in texts]
    saved = max((a - b).abs().max().item() for a, b in zip(logits(kept / name, texts), exact))
    original = work / "original"
    original.mkdir()
    make_families.make_folder(make_families.CASES[name](), original)
    quantize_to_q8(build / "pare", original, work / "q8")
    power = torch.cat([x.flatten() for x in exact]).norm().item()
    q8 = torch.cat([(a - b).flatten() for a, b in zip(logits(work / "q8", texts), exact)]).norm().item() / power
    return saved, q8


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    build, failed = pathlib.Path(sys.argv[1]).resolve(), 0
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names, results = sys.argv[2:], {}
    out = pathlib.Path(names.pop(names.index("--json") + 1)) if "--json" in names else None
    names = [name for name in names if name != "--json"]
    kept = pathlib.Path(tempfile.mkdtemp())
    saved_folders(build, kept)
    for name in names or make_families.CASES:
        saved = None
        with tempfile.TemporaryDirectory() as work:
            try:
                saved, q8 = check(build, name, kept, pathlib.Path(work))
                good, text = saved < 1e-5 and 0 < q8 < 0.1, f"saved within {saved:.1e}, q8 off by {q8:.2%}"
            except subprocess.CalledProcessError as problem:
                good, text = False, problem.stderr[-400:]
            except Exception as problem:  # one broken family must not hide the others
                good, text = False, f"{type(problem).__name__}: {str(problem)[-400:]}"
        print(f"{'ok' if good else 'FAILED':6} {name}: {text}")
        failed += not good
        results[name] = saved if good else None
    shutil.rmtree(kept)
    if out:
        out.write_text(json.dumps(results))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
