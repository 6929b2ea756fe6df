#!/usr/bin/env python3
"""What a third of the parameters costs, and what comes back: the tiny teacher loses about 30 % of its parameters by
width, by depth and by both, chosen by what is measured, by weight norms and at random, with and without the refit; then
every measured and refitted cut learns from the teacher, as does the best shape's random one, and the best shape is
trained from scratch with as many operations, 6 a parameter and token learned and 2 of the teacher's, thus on more
tokens. "Regained" counts from what the best cut loses. Rate and mixture were chosen with runs of half the length.

  tests/bench/structure.py PARE TEACHER TEXTS OUT.json [--work DIR] [--tokens N] [--windows N] [--seeds N]

TEXTS: the folder that examples/teacher/make_text.sh writes. Without --tokens nothing is trained. Every figure is
written to OUT.json as soon as it is known and not measured again (remove OUT.json to start over); a training that was
stopped goes on where it was when DIR is given and the same command runs again, and a finished one is not run again.
Held-out loss: mean over the manual's and the novels' windows of 512 tokens, nats a token.
"""
import argparse
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

SHAPES = {
    "width": ["--hidden", "224", "--ffn", "144", "--multiple-of", "16"],
    "depth": ["--layers", "2"],
    "both": ["--layers", "3", "--ffn", "160"],
}
WAYS = {
    "measured + refit": [],
    "measured": ["--no-correction"],
    "weight norms": ["--no-correction", "--rank-by", "weights"],
    "random": ["--no-correction", "--rank-by", "random"],
}
LEARN = ["--batch", "16", "--context", "512", "--warmup", "0.02", "--min-lr-ratio", "0.01", "--precision", "bf16",
         "--eval-every", "125", "--eval-tokens", "24576", "--final-eval-tokens", "24576"]


class Bench:
    def __init__(self, arguments):
        self.a = arguments
        self.texts = pathlib.Path(arguments.texts)
        self.out = pathlib.Path(arguments.out)
        self.work = pathlib.Path(arguments.work)
        self.runs = {}
        if self.out.exists():
            self.runs = json.loads(self.out.read_text())["runs"]

    def pare(self, *options):
        done = subprocess.run([self.a.pare, *map(str, options), "--json", "--quiet"], capture_output=True, text=True)
        if done.returncode != 0:
            command = " ".join(map(str, options))
            sys.exit(f"pare {command} ended with {done.returncode}: {done.stderr[-800:]}{done.stdout[-400:]}")
        return json.loads(done.stdout)

    def held_out(self, folder):
        losses = {}
        for name in ("manual", "novels"):
            rows = self.pare("eval", folder, "--text", self.texts / f"{name}_held_out", "--ctx", 512, "--limit",
                             self.a.windows)["rows"]
            losses[name] = math.log(next(row["after"] for row in rows if row["metric"] == "perplexity"))
        losses["mean"] = (losses["manual"] + losses["novels"]) / 2
        return losses

    def once(self, key, make):
        if key not in self.runs:
            self.runs[key] = make()
            self.write()
            print(f"{key}: {json.dumps(self.runs[key]['held_out'])}", flush=True)
        return self.runs[key]

    def text(self):
        return ["--text", f"{self.texts / 'manual'}=35", "--text", f"{self.texts / 'novels'}=65",
                "--held-out", self.texts / "manual_held_out", "--held-out", self.texts / "novels_held_out"]

    def cut(self, name, way, seed, keep=None):
        out = keep or self.work / "cut"
        shutil.rmtree(out, ignore_errors=True)
        command = ["prune", "--model", self.a.teacher, "--out", out, "--method", "shape", *SHAPES[name], *WAYS[way],
                   "--text", self.texts / "manual", "--text", self.texts / "novels_sample",
                   "--samples", self.a.samples, "--seed", seed]
        result = self.pare(*command)["result"]
        return {"shape": name, "way": way, "seed": seed, "parameters": result["parameters"],
                "removed": 1 - result["parameters"] / result["parameters_before"],
                "calibration_kl": result["calibration_kl"], "held_out": self.held_out(out)}

    def measure(self):
        teacher = self.once("teacher", lambda: {"held_out": self.held_out(self.a.teacher)})
        for name in SHAPES:
            for way in WAYS:
                for seed in range(1, 1 + (self.a.seeds if way == "random" else 1)):
                    self.once(f"{name}, {way}, seed {seed}", lambda: self.cut(name, way, seed))
        if not self.a.tokens:
            return
        best = min(SHAPES, key=lambda name: self.runs[f"{name}, measured + refit, seed 1"]["held_out"]["mean"])
        tokens, start = self.a.tokens, self.runs[f"{best}, measured + refit, seed 1"]["held_out"]["mean"]

        def learn(key, verb, tokens=tokens):
            out = self.work / key.replace(" ", "-").replace(",", "")
            if not out.exists():  # a folder under its final name is a finished one
                self.pare(*verb, "--out", out, *self.text(), "--tokens", tokens, *LEARN)
            found = {"tokens": tokens, "held_out": self.held_out(out)}
            found["regained"] = (start - found["held_out"]["mean"]) / (start - teacher["held_out"]["mean"])
            return found

        student = self.runs[f"{best}, measured + refit, seed 1"]
        taught = student["parameters"] / (1 - student["removed"])
        more = round(tokens * (1 + taught / (3 * student["parameters"])))
        key = f"{best}, from scratch on {more} tokens"
        if key not in self.runs:
            path = self.work / f"start-{best}-measured+refit" / "config.json"
            if not path.exists():
                self.cut(best, "measured + refit", 1, path.parent)
            verb = ["train", "--config", path, "--tokenizer", self.a.teacher, "--lr", "3e-3", "--weight-decay", "0.1"]
            self.once(key, lambda: learn(key, verb, more))
        others = [(name, "measured + refit") for name in SHAPES if name != best]
        for name, way in [(best, "measured + refit"), (best, "random"), *others]:
            folder = self.work / f"start-{name}-{way.replace(' ', '')}"
            key = f"{name}, {way}, distilled on {tokens} tokens"
            if key not in self.runs:
                if not folder.exists():
                    self.cut(name, way, 1, folder)
                verb = ["distill", "--teacher", self.a.teacher, "--model", folder, "--lr", self.a.lr,
                        "--weight-decay", "0"]
                self.once(key, lambda: learn(key, verb))

    def write(self):
        root = pathlib.Path(__file__).resolve().parents[2]
        commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True,
                                text=True).stdout.strip()
        with open("/proc/cpuinfo") as file:
            machine = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
        table = []
        for key, run in self.runs.items():
            losses = run["held_out"]
            table.append([key, f"{run['removed']:.1%}" if "removed" in run else "", losses["manual"], losses["novels"],
                          losses["mean"], f"{run['regained']:.0%}" if "regained" in run else ""])
        teacher = os.path.basename(os.path.normpath(self.a.teacher))
        result = {"benchmark": "structure",
                  "command": f"tests/bench/structure.py build/pare {teacher} TEXTS OUT.json "
                             f"--samples {self.a.samples} --windows {self.a.windows} --seeds {self.a.seeds}"
                             + (f" --tokens {self.a.tokens} --lr {self.a.lr}" if self.a.tokens else ""),
                  "columns": ["model", "parameters removed", "held-out loss, manual", "novels", "mean",
                              "of the lost nats regained"],
                  "table": table, "commit": commit or "unknown", "machine": machine, "runs": self.runs}
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(self.out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pare", "teacher", "texts", "out"):
        parser.add_argument(name)
    parser.add_argument("--work", help="folder for models; kept, so that a training can go on")
    parser.add_argument("--tokens", type=int, default=0, help="tokens to learn on; 0: only the cuts")
    parser.add_argument("--lr", default="4e-3", help="of the distillation")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of a cut")
    parser.add_argument("--windows", type=int, default=48, help="held-out windows of each text")
    parser.add_argument("--seeds", type=int, default=3, help="random cuts")
    arguments = parser.parse_args()
    if arguments.work:
        os.makedirs(arguments.work, exist_ok=True)
        Bench(arguments).measure()
    else:
        with tempfile.TemporaryDirectory() as work:
            arguments.work = work
            Bench(arguments).measure()


if __name__ == "__main__":
    main()
