#!/usr/bin/env python3
"""The table of model families: runs the tests that prove them and writes tests/bench/results/families.json. Cells are
the largest difference between two logits that a family's tiny models showed, in float32.

usage: families_table.py BUILD_DIR  PARE_PYTHON: interpreter with torch and transformers"""
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests/golden/families"
OUT = ROOT / "tests/bench/results/families.json"
FAMILIES = {  # model_type: what users call it
    "llama": "Llama 2, 3, 3.x, SmolLM2, DeepSeek-R1-Distill-Llama", "qwen2": "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
    "mistral": "Mistral", "mixtral": "Mixtral", "phi3": "Phi-3, Phi-3.5, Phi-4-mini", "gemma": "Gemma 1",
    "gemma2": "Gemma 2", "gemma3_text": "Gemma 3 (text)", "qwen3": "Qwen3", "smollm3": "SmolLM3",
    "qwen3_moe": "Qwen3-MoE", "gpt2": "GPT-2", "gpt_neox": "GPT-NeoX, Pythia"}
COLUMNS = {  # name: (test program, test)
    "logits by LibTorch": ("test_model", "LibTorchLogitsAreThoseOfTransformers"),
    "logits by the runtime": ("test_runtime", "LogitsAreThoseOfTransformers"),
    "cached decoding": ("test_runtime", "DecodingInPiecesEqualsPrefill"),
    "saved, reloaded by transformers": None,
    "GPTQ, exported, run": ("test_compress", "GptqExportVerifyRun")}

# model_type: fixtures of tests/golden/tokenizers (files of the same components that the reference trained), and whether
# recorded vectors of the family's real file are among the tests.
TOKENIZERS = {
    "llama": (["llama2", "llama3", "smollm", "deepseek"], "real files of 2 and 3, else stand-ins"),
    "qwen2": (["qwen2", "deepseek"], "real file; DeepSeek stand-in"), "mistral": (["mistral", "llama2"], "stand-in"),
    "mixtral": (["mistral", "llama2"], "stand-in"), "phi3": (["llama2"], "real file"), "gemma": (["gemma"], "stand-in"),
    "gemma2": (["gemma"], "stand-in"), "gemma3_text": (["gemma"], "stand-in"), "qwen3": (["qwen2"], "real file of Qwen2.5"),
    "smollm3": (["llama3"], "stand-in"), "qwen3_moe": (["qwen2"], "real file of Qwen2.5"), "gpt2": (["gpt2"], "real file"),
    "gpt_neox": (["gpt2", "qwen2"], "stand-in")}


def run_tests(build, program, tests, work):
    """(name, parameter, test) of each test that ran"""
    out = work / f"{program}.json"
    subprocess.run([build / "tests" / program, f"--gtest_filter={tests}", f"--gtest_output=json:{out}"],
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for suite in json.loads(out.read_text())["testsuites"]:
        for test in suite["testsuite"]:
            name, _, parameter = test["name"].partition("/")
            yield name, parameter, test


def test_results(build, program, work):
    """{(test, golden): difference or None where it failed}"""
    return {(name, golden): None if test.get("failures") else float(test.get("difference", 0)) * 1e-6
            for name, golden, test in run_tests(build, program, "*Family*", work)}


def tokenizer_cells(build, work):
    passed = {parameter or name
              for name, parameter, test in run_tests(build, "test_core", "*Golden.Ids*:TokenizerShared.Recorded*", work)
              if not test.get("failures") and test["result"] == "COMPLETED"}
    return {family: f"exact ({proof})" if passed >= {*fixtures, *(["RecordedVectors"] if "real" in proof else [])}
            else "FAILED" for family, (fixtures, proof) in TOKENIZERS.items()}


def reload_results(build, work):
    out = work / "interop.json"
    subprocess.run([os.environ.get("PARE_PYTHON", "python3"), ROOT / "tests/interop/families.py", build,
                    "--json", out], stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())


def cell(differences):
    if None in differences:
        return "FAILED"
    return "same bits" if max(differences) == 0 else f"{max(differences):.0e}"


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    build = pathlib.Path(sys.argv[1]).resolve()
    goldens = {}
    for path in sorted(GOLDENS.glob("*.json")):
        goldens.setdefault(json.loads(path.read_text())["config"]["model_type"], []).append(path.stem)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        results = {p: test_results(build, p, work) for p in ("test_model", "test_runtime", "test_compress")}
        reloaded = reload_results(build, work)
        tokenizers = tokenizer_cells(build, work)
    table, raw = [], {}
    for family, label in FAMILIES.items():
        row = [label, len(goldens[family])]
        for column, source in COLUMNS.items():
            found = {name: reloaded[name] if source is None else results[source[0]][source[1], name]
                     for name in goldens[family]}
            raw.setdefault(column, {}).update(found)
            row.append(cell(found.values()))
        table.append(row + [tokenizers[family]])
    if set(goldens) != set(FAMILIES):
        sys.exit(f"goldens of {sorted(set(goldens) ^ set(FAMILIES))} have no row or no goldens")
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    OUT.write_text(json.dumps({"command": "python3 tests/bench/families_table.py build",
                               "commit": commit.stdout.strip(),
                               "machine": f"{platform.system()} {platform.machine()}",
                               "unit": "largest difference between two logits", "differences": raw,
                               "columns": ["family", "tiny models", *COLUMNS, "tokenizer"], "table": table}, indent=1) + "\n")
    for row in table:
        print(*row, sep=" | ")
    return any("FAILED" in row for row in table)


if __name__ == "__main__":
    sys.exit(main())
