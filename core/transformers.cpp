#include "core/transformers.h"

#include "core/arch/arch.h"

namespace pare {

std::optional<std::string> own_widths_obstacle(const ModelConfig& config) {
  if (config.layer_widths.empty()) return std::nullopt;
  return "blocks of different widths: " + width_keys(config) + " of config.json has a number for each block, which its " +
         config.family + " does not read";
}

std::optional<std::string> transformers_obstacle(const ModelConfig& config) {
  if (auto why = own_widths_obstacle(config)) return why;
  const Family* family = find_family(config.family);
  if (family != nullptr && family->heads_divide_width && config.hidden_size % config.num_heads != 0)
    return "version 5 wants hidden_size to be a multiple of the heads: " + std::to_string(config.hidden_size) + " and " +
           std::to_string(config.num_heads);
  return std::nullopt;
}

}  // namespace pare
