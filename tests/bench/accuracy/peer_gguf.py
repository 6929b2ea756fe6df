#!/usr/bin/env python3
"""llama.cpp's side of the peers; needs the Python packages gguf and numpy.

  peer_gguf.py text CALIBRATION.jsonl OUT.txt --seed S       the documents in a random order, for llama-imatrix
  peer_gguf.py folder QUANTIZED.gguf MODEL OUT               block linears dequantized into a float32 folder
  peer_gguf.py compare QUANTIZED.gguf OURS.gguf              bytes of the Q4_0 tensors of both files
"""
import argparse
import json
import pathlib
import random
import shutil
import struct
import sys

import numpy
from gguf import GGUFReader, quants

NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}


def text(given):
    documents = [json.loads(line)["text"] for line in open(given.first)]
    random.Random(given.seed).shuffle(documents)
    pathlib.Path(given.second).write_text("\n".join(documents))


def block_linears(path):
    """(Hugging Face name, tensor) of every matrix inside the blocks."""
    for tensor in GGUFReader(path).tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk" and parts[2] in NAMES and parts[3] == "weight":
            yield f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight", tensor


def unpermuted(weight, heads):
    """GGUF holds the rows of q and k with the halves of each head interleaved; back to Hugging Face's order."""
    rows, cols = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def read_safetensors(path):
    data = pathlib.Path(path).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        raw = data[8 + size + entry["data_offsets"][0]:8 + size + entry["data_offsets"][1]]
        if entry["dtype"] == "BF16":
            values = (numpy.frombuffer(raw, "<u2").astype(numpy.uint32) << 16).view(numpy.float32)
        else:
            values = numpy.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[entry["dtype"]]).astype(numpy.float32)
        found[name] = values.reshape(entry["shape"])
    return found


def write_safetensors(path, tensors):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text_ = json.dumps(header).encode()
    text_ += b" " * (-len(text_) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text_)) + text_)
        for values in tensors.values():
            file.write(numpy.ascontiguousarray(values, "<f4").tobytes())


def folder(given):
    model, out = pathlib.Path(given.second), pathlib.Path(given.third)
    config = json.loads((model / "config.json").read_text())
    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors.update(read_safetensors(file))
    types, bits, weights, seen = {}, 0, 0, set()
    for name, tensor in block_linears(given.first):
        weight = quants.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
        if name.endswith("q_proj.weight"):
            weight = unpermuted(weight, config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            weight = unpermuted(weight, config["num_key_value_heads"])
        before = tensors[name]
        # Far off would mean another order of rows, not a rounding.
        apart = float(numpy.linalg.norm(weight - before) / numpy.linalg.norm(before))
        if weight.shape != before.shape or apart > 0.2:
            raise SystemExit(f"{name}: expected a rounding of the original, found {weight.shape}, off by {apart:.3f}")
        tensors[name] = weight
        kind = tensor.tensor_type.name
        types[kind] = types.get(kind, 0) + 1
        bits += 8 * int(tensor.n_bytes)
        weights += int(tensor.n_elements)
        seen.add(name)
    missing = [n for n in tensors if ".layers." in n and tensors[n].ndim == 2 and n not in seen]
    if missing:
        raise SystemExit(f"{given.first}: lacks {missing[0]}")
    out.mkdir(parents=True)
    write_safetensors(out / "model.safetensors", tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (model / name).is_file():
            shutil.copy(model / name, out / name)
    config["torch_dtype"] = config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    print(json.dumps({"types": types, "bits": bits / weights}))


def compare(given):
    theirs, ours = dict(block_linears(given.first)), dict(block_linears(given.second))
    blocks = different = zero_sign = 0
    for name, tensor in theirs.items():
        if tensor.tensor_type.name != "Q4_0":
            continue
        a = numpy.asarray(tensor.data).reshape(-1, 18)
        b = numpy.asarray(ours[name].data).reshape(-1, 18)
        if a.shape != b.shape:
            raise SystemExit(f"{name}: {a.shape} blocks against {b.shape}")
        blocks += len(a)
        different += int((a != b).any(axis=1).sum())
    print(json.dumps({"blocks": blocks, "different": different}))
    return 1 if different or not blocks else 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["text", "folder", "compare"])
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("third", nargs="?")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    return {"text": text, "folder": folder, "compare": compare}[given.what](given)


if __name__ == "__main__":
    sys.exit(main())
