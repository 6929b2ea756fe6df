// Mixtral (transformers models/mixtral): experts in place of the MLP, w1 = gate, w3 = up, w2 = down.
#include "core/arch/arch.h"

namespace pare {
namespace {

void read(ConfigReader& reader, ModelConfig& config) {
  config.experts.count = reader.integer("num_local_experts", 8, 1, 4096);
  config.experts.per_token = reader.integer("num_experts_per_tok", 2, 1, 4096);
  config.experts.module = "block_sparse_moe";
  config.experts.gate = "w1";
  config.experts.up = "w3";
  config.experts.down = "w2";
  read_window(reader, config, 0);
}

void write(const ModelConfig& config, Json& out) {
  out["num_local_experts"] = config.experts.count;
  out["num_experts_per_tok"] = config.experts.per_token;
  out["sliding_window"] = window_of(config);
}

}  // namespace

const Family kMixtral = {.name = "mixtral",
                         .architecture = "MixtralForCausalLM",
                         .read = read,
                         .write = write,
                         .default_max_positions = 131072,
                         .default_kv_heads = 8,
                         .default_eos = 2,
                         .default_rms_eps = 1e-5,
                         .default_theta = 1e6};

}  // namespace pare
