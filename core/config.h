// ModelConfig: what a decoder is made of, as plain fields. Both forwards (LibTorch and the runtime) read this
// and nothing else; a family is a file in core/arch that fills it in from config.json.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "core/json.h"

namespace pare {

// Llama-3 frequency scaling (transformers modeling_rope_utils.py, rope_type "llama3").
struct Llama3Rope {
  double factor = 8, low_freq_factor = 1, high_freq_factor = 4;
  std::int64_t original_max_position = 8192;
};

struct ModelConfig {
  std::string family;            // row of the arch table, e.g. "llama"; for messages and for writing config.json
  std::int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0;
  std::int64_t num_layers = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  double rope_linear_factor = 1.0;           // f_i / factor
  std::optional<Llama3Rope> rope_llama3;
  bool qkv_bias = false, o_bias = false, mlp_bias = false;
  bool tie_word_embeddings = false;
  std::vector<std::int64_t> eos_ids;         // generation_config.json over config.json
  Json source = Json::object();              // config.json as found: unknown keys are kept on writing
};

enum class TensorRole { kEmbedding, kHead, kNorm, kLinear, kBias };

// One tensor that a checkpoint of this config has, under its Hugging Face name.
struct TensorSpec {
  std::string name;                 // "model.layers.0.self_attn.q_proj.weight"
  std::vector<std::int64_t> shape;  // Linear weights are [out, in]
  TensorRole role;
  int layer = -1;                   // decoder block, -1 outside the blocks
  std::string module;               // inside the block: "self_attn.q_proj", "input_layernorm"; else "embed_tokens", "norm", "lm_head"
};

// config.json (transformers 4 and 5 spelling) -> ModelConfig through the arch table. `generation` may be null.
// Errors: exit 3, unknown architecture (lists the known ones), unsupported ingredient, missing or absurd value.
ModelConfig parse_config(const Json& config, const Json& generation, const std::string& place);
// ModelConfig -> config.json: both spellings (rope_theta/rope_scaling and rope_parameters; torch_dtype and dtype),
// unknown keys of `source` kept. `dtype` is "float32", "float16" or "bfloat16".
Json write_config(const ModelConfig& config, const std::string& dtype);

// Every tensor of the config in canonical order: embedding, blocks in order, final norm, head (absent if tied).
std::vector<TensorSpec> expected_tensors(const ModelConfig& config);
std::int64_t parameter_count(const ModelConfig& config);  // tied weights once

// inv_freq [head_dim / 2] after scaling, in double.
std::vector<double> rope_frequencies(const ModelConfig& config);

}  // namespace pare
