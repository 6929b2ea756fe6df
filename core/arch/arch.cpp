#include "core/arch/arch.h"

#include <algorithm>
#include <array>

namespace pare {

std::span<const Family* const> families() {
  static constexpr std::array kFamilies = {&kLlama,  &kMistral, &kQwen2,   &kQwen3,   &kGemma,   &kGemma2,
                                           &kGemma3, &kPhi3,    &kMixtral, &kSmolLm3, &kQwen3Moe, &kGpt2,
                                           &kGptNeox};
  return kFamilies;
}

const Family* find_family(std::string_view name) {
  for (const Family* family : families())
    if (name == family->name) return family;
  return nullptr;
}

std::optional<std::vector<std::uint8_t>> read_layer_types(ConfigReader& reader, std::int64_t layers) {
  if (!reader.present("layer_types")) return std::nullopt;
  const Json& types = reader["layer_types"];
  if (!types.is_array()) {
    reader.problem("layer_types is not a list");
    return std::nullopt;
  }
  if (static_cast<std::int64_t>(types.size()) != layers) {
    reader.problem("layer_types has " + std::to_string(types.size()) + " entries for " + std::to_string(layers) +
                   " layers");
    return std::nullopt;
  }
  std::vector<std::uint8_t> slides;
  for (const Json& type : types) {
    if (type != "full_attention" && type != "sliding_attention") {
      reader.problem("layer_types has " + type.dump(-1, ' ', false, Json::error_handler_t::replace) +
                     "; supported are full_attention and sliding_attention");
      return std::nullopt;
    }
    slides.push_back(type == "sliding_attention" ? 1 : 0);
  }
  return slides;
}

Json layer_types_of(const ModelConfig& config) {
  Json types = Json::array();
  for (int layer = 0; layer < config.num_layers; ++layer)
    types.push_back(config.slides(layer) ? "sliding_attention" : "full_attention");
  return types;
}

void read_window(ConfigReader& reader, ModelConfig& config, std::int64_t class_default) {
  const std::int64_t window =
      reader.mentions("sliding_window") ? reader.integer("sliding_window", 0, 1, 1ll << 40) : class_default;
  if (window == 0) return;
  config.sliding_window = window;
  config.layer_slides.assign(static_cast<std::size_t>(config.num_layers), 1);
}

Json window_of(const ModelConfig& config) {
  return config.sliding_window > 0 ? Json(config.sliding_window) : Json(nullptr);
}

}  // namespace pare
