// Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen (transformers models/qwen2): bias on q, k and v only. `sliding_window` means
// nothing unless `use_sliding_window`, and then only for layers from `max_window_layers` on.
#include "core/arch/arch.h"

namespace pare {
namespace {

void read(ConfigReader& reader, ModelConfig& config) {
  config.qkv_bias = true;
  if (!reader.flag("use_sliding_window", false)) return;
  const std::int64_t window = reader.integer("sliding_window", 4096, 1, 1ll << 40);
  const std::int64_t first = reader.integer("max_window_layers", 28, 0, 1ll << 40);
  if (first < config.num_layers && window < config.max_position_embeddings)
    reader.problem("use_sliding_window with sliding_window " + std::to_string(window) + " from layer " +
                   std::to_string(first) + " on: sliding attention is not supported");
}

void write(const ModelConfig& config, Json& out) {
  // Removing layers moves the first windowed layer; nothing is windowed here, so say so.
  out["use_sliding_window"] = false;
}

}  // namespace

const Family kQwen2 = {"qwen2", "Qwen2ForCausalLM", 32768, 32, -1, read, write};

}  // namespace pare
