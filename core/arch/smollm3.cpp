// SmolLM3 (transformers models/smollm3): Llama with blocks that use no rotary positions, every fourth by default. Where
// a window is asked for it is in those blocks.
#include <algorithm>

#include "core/arch/arch.h"

namespace pare {
namespace {

void read(ConfigReader& reader, ModelConfig& config) {
  config.qkv_bias = config.o_bias = reader.flag("attention_bias", false);
  config.mlp_bias = reader.flag("mlp_bias", false);
  const std::int64_t interval = reader.integer("no_rope_layer_interval", 4, 1, 1 << 20);
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer)
    config.layer_rotates.push_back((layer + 1) % interval != 0 ? 1 : 0);
  if (reader.present("no_rope_layers")) {
    const Json& list = reader["no_rope_layers"];
    if (!list.is_array() || static_cast<std::int64_t>(list.size()) != config.num_layers ||
        !std::all_of(list.begin(), list.end(), [](const Json& x) { return x == 0 || x == 1; })) {
      reader.problem("no_rope_layers is not a list of 0 and 1 with an entry for each layer");
      return;
    }
    for (std::size_t i = 0; i < list.size(); ++i) config.layer_rotates[i] = list[i].get<std::uint8_t>();
  }
  std::vector<std::uint8_t> slides(config.layer_rotates.size(), 0);
  const bool asked = reader.flag("use_sliding_window", false) && reader.present("sliding_window");
  if (asked)
    std::transform(config.layer_rotates.begin(), config.layer_rotates.end(), slides.begin(), [](auto x) { return !x; });
  if (const auto types = read_layer_types(reader, config.num_layers)) slides = *types;
  if (std::find(slides.begin(), slides.end(), 1) == slides.end()) return;
  if (!reader.present("sliding_window")) reader.problem("blocks slide, but sliding_window is missing");
  config.sliding_window = reader.integer("sliding_window", 1, 1, 1ll << 40);
  config.layer_slides = slides;
}

void write(const ModelConfig& config, Json& out) {
  out["attention_bias"] = config.qkv_bias;
  out["mlp_bias"] = config.mlp_bias;
  Json rotates = Json::array();
  for (const std::uint8_t flag : config.layer_rotates) rotates.push_back(static_cast<int>(flag));
  out["no_rope_layers"] = rotates;
  out["layer_types"] = layer_types_of(config);
  out["use_sliding_window"] = config.sliding_window > 0;
  if (config.sliding_window > 0) out["sliding_window"] = config.sliding_window;
}

}  // namespace

const Family kSmolLm3 = {.name = "smollm3",
                         .architecture = "SmolLM3ForCausalLM",
                         .read = read,
                         .write = write,
                         .default_max_positions = 32768,
                         .default_kv_heads = 4,
                         .default_eos = 128001,
                         .default_theta = 2e6,
                         .default_tied = true,
                         .reads_layer_types = true};

}  // namespace pare
