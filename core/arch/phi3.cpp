// Phi-3, Phi-3.5, Phi-4-mini (transformers models/phi3): q, k, v in one tensor, gate and up in one, partial rotary
// positions, LongRoPE, a sliding window in every block where there is one.
#include "core/arch/arch.h"

namespace pare {
namespace {

void read(ConfigReader& reader, ModelConfig& config) {
  config.fused_qkv = config.fused_gate_up = true;
  read_window(reader, config, 0);
}

void write(const ModelConfig& config, Json& out) {
  out["sliding_window"] = window_of(config);
  if (config.rope_long) out["original_max_position_embeddings"] = config.rope_long->original_max_position;
}

}  // namespace

const Family kPhi3 = {.name = "phi3",
                      .architecture = "Phi3ForCausalLM",
                      .read = read,
                      .write = write,
                      .default_max_positions = 4096,
                      .default_eos = 32000,
                      .default_rms_eps = 1e-5,
                      .rotates_partly = true};

}  // namespace pare
