#!/usr/bin/env python3
"""Measures quantization losses: models x formats x methods x seeds, on text that no method has seen.

  python3 tests/bench/accuracy/harness.py --work out/accuracy                everything; tables into the work folder
  python3 tests/bench/accuracy/harness.py --work out/accuracy --rows '^gptq' --models teacher --formats q4g32
  python3 tests/bench/accuracy/harness.py --work out/accuracy --publish            ... into tests/bench/results

What is compared lies in rows.py. Per model: calibration, tuning and test text are disjoint (corpora.py). Each result is
exported to a compact file and scored on that file against the original with pare's evaluator, activations in float
(--act int8: as the runtime runs it by default). KL(original || result) is in nats per token, losses too; intervals are
95 % percentile bootstrap intervals over documents (long documents cut into excerpts, see corpora.py), the same draws
for all methods, so that differences are paired. Bits per weight count codes, scales, zeros and what stays float, over
all weights, embedding included; beside it those of the blocks' linears alone.

Every run is kept in the work folder under the hash of program, model, command lines and text: an interrupted table
continues, a new row costs its own runs. --any-build accepts runs of other builds of the program; each run says its own
commit. Other results (peers.py) are merged from the work folder's peers/*.json where they are there.
"""
import argparse
import concurrent.futures
import datetime
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import struct
import subprocess
import sys
import threading
import time

import corpora
import report
import rows

ROOT = pathlib.Path(__file__).resolve().parents[3]
RESULTS = ROOT / "tests" / "bench" / "results"


def digest(*parts):
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
        h.update(b"\0")
    return h.hexdigest()[:20]


def file_digest(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:20]


def model_digest(folder):
    names = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".model"))
    return digest(*[[p.name, file_digest(p)] for p in names])


def machine():
    name = platform.machine()
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def commit():
    ask = lambda *words: subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()
    folders = ["core", "runtime", "eval", "model", "quantize", "distill", "prune", "compress"]
    changed = ask("status", "--porcelain", "--", *folders)
    return ask("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def write_json(path, value, **how):
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    partial.write_text(json.dumps(value, **how) + "\n")
    partial.replace(path)


def compact_header(path):
    """{tensor: {codec, shape}} of a compact file (runtime/FORMAT.md), checked to be one."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return json.loads(header["__metadata__"]["pare"])["tensors"]


CODE_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8": 8, "q4": 4, "q4a": 4, "q4m": 4, "q3": 3, "q2": 2}


def tensor_bits(codec, shape):
    """Bits of a tensor: codes, 16 per scale or minimum, 4 per zero point; padding of the file not counted."""
    count = 1
    for size in shape:
        count *= size
    if codec in ("f32", "f16", "bf16"):
        return count * CODE_BITS[codec]
    kind, _, group = codec.partition("g")
    if codec in ("q8", "q4", "q4a", "q4m"):
        group = 32
    elif codec in ("q8c", "w8a8"):
        kind, group = "q8", shape[1]
    groups = shape[0] * (shape[1] // int(group))
    return count * CODE_BITS[kind] + groups * (16 + {"q4a": 4, "q4m": 16}.get(kind, 0))


def bits_per_weight(tensors):
    """(all weights, the blocks' linears alone). Norms count as 16 bits, however the file holds them."""
    def bits(name):
        codec, shape = tensors[name]["codec"], tensors[name]["shape"]
        return tensor_bits("bf16" if len(shape) == 1 else codec, shape)
    def weights(name):
        shape = tensors[name]["shape"]
        return shape[0] * (shape[1] if len(shape) > 1 else 1)
    linears = [n for n in tensors if ".layers." in n and len(tensors[n]["shape"]) == 2]
    total = lambda names: sum(map(bits, names)) / sum(map(weights, names))
    return total(list(tensors)), total(linears)


class Failed(Exception):
    pass


def shown_command(words, work):
    """A command line as it is published: the repository as ".", the work folder as WORK, a run's own folder as RUN."""
    text = " ".join(map(str, words))
    text = re.sub(re.escape(str(work)) + r"/runs/[0-9a-f]+-[0-9]+", "RUN", text)
    text = text.replace(str(work), "WORK").replace(str(ROOT.parent / "shared"), "../shared")
    return text.replace(str(ROOT) + "/", "").replace(str(ROOT), ".")


class Program:
    def __init__(self, path, threads, work):
        self.path, self.threads, self.work = pathlib.Path(path).resolve(), threads, pathlib.Path(work).resolve()
        self.hash, self.commit = file_digest(self.path), commit()

    def run(self, words, log):
        """One pare command; its JSON object. The command as a user would type it goes into `log`."""
        log.append(shown_command(["pare", *words], self.work))
        done = subprocess.run([str(self.path), *map(str, words), "--json", "--quiet", "--threads", str(self.threads)],
                              capture_output=True, text=True, env=dict(os.environ, OMP_WAIT_POLICY="passive"))
        if done.returncode != 0:
            raise Failed(f"{log[-1]}\nexit {done.returncode}\n{done.stderr.strip()}")
        return json.loads(done.stdout)["result"]


class NotMeasured(Exception):
    """With --cached: a run that is not in the work folder."""


class Bench:
    """The cached runs of one work folder."""

    def __init__(self, given, program):
        self.given, self.program = given, program
        self.work = pathlib.Path(given.work).resolve()
        self.cache = self.work / "cache"
        self.lock = threading.Lock()
        for left in (self.work / "runs").glob("*-*"):  # of a run that was killed
            if not pathlib.Path("/proc", left.name.rsplit("-", 1)[1]).exists():
                shutil.rmtree(left, ignore_errors=True)
        self.done = self.total = 0

    def lookup(self, key):
        own = self.cache / f"{key}-{self.program.hash}.json"
        if own.is_file():
            return json.loads(own.read_text())
        if self.given.any_build:
            others = sorted(self.cache.glob(f"{key}-*.json"), key=lambda p: p.stat().st_mtime)
            if others:
                return json.loads(others[-1].read_text())
        return None

    def store(self, key, value):
        value |= {"commit": self.program.commit, "program": self.program.hash, "machine": machine(),
                  "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
        write_json(self.cache / f"{key}-{self.program.hash}.json", value)
        return value

    def original(self, folder, hash_):
        """The original as a compact float file: read much faster than the folder, the same logits."""
        out = self.work / "original" / f"{hash_}-{self.program.hash}.pare"
        with self.lock:
            if not out.is_file():
                out.parent.mkdir(parents=True, exist_ok=True)
                self.program.run(["export", folder, "--to", "compact", "--codec", "f32", "--out", out], [])
        return out

    def score(self, subject, original, test, context, log):
        """One evaluation, from the cache of results by the caller."""
        words = ["eval", subject, "--against", original, "--text", test, "--no-speed", "--ctx", context,
                 "--act", self.given.act, "--per", "document"]
        if self.given.limit:
            words += ["--documents", self.given.limit]
        result = self.program.run(words, log)["text"]
        return {"mean_kl": result["mean_kl"], "p999_kl": result["p999_kl"], "max_kl": result["max_kl"],
                "top1": result["top1_agreement"], "log_perplexity_ratio": result["log_perplexity_ratio"],
                "perplexity": result["compressed"]["perplexity"],
                "perplexity_original": result["original"]["perplexity"],
                "predictions": result["predictions"], "documents": result["documents"],
                "units": result["per_document"]}

    def evaluations(self, key, tests, subject, original, context):
        """{test: scores}; `subject` makes the file to be scored, called only if something is missing."""
        found = {}
        for name, path in tests.items():
            test_key = digest(key, file_digest(path), context, self.given.act, self.given.limit)
            scores = self.lookup("eval-" + test_key)
            if scores is None:
                log = []
                scores = self.score(subject(), original, path, context, log)
                scores = self.store("eval-" + test_key, scores | {"command": log[-1]})
            found[name] = scores
        return found

    def words(self, step, values):
        out = []
        for word in step:
            name = word[1:-1] if word.startswith("{") and word.endswith("}") else None
            if name is None:
                out.append(word)
            elif isinstance(values[name], list):
                out += values[name]
            else:
                out.append(str(values[name]))
        return out

    def run(self, task):
        start = time.time()
        folder, corpus = task["folder"], task["corpus"]
        values = {"model": folder, "codec": rows.FORMATS[task["format"]], "seed": task["seed"],
                  "calibrate": ["--text", str(corpus.calibration), "--samples", str(self.given.samples), "--seed",
                                str(task["seed"])], "tuning": corpus.tuning}
        steps = rows.METHODS[task["method"]]["steps"]
        used = {word for step in steps for word in step}
        inputs = [file_digest(corpus.calibration) if "{calibrate}" in used else None,
                  file_digest(corpus.tuning) if "{tuning}" in used else None]
        names = {"model": "MODEL", "out": "OUT", "previous": "PREVIOUS", "tuning": "TUNING",
                 "calibrate": ["CALIBRATE", self.given.samples, task["seed"]]}
        symbolic = [self.words(step, values | names) for step in steps]
        key = digest(task["hash"], symbolic, inputs)
        place = self.work / "runs" / f"{key}-{os.getpid()}"
        file = place / "result.pare"
        made = self.lookup("made-" + key)
        if made is None and self.given.cached:
            raise NotMeasured

        def subject():
            nonlocal made
            if file.is_file():
                return file
            place.mkdir(parents=True, exist_ok=True)
            log, previous, began = [], folder, time.time()
            for number, step in enumerate(steps):
                out = place / f"step-{number}"
                self.program.run(self.words(step, values | {"out": out, "previous": previous}), log)
                previous = out
            seconds = time.time() - began
            self.program.run(["export", previous, "--to", "compact", "--out", file], log)
            all_bits, linear_bits = bits_per_weight(compact_header(file))
            made = self.store("made-" + key, {"commands": log, "seconds": seconds, "bits_per_weight": all_bits,
                                              "bits_per_block_linear_weight": linear_bits})
            return file

        try:
            original = self.original(folder, task["hash"])
            tests = self.evaluations(key, corpus.tests, subject, original, task["context"])
            if made is None:
                subject()
        finally:
            shutil.rmtree(place, ignore_errors=True)
        self.say(task, tests, time.time() - start)
        return {k: task[k] for k in ("model", "format", "method", "seed")} | made | {"tests": tests}

    def say(self, task, tests, seconds):
        with self.lock:
            self.done += 1
            shown = ", ".join(f"{name} KL {scores['mean_kl']['value']:.5f}" for name, scores in tests.items())
            print(f"[{self.done}/{self.total}] {task['model']} {task['format']} {task['method']} seed {task['seed']}: "
                  f"{shown} ({seconds:.0f} s)", flush=True)


def seeded(method):
    return any(word in ("{calibrate}", "{seed}") for step in rows.METHODS[method]["steps"] for word in step)


def chosen(names, pattern):
    return [name for name in names if re.search(pattern, name)] if pattern else list(names)


def check_rows(formats):
    for name, row in rows.METHODS.items():
        for step in row["steps"]:
            if not any(word == "{out}" for word in step):
                raise SystemExit(f"rows.py: {name}: expected {{out}} in every step, found none in {step}")
    for name in formats:
        if name not in rows.FORMATS:
            raise SystemExit(f"--formats: expected some of {', '.join(rows.FORMATS)}, found {name}")


def plan(bench, given, bases=False):
    """The runs to be made, or with `bases` one entry per model that is there; and what is absent."""
    sources = corpora.Sources(ROOT, pathlib.Path(given.teacher_text) if given.teacher_text else None, bench.work)
    budgets = {"calibration": given.calibration_bytes, "tuning": given.tuning_bytes, "test": given.test_bytes}
    tasks, models = [], {}
    for name, model in rows.MODELS.items():
        if name not in given.models:
            continue
        folder = (ROOT / model["folder"]).resolve()
        entry = models[name] = {"folder": model["folder"], "domain": rows.DOMAIN[name], "absent": {}, "texts": {}}
        if not (folder / "config.json").is_file():
            entry["absent"]["model"] = f"{model['folder']}: no such model"
            continue
        corpus = corpora.Corpus(model["corpus"], model["tests"], sources, bench.work / "text" / name, budgets)
        entry["absent"] |= corpus.absent
        entry["texts"] = {"documents": corpus.documents, "left out for a line shared with training": corpus.overlap}
        if corpus.calibration is None:
            continue
        config = json.loads((folder / "config.json").read_text())
        base = {"model": name, "folder": folder, "hash": model_digest(folder), "corpus": corpus,
                "context": min(512, config["max_position_embeddings"])}
        if bases:
            tasks.append(base)
            continue
        for form in given.formats:
            for method in chosen(rows.METHODS, given.rows):
                row = rows.METHODS[method]
                if form not in row.get("formats", rows.FORMATS) or name not in row.get("models", [name]):
                    continue
                for seed in range(given.seeds if seeded(method) else 1):
                    tasks.append(base | {"format": form, "method": method, "seed": seed})
    return tasks, models


def options(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pare", default=str(ROOT / "build" / "pare"), help="the program [build/pare]")
    parser.add_argument("--work", required=True, help="folder of texts, cached runs and, without --publish, results")
    parser.add_argument("--models", nargs="+", default=list(rows.MODELS), choices=list(rows.MODELS), metavar="NAME")
    parser.add_argument("--formats", nargs="+", default=rows.DEFAULT_FORMATS, metavar="NAME")
    parser.add_argument("--rows", help="only methods whose name this regular expression finds")
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds of methods that have any [3]")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows [64]")
    parser.add_argument("--limit", type=int, default=0, help="only the first documents of each test text; 0: all [0]")
    parser.add_argument("--act", default="float", choices=["float", "int8"], help="activations while scoring [float]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores [1]")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap [2000]")
    parser.add_argument("--any-build", action="store_true", help="accept cached runs of other builds of the program")
    parser.add_argument("--cached", action="store_true", help="tables of the runs that are there; what is not is skipped")
    parser.add_argument("--publish", action="store_true", help="write results and plots to tests/bench/results")
    parser.add_argument("--merge", action="store_true",
                        help="published rows that this call does not measure stay as they are")
    parser.add_argument("--teacher-text", help="what make_text.sh made; default: made in the work folder")
    parser.add_argument("--test-bytes", type=int, default=160_000, help="characters of each test text [160000]")
    parser.add_argument("--calibration-bytes", type=int, default=2_000_000, help="characters to draw windows from")
    parser.add_argument("--tuning-bytes", type=int, default=8_000_000, help="characters of the tuning text")
    return parser


def main():
    given = options(__doc__).parse_args()
    check_rows(given.formats)
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    bench = Bench(given, Program(given.pare, threads, given.work))
    published = json.loads((RESULTS / "accuracy.json").read_text()) if given.merge else None
    if differ := report.settings_differ(published, vars(given)) if published else []:
        raise SystemExit(f"--merge: rows of other settings cannot be kept: {'; '.join(differ)}")
    tasks, models = plan(bench, given)
    bench.total = len(tasks)
    for name, model in models.items():
        for what, why in model["absent"].items():
            print(f"absent: {name}, {what}: {why}", flush=True)
    runs, failures, skipped = [], [], []
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        futures = {pool.submit(bench.run, task): task for task in tasks}
        try:
            for future in concurrent.futures.as_completed(futures):
                task = futures[future]
                try:
                    runs.append(future.result())
                except NotMeasured:
                    skipped.append(f"{task['model']} {task['format']} {task['method']} seed {task['seed']}")
                except Failed as error:
                    failures.append(f"{task['model']} {task['format']} {task['method']} seed {task['seed']}: {error}")
                    print(f"failed: {failures[-1]}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise SystemExit("interrupted: the same command continues")
    order = {(t["model"], t["format"], t["method"], t["seed"]): i for i, t in enumerate(tasks)}
    runs.sort(key=lambda r: order[(r["model"], r["format"], r["method"], r["seed"])])
    peers = [json.loads(p.read_text()) for p in sorted((bench.work / "peers").glob("*.json"))]
    runs += [peer for peer in peers if peer["model"] in models and peer["tests"]]
    absent_peers = [peer for peer in peers if not peer["tests"]]
    command = "python3 tests/bench/accuracy/harness.py " + " ".join(shown_words(sys.argv[1:]))
    out = RESULTS if given.publish else bench.work / "results"
    report.write(out, runs, models, absent_peers, rows.BASELINE,
                 {"command": command, "commit": bench.program.commit, "machine": machine(), "failures": failures,
                  "not run": skipped,
                  "resamples": given.resamples, "act": given.act, "samples": given.samples}, published)
    print(f"results in {out}")
    if failures:
        raise SystemExit(f"{len(failures)} of {len(tasks)} runs failed")


def shown_words(words):
    """The command line as it is published: folders of this machine as DIR."""
    shown, hide = [], False
    for word in words:
        shown.append("DIR" if hide else word)
        hide = word in ("--work", "--teacher-text", "--pare")
    return shown


if __name__ == "__main__":
    main()
