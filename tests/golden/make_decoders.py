#!/usr/bin/env python3
"""Tiny random models and their logits by transformers: tests/golden/decoders/<name>/{config.json,model.safetensors,
expected.json}. Weights are multiples of 1/256 (norms of 1/128) that bfloat16 holds exactly, so that the files stay small.
Run with torch and transformers installed; the outputs are committed."""
import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

HERE = pathlib.Path(__file__).parent / "decoders"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 10000.0}
COMMON = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64)
CASES = {
    "llama_untied": LlamaConfig(**COMMON, tie_word_embeddings=False),
    "llama_tied_mha": LlamaConfig(**{**COMMON, "num_key_value_heads": 4}, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "llama_head_dim": LlamaConfig(**COMMON, head_dim=20, tie_word_embeddings=True),
    "llama_rope3": LlamaConfig(**COMMON, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "llama_linear": LlamaConfig(**COMMON, tie_word_embeddings=True,
                                rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}),
    "llama_biases": LlamaConfig(**COMMON, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "mistral_head_dim": MistralConfig(**{**COMMON, "num_key_value_heads": 1}, head_dim=16, sliding_window=None,
                                      tie_word_embeddings=False),
}

for index, (name, config) in enumerate(CASES.items()):
    torch.manual_seed(index)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            values = torch.randint(-64, 65, parameter.shape) / 256.0
            parameter.copy_(1.0 + (values * 64).round() / 128.0 if key.endswith("norm.weight") else values)
    ids = torch.randint(0, config.vocab_size, (1, 48))
    with torch.no_grad():
        logits = model(ids).logits[0]
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()
             if not (k == "lm_head.weight" and config.tie_word_embeddings)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    saved = json.loads(config.to_json_string(use_diff=False))
    saved["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(saved, indent=1) + "\n")
    rows = [0, 1, 7, 31, 47]
    (folder / "expected.json").write_text(json.dumps({
        "ids": ids[0].tolist(), "rows": rows,
        "logits": [[round(float(x), 6) for x in logits[r]] for r in rows]}) + "\n")
    print(name, (folder / "model.safetensors").stat().st_size)
