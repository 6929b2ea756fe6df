// The options of `pare quantize` and its presets. No LibTorch types.
#pragma once

#include <vector>

#include "core/config.h"
#include "core/options.h"

namespace pare {

std::vector<OptionDecl> quantize_options();

// The options with those of --preset in place of defaults; what the user set stands, and what would have no use with it, or
// in a model with experts, is left out.
Options with_preset(const Options& given, const ModelConfig& config);

}  // namespace pare
