// Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen (transformers models/qwen2): bias on q, k and v only. Qwen3 (models/qwen3):
// RMSNorm on each q and k head, a head_dim of its own, no bias unless attention_bias.
//
// `sliding_window` means nothing unless `use_sliding_window`; then the blocks that `layer_types` names slide, or
// without that list those from `max_window_layers` on.
#include "core/arch/arch.h"

#include <algorithm>

namespace pare {
namespace {

void read_window(ConfigReader& reader, ModelConfig& config) {
  const auto types = read_layer_types(reader, config.num_layers);
  const bool sliding = types && std::find(types->begin(), types->end(), 1) != types->end();
  if (!reader.flag("use_sliding_window", false) ||
      (reader.mentions("sliding_window") && !reader.present("sliding_window"))) {
    if (sliding)
      reader.problem("layer_types has sliding_attention, but use_sliding_window or sliding_window does not ask for it");
    return;
  }
  const std::int64_t window = reader.integer("sliding_window", 4096, 1, 1ll << 40);
  const std::int64_t first = reader.integer("max_window_layers", 28, 0, 1ll << 40);
  std::vector<std::uint8_t> slides(static_cast<std::size_t>(config.num_layers), 0);
  for (std::int64_t layer = first; layer < config.num_layers; ++layer) slides[static_cast<std::size_t>(layer)] = 1;
  if (types) slides = *types;
  if (std::find(slides.begin(), slides.end(), 1) == slides.end()) return;
  config.sliding_window = window;
  config.layer_slides = slides;
}

void write_window(const ModelConfig& config, Json& out) {
  out["use_sliding_window"] = config.sliding_window > 0;
  if (config.sliding_window == 0) return;
  out["sliding_window"] = config.sliding_window;
  const auto first = std::find(config.layer_slides.begin(), config.layer_slides.end(), 1);
  out["max_window_layers"] = first - config.layer_slides.begin();
  out["layer_types"] = layer_types_of(config);
}

void read_qwen2(ConfigReader& reader, ModelConfig& config) {
  config.qkv_bias = true;
  read_window(reader, config);
}

void read_qwen3(ConfigReader& reader, ModelConfig& config) {
  config.qk_norm = true;
  config.qkv_bias = config.o_bias = reader.flag("attention_bias", false);
  read_window(reader, config);
}

void write_qwen3(const ModelConfig& config, Json& out) {
  out["attention_bias"] = config.qkv_bias;
  write_window(config, out);
}

void read_qwen3_moe(ConfigReader& reader, ModelConfig& config) {
  config.qk_norm = true;
  config.qkv_bias = config.o_bias = reader.flag("attention_bias", false);
  if (reader.flag("use_sliding_window", false) &&
      (!reader.mentions("sliding_window") || reader.present("sliding_window"))) {
    config.sliding_window = reader.integer("sliding_window", 4096, 1, 1ll << 40);  // in every block, unlike Qwen3
    config.layer_slides.assign(static_cast<std::size_t>(config.num_layers), 1);
  }
  config.intermediate_size = reader.integer("moe_intermediate_size", 768, 1, 1 << 20);
  config.experts.count =
      reader.integer(reader.present("num_experts") ? "num_experts" : "num_local_experts", 128, 1, 4096);
  config.experts.per_token = reader.integer("num_experts_per_tok", 8, 1, 4096);
  config.experts.renormalize = reader.flag("norm_topk_prob", false);
  const bool dense = reader.present("mlp_only_layers") && reader["mlp_only_layers"] != Json::array();
  if (dense || reader.integer("decoder_sparse_step", 1, 1, 1 << 20) != 1)
    reader.problem(
        "mlp_only_layers or decoder_sparse_step asks for blocks without experts; supported are experts in every block");
}

void write_qwen3_moe(const ModelConfig& config, Json& out) {
  out["attention_bias"] = config.qkv_bias;
  out["use_sliding_window"] = config.sliding_window > 0;
  if (config.sliding_window > 0) out["sliding_window"] = config.sliding_window;
  out["moe_intermediate_size"] = config.intermediate_size;
  out["intermediate_size"] =
      config.source.contains("intermediate_size") ? config.source["intermediate_size"] : Json(config.intermediate_size);
  for (const char* key : {"num_experts", "num_local_experts"})  // saved ones may have both
    if (key == std::string("num_experts") || out.contains(key)) out[key] = config.experts.count;
  out["num_experts_per_tok"] = config.experts.per_token;
  out["norm_topk_prob"] = config.experts.renormalize;
  out["decoder_sparse_step"] = 1;
  out["mlp_only_layers"] = Json::array();
}

}  // namespace

const Family kQwen2 = {.name = "qwen2",
                       .architecture = "Qwen2ForCausalLM",
                       .read = read_qwen2,
                       .write = write_window,
                       .default_max_positions = 32768,
                       .default_kv_heads = 32,
                       .reads_layer_types = true};

const Family kQwen3 = {.name = "qwen3",
                       .architecture = "Qwen3ForCausalLM",
                       .read = read_qwen3,
                       .write = write_qwen3,
                       .default_max_positions = 32768,
                       .default_kv_heads = 32,
                       .default_head_dim = 128,
                       .reads_layer_types = true};

const Family kQwen3Moe = {.name = "qwen3_moe",
                          .architecture = "Qwen3MoeForCausalLM",
                          .read = read_qwen3_moe,
                          .write = write_qwen3_moe,
                          .default_max_positions = 32768,
                          .default_kv_heads = 4};

}  // namespace pare
