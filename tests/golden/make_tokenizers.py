#!/usr/bin/env python3
"""Tiny tokenizer.json files trained by the reference library (`tokenizers`), with the ids and texts it gives.

usage: tokenizers.py [--out FOLDER] [--text FILE] [--vocab-size N] [--all]

Without arguments writes the committed fixtures next to this script, under tokenizers/. --all adds the variants that
only the fuzz comparison uses; --text trains on a larger text.
"""
import argparse
import collections
import json
import os
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "interop"))
from tokenizers_fuzz import SPACES, TRICKY, WORDS  # noqa: E402

TEXT = """The quick brown fox jumps over the lazy dog, and the dog doesn't mind. It's 12:30 on the 24th of July, 1969.
Once upon a time there was a little girl who lived in a village near the forest. She'd never been there; they'll go.
for (int i = 0; i < 10; ++i) {\n    total += values[i] * 2;  // sum\n}\nreturn total;\n\n
Die Straße führt über die Brücke. Ça va très bien, merci. El niño comió piñas. Привет, как дела? Хорошо, спасибо.
今日はいい天気ですね。你好，世界。안녕하세요 세계. مرحبا بالعالم. नमस्ते दुनिया. 3.14159, 2.71828, 1,000,000 and 50%.
HELLO WORLD! I'M HERE, YOU'RE THERE. The theory of the thing is that the others gather together there.\t\ttabs   spaces
"""
STRINGS = ["", " ", "  ", "a", " a", "a ", "Hello world", " Hello  world ", "\n", "\n\n  x", "\t\tx\t", "\r\n\r\n", "It's I'M they'LL",
           "12345 1,000.50 ½Ⅻ", "Привет мир", "今日は 世界", "안녕", "é e\u0301 \u212b", "🦙🇩🇪 👨‍👩‍👧", "<s>", "<s> x </s>", " <s>x</s> ",
           "<|end|>", "x <|end|> y", "x<|end|>y", "  <|mask|>  ", "un<|word|>known <|word|> <|word|>s", "<0x41>", "\u0000\u0007\u007f",
           "\u180e\u3000\u00a0x", "\u2581\u2581x \u2581", "\ufffd", "a\u200db_c", "((x)) // y;", "    return total;\n\n\n", "½½ 3三٣",
           "the theory of the thing " * 6]

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"
          r"\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
            r"\s*[\r\n]+|\s+(?!\S)|\s+")
SPM = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                                           {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
SPM_DECODER = {"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
BOS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
       "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
       "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
BOS_EOS = dict(BOS, single=BOS["single"] + [{"SpecialToken": {"id": "</s>", "type_id": 0}}],
               special_tokens=dict(BOS["special_tokens"], **{"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}))


def seq(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def split(pattern, behavior="Isolated", invert=False, literal=False):
    return {"type": "Split", "pattern": {"String" if literal else "Regex": pattern}, "behavior": behavior, "invert": invert}


def metaspace(scheme, do_split=False):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": do_split}


# name -> (byte level?, parts that replace those of the trained file)
VARIANTS = {
    "gpt2": (True, dict(pre_tokenizer=GPT2)),
    "smollm": (True, dict(pre_tokenizer=seq({"type": "Digits", "individual_digits": True}, GPT2))),
    "llama3": (True, dict(pre_tokenizer=seq(split(LLAMA3), BYTES), post_processor={"type": "Sequence", "processors": [GPT2, BOS]},
                          ignore_merges=True)),
    "qwen2": (True, dict(normalizer={"type": "NFC"}, pre_tokenizer=seq(split(QWEN2), BYTES))),
    "llama2": (False, dict(normalizer=SPM, pre_tokenizer=None, decoder=SPM_DECODER, post_processor=BOS)),
    "mistral": (False, dict(pre_tokenizer=metaspace("first"), decoder=SPM_DECODER, post_processor=BOS)),
    "gemma": (False, dict(normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                          pre_tokenizer=split(" ", "MergedWithPrevious", literal=True), post_processor=BOS,
                          decoder={"type": "Sequence", "decoders": SPM_DECODER["decoders"][:3]})),
    # Stands in for DeepSeek-V3's file: digits, CJK runs and the rest are split apart, one after the other.
    "deepseek": (True, dict(pre_tokenizer=seq(split(r"\p{N}{1,3}"), split(r"[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK), BYTES))),
}
EXTRA = {
    "cl100k": (True, dict(pre_tokenizer=seq(split(CL100K, "Removed", True), BYTES))),
    "o200k": (True, dict(pre_tokenizer=seq(split(O200K), BYTES), ignore_merges=True)),
    "prefix": (True, dict(pre_tokenizer=dict(GPT2, add_prefix_space=True))),
    "contiguous": (True, dict(pre_tokenizer=seq(split(r"\s|\p{L}", "Contiguous"), BYTES))),
    "previous": (True, dict(pre_tokenizer=seq(split(r"[ \n]", "MergedWithPrevious"), BYTES))),
    "next": (True, dict(pre_tokenizer=seq(split(r"\W", "MergedWithNext"), BYTES))),
    "next_inverted": (True, dict(pre_tokenizer=seq(split(r"\w+", "MergedWithNext", True), BYTES))),
    "removed": (True, dict(pre_tokenizer=seq(split(r"\s{2}?|e*", "Removed"), BYTES))),
    "interval": (True, dict(pre_tokenizer=seq(split(r"(?:\p{N}|x){2,3}+|[^\S\r\n]+|^.|.$|\S{1}?", "Isolated"), BYTES))),
    "digits": (True, dict(pre_tokenizer=seq({"type": "Digits", "individual_digits": False}, GPT2))),
    "words": (False, dict(pre_tokenizer=seq({"type": "Whitespace"}, {"type": "Punctuation", "behavior": "Isolated"}), decoder=None)),
    "space_split": (False, dict(normalizer={"type": "Lowercase"}, pre_tokenizer={"type": "WhitespaceSplit"}, decoder=None)),
    "nfkc": (False, dict(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": True}]},
                         pre_tokenizer=metaspace("always", True), decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True})),
    "nfd": (False, dict(normalizer={"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}]},
                        pre_tokenizer=metaspace("first", True), decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True})),
    "nfkd": (False, dict(normalizer={"type": "NFKD"}, pre_tokenizer=metaspace("never", True),
                         decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True})),
    "legacy_metaspace": (False, dict(pre_tokenizer={"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
                                     decoder={"type": "Metaspace", "replacement": "▁", "add_prefix_space": True})),
    "unfused": (False, dict(normalizer=SPM, pre_tokenizer=None, decoder=SPM_DECODER, post_processor=BOS_EOS, byte_fallback=False, fuse_unk=False)),
    "no_unk": (False, dict(normalizer=SPM, pre_tokenizer=None, decoder=SPM_DECODER, byte_fallback=False, unk_token=None)),
    "byte_normalizer": (True, dict(normalizer={"type": "ByteLevel"}, pre_tokenizer=None)),
    "no_decoder": (True, dict(pre_tokenizer=GPT2, decoder=None)),
}


def train(byte_level, text, size):
    tokenizer = Tokenizer(models.BPE())
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<unk>", "<s>", "</s>"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        alphabet = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789▁.,;'\n\t -")
        special = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
        # The rare characters stay out, so that unknown ones occur.
        counts = collections.Counter(text)
        text = "".join(c for c in text if counts[c] >= 6)
    trainer = trainers.BpeTrainer(vocab_size=size + (0 if byte_level else 100), special_tokens=special, initial_alphabet=alphabet,
                                  show_progress=False, min_frequency=2)
    tokenizer.train_from_iterator(text.split("\n\n") if len(text) > 10000 else [text], trainer)
    return json.loads(tokenizer.to_str())


def variant(trained, byte_level, parts, old_merges):
    file = json.loads(json.dumps(trained))
    file["added_tokens"] = [t for t in file["added_tokens"] if not t["content"].startswith("<0x")]
    flags = dict(unk_token=None if byte_level else "<unk>", fuse_unk=not byte_level, byte_fallback=not byte_level)
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        file[key] = parts.get(key, {"pre_tokenizer": GPT2, "decoder": GPT2}.get(key) if byte_level else None)
    for key in ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges"):
        file["model"][key] = parts.get(key, flags.get(key, False))
    if old_merges:
        file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
    size = len(file["model"]["vocab"])
    extra = [dict(content="<|end|>", rstrip=True, special=True), dict(content="<|mask|>", lstrip=True, special=True),
             dict(content="<|word|>", single_word=True), dict(content="the th", normalized=True),
             dict(content="<|both|>", lstrip=True, rstrip=True, normalized=True)]
    for token in extra:
        known = file["model"]["vocab"].get(token["content"])
        number, size = (size, size + 1) if known is None else (known, size)
        file["added_tokens"].append(dict(dict(id=number, single_word=False, lstrip=False, rstrip=False, normalized=False,
                                              special=False), **token))
    return file


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "tokenizers"))
    parser.add_argument("--text")
    parser.add_argument("--vocab-size", type=int, default=400)
    parser.add_argument("--all", action="store_true")
    args = parser.parse_args()
    text = open(args.text, encoding="utf-8").read() if args.text else TEXT * 2
    os.makedirs(args.out, exist_ok=True)
    if not args.text:
        with open(os.path.join(args.out, "training.txt"), "w", encoding="utf-8") as out:
            out.write(text)
    trained = {kind: train(kind, text, args.vocab_size) for kind in (True, False)}
    strings = STRINGS + TRICKY + ["x".join(SPACES[i::5]) for i in range(5)] + [" ".join(WORDS)]
    for number, (name, (byte_level, parts)) in enumerate({**VARIANTS, **(EXTRA if args.all else {})}.items()):
        file = variant(trained[byte_level], byte_level, parts, old_merges=number % 2 == 0)
        path = os.path.join(args.out, name + ".json")
        with open(path, "w", encoding="utf-8") as out:
            json.dump(file, out, ensure_ascii=False, separators=(",", ":"))
        reference = Tokenizer.from_file(path)
        odd = {i for i, t in reference.get_added_tokens_decoder().items() if reference.id_to_token(i) != t.content}
        cases = []
        for i, string in enumerate(strings):
            reference.encode_special_tokens = False
            whole, ids = reference.encode(string).ids, reference.encode(string, add_special_tokens=False).ids
            reference.encode_special_tokens = True
            plain = reference.encode(string, add_special_tokens=False).ids
            case = {"text": string, "ids": ids}
            if plain != ids:
                case["plain"] = plain  # special tokens left as text
            if i < 12 and whole != ids:
                case["whole"] = whole  # with the post-processor
            decoded = reference.decode(plain)
            if any(i in odd for i in plain):
                case["decoded"] = None  # see the fuzz comparison: this version prints these tokens normalized
            elif decoded != string:
                case["decoded"] = decoded
            cases.append(case)
        if not args.all:
            with open(os.path.join(args.out, name + ".jsonl"), "w", encoding="utf-8") as out:
                out.writelines(json.dumps(c, ensure_ascii=True, separators=(",", ":")) + "\n" for c in cases)


if __name__ == "__main__":
    main()
