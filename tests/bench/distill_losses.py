#!/usr/bin/env python3
"""What each distillation loss and each form of the teacher's cache is worth, at equal tokens.

One student, pruned from the teacher, learns the same number of tokens by next-token loss, from the live teacher by every
--loss, and from caches of the teacher; held-out KL to the teacher and next-token loss, several seeds (they choose the
order of the text and the cache's draws). Then the cost of a step: the same command with few and with many steps, in
turns, the difference of their processor times over the steps between them.

  tests/bench/distill_losses.py PARE TEACHER TEXT HELD_OUT OUT.json [--tokens 300000] [--seeds 1 2 3] [--part losses]

With --part losses or --part cost OUT.json keeps what it says of the other part. TEXT should be one document: a cache's
windows end with each document.
"""
import argparse
import concurrent.futures
import json
import math
import os
import shutil
import statistics
import subprocess
import tempfile
import time

CACHES = {"cache: top 64": ["--cache-top-k", "64"],
          "cache: top 12 + 12 samples": ["--cache-samples", "12"],
          "cache: 50 samples": ["--cache-top-k", "0", "--cache-samples", "50"]}
ARMS = {"next-token loss": ["--kl-weight", "0", "--ce-weight", "1"],
        "forward-kl": [],
        "reverse-kl": ["--loss", "reverse-kl"],
        "jsd, beta 0.5": ["--loss", "jsd"], "skew-kl, alpha 0.1": ["--loss", "skew-kl"],
        "skew-reverse-kl, alpha 0.1": ["--loss", "skew-reverse-kl"], "adaptive-kl": ["--loss", "adaptive-kl"],
        "forward-kl, hidden states": ["--hidden-weight", "1"], "forward-kl, attention": ["--attention-weight", "1"],
        "forward-kl, both": ["--hidden-weight", "1", "--attention-weight", "1"], **CACHES}

COMPARED = ("next-token loss", "forward-kl")  # with the caches: what the claims are about


def mean_and_error(values):
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "stderr_over_seeds": error}


def of_losses(runs, bytes_per_token):
    by_arm = {}
    for run in runs:
        by_arm.setdefault(run["arm"], []).append(run)
    means = {arm: {key: mean_and_error([r[key] for r in of]) for key in ("kl", "loss")} for arm, of in by_arm.items()}
    live = {r["seed"]: r["kl"] for r in by_arm["forward-kl"]}  # each seed against the live teacher of the same seed
    against_live = {arm: mean_and_error([r["kl"] / live[r["seed"]] - 1 for r in by_arm[arm]]) for arm in CACHES}
    table = [[arm, *[m[key][part] if m[key][part] is not None else "one seed"
                     for key in ("kl", "loss") for part in ("mean", "stderr_over_seeds")]] for arm, m in means.items()]
    for row in table:
        print(f"{row[0]:28} KL {row[1]:.5f} +- {row[2]}, loss {row[3]:.4f} +- {row[4]}")
    for arm, ratio in against_live.items():
        print(f"{arm:28} KL {100 * ratio['mean']:+.2f} % from the live teacher's, +- {ratio['stderr_over_seeds']}")
    return {"columns": ["student", "KL to the teacher", "over seeds", "held-out loss", "over seeds"], "table": table,
            "means": means, "caches_against_live": against_live, "bytes_per_token": bytes_per_token, "runs": runs}


def of_cost(times):
    cost = {}
    for name, rounds in times.items():
        cost[name] = {key: statistics.median([r[key] for r in rounds]) for key in ("processor_ms", "wall_ms")}
        cost[name]["of_next_token_loss"] = statistics.median(
            [r["processor_ms"] / b["processor_ms"] for r, b in zip(rounds, times["next-token loss"])])
        print(f"{name:28} {cost[name]['processor_ms']:.1f} ms of processor a step, "
              f"{cost[name]['of_next_token_loss']:.3f} of next-token loss")
    return {"step_cost": cost, "step_times": times, "load_average_of_cost": os.getloadavg()[1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("pare", "teacher", "text", "held_out", "out"):
        parser.add_argument(name)
    parser.add_argument("--part", choices=["all", "losses", "cost"], default="all")
    parser.add_argument("--student", default="--layers 2", help="options of prune --method shape")
    parser.add_argument("--tokens", type=int, default=300000)
    parser.add_argument("--lr", default="1e-3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--other-seeds", type=int, default=3, help="seeds of the losses beside forward-kl")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--eval-tokens", default="32768")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; timing has one")
    args = parser.parse_args()
    per_step = args.context * args.batch

    def distill(work, arm, seed, tokens, held_out):
        out = os.path.join(work, f"model.{arm}.{seed}")
        command = [args.pare, "distill", "--teacher", args.teacher, "--model", args.pruned, "--text", args.text,
                   "--tokens", str(tokens), "--context", str(args.context), "--batch", str(args.batch), "--lr", args.lr,
                   "--weight-decay", "0", "--dtype", "float32", "--seed", str(seed), "--threads", "1", "--out", out,
                   "--json", "--quiet", *ARMS[arm]]
        if arm in CACHES:
            command += ["--cache", os.path.join(work, f"{list(CACHES).index(arm)}.{seed}.h5")]
        if held_out:
            command += ["--held-out", args.held_out, "--final-eval-tokens", args.eval_tokens]
        start = time.monotonic()
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(command, stdout=said)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"exit {process.returncode}: {' '.join(command)}")
            wall = time.monotonic() - start
            said.seek(0)
            result = json.load(said)["result"]
        shutil.rmtree(out)
        return result, used.ru_utime + used.ru_stime, wall

    def losses(work):
        runs, bytes_per_token = [], {}

        def one(job):
            seed, arm = job
            result, _, _ = distill(work, arm, seed, args.tokens, True)
            held = next(iter(result["held_out"].values()))
            if arm == "next-token loss":
                runs.append({"arm": "untouched cut", "seed": seed, "kl": held["kl_before"],
                             "loss": held["before"]["loss"]})
            runs.append({"arm": arm, "seed": seed, "kl": held["kl_after"], "loss": held["after"]["loss"],
                         "kl_stderr": held["kl_standard_error"], "scored": held["after"]["tokens"]})
            if arm in CACHES:
                bytes_per_token[arm] = result["cache"]["bytes_per_id"]
            print(f"seed {seed} {arm}: KL {held['kl_after']:.5f}, loss {held['after']['loss']:.4f}", flush=True)

        jobs = [(seed, arm) for i, seed in enumerate(args.seeds) for arm in ARMS
                if arm in CACHES or arm in COMPARED or i < args.other_seeds]
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(one, jobs))
        order = ["untouched cut", *ARMS]
        runs.sort(key=lambda r: (order.index(r["arm"]), r["seed"]))
        return of_losses(runs, bytes_per_token)

    def cost(work):
        timed = [*COMPARED, *CACHES]
        few, many = 10 * per_step, 60 * per_step
        for arm in timed:
            distill(work, arm, args.seeds[0], few, False)  # makes the caches
        times = {arm: [] for arm in timed}
        for _ in range(args.rounds):
            for arm in timed:
                short, long = (distill(work, arm, args.seeds[0], tokens, False) for tokens in (few, many))
                times[arm].append({"processor_ms": 1000 * (long[1] - short[1]) / 50,
                                   "wall_ms": 1000 * (long[2] - short[2]) / 50})
        return of_cost(times)

    folder = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    machine = next((l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "unknown")
    result = json.load(open(args.out)) if args.part != "all" and os.path.exists(args.out) else {}
    command = "tests/bench/distill_losses.py build/pare TEACHER TEXT HELD_OUT OUT.json"
    result.update({
        "benchmark": "distill_losses", "command": command,
        "commit": git.stdout.strip() or "unknown", "machine": machine,
        "teacher": os.path.basename(args.teacher.rstrip("/")), "student": args.student,
        "text": os.path.basename(args.text), "held_out": os.path.basename(args.held_out), "tokens": args.tokens,
        "context": args.context, "batch": args.batch, "lr": float(args.lr), "eval_tokens": int(args.eval_tokens),
        "seeds": args.seeds})
    with tempfile.TemporaryDirectory() as work:
        args.pruned = os.path.join(work, "student")
        subprocess.run([args.pare, "prune", "--model", args.teacher, "--out", args.pruned, "--method", "shape",
                        *args.student.split(), "--text", args.text, "--quiet", "--json"], check=True,
                       stdout=subprocess.DEVNULL)
        if args.part != "cost":
            result.update(losses(work))
        if args.part != "losses":
            result.update(cost(work))
    with open(args.out, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
