#include "quantize/fold.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "core/codec.h"

namespace pare {
namespace {

bool ends_with_any(const std::string& module, std::initializer_list<std::string_view> ends) {
  return std::any_of(ends.begin(), ends.end(), [&](std::string_view end) { return module.ends_with(end); });
}

std::string norm_before(const ModelConfig& config, BlockStage stage) {
  if (stage == BlockStage::kQkv) return "input_layernorm";
  return config.post_norms ? "pre_feedforward_layernorm" : "post_attention_layernorm";
}

}  // namespace

BlockStage input_stage(const ModelConfig& config, const TensorSpec& spec) {
  if (ends_with_any(spec.module, {".q_proj", ".k_proj", ".v_proj", ".qkv_proj"})) return BlockStage::kQkv;
  if (spec.module.ends_with(".o_proj")) return BlockStage::kO;
  const bool down = spec.expert >= 0 ? spec.module.ends_with("." + config.experts.down)
                                     : spec.module.ends_with(".down_proj");
  return down ? BlockStage::kDown : BlockStage::kGateUp;
}

std::optional<MadeRows> made_rows(const ModelConfig& config, const TensorSpec& spec) {
  const BlockWidths widths = config.widths(spec.layer);
  const std::int64_t queries = widths.heads * config.head_dim, keys = widths.kv_heads * config.head_dim;
  const std::int64_t inner = widths.inner;
  if (spec.module.ends_with(".qkv_proj")) return MadeRows{BlockStage::kO, queries + keys, queries + 2 * keys};
  if (spec.module.ends_with(".v_proj")) return MadeRows{BlockStage::kO, 0, keys};
  if (spec.module.ends_with(".gate_up_proj")) return MadeRows{BlockStage::kDown, inner, 2 * inner};
  if (spec.module.ends_with(spec.expert >= 0 ? "." + config.experts.up : ".up_proj"))
    return MadeRows{BlockStage::kDown, 0, inner};
  return std::nullopt;
}

std::optional<std::string> cannot_fold(const ModelConfig& config, BlockStage stage) {
  if (stage == BlockStage::kDown && !config.gated_mlp)
    return "mlp.down_proj: its inputs come through an activation that lets no scale through";
  if (stage == BlockStage::kGateUp && config.has_experts())
    return config.experts.module + ".experts.*." + config.experts.up + ": all experts and the router share one input";
  return std::nullopt;
}

std::int64_t fold_channels(const ModelConfig& config, BlockStage stage) {
  switch (stage) {
    case BlockStage::kQkv:
    case BlockStage::kGateUp:
      return config.hidden_size;
    case BlockStage::kO:
      return config.num_kv_heads * config.head_dim;
    case BlockStage::kDown:
      return config.intermediate_size;
  }
  throw std::logic_error("block stage");
}

std::int64_t fold_channel(const ModelConfig& config, BlockStage stage, std::int64_t column) {
  if (stage != BlockStage::kO) return column;
  const std::int64_t head = column / config.head_dim;
  return head / (config.num_heads / config.num_kv_heads) * config.head_dim + column % config.head_dim;
}

std::vector<double> channel_peaks(const ModelConfig& config, BlockStage stage, std::span<const double> values) {
  std::vector<double> peaks(static_cast<std::size_t>(fold_channels(config, stage)), 0.0);
  for (std::size_t j = 0; j < values.size(); ++j) {
    double& peak = peaks[static_cast<std::size_t>(fold_channel(config, stage, static_cast<std::int64_t>(j)))];
    peak = std::max(peak, values[j]);
  }
  return peaks;
}

std::vector<double> channel_roots(const ModelConfig& config, BlockStage stage, std::span<const double> values) {
  std::vector<double> roots(static_cast<std::size_t>(fold_channels(config, stage)), 0.0);
  for (std::size_t j = 0; j < values.size(); ++j)
    roots[static_cast<std::size_t>(fold_channel(config, stage, static_cast<std::int64_t>(j)))] += values[j];
  const double each = static_cast<double>(values.size() / roots.size());
  for (double& root : roots) root = std::sqrt(root / each);
  return roots;
}

std::optional<std::string> folds_into_norm(const ModelConfig& config, BlockStage stage) {
  if (stage != BlockStage::kQkv && stage != BlockStage::kGateUp) return std::nullopt;
  return norm_before(config, stage) + ".weight";
}

std::vector<float> storable_scales(const ModelConfig& config, std::span<const float> weight,
                                   std::span<const float> scales, const std::string& dtype) {
  const float one = config.norm_adds_one ? 1.0f : 0.0f;
  const auto stored = [&](float value) {
    if (dtype == "bfloat16") return bf16_to_f32(f32_to_bf16(value));
    return dtype == "float16" ? f16_to_f32(f32_to_f16(value)) : value;
  };
  std::vector<float> out(scales.size(), 1.0f);
  for (std::size_t j = 0; j < scales.size(); ++j) {
    const double before = static_cast<double>(weight[j]) + static_cast<double>(one);
    const float rounded = stored(static_cast<float>(before / static_cast<double>(scales[j])) - one);
    const double after = static_cast<double>(rounded) + static_cast<double>(one);
    const double scale = before / after;
    if (before != 0 && after != 0 && std::isfinite(scale) && scale > 0.5 * static_cast<double>(scales[j]) &&
        scale < 2.0 * static_cast<double>(scales[j]))
      out[j] = static_cast<float>(scale);
  }
  return out;
}

void fold_scales(const ModelConfig& config, const TensorSpec& spec, const BlockScales& scales,
                 std::span<float> values) {
  const bool bias = spec.role == TensorRole::kBias;
  for (const BlockStage stage : {BlockStage::kQkv, BlockStage::kGateUp}) {
    if (spec.module != norm_before(config, stage) || scales[stage].empty()) continue;
    const double one = config.norm_adds_one && !bias ? 1.0 : 0.0;
    for (std::size_t j = 0; j < values.size(); ++j) {
      const double factor = static_cast<double>(values[j]) + one;
      values[j] = static_cast<float>(factor / static_cast<double>(scales[stage][j]) - one);
    }
  }
  const bool linear = spec.role == TensorRole::kLinear;
  if (!linear && (!bias || spec.module.ends_with("norm"))) return;
  const std::int64_t cols = linear ? spec.shape[1] : 1;
  const ModelConfig own = of_block(config, spec.layer);
  if (const BlockStage stage = input_stage(config, spec); linear && !scales[stage].empty()) {
    for (std::int64_t r = 0; r < spec.shape[0]; ++r)
      for (std::int64_t j = 0; j < cols; ++j)
        values[static_cast<std::size_t>(r * cols + j)] *=
            scales[stage][static_cast<std::size_t>(fold_channel(own, stage, j))];
  }
  if (const auto made = made_rows(config, spec); made && !scales[made->stage].empty()) {
    for (std::int64_t r = made->first; r < made->end; ++r) {
      const float scale = scales[made->stage][static_cast<std::size_t>(r - made->first)];
      for (std::int64_t j = 0; j < cols; ++j) values[static_cast<std::size_t>(r * cols + j)] /= scale;
    }
  }
}

}  // namespace pare
