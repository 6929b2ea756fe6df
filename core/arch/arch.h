// The table of model families: one row and one file each. A family turns config.json into plain ModelConfig fields
// and refuses, by name, every ingredient that the forwards do not have.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/arch/reader.h"
#include "core/config.h"

namespace pare {

struct Family {
  const char* name;          // model_type
  const char* architecture;  // architectures[0]
  // What differs from the common block.
  void (*read)(ConfigReader& reader, ModelConfig& config);
  // Keys special to the family, added to a config.json that already has the common ones.
  void (*write)(const ModelConfig& config, Json& out);
  // Defaults of transformers' configuration class, for keys that a saved config.json leaves out.
  std::int64_t default_max_positions = 2048;
  std::int64_t default_kv_heads = 0;  // 0: as many as heads
  std::int64_t default_eos = -1;      // -1: none
  std::int64_t default_head_dim = 0;  // 0: hidden_size / heads
  double default_rms_eps = 1e-6;
  double default_theta = 10000.0;
  bool default_tied = false;
  const char* activation_key = "hidden_act";
  const char* default_activation = "silu";
  bool gelu_is_tanh = false;       // hidden_act "gelu" means the tanh form
  bool reads_layer_types = false;  // the class follows layer_types; else windows are everywhere or nowhere
  bool rotates_partly = false;     // partial_rotary_factor counts
  bool rope_by_kind = false;       // rope_parameters has one object for each kind of layer
};

extern const Family kLlama, kMistral, kQwen2, kQwen3, kGemma, kGemma2, kGemma3, kPhi3, kMixtral, kSmolLm3, kQwen3Moe;

std::span<const Family* const> families();
const Family* find_family(std::string_view name);

// layer_types as flags (1: sliding_attention); nullopt where the key is missing or wrong (then it is a problem).
std::optional<std::vector<std::uint8_t>> read_layer_types(ConfigReader& reader, std::int64_t layers);
Json layer_types_of(const ModelConfig& config);

// For families whose blocks all slide or none does: sliding_window, `class_default` where the key is missing; null
// means full attention.
void read_window(ConfigReader& reader, ModelConfig& config, std::int64_t class_default);
Json window_of(const ModelConfig& config);

}  // namespace pare
