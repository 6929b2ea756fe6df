"""lm-evaluation-harness scores a model through `pare serve`; `pare eval` must give the same numbers on the same items.

    lm_eval_client.py PROGRAM [--data FOLDER] [--limit 100]

FOLDER: public task files as jsonl (arc_easy_test, arc_challenge_test, piqa_val, sciq, openbookqa_test, hellaswag,
boolq_val, winogrande_val, lambada_small and a folder blimp); without it, only the items that are made here.
"""
import argparse
import glob
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from served import Served, export

HERE = pathlib.Path(__file__).resolve().parent
TEACHER = HERE.parents[1] / "examples" / "teacher"
PUBLIC = {"arc_easy": "arc_easy_test", "arc_challenge": "arc_challenge_test", "piqa": "piqa_val", "sciq": "sciq",
          "openbookqa": "openbookqa_test", "hellaswag": "hellaswag", "boolq": "boolq_val",
          "winogrande": "winogrande_val", "lambada": "lambada_small"}
CONTEXT = 511  # the harness keeps max_length - 1 ids, pare eval its context and the last target
EXACT = ("acc,none", "acc_norm,none", "acc_bytes,none")


def made_items():
    """Blanks on both sides of the cut, letters of several bytes, contexts that do not fit, ties, special tokens."""
    words = (HERE.parents[1] / "README.md").read_text().split()
    text = lambda i, n: " ".join(words[i:i + n])
    choices, blimp, lambada, winogrande, texts = [], [], [], [], []
    for i in range(60):
        query = text(7 * i, 5 + i) + ("", " ", "\n", " \u00a0 ", "\t")[i % 5]
        foreign = "\u00e9t\u00e9 \u20ac " * (1 + i % 2)
        choices.append({"query": query, "gold": i % 3,
                        "choices": [text(900 + i, 1 + i % 3), " " + text(950 + i, 2), foreign]})
        blimp.append({"sentence_good": text(11 * i, 6), "sentence_bad": text(11 * i, 6 if i % 9 == 0 else 5)})
        lambada.append({"context": text(5 * i, 8) + " " * (i % 3), "continuation": words[5 * i + 8]})
        winogrande.append({"sentence": text(3 * i, 4) + " _ " + text(3 * i + 4, 3) + " " * (i % 2),
                           "option1": words[i], "option2": words[i + 1], "label": i % 2})
    end = "<|endoftext|>"  # special tokens stand for themselves, at the beginning, inside and in what is scored
    for i in range(6):
        query = (end, text(20 * i, 4) + end, end + end + " ")[i % 3] + text(30 * i, 6)
        choices.append({"query": query, "choices": [text(40 * i, 2), text(50 * i, 1) + end, end], "gold": i % 3})
        lambada.append({"context": query, "continuation": (words[i], end)[i % 2]})
        texts.append({"text": end * (i % 2) + text(70 * i, 20) + end + text(80 * i, 10)})
        choices.append({"query": text(100 * i, 400 + 20 * i), "choices": ["a library", "the model"], "gold": 0})
        texts.append({"text": text(60 * i, 40 + 150 * i) + (" \n" if i % 2 else "")})
    return {"arc_easy": choices, "blimp": blimp, "lambada": lambada, "winogrande": winogrande, "text": texts}


def public_items(folder, limit):
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    items = {task: read(folder / "tasks" / f"{name}.jsonl")[:limit] for task, name in PUBLIC.items()}
    pairs = max(1, limit // 20)
    items["blimp"] = [item for path in sorted((folder / "blimp").glob("*.jsonl")) for item in read(path)[:pairs]]
    return items


def by_harness(server, tasks, folder):
    arguments = (f"model=q4,base_url={server.url}/completions,tokenizer={TEACHER},tokenizer_backend=huggingface,"
                 f"num_concurrent=4,max_length={CONTEXT + 2}")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "DISABLE_MULTIPROC": "1"}
    subprocess.run([sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--batch_size", "8",
                    "--model_args", arguments, "--tasks", ",".join(f"pare_{task}" for task in tasks),
                    "--include_path", str(HERE / "lm_eval"), "--output_path", str(folder / "harness")],
                   cwd=folder, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **offline})
    return json.loads(pathlib.Path(glob.glob(str(folder / "harness" / "*" / "results_*.json"))[0]).read_text())


def by_pare(program, model, tasks, folder):
    subprocess.run([program, "eval", str(model), "--quiet", "--no-speed", "--ctx", str(CONTEXT), "--tasks",
                    *(str(folder / f"pare_{task}.jsonl") for task in tasks), "--output-format", "lm-eval",
                    "--output", str(folder / "own")], check=True, stdout=subprocess.DEVNULL)
    return json.loads(pathlib.Path(glob.glob(str(folder / "own" / "*" / "results_*.json"))[0]).read_text())


def compare(title, harness, own):
    compared = 0
    for task, theirs in harness["results"].items():
        ours = own["results"][task]
        assert theirs["sample_len"] == ours["sample_len"], task
        assert harness["n-samples"][task] == own["n-samples"][task], task
        assert harness["higher_is_better"][task].items() <= own["higher_is_better"][task].items(), task
        for key, value in theirs.items():
            if not isinstance(value, float):
                continue
            if key in EXACT:
                assert ours[key] == value, f"{task} {key}: {ours[key]!r}, the harness has {value!r}"
            elif key != "perplexity_stderr,none":  # which the harness draws at random
                assert abs(ours[key] - value) <= 1e-12 * abs(value), f"{task} {key}: {ours[key]!r}, harness {value!r}"
            compared += 1
        print(f"  {title} {task}: {theirs['sample_len']} items, "
              + ", ".join(f"{key.removesuffix(',none')} {value:.4f}" for key, value in theirs.items()
                          if isinstance(value, float) and "stderr" not in key))
    from lm_eval.utils import make_table  # what prints the harness's results prints ours
    table = make_table(own)
    assert all(task in table for task in own["results"]), table
    return compared


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--limit", type=int, default=100)
    given = parser.parse_args()
    sets = {"made": made_items()}
    if given.data:
        sets["public"] = public_items(given.data, given.limit)
    for title, items in sets.items():
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            model = export(given.program, TEACHER, folder / "q4.pare", "--codec", "q4")
            for task, lines in items.items():
                (folder / f"pare_{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            with Served(given.program, model, "--parallel", "8") as server:
                harness = by_harness(server, items, folder)
            figures = compare(title, harness, by_pare(given.program, model, items, folder))
            print(f"ok {title}: {figures} figures", flush=True)


main()
