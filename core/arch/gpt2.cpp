// GPT-2 (transformers models/gpt2): LayerNorm, learned positions, an MLP without gate, biases everywhere. Linears are
// Conv1D there, stored as [in, out], and c_attn holds q, k and v one after the other.
#include "core/arch/arch.h"
#include "core/placement.h"

namespace pare {
namespace {

constexpr std::int64_t kMostPositions = 1 << 24;  // each has a row in a table
constexpr const char* kBuffers[] = {".attn.bias", ".attn.masked_bias"};

void read(ConfigReader& reader, ModelConfig& config) {
  config.layer_norm = config.learned_positions = true;
  config.gated_mlp = false;
  config.qkv_bias = config.o_bias = config.mlp_bias = true;
  config.layer_rotates.assign(static_cast<std::size_t>(config.num_layers), 0);
  if (config.max_position_embeddings > kMostPositions)
    reader.problem("n_positions is " + std::to_string(config.max_position_embeddings) + ", above " +
                   std::to_string(kMostPositions));
  if (!reader.flag("scale_attn_weights", true)) config.attention_scale = 1;
  // A block's scores would depend on its number, which changes when blocks before it are removed.
  for (const char* key : {"scale_attn_by_inverse_layer_idx", "add_cross_attention"})
    if (reader.flag(key, false)) reader.problem(std::string(key) + " is true, which is not supported");
  reader.flag("reorder_and_upcast_attn", false);  // asks for scores in float32, which both forwards compute anyway
}

void write(const ModelConfig& config, Json& out) {
  const Json& source = config.source;
  const bool said = source.contains("n_inner") && !source["n_inner"].is_null();
  if (!said && config.intermediate_size == 4 * config.hidden_size) out["n_inner"] = nullptr;
  if (source.contains("activation_function") && source["activation_function"].is_string())
    out["activation_function"] = source["activation_function"];  // gelu_new, as its loaders know it
  out["scale_attn_weights"] = config.attention_scale == 0;
}

std::optional<Placement> place(const ModelConfig& config, const TensorSpec& spec) {
  if (spec.role == TensorRole::kHead) return std::nullopt;
  const std::string end = spec.name.substr(spec.name.rfind('.'));
  if (spec.module == "embed_tokens") return renamed("transformer.wte.weight", spec);
  if (spec.module == "embed_positions") return renamed("transformer.wpe.weight", spec);
  if (spec.module == "norm") return renamed("transformer.ln_f" + end, spec);
  const std::string block = "transformer.h." + std::to_string(spec.layer) + ".";
  if (spec.module == "input_layernorm") return renamed(block + "ln_1" + end, spec);
  if (spec.module == "post_attention_layernorm") return renamed(block + "ln_2" + end, spec);
  std::string module = "attn.c_attn";
  std::int64_t part = 0, parts = 1;
  const std::int64_t rows = spec.shape[0];
  if (spec.module == "self_attn.o_proj") module = "attn.c_proj";
  else if (spec.module == "mlp.up_proj") module = "mlp.c_fc";
  else if (spec.module == "mlp.down_proj") module = "mlp.c_proj";
  else {
    parts = 3;
    part = spec.module == "self_attn.q_proj" ? 0 : spec.module == "self_attn.k_proj" ? 1 : 2;
  }
  const bool matrix = spec.shape.size() == 2;
  std::vector<std::int64_t> shape = {parts * rows};
  if (matrix) shape.insert(shape.begin(), spec.shape[1]);
  return Placement{block + module + end, std::move(shape), matrix, part * config.hidden_size, rows, rows};
}

}  // namespace

const Family kGpt2 = {.name = "gpt2",
                      .architecture = "GPT2LMHeadModel",
                      .read = read,
                      .write = write,
                      .default_max_positions = 1024,
                      .default_eos = 50256,
                      .default_rms_eps = 1e-5,
                      .default_tied = true,
                      .activation_key = "activation_function",
                      .default_activation = "gelu_new",
                      .plain_gelu = true,
                      .rotates = false,
                      .heads_share_width = true,
                      .inner_of_hidden = 4,
                      .keys = {.hidden = "n_embd",
                               .inner = "n_inner",
                               .layers = "n_layer",
                               .heads = "n_head",
                               .positions = "n_positions",
                               .epsilon = "layer_norm_epsilon"},
                      .place = place,
                      .prefix = "transformer.",
                      .buffers = kBuffers};

}  // namespace pare
