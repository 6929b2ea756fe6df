#!/usr/bin/env python3
"""What a long context and several sequences do to decoding, and what a session takes in memory.

usage: runtime_context.py --pare PARE --work FOLDER --out FILE.json [--shapes A,B] [--codecs q4,q8] [--threads 2,1]
                          [--rounds 3] [--depth 4096] [--sequences 8] [--tokens 32] [--most-stolen 0.02]

Random weights in a published shape, as runtime_peers.py makes them; the same work folder may be given. PARE is the full
program or, if the files are there already, pare-edge, whose memory is the session's alone (LibTorch takes 150 MB).
Round by round one sequence is decoded behind no context, one behind --depth tokens, and --sequences together behind
none, one after the other, every second round the other way round, and disturbed runs made again (runtime_peers.py);
shares are of the runs of one round, medians over rounds. Memory is the largest resident size
of a run behind --depth tokens against the file and the computed bytes of its cache.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

import runtime_peers

LONG, MANY = "long", "many"


def bench(arguments, file, threads, depth=0, sequences=1):
    """(result of pare bench, its largest resident bytes)."""
    command = [arguments.pare, "bench", file, "-q", "--json", "-t", threads, "-p", 0, "-n", arguments.tokens, "-r", 1,
               "--depth", depth, "--sequences", sequences]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE)
    out = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit {process.returncode}")
    return json.loads(out)["result"], used.ru_maxrss * 1024


def case(arguments, shape, codec, threads, file):
    rates, peak, told = {1: [], LONG: [], MANY: []}, 0, None
    for number in range(arguments.rounds):
        runs = [(1, {}), (LONG, {"depth": arguments.depth}), (MANY, {"sequences": arguments.sequences})]
        for what, more in runs if number % 2 == 0 else runs[::-1]:
            result, resident, _ = runtime_peers.undisturbed(lambda: bench(arguments, file, threads, **more), arguments)
            rates[what].append(result["results"][0]["decode_tokens_per_second"]["median"])
            if what == LONG:
                peak, told = max(peak, resident), result
            print(f"{shape} {codec} {threads} threads, round {number + 1}: {what} {rates[what][-1]:.1f}", file=sys.stderr,
                  flush=True)
    share = lambda what: [x / one for x, one in zip(rates[what], rates[1])]
    wanted = told["file_bytes"] + told["results"][0]["cache_bytes"]
    return {"shape": shape, "codec": codec, "threads": threads, "kernels": told["kernels"], "kv": told["kv"],
            "tokens_per_second": {"alone": rates[1], "behind_depth": rates[LONG], "together": rates[MANY]},
            "long": statistics.median(share(LONG)), "long_range": [min(share(LONG)), max(share(LONG))],
            "together": statistics.median(share(MANY)), "together_range": [min(share(MANY)), max(share(MANY))],
            "file_bytes": told["file_bytes"], "cache_bytes": told["results"][0]["cache_bytes"], "peak_bytes": peak,
            "over": peak / wanted - 1}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pare", required=True, type=pathlib.Path)
    parser.add_argument("--work", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--shapes", default="Llama-3.2-1B")
    parser.add_argument("--codecs", default="q4,q8")
    parser.add_argument("--threads", default="2,1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--most-stolen", type=float, default=0.02)
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    cases = []
    for shape in a.shapes.split(","):
        for codec in a.codecs.split(","):
            file, _ = runtime_peers.prepare(a.pare, a.work, shape, codec)
            for threads in map(int, a.threads.split(",")):
                cases.append(case(a, shape, codec, threads, file))
    percent = lambda value: f"{100 * value:.1f} %"
    table = [[c["shape"], c["codec"], c["threads"], round(statistics.median(c["tokens_per_second"]["alone"]), 1),
              f"{c['long']:.2f} ({c['long_range'][0]:.2f} .. {c['long_range'][1]:.2f})",
              f"{c['together']:.2f} ({c['together_range'][0]:.2f} .. {c['together_range'][1]:.2f})", percent(c["over"])]
             for c in cases]
    a.out.write_text(json.dumps({
        "command": f"python3 tests/bench/runtime_context.py --pare {a.pare.name} --work WORK --out {a.out.name}",
        "commit": runtime_peers.commit_of(runtime_peers.root), "machine": f"{os.cpu_count()} cores, "
        f"{runtime_peers.processor()}", "depth": a.depth, "sequences": a.sequences, "tokens": a.tokens, "rounds": a.rounds,
        "cases": cases, "columns": ["shape", "codec", "threads", "decode, tokens/s", f"behind {a.depth} tokens, share",
                                    f"{a.sequences} sequences together, times", "memory over file and cache"],
        "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
