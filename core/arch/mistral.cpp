// Mistral (transformers models/mistral): no biases. A sliding window narrower than the context is refused.
#include "core/arch/arch.h"

namespace pare {
namespace {

void read(ConfigReader& reader, ModelConfig& config) {
  // The class default is a window of 4096 when the key is missing; null means full attention.
  std::int64_t window = 0;
  if (!reader.mentions("sliding_window")) window = 4096;
  else window = reader.integer("sliding_window", 0, 1, 1ll << 40);
  if (window != 0 && window < config.max_position_embeddings)
    reader.problem("sliding_window is " + std::to_string(window) +
                   (reader.mentions("sliding_window") ? "" : " by the default of its class") +
                   ", narrower than max_position_embeddings " + std::to_string(config.max_position_embeddings) +
                   ": sliding attention is not supported");
}

void write(const ModelConfig& config, Json& out) {
  // A window at least as wide as the context changes nothing and may stay as found.
  if (!out.contains("sliding_window")) out["sliding_window"] = nullptr;
}

}  // namespace

const Family kMistral = {"mistral", "MistralForCausalLM", 131072, 8, 2, read, write};

}  // namespace pare
