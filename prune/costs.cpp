#include "prune/costs.h"

#include <algorithm>

#include "core/error.h"

namespace pare {
namespace {

double elements(const TensorSpec& spec) {
  double count = 1;
  for (const std::int64_t size : spec.shape) count *= static_cast<double>(size);
  return count;
}

double size_of(const TensorSpec& spec, const StoredAs* stored) {
  return stored == nullptr ? elements(spec) : static_cast<double>(stored->bytes(spec));
}

// One block, or none, of these dimensions. Not a config that could be loaded: only its tensors are counted.
ModelConfig piece(const ModelConfig& config, std::int64_t hidden, std::int64_t layers) {
  ModelConfig out = config;
  out.layer_widths.clear();
  out.hidden_size = hidden;
  out.num_layers = layers;
  return out;
}

}  // namespace

StoredAs stored_as(const std::string& codec, const std::string& dtype) {
  StoredAs stored;
  stored.other.kind = dtype == "bfloat16" ? CodecKind::kBf16 : dtype == "float16" ? CodecKind::kF16 : CodecKind::kF32;
  stored.linear = codec.empty() ? stored.other : Codec::parse(codec, "--codec");
  if (stored.linear.is_float()) stored.other = stored.linear;
  return stored;
}

Codec StoredAs::of(const TensorSpec& spec) const {
  if (linear.is_float()) return linear;
  if (spec.shape.size() != 2) return {CodecKind::kF32, 0};
  if (spec.role == TensorRole::kLinear) return linear.fitting(spec.shape[1]);
  if (spec.role == TensorRole::kEmbedding || spec.role == TensorRole::kHead)
    return Codec{CodecKind::kQ8, 32}.fitting(spec.shape[1]);
  return other;
}

std::uint64_t StoredAs::bytes(const TensorSpec& spec) const {
  const Codec codec = of(spec);
  if (linear.is_float()) return static_cast<std::uint64_t>(elements(spec)) * (codec.kind == CodecKind::kF32 ? 4 : 2);
  return codec.payload_bytes(spec.shape.size() == 2 ? spec.shape[0] : 1, spec.shape.back());
}

PartSizes outer_sizes(const ModelConfig& config, std::int64_t hidden, const StoredAs* stored) {
  PartSizes sizes;
  for (const TensorSpec& spec : expected_tensors(piece(config, hidden, 0))) {
    const double size = size_of(spec, stored);
    sizes.all += size;
    if (spec.role == (config.tie_word_embeddings ? TensorRole::kEmbedding : TensorRole::kHead)) sizes.head += size;
  }
  return sizes;
}

PartSizes block_sizes(const ModelConfig& config, std::int64_t hidden, const BlockWidths& widths, std::int64_t experts,
                      const StoredAs* stored) {
  // Experts are all alike: two of them tell what each adds, router row included.
  const auto counted = [&](std::int64_t count) {
    ModelConfig block = piece(config, hidden, 1);
    block.num_heads = widths.heads;
    block.num_kv_heads = widths.kv_heads;
    block.intermediate_size = widths.inner;
    block.experts.count = count;
    PartSizes sizes;
    for (const TensorSpec& spec : expected_tensors(block)) {
      if (spec.layer < 0) continue;
      const double size = size_of(spec, stored);
      sizes.all += size;
      if (spec.role != TensorRole::kLinear) continue;
      (spec.module.starts_with("self_attn.") ? sizes.attention : sizes.mlp_read) += size;
    }
    return sizes;
  };
  if (experts == 0) return counted(0);
  const PartSizes one = counted(1), two = counted(2);
  PartSizes sizes = one;
  sizes.all += static_cast<double>(experts - 1) * (two.all - one.all);
  sizes.mlp_read *= static_cast<double>(std::min(experts, config.experts.per_token));
  return sizes;
}

double ShapeCosts::outer(std::int64_t hidden) {
  const auto [found, fresh] = outers_.emplace(hidden, 0.0);
  if (fresh) {
    const PartSizes sizes = outer_sizes(config_, hidden, stored());
    found->second = unit_ == Unit::kSeconds ? times_.fixed + times_.head * sizes.head
                    : unit_ == Unit::kBytes ? sizes.all + stored_.beside
                                            : sizes.all;
  }
  return found->second;
}

double ShapeCosts::block(std::int64_t hidden, const BlockWidths& widths, std::int64_t experts) {
  const auto [found, fresh] =
      blocks_.emplace(std::tuple{hidden, widths.heads, widths.kv_heads, widths.inner, experts}, 0.0);
  if (fresh) {
    const PartSizes sizes = block_sizes(config_, hidden, widths, experts, stored());
    found->second = unit_ == Unit::kSeconds
                        ? times_.per_block + times_.attention * sizes.attention + times_.mlp * sizes.mlp_read
                        : sizes.all;
  }
  return found->second;
}

double ShapeCosts::of(const Shape& shape) {
  return outer(shape.hidden) + static_cast<double>(shape.layers) *
                                   block(shape.hidden, {shape.heads, shape.kv_heads, shape.ffn}, shape.experts);
}

double ShapeCosts::of(const ModelConfig& model) {
  double cost = outer(model.hidden_size);
  for (int layer = 0; layer < model.num_layers; ++layer)
    cost += block(model.hidden_size, model.widths(layer), model.experts.count);
  return cost;
}

}  // namespace pare
