#!/usr/bin/env python3
"""Random blocks of every GGUF type that pare reads and the values that the gguf package makes of them:
tests/golden/gguf_blocks.json {type: {"blocks": hex, "values": [float32 as uint32, ...]}}. The output is committed."""
import json
import pathlib

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import dequantize
from gguf.constants import GGML_QUANT_SIZES

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
# Where the halves of a block's scales stand.
HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "IQ4_NL": [0], "Q2_K": [80, 82],
          "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
random = np.random.default_rng(7)
out = {}
for name in TYPES:
    values, size = GGML_QUANT_SIZES[T[name]]
    count = 32 if values == 1 else 3
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
    if values == 1:
        numbers = random.normal(size=count).astype(np.float32)
        if name == "BF16":
            blocks = (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(count, 2)
        else:
            blocks = numbers.astype(np.float16 if name == "F16" else np.float32).view(np.uint8).reshape(count, size)
    for at in HALVES.get(name, []):
        halves = random.normal(size=count).astype(np.float16)
        blocks[:, at:at + 2] = halves.view(np.uint8).reshape(count, 2)
    row = blocks.reshape(1, -1)
    data = row.view({"F32": np.float32, "F16": np.float16}.get(name, np.uint8))
    got = np.asarray(dequantize(data, T[name]), dtype=np.float32).reshape(-1)
    assert got.size == count * values and np.isfinite(got).all()
    out[name] = {"blocks": blocks.tobytes().hex(), "values": [int(x) for x in got.view(np.uint32)]}
path = pathlib.Path(__file__).parent / "gguf_blocks.json"
path.write_text(json.dumps(out) + "\n")
