#!/usr/bin/env python3
"""A student of one domain against its larger general teacher: the tiny teacher is cut to two thirds of its parameters,
learns from CMake's manual and from the teacher, and is rounded to int4, embedding included. Scored on held-out pages of
the manual and on held-out novels, which it was not made for.

  tests/bench/domain.py PARE TEACHER TEXTS OUT.json WORK [--seed N]

TEXTS: the folder that examples/teacher/make_text.sh writes. What WORK holds already is not made again. Differences are
paired over documents; with the novels these are two, whose standard error says little.
"""
import argparse
import json
import pathlib
import subprocess
import sys

LEARN = ["--tokens", "4096000", "--ce-weight", "1", "--kl-weight", "0.3", "--lr", "2e-3", "--min-lr-ratio", "0.02",
         "--weight-decay", "0.1", "--precision", "bf16", "--eval-every", "100"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pare", "teacher", "texts", "out", "work"):
        parser.add_argument(name, type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    manual, held = given.texts / "manual", given.texts / "manual_held_out"
    given.work.mkdir(parents=True, exist_ok=True)
    commands = []

    def pare(*words):
        done = subprocess.run([str(w) for w in (given.pare, *words, "--json", "--quiet")], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"pare {' '.join(map(str, words))}: exit {done.returncode}\n{done.stderr[-1000:]}")
        return json.loads(done.stdout)["result"]

    def stage(name, *words):
        out = given.work / name
        shown = " ".join(map(str, words)).replace(str(given.texts), "TEXTS").replace(str(given.work), "WORK")
        commands.append(f"pare {shown} --out WORK/{name}".replace(str(given.teacher), "examples/teacher"))
        if not out.exists():
            pare(*words, "--out", out)
        return out

    cut = stage("cut", "prune", "--model", given.teacher, "--method", "shape", "--max-params", 1150000, "--text", manual,
                "--samples", 64, "--seed", given.seed)
    student = stage("student", "distill", "--teacher", given.teacher, "--model", cut, "--text", manual, "--held-out", held,
                    *LEARN, "--seed", given.seed)
    rounded = stage("int4", "quantize", "--model", student, "--preset", "balanced", "--codec", "q4", "--embedding-codec",
                    "q4", "--text", manual, "--samples", 64, "--seed", given.seed)
    file = stage("student.pare", "export", rounded, "--to", "compact")

    weights = (given.teacher / "model.safetensors").stat().st_size
    runs, table = {}, []
    subjects = {"cut to 1.15 M parameters": cut, "after 4.1 M tokens of the manual": student, "that in int4": file}
    for name, subject in subjects.items():
        size = file.stat().st_size if subject is file else (subject / "model.safetensors").stat().st_size
        run = runs[name] = {"bytes": size, "of_the_teacher": size / weights}
        for text in ("manual", "novels"):
            words = ["eval", subject, "--against", given.teacher, "--text", given.texts / f"{text}_held_out", "--ctx", 512,
                     "--no-speed"]
            found = pare(*words)["text"]
            run[text] = {"loss": found["compressed"]["loss"], "teacher": found["original"]["loss"],
                         "difference": found["log_perplexity_ratio"], "predictions": found["predictions"],
                         "documents": found["documents"]}
    teacher = runs["that in int4"]
    table.append(["the teacher, bfloat16", weights, "100 %", teacher["manual"]["teacher"]["value"], "", "",
                  teacher["novels"]["teacher"]["value"]])
    for name, run in runs.items():
        table.append([name, run["bytes"], f"{run['of_the_teacher']:.0%}".replace("%", " %"),
                      run["manual"]["loss"]["value"], run["manual"]["difference"]["value"],
                      run["manual"]["difference"]["standard_error"], run["novels"]["loss"]["value"]])
    commit = subprocess.run(["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "--short", "HEAD"],
                            capture_output=True, text=True).stdout.strip()
    with open("/proc/cpuinfo") as file:
        machine = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    result = {"benchmark": "domain", "command": "tests/bench/domain.py build/pare examples/teacher TEXTS OUT.json WORK",
              "commands": commands, "seed": given.seed, "commit": commit, "machine": machine,
              "columns": ["model", "bytes", "of the teacher's", "held-out loss, manual", "less the teacher's",
                          "standard error", "held-out loss, novels"],
              "table": table, "runs": runs}
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
