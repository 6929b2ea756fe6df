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

// LongRoPE (Phi-3): every rotated pair has one divisor while the whole sequence fits the original context and another
// one beyond it, for all positions of the sequence. cos and sin are multiplied by attention_factor.
struct LongRope {
  std::vector<double> short_factor, long_factor;  // [rotated pairs]
  double attention_factor = 1;
  std::int64_t original_max_position = 4096;
  std::optional<double> said_factor, said_attention_factor;  // as config.json has them, for writing
};

// Which rotary table a block uses. kNone: positions do not enter (NoPE).
enum class RopeKind { kGlobal, kLocal, kNone };

enum class Activation { kSilu, kGeluTanh, kGelu };  // kGelu: by erf, in MLPs without a gate

// Mixture of experts in place of the MLP. Every expert is gate, up and down of width `ModelConfig::intermediate_size`.
struct Experts {
  std::int64_t count = 0, per_token = 0;  // 0: an ordinary MLP
  bool renormalize = true;                // weights of the chosen experts sum to 1
  // "<module>.gate" is the router, "<module>.experts.N.<gate>" a linear; fused: 3-D tensors "mlp.experts.gate_up_proj"
  // [experts, 2 width, hidden] and "mlp.experts.down_proj" [experts, hidden, width] are read as well.
  std::string module = "mlp", gate = "gate_proj", up = "up_proj", down = "down_proj";
};

// Of one decoder block: query heads, heads of keys and values, neurons of the MLP.
struct BlockWidths {
  std::int64_t heads = 0, kv_heads = 0, inner = 0;
  bool operator==(const BlockWidths&) const = default;
};

struct ModelConfig {
  std::string family;            // row of the arch table, e.g. "llama"; for messages and for writing config.json
  std::int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0;
  std::int64_t num_layers = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  // [num_layers]; empty: num_heads, num_kv_heads and intermediate_size are those of every block. Else these three are
  // the largest. Set by set_widths() alone.
  std::vector<BlockWidths> layer_widths;
  std::int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;                // of LayerNorm too
  double rope_theta = 10000.0;
  double rope_linear_factor = 1.0;           // f_i / factor
  std::optional<Llama3Rope> rope_llama3;
  std::optional<LongRope> rope_long;
  std::int64_t rotary_dim = 0;              // leading dimensions of a head that rotate; 0: all
  double rope_local_theta = 0;              // base of the sliding blocks, without scaling; 0: as the others
  std::int64_t sliding_window = 0;          // position i sees j with i - j < window, in sliding blocks; 0: none
  std::vector<std::uint8_t> layer_slides;   // [num_layers]; empty: no block slides
  std::vector<std::uint8_t> layer_rotates;  // [num_layers]; empty: all blocks use rotary positions
  double attention_scale = 0;               // scores are multiplied by it; 0: 1 / sqrt(head_dim)
  double attention_softcap = 0;             // scores become c * tanh(score / c) before the mask; 0: none
  double final_softcap = 0;                 // the same for the logits
  double embedding_scale = 1;               // embeddings are multiplied by it
  Activation activation = Activation::kSilu;
  bool norm_adds_one = false;                     // RMSNorm multiplies by 1 + weight
  bool layer_norm = false;                        // LayerNorm with a bias in place of RMSNorm
  bool learned_positions = false;                 // embeddings get a row of a table added, by their position
  bool parallel_residual = false;                 // the MLP reads what attention reads, the block's input
  bool gated_mlp = true;                          // down(act(gate) * up), or down(act(up))
  bool qk_norm = false;                           // RMSNorm over head_dim of each q and k head before the rotation
  bool post_norms = false;                        // RMSNorm also on what attention and MLP add to the residual stream
  bool fused_qkv = false, fused_gate_up = false;  // one tensor for q, k, v (rows in that order); one for gate, up
  Experts experts;
  bool qkv_bias = false, o_bias = false, mlp_bias = false;
  bool tie_word_embeddings = false;
  std::vector<std::int64_t> eos_ids;         // generation_config.json over config.json
  Json source = Json::object();              // config.json as found: unknown keys are kept on writing

  bool slides(int layer) const { return !layer_slides.empty() && layer_slides[static_cast<std::size_t>(layer)] != 0; }
  std::int64_t window(int layer) const { return slides(layer) ? sliding_window : 0; }  // 0: sees everything before it
  RopeKind rope_kind(int layer) const {
    if (!layer_rotates.empty() && layer_rotates[static_cast<std::size_t>(layer)] == 0) return RopeKind::kNone;
    return rope_local_theta > 0 && slides(layer) ? RopeKind::kLocal : RopeKind::kGlobal;
  }
  std::int64_t rotated() const { return rotary_dim > 0 ? rotary_dim : head_dim; }
  bool has_experts() const { return experts.count > 0; }
  BlockWidths widths(int layer) const {
    return layer_widths.empty() ? BlockWidths{num_heads, num_kv_heads, intermediate_size}
                                : layer_widths[static_cast<std::size_t>(layer)];
  }
  void set_widths(const std::vector<BlockWidths>& widths);  // one for each block, all alike or not
};

// The config of the same model with the blocks `kept` alone, by their present numbers: lists with an entry per block
// follow, in the fields and in `source`.
ModelConfig with_layers(const ModelConfig& config, const std::vector<int>& kept);

// A part of the widths as config.json has it: one number, or where blocks differ a list with an entry for each.
Json width_json(const ModelConfig& config, std::int64_t BlockWidths::*part);
// The keys of config.json that are lists, such as "intermediate_size, num_attention_heads"; empty: none.
std::string width_keys(const ModelConfig& config);
// The config of a model all of whose blocks are as wide as block `layer`.
ModelConfig of_block(const ModelConfig& config, int layer);

// kBias: of linears and of LayerNorm. kPosition: [max_position_embeddings, hidden_size], never quantized.
enum class TensorRole { kEmbedding, kHead, kNorm, kLinear, kBias, kRouter, kPosition };

// One tensor of this config, under the name that most families give it (core/placement.h says where files keep it).
struct TensorSpec {
  std::string name;                 // "model.layers.0.self_attn.q_proj.weight"
  std::vector<std::int64_t> shape;  // Linear weights are [out, in]
  TensorRole role;
  int layer = -1;                   // decoder block, -1 outside the blocks
  std::string module;               // inside the block: "self_attn.q_proj", "input_layernorm"; else "embed_tokens", "norm", "lm_head"
  std::int64_t expert = -1;         // whose, in a block with experts
};

// config.json (transformers 4 and 5 spelling) -> ModelConfig through the arch table. `generation` may be null.
// Errors: exit 3, unknown architecture (lists the known ones), unsupported ingredient, missing or absurd value.
ModelConfig parse_config(const Json& config, const Json& generation, const std::string& place);
// ModelConfig -> config.json: both spellings (rope_theta/rope_scaling and rope_parameters; torch_dtype and dtype),
// unknown keys of `source` kept. `dtype` is "float32", "float16" or "bfloat16".
Json write_config(const ModelConfig& config, const std::string& dtype);

// Every tensor of the config in canonical order: embedding, blocks in order, final norm, head (absent if tied).
std::vector<TensorSpec> expected_tensors(const ModelConfig& config);
// Where else a checkpoint may keep a tensor: rows of a larger one.
struct TensorSource {
  std::string name;
  std::vector<std::int64_t> shape;  // of the larger one
  std::int64_t first = 0;           // its element where `spec` begins; its elements follow without gaps
};
std::optional<TensorSource> other_source(const ModelConfig& config, const TensorSpec& spec);
std::int64_t parameter_count(const ModelConfig& config);  // tied weights once
// Exit 3 where a sequence is longer than the table of learned positions.
void require_positions(const ModelConfig& config, std::int64_t positions, const std::string& place);

// inv_freq [rotated() / 2] after scaling, in double. `positions`: length of the sequence, which LongRoPE looks at.
std::vector<double> rope_frequencies(const ModelConfig& config, RopeKind kind = RopeKind::kGlobal,
                                     std::int64_t positions = 0);
// What cos and sin are multiplied by.
double rope_attention_factor(const ModelConfig& config, RopeKind kind = RopeKind::kGlobal);
// Whether a sequence of this length is beyond the switch of LongRoPE: keys of shorter sequences do not fit then.
inline bool rope_beyond(const ModelConfig& config, std::int64_t positions) {
  return config.rope_long && positions > config.rope_long->original_max_position;
}

}  // namespace pare
