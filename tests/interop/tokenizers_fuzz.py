#!/usr/bin/env python3
"""Compares `pare tokenize --batch` with the reference library (`tokenizers`) on random strings, id for id.

usage: tokenizers_fuzz.py PARE TOKENIZER_JSON... [--count N] [--seed S] [--text FILE] [--all-unicode]

Strings are built from white-space runs, control characters, all of Unicode, digits and letters of many scripts,
combining marks, contractions, look-alikes of the added tokens, pieces of the vocabulary, slices of a text file and
invalid UTF-8. Encoding is checked with and without the post-processor and with special tokens parsed or left as
text; decoding on encoded and on random ids. Exit code 1 when anything differs.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import unicodedata

from tokenizers import Tokenizer

SPACES = [" ", "  ", "   ", "\t", "\n", "\r", "\r\n", "\n\n", "\v", "\f", "\x1c", "\x85", "\xa0", "\u1680", "\u180e",
          "\u2000", "\u200a", "\u200b", "\u2028", "\u2029", "\u202f", "\u205f", "\u2060", "\u3000", "\ufeff", "\u2581"]
TRICKY = ["'s", "'S", "'\u017f", "'ll", "'LL", "'Ve", "\u2019s", "'d", "'M", "\u00bd", "\u2167", "\u0663", "\u4e09", "\u096a", "1234567", "3.14", "0x",
          "e\u0301", "\u00e9", "\u0041\u030a", "\u212b", "\uac00", "\u1100\u1161\u11a8", "\u0f71\u0f72", "\u0344", "\u2126",
          "\ufb01", "\u01c5", "\u0130", "\u0131", "\u1e9e", "\u00df", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
          "\U0001f1e9\U0001f1ea", "\U0001f999", "\u24b6", "\u200c", "\u200d", "\u0000", "\u007f", "\u00ad", "\ufffd",
          "\uffff", "\U0010ffff", "\ue000", "<0x41>", "<0x", "\u0120", "\u010a", "\u0300\u0301\u0302", "\u093f", "_", "__",
          "a_b", "https://x.org/?q=1&r=2", "#!/bin", "//", "``", "((", "))", "...", "---", "\\n", "\u05d0\u05b8", "\u0e01\u0e33"]
WORDS = ["the", "The", " the", "Hello", "world", " of", "and", "tokenizer", "\u043f\u0440\u0438\u0432\u0435\u0442",
         "\u4f60\u597d", "\u3053\u3093\u306b\u3061\u306f", "\uc548\ub155", "\u0645\u0631\u062d\u0628\u0627",
         "\u0928\u092e\u0938\u094d\u0924\u0947", "na\u00efve", "stra\u00dfe", "x", "I", "a"]


class Source:
    def __init__(self, rng, reference, text, allowed):
        self.rng, self.text, self.allowed = rng, text, allowed
        self.added = [t.content for t in reference.get_added_tokens_decoder().values()]
        self.pieces = list(reference.get_vocab().keys())
        self.size = reference.get_vocab_size()

    def part(self):
        rng = self.rng
        kind = rng.randrange(12)
        if kind == 0:
            return rng.choice(SPACES) * rng.choice([1, 1, 1, 2, 3, 7])
        if kind == 1:
            return "".join(rng.choice(SPACES) for _ in range(rng.randrange(1, 6)))
        if kind == 2:
            return chr(rng.randrange(0x20))
        if kind == 3:
            return "".join(self.char() for _ in range(rng.randrange(1, 4)))
        if kind == 4:
            return rng.choice(TRICKY)
        if kind == 5 and self.added:
            token = rng.choice(self.added)
            how = rng.randrange(7)
            if how == 0:
                return token[:rng.randrange(len(token) + 1)]
            if how == 1:
                return " " * rng.randrange(3) + token + " " * rng.randrange(3)
            if how == 2:
                return rng.choice(["a", "_", "\u00e9", "\n", "\t"]) + token + rng.choice(["b", "1", " ", "\r\n", ""])
            if how == 3:
                return token.upper()
            return token
        if kind == 6:
            return rng.choice(self.pieces)
        if kind == 7:
            return str(rng.randrange(10 ** rng.randrange(1, 9)))
        if kind == 8:
            return "".join(chr(rng.randrange(0x20, 0x7f)) for _ in range(rng.randrange(1, 8)))
        if kind == 9 and self.text:
            at = rng.randrange(len(self.text))
            return self.text[at:at + rng.randrange(1, 40)]
        if kind == 10:
            return " " + rng.choice(WORDS)
        return rng.choice(WORDS)

    def char(self):
        while True:
            rng = self.rng
            top = rng.choice([0x80, 0x250, 0x3000, 0x10000, 0x20000, 0x110000])
            code = rng.randrange(top)
            if not 0xd800 <= code < 0xe000 and self.allowed(chr(code)):
                return chr(code)

    def string(self):
        return "".join(self.part() for _ in range(self.rng.choice([0, 1, 1, 2, 3, 5, 8, 13, 30])))

    def broken(self):
        data = bytearray(self.string().encode())
        for _ in range(self.rng.randrange(1, 4)):
            at = self.rng.randrange(len(data) + 1)
            if self.rng.random() < 0.5 or at == len(data):
                data[at:at] = bytes(self.rng.choice([0x80, 0xc0, 0xc2, 0xe0, 0xe2, 0xed, 0xf0, 0xf4, 0xf5, 0xff,
                                                    0xbf, 0x9f, 0xa0, 0x90]) for _ in range(self.rng.randrange(1, 4)))
            else:
                del data[at]
        return bytes(data)


def compare(pare, file, count, rng, text, allowed, reference=None):
    reference = reference or Tokenizer.from_file(file)
    reference.no_truncation()
    reference.no_padding()
    source = Source(rng, reference, text, allowed)
    requests, expected = [], []
    while len(requests) < count:
        special, parse = rng.random() < 0.5, rng.random() < 0.7
        batch = []
        for _ in range(min(1000, count - len(requests))):
            if rng.random() < 0.1:
                data = source.broken()
                requests.append({"hex": data.hex(), "special": special, "parse": parse})
                batch.append(data.decode("utf-8", "replace"))
            else:
                string = source.string()
                requests.append({"text": string, "special": special, "parse": parse})
                batch.append(string)
        reference.encode_special_tokens = not parse
        expected += [e.ids for e in reference.encode_batch(batch, add_special_tokens=special)]
    # Version 0.23 of the reference prints such tokens normalized and no longer skips them when they are special; pare
    # keeps to the spelling in the file, as older versions do.
    odd = {i for i, t in reference.get_added_tokens_decoder().items() if reference.id_to_token(i) != t.content}
    for ids in [e for e in expected if rng.random() < 0.3]:
        if rng.random() < 0.5:
            ids = [rng.randrange(source.size + 2) for _ in range(rng.randrange(1, 20))]
        if rng.random() < 0.3:
            ids = ids[rng.randrange(len(ids) + 1):]
        ids = [i for i in ids if i not in odd]
        keep = rng.random() < 0.5
        requests.append({"ids": ids, "keep": keep})
        expected.append({"text": reference.decode(ids, skip_special_tokens=not keep)})
    with tempfile.TemporaryFile("w+") as stdin:
        stdin.writelines(json.dumps(r) + "\n" for r in requests)
        stdin.flush()
        stdin.seek(0)
        run = subprocess.run([pare, "tokenize", file, "--batch"], stdin=stdin, capture_output=True, text=True)
    if run.returncode:
        print(run.stderr[-2000:])
        return len(requests)
    got = [json.loads(line) for line in run.stdout.split("\n") if line]
    if len(got) != len(expected):
        print(f"{file}: {len(got)} answers to {len(expected)} requests")
        return len(requests)
    wrong = [(r, g, e) for r, g, e in zip(requests, got, expected) if g != e]
    for request, ours, theirs in sorted(wrong, key=lambda w: len(str(w[0])))[:8]:
        print("  request  ", json.dumps(request)[:300])
        print("  pare     ", str(ours)[:300])
        print("  reference", str(theirs)[:300])
    encoded = sum("ids" not in r for r in requests)
    print(f"{file}: {encoded} strings and {len(requests) - encoded} id lists, {len(wrong)} differ")
    return len(wrong)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("pare")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--text")
    parser.add_argument("--all-unicode", action="store_true", help="also code points this Python does not know")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    text = open(args.text, encoding="utf-8", errors="replace").read() if args.text else ""
    allowed = (lambda c: True) if args.all_unicode else (lambda c: unicodedata.category(c) != "Cn")
    bad = sum(compare(args.pare, f, args.count, random.Random(f"{args.seed} {i}"), text, allowed)
              for i, f in enumerate(args.files))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
