#include "core/fused_rows.h"

#include <algorithm>
#include <vector>

namespace pare {

std::optional<std::string> not_splittable(const ModelConfig& config, const TensorSpec& spec) {
  constexpr std::int64_t kBlockRows = 16;
  std::vector<std::int64_t> begins;
  const BlockWidths widths = config.widths(std::max(0, spec.layer));
  if (spec.role == TensorRole::kLinear && spec.module == "self_attn.qkv_proj")
    begins = {widths.heads * config.head_dim, (widths.heads + widths.kv_heads) * config.head_dim};
  else if (spec.role == TensorRole::kLinear && spec.module == "mlp.gate_up_proj")
    begins = {widths.inner};
  for (const std::int64_t row : begins)
    if (row % kBlockRows != 0)
      return "a part begins at row " + std::to_string(row) + ", which " + std::to_string(kBlockRows) +
             " does not divide";
  return std::nullopt;
}

}  // namespace pare
