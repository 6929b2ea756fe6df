// What transformers refuses of a config.json that pare reads.
#pragma once

#include <optional>
#include <string>

#include "core/config.h"

namespace pare {

// Blocks of different widths: the classes of these families have one number where config.json says a list.
std::optional<std::string> own_widths_obstacle(const ModelConfig& config);
// Why transformers does not load a folder of this config; nullopt: it does.
std::optional<std::string> transformers_obstacle(const ModelConfig& config);

}  // namespace pare
