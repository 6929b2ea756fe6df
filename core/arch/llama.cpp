// Llama 2/3.x, SmolLM2, TinyLlama (transformers models/llama): the common block; biases are switches.
#include "core/arch/arch.h"

namespace pare {
namespace {

void read(ConfigReader& reader, ModelConfig& config) {
  const bool attention_bias = reader.flag("attention_bias", false);
  config.qkv_bias = config.o_bias = attention_bias;
  config.mlp_bias = reader.flag("mlp_bias", false);
}

void write(const ModelConfig& config, Json& out) {
  out["attention_bias"] = config.qkv_bias;
  out["mlp_bias"] = config.mlp_bias;
}

}  // namespace

const Family kLlama = {
    .name = "llama", .architecture = "LlamaForCausalLM", .read = read, .write = write, .default_eos = 2,
    .heads_divide_width = true};

}  // namespace pare
