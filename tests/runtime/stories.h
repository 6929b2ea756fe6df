// stories260K (../shared/models) as an f32 compact file, and what is known about it.
#pragma once

#include <optional>

#include "core/safetensors.h"
#include "tests/runtime/tiny_model.h"

namespace pare::testing {

inline fs::path shared_folder() {
  return fs::path(PARE_SOURCE_DIR) / ".." / "shared";
}

// The folder of the model, or nothing where ../shared does not lie beside the checkout.
inline std::optional<fs::path> stories_folder() {
  const fs::path folder = shared_folder() / "models" / "stories260K";
  if (!fs::exists(folder / "model.safetensors")) return std::nullopt;
  return folder;
}

inline void write_stories(const fs::path& folder, const fs::path& out, const Codec& codec) {
  const ModelConfig config =
      parse_config(read_json(folder / "config.json"), read_json(folder / "generation_config.json"), folder.string());
  const ShardedTensors tensors(folder);
  std::vector<CompactWriter::Plan> plan;
  const std::vector<TensorSpec> specs = expected_tensors(config);
  for (const TensorSpec& spec : specs) {
    const bool matrix = spec.shape.size() == 2 && codec.fits(spec.shape[1]);
    plan.push_back({spec.name, matrix ? codec : Codec{}, spec.shape});
  }
  CompactWriter writer(out, plan,
                       {{"config.json", read_text(folder / "config.json")},
                        {"generation_config.json", read_text(folder / "generation_config.json")},
                        {"tokenizer.json", read_text(folder / "tokenizer.json")}});
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const TensorView* view = tensors.find(specs[i].name);
    if (view == nullptr) throw std::runtime_error(specs[i].name);
    std::vector<float> values(static_cast<std::size_t>(view->elements()));
    to_f32(*view, 0, view->elements(), values.data());
    if (plan[i].codec.is_float()) {
      writer.add(values.data());
    } else {
      writer.add(round_to_nearest(plan[i].codec, specs[i].shape[0], specs[i].shape[1], values.data()));
    }
  }
  writer.finish_payload();
  writer.seal("{\"rows\":[]}");
}

// The greedy continuation that ORIGIN.md records.
inline std::string recorded_story(const fs::path& folder) {
  const std::string text = read_text(folder / "ORIGIN.md");
  const std::string mark = "-t 0.0\n";
  const std::size_t begin = text.find(mark) + mark.size();
  return text.substr(begin, text.find("\n```", begin) - begin);
}

}  // namespace pare::testing
