#!/usr/bin/env python3
"""Compares `pare tokenize --batch` on folders that have tokenizer.model alone with transformers' converter, with
transformers' LlamaTokenizerFast and with sentencepiece itself, on random strings (see tokenizers_fuzz.py).

usage: sentencepiece_fuzz.py PARE [--count N] [--seed S] [--text FILE]

The models and the references are those of tests/golden/make_sentencepiece.py, whose first lines say which reference
counts for which model. Exit code 1 when anything differs.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import unicodedata

import sentencepiece as spm
from tokenizers import processors

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "golden")]
from make_sentencepiece import converted, fast  # noqa: E402
from tokenizers_fuzz import Source, compare  # noqa: E402

MODELS = os.path.join(HERE, "..", "golden", "sentencepiece")


def allowed(char):
    return unicodedata.category(char) != "Cn"


def against_library(pare, folder, reference, count, rng, text):
    """Text without special tokens: the ids of sentencepiece itself."""
    source = Source(rng, reference, text, allowed)
    strings = [source.string() for _ in range(count)]
    requests = "".join(json.dumps({"text": s, "special": False, "parse": False}) + "\n" for s in strings)
    run = subprocess.run([pare, "tokenize", folder, "--batch"], input=requests, capture_output=True, text=True)
    if run.returncode:
        print(run.stderr[-2000:])
        return count
    got = [json.loads(line) for line in run.stdout.split("\n") if line]
    library = spm.SentencePieceProcessor(model_file=os.path.join(folder, "tokenizer.model"))
    wrong = [(s, g, library.encode(s)) for s, g in zip(strings, got) if g != library.encode(s)]
    for string, ours, theirs in sorted(wrong, key=lambda w: len(w[0]))[:8]:
        print("  text", repr(string)[:300], "\n  pare     ", str(ours)[:300], "\n  reference", str(theirs)[:300])
    print(f"{folder}: {len(strings)} strings against sentencepiece, {len(wrong) + len(strings) - len(got)} differ")
    return len(wrong) + len(strings) - len(got)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("pare")
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--text", default=os.path.join(HERE, "..", "..", "README.md"))
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    text = open(args.text, encoding="utf-8", errors="replace").read()
    bad = 0
    with tempfile.TemporaryDirectory() as base:

        def folder(name, kind, **config):
            path = os.path.join(base, name + "-" + kind)
            os.mkdir(path)
            shutil.copy(os.path.join(MODELS, name + ".model"), os.path.join(path, "tokenizer.model"))
            with open(os.path.join(path, "tokenizer_config.json"), "w") as out:
                json.dump(config, out)
            return path

        for name in ["llama", "llama_spaces", "user", "no_bytes", "gemma", "trimmed"]:
            gemma = name == "gemma"
            rng = random.Random(f"{args.seed} {name}")
            path = folder(name, "legacy", tokenizer_class="GemmaTokenizer" if gemma else "LlamaTokenizer")
            reference = converted(os.path.join(path, "tokenizer.model"), True, gemma)
            if name not in ("gemma", "user"):  # a file's own symbols are found in raw text, the library's in normalized
                bad += against_library(args.pare, path, reference, args.count, rng, text)
            if name != "trimmed":
                bos = "<bos>" if gemma else "<s>"
                reference.post_processor = processors.TemplateProcessing(
                    single=f"{bos} $A", special_tokens=[(bos, reference.token_to_id(bos))])
                bad += compare(args.pare, path, args.count, rng, text, allowed, reference)
            if name in ("llama", "user"):
                path = folder(name, "first", tokenizer_class="LlamaTokenizer", legacy=False, add_bos_token=True)
                reference = fast(os.path.join(path, "tokenizer.model"), legacy=False, add_bos_token=True)
                bad += compare(args.pare, path, args.count, rng, text, allowed, reference)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
