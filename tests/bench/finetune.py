#!/usr/bin/env python3
"""What fine-tuning on instructions gives, in held-out accuracy: all weights against LoRA, several seeds.

The instructions are made of task files: of each, part of the items (every third, by its number) is held out to test,
a twelfth decides when to stop (two passes without a lower loss; the best weights stay), the others become prompt and
response. Minimal pairs (BLiMP) ask for a sentence, the good one is the response; the test is a choice
of the two. Multiple choice gives query and the right choice. Accuracy is that of `pare eval --tasks` on the files that
`pare finetune` wrote; standard errors over items, and of differences between two models over the items that both answered.

  tests/bench/finetune.py PARE MODEL OUT.json TASK.jsonl.. [--seeds 1 2 3] [--work FOLDER]

With --work what is done stays in FOLDER, and a run that was cut short goes on there.
"""
import argparse
import contextlib
import json
import math
import os
import pathlib
import statistics
import subprocess
import tempfile

ARMS = {"all weights": ["--lr", "{full}"], "LoRA": ["--lora-rank", "{rank}", "--lr", "{lora}"]}


def instructions(path):
    """[(prompt, choices, gold)] of a task file."""
    items = []
    for line in open(path, encoding="utf-8"):
        item = json.loads(line)
        if "sentence_good" in item:
            items.append(("Write a sentence that is right.\n", [item["sentence_good"], item["sentence_bad"]], 0))
        else:
            items.append((item["query"], item["choices"], item["gold"]))
    return items


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("pare", "model", "out"):
        parser.add_argument(name)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", default="8", help="at most")
    parser.add_argument("--context", default="256")
    parser.add_argument("--batch", default="8")
    parser.add_argument("--work", help="folder for models and scores, kept")
    parser.add_argument("--full", default="5e-4", help="learning rate of all weights")
    parser.add_argument("--rank", default="16", help="of LoRA")
    parser.add_argument("--lora", default="2e-3", help="learning rate of LoRA")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = pathlib.Path(args.work or stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(exist_ok=True)
        names, train, stop = [], [], []
        for path in map(pathlib.Path, args.tasks):
            names.append(path.stem)
            tests = []
            for i, (prompt, choices, gold) in enumerate(instructions(path)):
                if i % 3 == 0:
                    tests.append({"query": prompt.rstrip("\n"), "choices": choices, "gold": gold})
                else:
                    lines = stop if i % 12 == 1 else train
                    lines.append({"prompt": prompt.rstrip("\n"), "response": " " + choices[gold]})
            (work / path.name).write_text("".join(json.dumps(t) + "\n" for t in tests))
        for name, lines in (("train", train), ("stop", stop)):
            (work / f"{name}.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))

        def pare(*words):
            done = subprocess.run([args.pare, *map(str, words), "--json", "--quiet"], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"exit {done.returncode}: pare {' '.join(map(str, words))}\n{done.stderr}")
            return json.loads(done.stdout)["result"]

        def score(model, label):
            """{task: [right, ..]} from the items' own picks."""
            file = work / f"{label}.json"
            if not file.exists():
                pare("eval", model, *[w for name in names for w in ("--tasks", work / f"{name}.jsonl")], "--output", file)
            right = {}
            for task in json.loads(file.read_text())["tasks"]:
                gold = [json.loads(line)["gold"] for line in open(work / f"{task['task']}.jsonl")]
                right[task["task"]] = [int(p == g) for p, g in zip(task["picks"], gold)]
            return right

        def train_one(arm, words, seed, out):
            result = pare("finetune", "--model", args.model, "--text", work / "train.jsonl", "--held-out",
                          work / "stop.jsonl", "--patience", "2", "--out", out, "--epochs", args.epochs, "--context",
                          args.context, "--batch", args.batch, "--seed", seed, "--threads", "1",
                          *[w.format(full=args.full, lora=args.lora, rank=args.rank) for w in words])
            losses = result["held_out"]["stop.jsonl"]
            return {"arm": arm, "seed": seed, "steps": result["steps"],
                    "trained_parameters": result["trained_parameters"], "text": result["text"]["train.jsonl"],
                    "stop_loss": [losses["before"]["loss"], losses["after"]["loss"]],
                    "stop_loss_stderr": losses["after"]["standard_error"]}

        def estimate(values):
            n, mean = len(values), statistics.fmean(values)
            return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)

        before = score(args.model, "before")
        scores, runs = {arm: [] for arm in ARMS}, []
        for seed in args.seeds:
            for arm, words in ARMS.items():
                label = f"{arm.split()[0].strip(',')}.{seed}"
                record = work / f"{label}.run"
                if not record.exists():
                    record.write_text(json.dumps(train_one(arm, words, seed, work / label)))
                runs.append(json.loads(record.read_text()))
                scores[arm].append(score(work / label, label))
                for name in names:
                    runs[-1][name] = statistics.fmean(scores[arm][-1][name])
                print(json.dumps(runs[-1]), flush=True)

    table = []
    for name in [*names, "all together"]:
        picked = lambda by: [v for n in names if name in (n, "all together") for v in by[n]]
        base = picked(before)
        mean = {arm: [statistics.fmean(column) for column in zip(*map(picked, scores[arm]))] for arm in ARMS}
        full, lora = mean["all weights"], mean["LoRA"]
        cells = [name, len(base), *estimate(base)]
        for arm in (full, lora):
            cells += [statistics.fmean(arm), *estimate([a - b for a, b in zip(arm, base)])]
        cells += [*estimate([l - f for l, f in zip(lora, full)])]
        table.append(cells)
        print(cells)
    git = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "--short", "HEAD"],
                         capture_output=True, text=True)
    machine = next((l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "unknown")
    columns = ["held-out items of", "items", "before", "±", "all weights", "gain", "± of the gain", "LoRA", "gain", "± of the gain",
               "LoRA less all weights", "±"]
    result = {"benchmark": "finetune", "command": "tests/bench/finetune.py build/pare MODEL OUT.json TASK.jsonl..",
              "commit": git.stdout.strip() or "unknown", "machine": machine, "seeds": args.seeds, "epochs": float(args.epochs),
              "context": int(args.context), "batch": int(args.batch),
              "learning_rates": {"all weights": float(args.full), "LoRA": float(args.lora)}, "rank": int(args.rank),
              "model": os.path.basename(args.model.rstrip("/")), "trained_on": len(train),
              "columns": columns, "table": table, "runs": runs}
    with open(args.out, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
