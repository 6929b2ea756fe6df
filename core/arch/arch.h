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

struct Placement;

// What a family calls the common keys of config.json.
struct FamilyKeys {
  const char* hidden = "hidden_size";
  const char* inner = "intermediate_size";
  const char* layers = "num_hidden_layers";
  const char* heads = "num_attention_heads";
  const char* positions = "max_position_embeddings";
  const char* epsilon = "rms_norm_eps";
  const char* theta = "rope_theta";
  const char* partial = "partial_rotary_factor";
};

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
  double default_partial = 1;
  bool rope_by_kind = false;       // rope_parameters has one object for each kind of layer
  bool plain_gelu = false;         // down(act(up)), act a GELU of either form: nothing else is known there
  bool rotates = true;             // false: config.json says nothing about rotary positions
  bool heads_share_width = false;  // head_dim is hidden / heads, every head has its key and value: no keys for that
  bool heads_divide_width = false;  // transformers 5 refuses a hidden_size that is no multiple of the heads
  std::int64_t inner_of_hidden = 0;  // intermediate_size where it is missing, in hidden sizes; 0: it must be there
  FamilyKeys keys{};
  // core/placement.h; null: tensors stand in files as they are.
  std::optional<Placement> (*place)(const ModelConfig& config, const TensorSpec& spec) = nullptr;
  const char* prefix = "";                   // of the base model's tensors
  std::span<const char* const> buffers = {};  // suffixes of tensors to be ignored
};

extern const Family kLlama, kMistral, kQwen2, kQwen3, kGemma, kGemma2, kGemma3, kPhi3, kMixtral, kSmolLm3, kQwen3Moe,
    kGpt2, kGptNeox;

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
