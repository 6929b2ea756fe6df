// Linears that a checkpoint keeps in one tensor (q, k and v; gate and up) and that are read apart.
#pragma once

#include <optional>
#include <string>

#include "core/config.h"

namespace pare {

// Why codes of this tensor cannot be read in parts: a fused linear whose parts do not begin at whole blocks of 16 rows,
// in which codes are laid out. nullopt: they can, or it is one linear.
std::optional<std::string> not_splittable(const ModelConfig& config, const TensorSpec& spec);

}  // namespace pare
