#!/usr/bin/env python3
"""Small tokenizer.model files trained by sentencepiece, with the ids that sentencepiece and transformers give.

usage: make_sentencepiece.py [--out FOLDER]

Writes NAME.model and NAME.jsonl under sentencepiece/ next to this script. A line holds a text and
  sp      ids of sentencepiece itself
  legacy  ids of transformers' converter with `legacy: true` (LlamaConverter; GemmaConverter's rules for gemma)
  first   ids of transformers' LlamaTokenizerFast, loaded from a folder that has tokenizer.model and `legacy: false`
without beginning-of-sequence token; `legacy` and `first` are left out where they equal `sp`.

The converter is transformers' own, with one part replaced: in transformers 5 its merge extraction can no longer be
called from the converters. What stands in its place orders merges by score, as older versions did and as Llama 2's
published tokenizer.json shows, and within one piece as generate_merges does today.

`first` is written for two models only. On the others transformers 5.23 departs from sentencepiece and from published
tokenizer.json files, and pare follows those: its class orders merges by id where scores say otherwise (llama_spaces),
has no unknown token (no_bytes) and ignores remove_extra_whitespaces (trimmed; so does the converter, so that model has
no `legacy` either).
"""
import argparse
import json
import os
import sys
import tempfile
from types import SimpleNamespace

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as pb
from transformers import LlamaTokenizerFast
from transformers.convert_slow_tokenizer import GemmaConverter, LlamaConverter, generate_merges

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "interop")]
from make_tokenizers import STRINGS, TEXT  # noqa: E402
from tokenizers_fuzz import SPACES, TRICKY, WORDS  # noqa: E402

GEMMA = ["<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<table>"]
MODELS = {
    "llama": dict(add_dummy_prefix=True),
    # As in Llama 2: runs of spaces stand early among the ids and last among the scores.
    "llama_spaces": dict(add_dummy_prefix=True),
    "gemma": dict(add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
                  bos_piece="<bos>", user_defined_symbols=GEMMA),
    "user": dict(add_dummy_prefix=True, user_defined_symbols=["<x>", "the", "  ", "\n\n"], control_symbols=["<|ctl|>"]),
    "no_bytes": dict(add_dummy_prefix=True, byte_fallback=False, vocab_size=360),
    "trimmed": dict(add_dummy_prefix=True, remove_extra_whitespaces=True),
    "unigram": dict(model_type="unigram", vocab_size=400),
}
EXTRA = ["<x>", "a<x>b", " <x> ", "  x", "x  y   z    w", "\n\n\n\nx\n\n", "other the then", "<|ctl|>", "<table><mask>",
         "<start_of_turn>user\nHi<end_of_turn>", "\t\t", "x\n  y\n    z", "   ▁ ", "▁▁▁", "ababababa aaaaaaa", "hello<s>",
         "</s>", "<unk>", "<0x0A>", "\u0000", "a\u0000b", " \n ", "   ", "        return x"]


def train(path, **options):
    defaults = dict(vocab_size=600, model_type="bpe", byte_fallback=True, character_coverage=0.98,
                    normalization_rule_name="identity", remove_extra_whitespaces=False,
                    allow_whitespace_only_pieces=True, split_digits=True, num_threads=1, minloglevel=2,
                    hard_vocab_limit=False)
    with tempfile.TemporaryDirectory() as folder:
        text = os.path.join(folder, "text")
        with open(text, "w", encoding="utf-8") as out:
            # Lines are sentences to the trainer; indented ones teach it runs of spaces.
            out.write(TEXT * 3 + "        x = y;\n    a  b   c\n" * 4)
        spm.SentencePieceTrainer.train(input=text, model_prefix=path[:-len(".model")], **dict(defaults, **options))
    os.remove(path[:-len(".model")] + ".vocab")
    proto = read(path)
    proto.trainer_spec.ClearField("input")  # names of files of the machine
    proto.trainer_spec.ClearField("model_prefix")
    if os.path.basename(path) == "llama_spaces.model":
        for piece in proto.pieces:
            if len(piece.piece) > 1 and not piece.piece.strip("▁"):
                piece.score = -1e9
    with open(path, "wb") as out:
        out.write(proto.SerializeToString(deterministic=True))


def read(path):
    proto = pb.ModelProto()
    with open(path, "rb") as file:
        proto.ParseFromString(file.read())
    return proto


class Extractor:
    """Stands where the converters expect the extraction of merges."""
    def __init__(self, file):
        self.proto = read(file)

    def extract(self, vocab_scores):
        # Without scores generate_merges sorts by the number that stands for the piece: here its place by score.
        scores = dict(vocab_scores)
        by_score = sorted(scores, key=lambda piece: -scores[piece])
        return None, generate_merges({piece: place for place, piece in enumerate(by_score)}, None)


def converted(path, legacy, gemma=False, prefix=True):
    """The reference for `legacy: true`: transformers' converter."""
    proto = read(path)
    names = [piece.piece for piece in proto.pieces]
    special = dict(pad_token=names[0], eos_token=names[1], bos_token=names[2])
    original = SimpleNamespace(vocab_file=path, legacy=legacy, add_prefix_space=prefix,
                               convert_ids_to_tokens=lambda i: names[i], **special)
    kind = GemmaConverter if gemma else LlamaConverter
    converter = type("Converter", (kind,), {"SpmExtractor": Extractor})(original)
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    if not gemma:  # the class gives the first three pieces the score 0, which is what they have
        converter.vocab = lambda proto: scores
    tokenizer = converter.converted()
    tokenizer.add_special_tokens([names[proto.trainer_spec.unk_id]])
    return tokenizer


def fast(path, **config):
    with tempfile.TemporaryDirectory() as folder:
        with open(path, "rb") as file, open(os.path.join(folder, "tokenizer.model"), "wb") as out:
            out.write(file.read())
        with open(os.path.join(folder, "tokenizer_config.json"), "w") as out:
            json.dump(dict(tokenizer_class="LlamaTokenizer", **config), out)
        return LlamaTokenizerFast.from_pretrained(folder)._tokenizer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=os.path.join(HERE, "sentencepiece"))
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    spaces = ["x".join(SPACES[i::5]) for i in range(5)]
    strings = list(dict.fromkeys(STRINGS + EXTRA + TRICKY + spaces + [" ".join(WORDS)]))
    for name, options in MODELS.items():
        path = os.path.join(args.out, name + ".model")
        train(path, **options)
        if name == "unigram":
            continue
        library = spm.SentencePieceProcessor(model_file=path)
        legacy = converted(path, True, name == "gemma")
        first = fast(path, legacy=False) if name in ("llama", "user") else None
        with open(os.path.join(args.out, name + ".jsonl"), "w", encoding="utf-8") as out:
            for text in strings:
                case = {"text": text, "sp": library.encode(text)}
                if name != "trimmed":
                    case["legacy"] = legacy.encode(text, add_special_tokens=False).ids
                if first:
                    case["first"] = first.encode(text, add_special_tokens=False).ids
                case = {k: v for k, v in case.items() if k in ("text", "sp") or v != case["sp"]}
                out.write(json.dumps(case, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
