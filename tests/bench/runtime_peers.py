#!/usr/bin/env python3
"""Speed of the runtime beside llama.cpp and ik_llama.cpp: the same shapes, the same codes, interleaved in one run.

usage: runtime_peers.py --pare PARE --work FOLDER --out FILE.json [--llama llama-bench] [--ik llama-bench]
                        [--shapes A,B] [--codecs q4,q8] [--threads 2,1] [--rounds 5] [--prompt 512] [--tokens 64]
                        [--depth N] [--kernels avx2] [--cpu-time [--repeats 1]] [--most-stolen 0.02]

Makes what the work folder lacks: random weights in a published shape (`pare new`), rounded once (q4 or q8 in groups
of 32, embedding and head q8), written as a compact file and, the same codes, as GGUF, so that all programs read the
same bytes a token. PARE is the full program. Then, round by round, every program measures prefill and decode once, one
after the other; medians are over rounds. With --kernels the instruction set is forced, and the peers are expected to
be built for the same one. A run in which other guests of the machine took more than --most-stolen of the processors'
time is made again, up to five times, whichever program it is of; the least disturbed one counts. All files are dropped
from memory first: each program reads its own in its own way.

With --cpu-time, for a machine that is busy with other things, a second is one that the program had a processor, and
only one thread is measured: start, loading and warm-up drop out of the difference between one repetition and
--repeats more. Limits of the machine are then the best of their runs instead of the median.

ik_llama.cpp repacks weights at start (-rtr 1), which is its faster way; llama.cpp does it by itself where it can.
"""
import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

root = pathlib.Path(__file__).resolve().parents[2]
TOKENIZERS = {"SmolLM2-135M": "smollm", "Qwen2.5-0.5B": "qwen2", "Llama-3.2-1B": "llama3"}


def run(command, **more):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **more)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def cpu_seconds(command, environment=None):
    """Seconds of processor time of the whole program, and what it printed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=errors, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for stream in (out, errors):
            stream.seek(0)
        if process.returncode != 0:
            sys.exit(f"{' '.join(map(str, command))}: exit {process.returncode}\n{errors.read()[-2000:].decode()}")
        return used.ru_utime + used.ru_stime, out.read().decode()


def prepare(pare, work, shape, codec):
    """The compact file and the GGUF file of the same codes."""
    tokenizer = work / f"tokenizer-{TOKENIZERS[shape]}"
    tokenizer.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / "tests/golden/tokenizers" / f"{TOKENIZERS[shape]}.json", tokenizer / "tokenizer.json")
    folder, rounded = work / shape, work / f"{shape}-{codec}"
    compact, gguf = work / f"{shape}-{codec}.pare", work / f"{shape}-{codec}.gguf"
    if not (compact.exists() and gguf.exists()):
        if not rounded.exists():
            if not folder.exists():
                run([pare, "new", shape, "--tokenizer", tokenizer, "--out", folder, "-q"])
            run([pare, "quantize", "--model", folder, "--out", rounded, "--codec", codec, "--method", "rtn-absmax",
                 "-q"])
        for target, path in (("compact", compact), ("gguf", gguf)):
            if not path.exists():
                run([pare, "export", rounded, "--to", target, "--out", path, "-q"])
    return compact, gguf


def drop_from_memory(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def stolen_seconds():
    """Processor time that other guests of the machine took while programs here wanted it, since the start."""
    for line in open("/proc/stat"):
        if line.startswith("cpu "):
            return int(line.split()[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0


class Programs:
    def __init__(self, arguments):
        self.arguments = arguments
        self.names = ["pare"] + [name for name in ("llama", "ik") if getattr(arguments, name)]

    def measure_cpu(self, name, compact, gguf):
        """As measure, in tokens a second of processor time, one thread."""
        a = self.arguments
        environment = dict(os.environ, PARE_KERNELS=a.kernels) if a.kernels and name == "pare" else None
        rates, told = [], {}
        for tokens, lengths in ((a.prompt, ["-p", a.prompt, "-n", 0]), (a.tokens, ["-p", 0, "-n", a.tokens])):
            seconds = []
            for repeats in (1, 1 + a.repeats):
                if name == "pare":
                    command = [a.pare, "bench", compact, "-q", "--json", "-t", 1, *lengths, "-r", repeats]
                else:
                    command = [getattr(a, name), "-m", gguf, "-t", 1, *lengths, "-r", repeats, "-o", "json"]
                    command += ["-rtr", 1] if name == "ik" else []
                used, out = cpu_seconds(command, environment)
                seconds.append(used)
            rates.append(tokens * a.repeats / (seconds[1] - seconds[0]))
            if name == "pare":
                told = json.loads(out)["result"]
        if name != "pare":
            return (*rates, {})
        # Prefill of one token: only the machine is of interest.
        roofs = json.loads(run([a.pare, "bench", compact, "-q", "--json", "-t", 1, "-p", 1, "-n", 0, "-r", 1,
                                "--roofline"], env=environment))["result"]["machine"]
        roof = next(m for m in roofs if m["threads"] == 1)
        row = told["results"][0]
        row["prefill_peak_share"] = (2 * told["block_weights_per_token"] * rates[0] /
                                     roof[told["limit"] + "_operations_per_second"]["best"])
        row["decode_read_share"] = told["bytes_per_token"] * rates[1] / roof["read_bytes_per_second"]["best"]
        return (*rates, {"row": row, "roof": roof, "bytes_per_token": told["bytes_per_token"], "limit": told["limit"],
                         "kernels": told["kernels"]})

    def read_files(self, compact, gguf):
        """Brings the files back into memory, each as its program reads it."""
        for name in self.names:
            if name == "pare":
                run([self.arguments.pare, "bench", compact, "-q", "-p", 1, "-n", 0, "-r", 1])
            else:
                run([getattr(self.arguments, name), "-m", gguf, "-p", 1, "-n", 0, "-r", 1])

    def measure(self, name, compact, gguf, threads):
        """(prefill, decode) tokens/s and what else the program says, of one short run."""
        a = self.arguments
        if a.cpu_time:
            return self.measure_cpu(name, compact, gguf)
        if name == "pare":
            environment = dict(os.environ, PARE_KERNELS=a.kernels) if a.kernels else None
            told = json.loads(run([a.pare, "bench", compact, "-q", "--json", "-t", threads, "-p", a.prompt,
                                   "-n", a.tokens, "-r", 1, "--depth", a.depth, "--roofline"], env=environment))
            told = told["result"]
            row = told["results"][0]
            roof = next(m for m in told["machine"] if m["threads"] == threads)
            return (row["prefill_tokens_per_second"]["median"], row["decode_tokens_per_second"]["median"],
                    {"row": row, "roof": roof, "bytes_per_token": told["bytes_per_token"], "limit": told["limit"],
                     "kernels": told["kernels"]})
        command = [getattr(a, name), "-m", gguf, "-t", threads, "-r", 1, "-o", "json"]
        command += ["-rtr", 1] if name == "ik" else []
        rates = {}
        if a.depth and name == "ik":  # it has no depth: a prompt and tokens after it, less the prompt alone
            tests = json.loads(run(command + ["-p", a.depth, "-n", 0, "-pg", f"{a.depth},{a.tokens}"]))
            seconds = {(t["n_prompt"], t["n_gen"]): t["avg_ns"] * 1e-9 for t in tests}
            rates["tg"] = a.tokens / (seconds[a.depth, a.tokens] - seconds[a.depth, 0])
            tests = json.loads(run(command + ["-p", a.prompt, "-n", 0]))
        else:
            tests = json.loads(run(command + ["-p", 0, "-n", a.tokens, "-d", a.depth])) if a.depth else []
            for test in tests:
                rates["tg"] = test["avg_ts"]
            tests = json.loads(run(command + ["-p", a.prompt, "-n", 0 if a.depth else a.tokens]))
        for test in tests:
            rates["pp" if test["n_gen"] == 0 else "tg"] = test["avg_ts"]
        return rates["pp"], rates["tg"], {}


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def share_text(values):
    return f"{100 * statistics.median(values):.0f} %"


def undisturbed(measure, a):
    """What `measure` gives, a tuple, and the share of the processors' time that was stolen meanwhile: measured again, five
    times at most, where that is above --most-stolen; then the least disturbed one."""
    tried = []
    while not tried or (tried[-1][-1] > a.most_stolen and len(tried) < 5):
        stolen, began = stolen_seconds(), time.monotonic()
        result = measure()
        tried.append((*result, (stolen_seconds() - stolen) / (time.monotonic() - began) / os.cpu_count()))
    return min(tried, key=lambda t: t[-1])


def case(programs, shape, codec, threads, compact, gguf):
    a = programs.arguments
    samples = {name: {"prefill": [], "decode": []} for name in programs.names}
    taken = {name: [] for name in programs.names}
    shares = {"prefill": [], "decode": [], "file": []}
    about = {}
    for round_number in range(a.rounds):
        order = programs.names if round_number % 2 == 0 else programs.names[::-1]
        for name in order:
            prefill, decode, more, stolen = undisturbed(lambda: programs.measure(name, compact, gguf, threads), a)
            taken[name].append(stolen)
            samples[name]["prefill"].append(prefill)
            samples[name]["decode"].append(decode)
            if more:
                about = more
                shares["prefill"].append(more["row"]["prefill_peak_share"])
                shares["decode"].append(more["row"]["decode_read_share"])
                if "decode_file_share" in more["row"]:
                    shares["file"].append(more["row"]["decode_file_share"])
            print(f"{shape} {codec} {threads} threads, round {round_number + 1}: {name} {prefill:.1f} {decode:.2f}",
                  file=sys.stderr, flush=True)
    result = {"shape": shape, "codec": codec, "threads": threads, "samples": samples, "shares": shares, "stolen": taken,
              "bytes_per_token": about["bytes_per_token"], "kernels": about["kernels"], "limit": about["limit"],
              "last_run": {"row": about["row"], "roof": about["roof"]}}
    return summed_up(result)


def summed_up(case):
    """The case with what follows from its samples."""
    samples = case["samples"]
    for name in samples:
        case[name] = {what: spread(values) for what, values in samples[name].items()}
        if name != "pare":  # of the runs side by side, not of the medians
            case[name]["ratio"] = {
                what: statistics.median(a / b for a, b in zip(samples["pare"][what], samples[name][what]))
                for what in ("prefill", "decode")}
    return case


SETTINGS = ("machine", "peers", "prompt", "tokens", "depth", "most_stolen", "cpu_time", "repeats")


def pool(files, out):
    """All rounds of several runs with the same settings, none left out."""
    runs = [json.loads(pathlib.Path(file).read_text()) for file in files]
    cases = {}
    for file, told in zip(files, runs):
        for setting in SETTINGS:
            if told.get(setting) != runs[0].get(setting):
                sys.exit(f"{file}: {setting} is {told.get(setting)}, in {files[0]} it is {runs[0].get(setting)}")
        for case in told["cases"]:
            have = cases.setdefault((case["shape"], case["codec"], case["threads"]), case)
            if have is case:
                continue
            if (have["kernels"], have["limit"], list(have["samples"])) != (
                    case["kernels"], case["limit"], list(case["samples"])):
                sys.exit(f"{file}: {case['shape']}: other kernels or programs than before")
            for name, samples in case["samples"].items():
                for what, values in samples.items():
                    have["samples"][name][what] += values
                have["stolen"][name] += case["stolen"][name]
            for what, values in case["shares"].items():
                have["shares"].setdefault(what, []).extend(values)
            have["last_run"] = case["last_run"]
    cases = [summed_up(case) for case in cases.values()]
    columns, rows = table(cases, list(cases[0]["samples"]))
    whole = {"command": runs[-1]["command"].split(" --out")[0] + ", runs pooled with --pool", "commit": runs[-1]["commit"],
             **{setting: runs[0].get(setting) for setting in SETTINGS},
             "rounds": max(len(case["samples"]["pare"]["prefill"]) for case in cases), "cases": cases,
             "columns": columns, "table": rows}
    out.write_text(json.dumps(whole, indent=1) + "\n")


def table(cases, names):
    titles = {"llama": "llama.cpp", "ik": "ik_llama.cpp"}
    columns = ["shape", "codec", "threads", "prefill, tokens/s", "of the peak", "decode, tokens/s", "of the bandwidth"]
    with_file = any(c["shares"].get("file") for c in cases)
    if with_file:
        columns.append("of reading the file")
    for name in names[1:]:
        columns += [f"prefill over {titles[name]}", f"decode over {titles[name]}"]
    rows = []
    for c in cases:
        prefill, decode = c["pare"]["prefill"]["median"], c["pare"]["decode"]["median"]
        row = [c["shape"], c["codec"], c["threads"], round(prefill), share_text(c["shares"]["prefill"]),
               round(decode, 1), share_text(c["shares"]["decode"])]
        if with_file:
            row.append(share_text(c["shares"]["file"]) if c["shares"].get("file") else "-")
        for name in names[1:]:
            row += [f"{c[name]['ratio'][what]:.2f}x" for what in ("prefill", "decode")]
        rows.append(row)
    return columns, rows


def commit_of(folder):
    told = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return told.stdout.strip()


def processor():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pare", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path)
    parser.add_argument("--pool", nargs="+", metavar="RUN.json",
                        help="measure nothing: all rounds of these runs, which must have the same settings, in one --out")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--llama", type=pathlib.Path)
    parser.add_argument("--ik", type=pathlib.Path)
    parser.add_argument("--shapes", default=",".join(reversed(TOKENIZERS)))
    parser.add_argument("--codecs", default="q4,q8")
    parser.add_argument("--threads", default="2,1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--kernels", default="")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--most-stolen", type=float, default=0.02,
                        help="share of processor time that other guests of the machine may take in a run [0.02]")
    parser.add_argument("--peers", default="", help="versions of the peers, for the record")
    arguments = parser.parse_args()
    if arguments.pool:
        return pool(arguments.pool, arguments.out)
    if not arguments.pare or not arguments.work:
        parser.error("--pare and --work, or --pool")
    if arguments.cpu_time and (arguments.threads != "1" or arguments.depth):
        parser.error("--cpu-time goes with --threads 1 and without --depth")
    arguments.work.mkdir(parents=True, exist_ok=True)
    programs = Programs(arguments)
    cases = []
    for shape in arguments.shapes.split(","):
        for codec in arguments.codecs.split(","):
            files = prepare(arguments.pare, arguments.work, shape, codec)
            for path in files:
                drop_from_memory(path)
            programs.read_files(*files)
            for threads in map(int, arguments.threads.split(",")):
                cases.append(case(programs, shape, codec, threads, *files))
                columns, rows = table(cases, programs.names)
                arguments.out.write_text(json.dumps({
                    "command": "python3 tests/bench/runtime_peers.py --pare build/pare --work WORK --llama LLAMA_BENCH "
                               "--ik IK_LLAMA_BENCH --out " + arguments.out.name +
                               (" --cpu-time --threads 1" if arguments.cpu_time else ""),
                    "commit": commit_of(root), "machine": f"{os.cpu_count()} cores, {processor()}",
                    "peers": arguments.peers, "prompt": arguments.prompt, "tokens": arguments.tokens,
                    "depth": arguments.depth, "most_stolen": arguments.most_stolen, "cpu_time": arguments.cpu_time,
                    "repeats": arguments.repeats,
                    "rounds": arguments.rounds, "cases": cases,
                    "columns": columns, "table": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
