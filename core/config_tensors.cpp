// Which tensors a model of a given config has.
#include "core/config.h"
#include "core/error.h"

namespace pare {

std::vector<TensorSpec> expected_tensors(const ModelConfig& config) {
  std::vector<TensorSpec> specs;
  const std::int64_t hidden = config.hidden_size;
  specs.push_back(
      {"model.embed_tokens.weight", {config.vocab_size, hidden}, TensorRole::kEmbedding, -1, "embed_tokens"});
  if (config.learned_positions)
    specs.push_back({"model.embed_positions.weight",
                     {config.max_position_embeddings, hidden},
                     TensorRole::kPosition,
                     -1,
                     "embed_positions"});
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const BlockWidths widths = config.widths(layer);
    const std::int64_t queries = widths.heads * config.head_dim, keys = widths.kv_heads * config.head_dim;
    const std::int64_t inner = widths.inner;
    const auto norm = [&](const std::string& module) {
      specs.push_back({prefix + module + ".weight", {hidden}, TensorRole::kNorm, layer, module});
      if (config.layer_norm) specs.push_back({prefix + module + ".bias", {hidden}, TensorRole::kBias, layer, module});
    };
    const auto linear = [&](const std::string& module, std::int64_t out, std::int64_t in, bool bias) {
      specs.push_back({prefix + module + ".weight", {out, in}, TensorRole::kLinear, layer, module});
      if (bias) specs.push_back({prefix + module + ".bias", {out}, TensorRole::kBias, layer, module});
    };
    norm("input_layernorm");
    if (config.fused_qkv) {
      linear("self_attn.qkv_proj", queries + 2 * keys, hidden, config.qkv_bias);
    } else {
      linear("self_attn.q_proj", queries, hidden, config.qkv_bias);
      linear("self_attn.k_proj", keys, hidden, config.qkv_bias);
      linear("self_attn.v_proj", keys, hidden, config.qkv_bias);
    }
    if (config.qk_norm) {
      for (const char* module : {"self_attn.q_norm", "self_attn.k_norm"})
        specs.push_back({prefix + module + ".weight", {config.head_dim}, TensorRole::kNorm, layer, module});
    }
    linear("self_attn.o_proj", hidden, queries, config.o_bias);
    norm("post_attention_layernorm");
    if (config.post_norms) {
      norm("pre_feedforward_layernorm");
      norm("post_feedforward_layernorm");
    }
    if (config.has_experts()) {
      const Experts& experts = config.experts;
      specs.push_back({prefix + experts.module + ".gate.weight",
                       {experts.count, hidden},
                       TensorRole::kRouter,
                       layer,
                       experts.module + ".gate"});
      for (std::int64_t e = 0; e < experts.count; ++e) {
        const std::string expert = experts.module + ".experts." + std::to_string(e) + ".";
        linear(expert + experts.gate, inner, hidden, false);
        linear(expert + experts.up, inner, hidden, false);
        linear(expert + experts.down, hidden, inner, false);
        for (std::size_t i = specs.size() - 3; i < specs.size(); ++i) specs[i].expert = e;
      }
    } else if (config.fused_gate_up) {
      linear("mlp.gate_up_proj", 2 * inner, hidden, config.mlp_bias);
      linear("mlp.down_proj", hidden, inner, config.mlp_bias);
    } else {
      if (config.gated_mlp) linear("mlp.gate_proj", inner, hidden, config.mlp_bias);
      linear("mlp.up_proj", inner, hidden, config.mlp_bias);
      linear("mlp.down_proj", hidden, inner, config.mlp_bias);
    }
  }
  specs.push_back({"model.norm.weight", {hidden}, TensorRole::kNorm, -1, "norm"});
  if (config.layer_norm) specs.push_back({"model.norm.bias", {hidden}, TensorRole::kBias, -1, "norm"});
  if (!config.tie_word_embeddings)
    specs.push_back({"lm_head.weight", {config.vocab_size, hidden}, TensorRole::kHead, -1, "lm_head"});
  return specs;
}

std::optional<TensorSource> other_source(const ModelConfig& config, const TensorSpec& spec) {
  const Experts& experts = config.experts;
  if (!config.has_experts() || !spec.module.starts_with(experts.module + ".")) return std::nullopt;
  const std::string prefix = "model.layers." + std::to_string(spec.layer) + ".mlp.";
  if (spec.role == TensorRole::kRouter) return TensorSource{prefix + "gate.weight", spec.shape, 0};
  const std::string rest = spec.module.substr((experts.module + ".experts.").size());
  const std::int64_t expert = std::stoll(rest), hidden = config.hidden_size, inner = config.intermediate_size;
  const std::string part = rest.substr(rest.find('.') + 1);
  if (part == experts.down)
    return TensorSource{prefix + "experts.down_proj", {experts.count, hidden, inner}, expert * hidden * inner};
  const std::int64_t row = expert * 2 * inner + (part == experts.up ? inner : 0);
  return TensorSource{prefix + "experts.gate_up_proj", {experts.count, 2 * inner, hidden}, row * hidden};
}

void require_positions(const ModelConfig& config, std::int64_t positions, const std::string& place) {
  if (!config.learned_positions || positions <= config.max_position_embeddings) return;
  throw input_error(place, "at most " + std::to_string(config.max_position_embeddings) +
                               " positions, which is what this model has learned",
                    std::to_string(positions), "split the text into shorter windows (--context)");
}

std::int64_t parameter_count(const ModelConfig& config) {
  std::int64_t count = 0;
  for (const TensorSpec& spec : expected_tensors(config)) {
    std::int64_t elements = 1;
    for (const std::int64_t size : spec.shape) elements *= size;
    count += elements;
  }
  return count;
}

}  // namespace pare
