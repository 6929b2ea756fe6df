#!/usr/bin/env python3
"""What zeros cost, by criterion, pattern and what is done about them, as tests/bench/results/pruning.json.

usage: pruning.py --work FOLDER [--pare build/pare] [--any-build] [--teacher-text T] [--rows REGEX] [--seeds 3]
                  [--samples 64] [--test-bytes 48000] [--cached] [--out tests/bench/results/pruning.json]

The tiny teacher with zeros in its blocks' linears, with and without refitting the weights that stay, with blocks that
lose different shares, and rounded to 4 bits, after pruning or in the same sweep; mean KL(original || result) in nats
per token on held-out pages of the manual and of novels, over calibration seeds. Text is shared out as in
accuracy/corpora.py: calibration, half manual and half novels, is disjoint from what is scored. Each result is exported
to a compact file and that file is scored, activations in float. Runs are kept in the work folder under the hash of
program, command lines and text; an interrupted table continues.
"""
import argparse
import math
import pathlib
import re
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "bench" / "accuracy"))
import corpora  # noqa: E402
import harness  # noqa: E402

TEACHER = ROOT / "examples" / "teacher"
CONTEXT = 512
PATTERNS = {"50 %": ["--sparsity", "0.5"], "2:4": ["--pattern", "2:4"], "4:8": ["--pattern", "4:8"]}


def prune(method, amount, *words):
    return ["prune", "--model", "{previous}", "--out", "{out}", "--method", method, *amount, "{calibrate}", *words]


def quantize(*words):
    return ["quantize", "--model", "{previous}", "--out", "{out}", "--codec", "q4", "{calibrate}", *words]


def table_rows():
    """[pattern, name, steps]: command lines one after the other, as in accuracy/rows.py."""
    for pattern, amount in PATTERNS.items():
        for method in ("magnitude", "wanda", "sparsegpt"):
            yield pattern, method, [prune(method, amount)]
            yield pattern, method + ", refitted", [prune(method, amount, "--reconstruct")]
    for pattern in ("50 %", "70 %"):
        amount = ["--sparsity", str(int(pattern[:2]) / 100)]
        for method in ("wanda", "sparsegpt"):
            if pattern not in PATTERNS:
                yield pattern, method, [prune(method, amount)]
            yield pattern, method + ", owl", [prune(method, amount, "--allocation", "owl")]
    for pattern in ("50 %", "2:4"):
        amount = PATTERNS[pattern]
        yield pattern + ", q4", "sparsegpt, then gptq", [prune("sparsegpt", amount), quantize()]
        refitted = prune("sparsegpt", amount, "--reconstruct")
        yield pattern + ", q4", "sparsegpt, refitted, then gptq", [refitted, quantize()]
        yield pattern + ", q4", "in one sweep", [quantize(*amount)]
        yield pattern + ", q4", "sparsegpt, refitted, then gptq, re-targeted", [refitted, quantize("--retarget")]
        yield pattern + ", q4", "in one sweep, re-targeted", [quantize(*amount, "--retarget")]


class Runs:
    def __init__(self, given):
        self.given = given
        self.bench = harness.Bench(given, harness.Program(given.pare, given.threads, given.work))
        text = pathlib.Path(given.teacher_text) if given.teacher_text else None
        sources = corpora.Sources(ROOT, text, self.bench.work)
        budgets = {"calibration": 2_000_000, "tuning": 1_000, "test": given.test_bytes}
        self.corpus = corpora.Corpus("manual and novels", ["manual", "novels"], sources, self.bench.work / "text",
                                     budgets)
        if self.corpus.absent:
            raise SystemExit(f"expected text, found none: {self.corpus.absent}")
        self.hash = harness.model_digest(TEACHER)

    def one(self, pattern, name, steps, seed):
        values = {"calibrate": ["--text", str(self.corpus.calibration), "--samples", str(self.given.samples),
                                "--context", str(CONTEXT), "--seed", str(seed)]}
        names = {"out": "OUT", "previous": "PREVIOUS", "calibrate": [self.given.samples, seed]}
        symbolic = [self.bench.words(step, names) for step in steps]
        tests = {test: harness.file_digest(path) for test, path in self.corpus.tests.items()}
        key = harness.digest("pruning", self.hash, symbolic, harness.file_digest(self.corpus.calibration), tests)
        found = self.bench.lookup(key)
        if found is None and self.given.cached:
            return None
        if found is None:
            found = self.bench.store(key, self.made(steps, values, key))
        print(f"{pattern:9} {name:32} seed {seed}: " + ", ".join(
            f"{test} {scores['mean_kl']['value']:.5f}" for test, scores in found["tests"].items()), flush=True)
        return {"pattern": pattern, "method": name, "seed": seed} | found

    def made(self, steps, values, key):
        place, log, previous = self.bench.work / "runs" / key, [], TEACHER
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            for number, step in enumerate(steps):
                out = place / f"step-{number}"
                self.bench.program.run(self.bench.words(step, values | {"out": out, "previous": previous}), log)
                previous = out
            quantized = steps[-1][0] == "quantize"
            file = place / "result.pare"
            self.bench.program.run(["export", previous, "--to", "compact", *([] if quantized else ["--codec", "f32"]),
                                    "--out", file], log)
            original = self.bench.original(TEACHER, self.hash)
            tests = {}
            for test, path in self.corpus.tests.items():
                tests[test] = self.bench.score(file, original, path, CONTEXT, log)
                del tests[test]["units"]
            commands = [re.sub(r"WORK/runs/[0-9a-f]+", "RUN", line) for line in log]
            return {"commands": commands, "tests": tests}
        finally:
            shutil.rmtree(place, ignore_errors=True)


def summary(runs):
    """One table line for each row of the benchmark: means over seeds and their standard error, "-" of a single seed."""
    lines, groups = [], {}
    for run in runs:
        groups.setdefault((run["pattern"], run["method"]), []).append(run)
    for (pattern, method), group in groups.items():
        line = [pattern, method, len(group)]
        for test in ("manual", "novels"):
            values = [run["tests"][test]["mean_kl"]["value"] for run in group]
            mean = sum(values) / len(values)
            spread = sum((v - mean) ** 2 for v in values)
            line += [mean, math.sqrt(spread / (len(values) - 1) / len(values)) if len(values) > 1 else "-"]
        line.append(sum(run["tests"]["manual"]["top1"]["value"] for run in group) / len(group))
        lines.append(line)
    return lines


def expectations(table):
    """What theory says of these rows, and whether it came out; mean KL over seeds, both texts."""
    kl = {(pattern, method): (manual, novels) for pattern, method, _, manual, _, novels, _, _ in table}
    checks = []

    def below(pattern, better, worse):
        if (pattern, better) in kl and (pattern, worse) in kl:
            for test, a, b in zip(("manual", "novels"), kl[pattern, better], kl[pattern, worse]):
                checks.append({"text": test, "pattern": pattern, "lower": better, "higher": worse, "values": [a, b],
                               "holds": a < b})

    for pattern in PATTERNS:
        below(pattern, "sparsegpt", "wanda")
        below(pattern, "wanda", "magnitude")
        for method in ("magnitude", "wanda", "sparsegpt"):
            below(pattern, method + ", refitted", method)
        below(pattern + ", q4", "in one sweep", "sparsegpt, then gptq")
    for pattern in ("50 %", "70 %"):
        for method in ("wanda", "sparsegpt"):
            below(pattern, method + ", owl", method)
    return checks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pare", default=str(ROOT / "build" / "pare"))
    parser.add_argument("--work", required=True)
    parser.add_argument("--teacher-text")
    parser.add_argument("--rows", default="", help="only rows whose 'pattern method' this regular expression finds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--test-bytes", type=int, default=48_000)
    parser.add_argument("--any-build", action="store_true", help="accept kept runs of other builds of the program")
    parser.add_argument("--cached", action="store_true", help="the table of the runs that are kept; no new ones")
    parser.add_argument("--out", default=str(harness.RESULTS / "pruning.json"))
    given = parser.parse_args()
    given.act, given.limit = "float", 0
    work = Runs(given)
    runs = []
    for seed in range(1, given.seeds + 1):  # whole tables one after the other
        for pattern, name, steps in table_rows():
            if not re.search(given.rows, f"{pattern} {name}"):
                continue
            if name == "magnitude" and seed > 1:  # looks at no text
                continue
            runs += filter(None, [work.one(pattern, name, steps, seed)])
    order = {(pattern, name): i for i, (pattern, name, _) in enumerate(table_rows())}
    runs.sort(key=lambda run: (order[run["pattern"], run["method"]], run["seed"]))
    table = summary(runs)
    checks = expectations(table)
    for check in checks:
        if not check["holds"]:
            print(f"does not hold: {check}")
    documents = {test: work.corpus.documents[test] for test in work.corpus.tests}
    command = "python3 tests/bench/pruning.py " + " ".join(harness.shown_words(sys.argv[1:]))
    harness.write_json(pathlib.Path(given.out), {
        "benchmark": "pruning", "command": command,
        "commit": work.bench.program.commit, "machine": harness.machine(), "model": "examples/teacher",
        "columns": ["zeros", "method", "seeds", "KL, manual", "over seeds", "KL, novels", "over seeds",
                    "top-1, manual"],
        "table": table, "samples": given.samples, "context": CONTEXT, "documents": documents,
        "predictions": {t: s["predictions"] for t, s in runs[0]["tests"].items()}, "expected": checks, "runs": runs},
        indent=1)


if __name__ == "__main__":
    main()
