#!/usr/bin/env python3
"""Tiny models of every family and their logits by transformers: tests/golden/families/<name>.json with
{"config", "generation", "texts": [{"ids", "rows", "logits"}]}. No weights are stored: element i of tensor NAME, as
transformers saves it, comes from a formula that the C++ tests evaluate too,

  x = splitmix64(fnv1a64(NAME) + i) >> 52          a whole number, 0 .. 4095
  matrices and biases (x - 2048) / 8192            -0.25 .. 0.25
  norms               base + (x - 2048) / 4096     base 0 where the family adds 1 to the weight, else 1

which float32 holds exactly. Run with torch and transformers installed; the outputs are committed.

usage: make_families.py [NAME ...]"""
import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent / "families"
ADDS_ONE = ("gemma",)


def splitmix64(z):
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def fnv1a64(text):
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def values(name, shape, adds_one):
    with np.errstate(over="ignore"):
        x = splitmix64(np.uint64(fnv1a64(name)) + np.arange(int(np.prod(shape)), dtype=np.uint64)) >> np.uint64(52)
    x = x.astype(np.float64) - 2048
    norm = name.endswith("norm.weight") or (".ln_" in name and name.endswith(".weight"))
    numbers = (0.0 if adds_one else 1.0) + x / 4096 if norm else x / 8192
    return torch.from_numpy(numbers.astype(np.float32)).reshape(shape)


def fill(folder):
    """Replaces the weights of a saved folder by those of the formula; the names and shapes stay."""
    family = json.loads((folder / "config.json").read_text())["model_type"]
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    save_file({name: values(name, shape, family.startswith(ADDS_ONE)) for name, shape in shapes.items()}, path,
              metadata={"format": "pt"})


def make_folder(config, folder):
    """A model folder as transformers saves it, from a config object or the dictionary of a config.json."""
    raw = config if isinstance(config, dict) else None
    if raw is not None:
        (folder / "config.json").write_text(json.dumps(raw))
        config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    fill(folder)
    if raw is not None:  # as published, not as this version of transformers would write it
        (folder / "config.json").write_text(json.dumps(raw))
    return raw or saved


BASE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 10000.0}


def base(**changes):
    return {**BASE, **changes}


def long_factors(pairs):
    return {"short_factor": [1.0 + 0.05 * i for i in range(pairs)],
            "long_factor": [1.5 + 0.7 * i for i in range(pairs)]}


def gpt2(**changes):
    return {**dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
            **changes}


T = transformers
CASES = {
    # Llama: theta in the file, GQA and MHA, head_dim of its own, biases, llama3 and linear scaling.
    "llama_gqa": lambda: T.LlamaConfig(**base(), tie_word_embeddings=False, rms_norm_eps=1e-5),
    "llama_llama3": lambda: T.LlamaConfig(**base(num_key_value_heads=1), tie_word_embeddings=True, head_dim=12,
                                          attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    "llama_published": lambda: {**base(hidden_size=96, num_attention_heads=3, num_key_value_heads=1),
                                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                                "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5,
                                "rope_theta": 500000.0,
                                "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                                 "original_max_position_embeddings": 16, "rope_type": "llama3"},
                                "tie_word_embeddings": True, "torch_dtype": "float32",
                                "transformers_version": "4.45.0"},
    "llama_linear": lambda: {**base(num_key_value_heads=4), "architectures": ["LlamaForCausalLM"],
                             "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
                             "rope_scaling": {"type": "linear", "factor": 4.0}, "tie_word_embeddings": False,
                             "torch_dtype": "float32", "transformers_version": "4.35.0"},
    # A window size alone means nothing to Qwen2: the DeepSeek-R1 distills carry one.
    "qwen2_published": lambda: {**base(), "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
                                "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000, "sliding_window": 6,
                                "max_window_layers": 1, "use_sliding_window": False, "use_mrope": False,
                                "tie_word_embeddings": False, "torch_dtype": "float32",
                                "transformers_version": "4.44.0"},
    # Qwen2: qkv bias; a window in the last blocks only.
    "qwen2_tied": lambda: T.Qwen2Config(**base(), tie_word_embeddings=True),
    "qwen2_window": lambda: T.Qwen2Config(**base(num_hidden_layers=3, num_key_value_heads=1), tie_word_embeddings=False,
                                          use_sliding_window=True, sliding_window=7, max_window_layers=1),
    # Mistral: window shorter than the text; none, with a head_dim of its own; the window of a missing key.
    "mistral_window": lambda: T.MistralConfig(**base(), sliding_window=9, tie_word_embeddings=False),
    "mistral_full": lambda: T.MistralConfig(**base(num_key_value_heads=1), sliding_window=None, head_dim=16,
                                            tie_word_embeddings=False),
    # Qwen3: norms on q and k, head_dim of its own, layer_types with a window.
    "qwen3": lambda: T.Qwen3Config(**base(num_key_value_heads=1), head_dim=16, tie_word_embeddings=True),
    "qwen3_window": lambda: T.Qwen3Config(**base(num_hidden_layers=3, num_key_value_heads=4), head_dim=12,
                                          tie_word_embeddings=False, attention_bias=True, use_sliding_window=True,
                                          sliding_window=6, layer_types=["sliding_attention", "full_attention",
                                                                         "sliding_attention"]),
    # Gemma 1: a published file says gelu and means tanh.
    "gemma": lambda: T.GemmaConfig(**base(num_key_value_heads=1), head_dim=16),
    "gemma_published": lambda: {**base(num_key_value_heads=4), "architectures": ["GemmaForCausalLM"],
                                "model_type": "gemma",
                                "head_dim": 12, "hidden_act": "gelu", "hidden_activation": None, "rms_norm_eps": 1e-6,
                                "rope_theta": 10000.0, "attention_bias": False, "attention_dropout": 0.0,
                                "torch_dtype": "float32", "transformers_version": "4.38.0"},
    "gemma2": lambda: T.Gemma2Config(**base(num_hidden_layers=3), head_dim=16, sliding_window=8,
                                     query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma2_published": lambda: {**base(num_hidden_layers=4, num_key_value_heads=1),
                                 "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 10,
                                 "hidden_act": "gelu_pytorch_tanh",
                                 "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 5000.0,
                                 "sliding_window": 5, "query_pre_attn_scalar": 10, "attention_bias": False,
                                 "torch_dtype": "float32", "transformers_version": "4.42.0"},
    "gemma3": lambda: T.Gemma3TextConfig(**base(num_hidden_layers=4), head_dim=16, sliding_window=8,
                                         query_pre_attn_scalar=16, sliding_window_pattern=3, rope_parameters={
                                             "full_attention": {"rope_type": "linear", "factor": 8.0,
                                                                "rope_theta": 1e6},
                                             "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}),
    "gemma3_published": lambda: {**base(num_hidden_layers=7, num_key_value_heads=1),
                                 "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
                                 "head_dim": 12, "hidden_activation": "gelu_pytorch_tanh",
                                 "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_local_base_freq": 10000,
                                 "rope_scaling": None, "sliding_window": 6, "sliding_window_pattern": 6,
                                 "query_pre_attn_scalar": 256, "attn_logit_softcapping": None,
                                 "final_logit_softcapping": 4.0, "attention_bias": False, "use_cache": True,
                                 "torch_dtype": "float32", "transformers_version": "4.50.0"},
    # Phi-3: plain with a window; LongRoPE on part of each head, seen on both sides of the switch; as published.
    "phi3_window": lambda: T.Phi3Config(**base(num_key_value_heads=4), sliding_window=11, tie_word_embeddings=False),
    "phi3_long": lambda: T.Phi3Config(**base(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128),
                                      original_max_position_embeddings=24, tie_word_embeddings=True,
                                      rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0,
                                                       "partial_rotary_factor": 0.75, **long_factors(6)}),
    "phi3_published": lambda: {**base(max_position_embeddings=96), "architectures": ["Phi3ForCausalLM"],
                               "model_type": "phi3", "hidden_act": "silu", "original_max_position_embeddings": 32,
                               "rms_norm_eps": 1e-5,
                               "rope_theta": 10000.0, "rope_scaling": {"type": "longrope", **long_factors(4)},
                               "sliding_window": 40, "tie_word_embeddings": False, "attention_bias": False,
                               "torch_dtype": "float32", "transformers_version": "4.40.0"},
    "mixtral": lambda: T.MixtralConfig(**base(), num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
    "mixtral_window": lambda: T.MixtralConfig(**base(num_key_value_heads=1), num_local_experts=5, num_experts_per_tok=3,
                                              sliding_window=10, tie_word_embeddings=True, rms_norm_eps=1e-6),
    "smollm3": lambda: T.SmolLM3Config(**base(num_hidden_layers=4), tie_word_embeddings=True),
    "smollm3_window": lambda: T.SmolLM3Config(**base(num_hidden_layers=3, num_key_value_heads=1),
                                              tie_word_embeddings=False, no_rope_layers=[1, 0, 1],
                                              use_sliding_window=True, sliding_window=9,
                                              attention_bias=True, mlp_bias=True),
    "qwen3_moe": lambda: T.Qwen3MoeConfig(**base(), head_dim=16, num_experts=4, num_experts_per_tok=2,
                                          moe_intermediate_size=24, norm_topk_prob=True, tie_word_embeddings=False),
    "qwen3_moe_plain": lambda: T.Qwen3MoeConfig(**base(num_key_value_heads=1), head_dim=8, num_experts=6,
                                                num_experts_per_tok=4, moe_intermediate_size=40, norm_topk_prob=False,
                                                tie_word_embeddings=True),
    # GPT-2: as transformers saves it; a width of its own, unscaled scores, exact gelu, an untied head; as published.
    "gpt2": lambda: T.GPT2Config(**gpt2()),
    "gpt2_inner": lambda: T.GPT2Config(**gpt2(n_head=2, n_layer=3), n_inner=48, scale_attn_weights=False,
                                       reorder_and_upcast_attn=True, activation_function="gelu",
                                       tie_word_embeddings=False, layer_norm_epsilon=1e-3),
    "gpt2_published": lambda: {**gpt2(n_embd=48), "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
                               "activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1,
                               "initializer_range": 0.02, "layer_norm_epsilon": 1e-5, "n_ctx": 64, "resid_pdrop": 0.1,
                               "summary_type": "cls_index", "vocab_size": 64},
    # GPT-NeoX: parallel and sequential, a quarter and all of each head rotating, scaled, without biases, tied; as
    # published.
    "gpt_neox": lambda: T.GPTNeoXConfig(**base(), tie_word_embeddings=False),
    "gpt_neox_sequential": lambda: T.GPTNeoXConfig(
        **base(num_attention_heads=2, num_hidden_layers=3), use_parallel_residual=False, attention_bias=False,
        tie_word_embeddings=True, layer_norm_eps=1e-4,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0, "partial_rotary_factor": 1.0}),
    "gpt_neox_published": lambda: {**base(intermediate_size=128), "architectures": ["GPTNeoXForCausalLM"],
                                   "model_type": "gpt_neox", "hidden_act": "gelu", "initializer_range": 0.02,
                                   "layer_norm_eps": 1e-5, "rotary_emb_base": 1000, "rotary_pct": 0.5,
                                   "tie_word_embeddings": False, "torch_dtype": "float16",
                                   "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True},
}


def text_lengths(config):
    if config.get("original_max_position_embeddings") and (config.get("rope_scaling") or "long" in
                                                           str(config.get("rope_parameters"))):
        switch = config["original_max_position_embeddings"]
        return [switch, switch + 1, 2 * switch]
    return [48]


def main():
    names = sys.argv[1:] or CASES
    HERE.mkdir(exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            folder = pathlib.Path(work)
            torch.manual_seed(0)
            config = make_folder(CASES[name](), folder)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"], info
            model.eval()
            texts = []
            for length in text_lengths(config):
                ids = splitmix64(np.arange(length, dtype=np.uint64) + np.uint64(fnv1a64(name))) % np.uint64(64)
                ids = [int(x) for x in ids]
                with torch.no_grad():
                    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
                rows = sorted({0, length // 3, length - 1})
                assert torch.isfinite(logits).all() and logits.std() > 0.1
                texts.append({"ids": ids, "rows": rows,
                              "logits": [[round(float(x), 6) for x in logits[r]] for r in rows]})
            if isinstance(config, dict):
                config.pop("_name_or_path", None)
            out = {"transformers": transformers.__version__, "config": config, "texts": texts}
            path = HERE / f"{name}.json"
            path.write_text(json.dumps(out) + "\n")
            print(name, path.stat().st_size, f"logits {logits.std():.3f}")


if __name__ == "__main__":
    main()
