#!/usr/bin/env python3
"""Compares `pare train-tokenizer` with the reference's BpeTrainer (vocabulary and merges) and loads the folder in transformers.

usage: tokenizers_train.py PARE TEXT_FILE... [--vocab-size N]
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("pare")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--vocab-size", type=int, default=2048)
    args = parser.parse_args()
    documents = []
    for file in args.files:
        with open(file, "rb") as source:
            text = source.read().decode("utf-8", "replace")
        documents += [d for d in (part.strip(" \t\r\n\f\v") for part in text.split("<|endoftext|>")) if d]
    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.train_from_iterator(documents, trainers.BpeTrainer(
        vocab_size=args.vocab_size, min_frequency=2, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    theirs = json.loads(reference.to_str())["model"]
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "tokenizer")
        subprocess.run([args.pare, "train-tokenizer", "--text", *args.files, "--split", "<|endoftext|>", "--vocab-size",
                        str(args.vocab_size), "--out", out], check=True)
        with open(os.path.join(out, "tokenizer.json"), encoding="utf-8") as file:
            ours = json.load(file)["model"]
        loaded = AutoTokenizer.from_pretrained(out)
        sample = documents[0][:2000]
        same = {"vocabulary": ours["vocab"] == theirs["vocab"],
                "merges": [m.split(" ") for m in ours["merges"]] == [list(m) for m in theirs["merges"]],
                "transformers": loaded.decode(loaded(sample).input_ids) == sample and loaded.eos_token_id == 0}
    print(same, len(theirs["merges"]), "merges")
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
