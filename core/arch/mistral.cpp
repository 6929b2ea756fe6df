// Mistral (transformers models/mistral): no biases, a sliding window in every block.
#include "core/arch/arch.h"

namespace pare {
namespace {

void read(ConfigReader& reader, ModelConfig& config) {
  read_window(reader, config, 4096);
}

void write(const ModelConfig& config, Json& out) {
  out["sliding_window"] = window_of(config);
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
