// Mistral (transformers models/mistral): no biases, a sliding window in every block.
#include "core/arch/arch.h"

namespace pare {
namespace {

void read(ConfigReader& reader, ModelConfig& config) {
  // The class default is a window of 4096 when the key is missing; null means full attention.
  const std::int64_t window =
      reader.mentions("sliding_window") ? reader.integer("sliding_window", 0, 1, 1ll << 40) : 4096;
  if (window == 0) return;
  config.sliding_window = window;
  config.layer_slides.assign(static_cast<std::size_t>(config.num_layers), 1);
}

void write(const ModelConfig& config, Json& out) {
  out["sliding_window"] = config.sliding_window > 0 ? Json(config.sliding_window) : Json(nullptr);
}

}  // namespace

const Family kMistral = {.name = "mistral",
                         .architecture = "MistralForCausalLM",
                         .read = read,
                         .write = write,
                         .default_max_positions = 131072,
                         .default_kv_heads = 8,
                         .default_eos = 2};

}  // namespace pare
