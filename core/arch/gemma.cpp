// Gemma 1, 2 and 3 (transformers models/gemma, gemma2, gemma3; text only): RMSNorm times 1 + weight, embeddings times
// sqrt(hidden_size), tanh GELU, a head_dim of its own, tied. Gemma 2 adds norms on what attention and MLP put out, soft
// caps and windows in every other block; Gemma 3 norms on q and k and a rotary base for each kind of block instead of
// caps.
#include <algorithm>
#include <cmath>

#include "core/arch/arch.h"

namespace pare {
namespace {

void read_common(ConfigReader& reader, ModelConfig& config) {
  config.norm_adds_one = true;
  // transformers keeps the factor in single precision.
  config.embedding_scale = static_cast<double>(static_cast<float>(std::sqrt(static_cast<double>(config.hidden_size))));
  config.qkv_bias = config.o_bias = reader.flag("attention_bias", false);
  if (reader.flag("use_bidirectional_attention", false))
    reader.problem("use_bidirectional_attention is true; supported is causal attention");
}

void read_gemma(ConfigReader& reader, ModelConfig& config) {
  read_common(reader, config);
  const std::string activation = reader.text("hidden_activation", "gelu_pytorch_tanh");
  if (activation != "gelu_pytorch_tanh")
    reader.problem("hidden_activation is \"" + activation + "\"; supported is gelu_pytorch_tanh");
}

void write_gemma(const ModelConfig& config, Json& out) {
  out["attention_bias"] = config.qkv_bias;
  if (out.contains("hidden_activation")) out["hidden_activation"] = out["hidden_act"];
}

// A number above 0, or null for none.
double read_cap(ConfigReader& reader, const std::string& key, double fallback) {
  if (!reader.mentions(key)) return fallback;
  const double cap = reader.number(key, 0, 0, 1e6);
  if (reader.present(key) && !(cap > 0)) reader.problem(key + " is not above 0");
  return cap;
}

void read_windows(ConfigReader& reader, ModelConfig& config, std::int64_t period) {
  config.post_norms = true;
  const double scalar = reader.number("query_pre_attn_scalar", 256, 1e-6, 1e9);
  config.attention_scale = 1.0 / std::sqrt(scalar);
  const auto types = read_layer_types(reader, config.num_layers);
  std::vector<std::uint8_t> slides;
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) slides.push_back((layer + 1) % period != 0 ? 1 : 0);
  if (types) slides = *types;
  const bool any = std::find(slides.begin(), slides.end(), 1) != slides.end();
  config.sliding_window = reader.integer("sliding_window", 4096, 1, 1ll << 40);
  if (any && reader.mentions("sliding_window") && !reader.present("sliding_window"))
    reader.problem("sliding_window is null, but blocks slide");
  if (any)
    config.layer_slides = slides;
  else
    config.sliding_window = 0;
}

void write_windows(const ModelConfig& config, Json& out) {
  out["attention_bias"] = config.qkv_bias;
  const double scalar = 1.0 / (config.attention_scale * config.attention_scale);
  const double whole = std::round(scalar);
  if (std::abs(scalar - whole) < 1e-9 * scalar)
    out["query_pre_attn_scalar"] = static_cast<std::int64_t>(whole);
  else
    out["query_pre_attn_scalar"] = scalar;
  if (config.sliding_window > 0) out["sliding_window"] = config.sliding_window;
  out["layer_types"] = layer_types_of(config);
  out["final_logit_softcapping"] = config.final_softcap > 0 ? Json(config.final_softcap) : Json(nullptr);
  out["attn_logit_softcapping"] = config.attention_softcap > 0 ? Json(config.attention_softcap) : Json(nullptr);
}

void read_gemma2(ConfigReader& reader, ModelConfig& config) {
  read_common(reader, config);
  read_windows(reader, config, 2);
  config.final_softcap = read_cap(reader, "final_logit_softcapping", 30);
  config.attention_softcap = read_cap(reader, "attn_logit_softcapping", 50);
}

void read_gemma3(ConfigReader& reader, ModelConfig& config) {
  read_common(reader, config);
  config.qk_norm = true;
  read_windows(reader, config, reader.integer("sliding_window_pattern", 6, 1, 1 << 20));
  config.final_softcap = read_cap(reader, "final_logit_softcapping", 0);
  if (reader.present("attn_logit_softcapping"))
    reader.problem("attn_logit_softcapping is set, which transformers' Gemma 3 does not apply");
}

}  // namespace

const Family kGemma = {.name = "gemma",
                       .architecture = "GemmaForCausalLM",
                       .read = read_gemma,
                       .write = write_gemma,
                       .default_max_positions = 8192,
                       .default_kv_heads = 16,
                       .default_eos = 1,
                       .default_head_dim = 256,
                       .default_tied = true,
                       .default_activation = "gelu_pytorch_tanh",
                       .gelu_is_tanh = true};

const Family kGemma2 = {.name = "gemma2",
                        .architecture = "Gemma2ForCausalLM",
                        .read = read_gemma2,
                        .write = write_windows,
                        .default_max_positions = 8192,
                        .default_kv_heads = 4,
                        .default_eos = 1,
                        .default_head_dim = 256,
                        .default_tied = true,
                        .activation_key = "hidden_activation",
                        .default_activation = "gelu_pytorch_tanh",
                        .reads_layer_types = true,
                        .heads_divide_width = true};

const Family kGemma3 = {.name = "gemma3_text",
                        .architecture = "Gemma3ForCausalLM",
                        .read = read_gemma3,
                        .write = write_windows,
                        .default_max_positions = 131072,
                        .default_kv_heads = 4,
                        .default_eos = 1,
                        .default_head_dim = 256,
                        .default_theta = 1e6,
                        .default_tied = true,
                        .activation_key = "hidden_activation",
                        .default_activation = "gelu_pytorch_tanh",
                        .reads_layer_types = true,
                        .rope_by_kind = true,
                        .heads_divide_width = true};

}  // namespace pare
