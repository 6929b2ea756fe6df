#!/usr/bin/env python3
"""GGUF files that pare writes, read by the gguf package: every tensor dequantizes to the weights of the folder, query
and key rows stand where llama.cpp wants them, and the tokenizer keys say what tokenizer.json says.

usage: gguf_file.py PARE MODEL_FOLDER [MODEL_FOLDER ...]     (Llama family; the first may also be quantized)
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.pop(0)  # a file beside this one is called like a package that transformers imports
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from safetensors import safe_open
from transformers import AutoModelForCausalLM

NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm",
         "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def pare(*arguments):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: {done.stderr}"


def weights_of(folder):
    """Float weights that transformers computes with; linears of codes are read with an identity batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    packed = [name.removesuffix(".weight_packed") for name in state if name.endswith(".weight_packed")]
    packed += [name.removesuffix(".weight") for name in state if state[name].dtype == torch.int8]
    weights = {name: value for name, value in state.items() if ".weight_" not in name}
    modules = dict(model.named_modules())
    with torch.no_grad():
        model(torch.arange(1, 17)[None])  # makes packed layers ready
        for name in packed:
            modules[name].quantization_enabled = False  # the identity is not rounded to int8
            weights[name + ".weight"] = modules[name](torch.eye(modules[name].in_features)).T
    return {name: value.numpy() for name, value in weights.items()}


def interleaved(weight, heads):
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def field(reader, key):
    return reader.get_field(key).contents()


def check(folder, file, exact, kind):
    config = json.loads((folder / "config.json").read_text())
    reader = GGUFReader(file)
    weights = weights_of(folder)
    codecs, compared, worst = {}, 0, 0.0
    if (folder / "codes.pare").exists():
        with safe_open(folder / "codes.pare", framework="np") as side:
            codecs = json.loads(side.metadata()["pare.codecs"])
    for tensor in reader.tensors:
        got = dequantize(tensor.data, tensor.tensor_type)
        parts = tensor.name.split(".")
        back = {v: k for k, v in NAMES.items()}
        module = back[parts[2] if parts[0] == "blk" else parts[0]]
        name = f"model.layers.{parts[1]}.{module}" if parts[0] == "blk" else f"model.{module}"
        want = weights[name + "." + parts[-1]]
        if module == "self_attn.q_proj":
            want = interleaved(want, config["num_attention_heads"])
        if module == "self_attn.k_proj":
            want = interleaved(want, config["num_key_value_heads"])
        got = got.reshape(want.shape)
        if exact:
            assert np.array_equal(got, want), f"{tensor.name}: {np.abs(got - want).max()}"
        worst = max(worst, float(np.linalg.norm(got - want) / (np.linalg.norm(want) + 1e-30)))
        if codecs.get(name + "." + parts[-1]) == "q4mg32":
            assert tensor.tensor_type == GGMLQuantizationType.Q4_1, f"{tensor.name}: {tensor.tensor_type.name}"
        compared += 1
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    assert not kind.endswith("_k") or kind.upper() in kinds, (kind, kinds)
    assert compared == len(weights) - (1 if config["tie_word_embeddings"] else 0), (compared, len(weights))

    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == config["vocab_size"] and len(set(tokens)) == len(tokens)
    for piece, index in tokenizer["model"]["vocab"].items():
        assert tokens[index] == piece or any(a["id"] == index for a in tokenizer["added_tokens"])
    if field(reader, "tokenizer.ggml.model") == "gpt2":
        assert len(field(reader, "tokenizer.ggml.merges")) == len(tokenizer["model"]["merges"])
    else:
        scores = field(reader, "tokenizer.ggml.scores")
        first = tokenizer["model"]["merges"][0]
        piece = first.replace(" ", "", 1) if isinstance(first, str) else "".join(first)
        assert scores[tokenizer["model"]["vocab"][piece]] == 0 and min(scores) < 0
    assert field(reader, "general.architecture") == "llama"
    return worst


def main():
    binary, folders = sys.argv[1], [Path(f) for f in sys.argv[2:]]
    for folder in folders:
        with tempfile.TemporaryDirectory() as scratch:
            for codec, exact, bound in (("keep", True, 0), ("f32", True, 0), ("q8", False, 0.01), ("q4", False, 0.15),
                                        ("q2_k", False, 0.35), ("q3_k", False, 0.2), ("q4_k", False, 0.1),
                                        ("q5_k", False, 0.05), ("q6_k", False, 0.025)):
                if codec.startswith("q") and ("quantization_config" in json.loads((folder / "config.json").read_text())
                                              or (folder / "codes.pare").exists()):
                    continue
                file = Path(scratch) / f"{codec}.gguf"
                pare(binary, "export", folder, "--to", "gguf", "--codec", codec, "--out", file, "--quiet")
                worst = check(folder, file, exact, codec)
                assert exact or 0 < worst < bound, (codec, worst)
                print(f"{folder.name} {codec}: {'equal' if exact else f'largest relative error {worst:.4f}'}")


if __name__ == "__main__":
    main()
