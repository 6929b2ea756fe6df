#!/usr/bin/env python3
"""Writes q4_0.json: what llama.cpp makes of the weights that tests/quantize/q4_0.cpp computes too.

usage: make_q4_0.py .../libggml-base.so COMMIT     (built from llama.cpp's sources; COMMIT is recorded)
"""
import ctypes
import json
import pathlib
import sys

ROWS, COLS = 24, 96


def weights():
    """The same in tests/quantize/q4_0.cpp: exact in single precision."""
    state, weight, importance = 12345, [], []
    def draw():
        nonlocal state
        state = (state * 1664525 + 1013904223) % 2**32
        return state
    for i in range(ROWS * COLS):
        drawn = draw()
        value = (drawn - 2**32 if drawn >= 2**31 else drawn) // 256 * 2.0**-26
        weight.append(value * (6.0 if i % 23 == 7 else 1.0))
    for j in range(COLS):
        importance.append((draw() // 256 % 1000 + 1) * (64.0 if j % 17 == 3 else 1.0))
    for j in range(32):
        weight[2 * COLS + j] = 0.0                               # a group of zeros
        weight[3 * COLS + 32 + j] = 0.25 if j % 2 else -0.25     # the same magnitude everywhere
        weight[4 * COLS + 64 + j] *= 2.0**-14                    # scales below the normal halves
    return weight, importance


def main():
    library, commit = ctypes.CDLL(sys.argv[1]), sys.argv[2]
    library.quantize_q4_0.restype = ctypes.c_size_t
    library.quantize_q4_0.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    weight, importance = weights()
    floats = lambda values: (ctypes.c_float * len(values))(*values)
    result = {"source": f"quantize_q4_0 of llama.cpp at {commit}", "rows": ROWS, "cols": COLS}
    for name, costs in (("plain", None), ("weighted", floats(importance))):
        out = (ctypes.c_char * (ROWS * COLS // 32 * 18))()
        size = library.quantize_q4_0(floats(weight), out, ROWS, COLS, costs)
        assert size == len(out.raw)
        result[name] = out.raw[:size].hex()
    pathlib.Path(__file__).with_name("q4_0.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
