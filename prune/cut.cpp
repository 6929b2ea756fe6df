#include "prune/cut.h"

#include <numeric>

namespace pare {
namespace {

using torch::Tensor;

Tensor select(const Tensor& values, std::int64_t dimension, const Kept& kept) {
  if (values.size(dimension) == static_cast<std::int64_t>(kept.size())) return values;
  return values.index_select(dimension, torch::tensor(kept, torch::kLong).to(values.device()));
}

// Rows of heads that lie one after the other from row `first` on.
void add_heads(const Kept& heads, std::int64_t width, std::int64_t first, Kept& rows) {
  for (const std::int64_t head : heads)
    for (std::int64_t i = 0; i < width; ++i) rows.push_back(first + head * width + i);
}

Kept head_rows(const Kept& heads, std::int64_t width) {
  Kept rows;
  add_heads(heads, width, 0, rows);
  return rows;
}

}  // namespace

Kept all_of(std::int64_t count) {
  Kept all(static_cast<std::size_t>(count));
  std::iota(all.begin(), all.end(), std::int64_t{0});
  return all;
}

Tensor cut_tensor(const ModelConfig& config, const TensorSpec& spec, const Tensor& values, const Kept& channels,
                  const BlockCut* block, std::int64_t expert) {
  if (block == nullptr)  // embeddings, head: [ids, channels]; norm: [channels]
    return select(values, values.dim() - 1, channels);
  const bool matrix = values.dim() == 2;
  const auto from_channels = [&](const Kept& rows) {
    const Tensor cut = select(values, 0, rows);
    return matrix ? select(cut, 1, channels) : cut;
  };
  const auto to_channels = [&](const Kept& columns) {
    const Tensor cut = select(values, 0, channels);
    return matrix ? select(cut, 1, columns) : cut;
  };
  const std::string part = spec.module.substr(spec.module.rfind('.') + 1);
  const std::int64_t width = config.head_dim, queries = config.num_heads * width, keys = config.num_kv_heads * width;
  if (part == "q_norm" || part == "k_norm") return values;
  if (spec.role == TensorRole::kRouter) return from_channels(block->experts);
  if (part == "q_proj") return from_channels(head_rows(block->heads, width));
  if (part == "k_proj" || part == "v_proj") return from_channels(head_rows(block->kv_heads, width));
  if (part == "o_proj") return to_channels(head_rows(block->heads, width));
  if (part == "qkv_proj") {
    Kept rows = head_rows(block->heads, width);
    add_heads(block->kv_heads, width, queries, rows);
    add_heads(block->kv_heads, width, queries + keys, rows);
    return from_channels(rows);
  }
  if (spec.role == TensorRole::kLinear || (spec.role == TensorRole::kBias && spec.module.starts_with("mlp."))) {
    const Kept& neurons = block->neurons[static_cast<std::size_t>(expert < 0 ? 0 : expert)];
    if (part == "down_proj" || (spec.expert >= 0 && part == config.experts.down)) return to_channels(neurons);
    if (part != "gate_up_proj") return from_channels(neurons);
    Kept rows = neurons;  // gate above up: both lose the same rows
    for (const std::int64_t row : neurons) rows.push_back(row + config.intermediate_size);
    return from_channels(rows);
  }
  return select(values, 0, channels);  // norms
}

std::string source_name(const ModelConfig& config, const TensorSpec& cut, int layer, const BlockCut& block) {
  if (cut.layer < 0) return cut.name;
  const std::string end = cut.name.substr(cut.name.rfind('.'));
  const std::string prefix = "model.layers." + std::to_string(layer) + ".";
  if (cut.expert < 0) return prefix + cut.module + end;
  const std::string part = cut.module.substr(cut.module.rfind('.') + 1);
  const std::int64_t expert = block.experts[static_cast<std::size_t>(cut.expert)];
  return prefix + config.experts.module + ".experts." + std::to_string(expert) + "." + part + end;
}

}  // namespace pare
