// GPT-NeoX, Pythia (transformers models/gpt_neox): LayerNorm, part of each head rotates, attention and MLP both read
// the block's input, an MLP without gate. query_key_value holds q, k and v of the first head, then of the second, ...
#include "core/arch/arch.h"
#include "core/placement.h"

namespace pare {
namespace {

constexpr const char* kBuffers[] = {".attention.bias", ".attention.masked_bias"};

void read(ConfigReader& reader, ModelConfig& config) {
  config.layer_norm = true;
  config.gated_mlp = false;
  config.parallel_residual = reader.flag("use_parallel_residual", true);
  config.qkv_bias = config.o_bias = reader.flag("attention_bias", true);
  config.mlp_bias = true;
}

void write(const ModelConfig& config, Json& out) {
  if (config.source.contains("hidden_act") && config.source["hidden_act"].is_string())
    out["hidden_act"] = config.source["hidden_act"];
  out["use_parallel_residual"] = config.parallel_residual;
  out["attention_bias"] = config.qkv_bias;
}

std::optional<Placement> place(const ModelConfig& config, const TensorSpec& spec) {
  const std::string end = spec.name.substr(spec.name.rfind('.'));
  if (spec.role == TensorRole::kHead) return renamed("embed_out.weight", spec);
  if (spec.module == "embed_tokens") return renamed("gpt_neox.embed_in.weight", spec);
  if (spec.module == "norm") return renamed("gpt_neox.final_layer_norm" + end, spec);
  const std::string block = "gpt_neox.layers." + std::to_string(spec.layer) + ".";
  if (spec.module == "self_attn.o_proj") return renamed(block + "attention.dense" + end, spec);
  if (spec.module == "mlp.up_proj") return renamed(block + "mlp.dense_h_to_4h" + end, spec);
  if (spec.module == "mlp.down_proj") return renamed(block + "mlp.dense_4h_to_h" + end, spec);
  if (!spec.module.starts_with("self_attn.")) return renamed(block + spec.module + end, spec);  // the norms
  const std::int64_t part = spec.module == "self_attn.q_proj" ? 0 : spec.module == "self_attn.k_proj" ? 1 : 2;
  std::vector<std::int64_t> shape = spec.shape;
  shape[0] *= 3;
  return Placement{block + "attention.query_key_value" + end, std::move(shape), false, part * config.head_dim,
                   config.head_dim, 3 * config.head_dim};
}

}  // namespace

const Family kGptNeox = {.name = "gpt_neox",
                         .architecture = "GPTNeoXForCausalLM",
                         .read = read,
                         .write = write,
                         .default_eos = 2,
                         .default_rms_eps = 1e-5,
                         .default_activation = "gelu",
                         .rotates_partly = true,
                         .default_partial = 0.25,
                         .plain_gelu = true,
                         .heads_share_width = true,
                         .heads_divide_width = true,
                         .keys = {.epsilon = "layer_norm_eps", .theta = "rotary_emb_base", .partial = "rotary_pct"},
                         .place = place,
                         .prefix = "gpt_neox.",
                         .buffers = kBuffers};

}  // namespace pare
