"""Values of transformers for config tests: rope inverse frequencies and config.json in its current spelling.

python tests/golden/make_config.py > tests/golden/config.json
"""

import json

import torch
import transformers
from transformers import LlamaConfig, MistralConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

SMALL = dict(vocab_size=50, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)

ropes = {
    "default": LlamaConfig(hidden_size=512, num_attention_heads=8, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "linear": LlamaConfig(hidden_size=512, num_attention_heads=8,
                          rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
    "llama3": LlamaConfig(hidden_size=2048, num_attention_heads=32, max_position_embeddings=131072,
                          rope_parameters=dict(LLAMA3, rope_theta=500000.0)),
}
out = {"transformers": transformers.__version__, "rope": {}, "configs": {}}
for name, config in ropes.items():
    config.architectures = ["LlamaForCausalLM"]
    inv_freq = LlamaRotaryEmbedding(config).inv_freq
    out["rope"][name] = {"config": json.loads(config.to_json_string(use_diff=False)),
                         "inv_freq": [float(x) for x in inv_freq.to(torch.float64)]}
for name, config in {
    "llama": LlamaConfig(**SMALL, rope_parameters=dict(LLAMA3, rope_theta=500000.0), attention_bias=True),
    "mistral": MistralConfig(**SMALL, sliding_window=None, head_dim=64),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True, eos_token_id=[3, 4]),
}.items():
    config.architectures = [{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}[name]]
    model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    out["configs"][name] = {"config": json.loads(config.to_json_string(use_diff=True)), "shapes": shapes}
print(json.dumps(out, indent=1))
