// The tiny models of tests/golden/families: folders made from the formula that tests/golden/make_families.py states.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/error.h"
#include "core/file.h"
#include "core/placement.h"
#include "core/safetensors.h"
#include "eval/logits_source.h"

namespace pare::testing {

inline fs::path golden_families() {
  return fs::path(PARE_SOURCE_DIR) / "tests/golden/families";
}

inline std::vector<std::string> family_names() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(golden_families()))
    if (entry.path().extension() == ".json") names.push_back(entry.path().stem().string());
  std::sort(names.begin(), names.end());
  return names;
}

// Of a tensor as it stands in the file.
inline std::vector<float> formula_values(const StoredTensor& spec, bool adds_one) {
  std::uint64_t seed = 0xcbf29ce484222325ull;
  for (const char c : spec.name) seed = (seed ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
  std::int64_t count = 1;
  for (const std::int64_t size : spec.shape) count *= size;
  std::vector<float> values;
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint64_t z = seed + static_cast<std::uint64_t>(i) + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    const auto x = static_cast<float>((z ^ (z >> 31)) >> 52) - 2048.0f;
    values.push_back(spec.parts[0]->role == TensorRole::kNorm ? (adds_one ? 0.0f : 1.0f) + x / 4096.0f : x / 8192.0f);
  }
  return values;
}

// A folder with config.json as it stands in the golden file.
inline void make_family_folder(const Json& config, const fs::path& folder) {
  fs::create_directories(folder);
  write_text(folder / "config.json", config.dump());
  const ModelConfig parsed = parse_config(config, nullptr, "golden config");
  const std::vector<TensorSpec> specs = expected_tensors(parsed);
  std::vector<TensorDecl> decls;
  for (const StoredTensor& stored : stored_tensors(parsed, specs))
    decls.push_back({stored.name, DType::kF32, stored.shape});
  SafetensorsWriter writer(folder / "model.safetensors", decls, {{"format", "pt"}});
  for (const StoredTensor& stored : stored_tensors(parsed, specs))
    writer.write(std::as_bytes(std::span<const float>(formula_values(stored, parsed.norm_adds_one))));
  writer.finish();
}

struct FamilyText {
  std::vector<std::int32_t> ids;
  std::vector<std::int64_t> rows;           // positions whose logits transformers computed
  std::vector<std::vector<double>> logits;  // [rows][vocab]
};

inline std::vector<FamilyText> family_texts(const Json& golden) {
  std::vector<FamilyText> texts;
  for (const Json& text : golden.at("texts"))
    texts.push_back({text.at("ids").get<std::vector<std::int32_t>>(), text.at("rows").get<std::vector<std::int64_t>>(),
                     text.at("logits").get<std::vector<std::vector<double>>>()});
  return texts;
}

// NaN stays: it must not pass for a small difference.
inline double larger(double largest, double difference) {
  return difference <= largest ? largest : difference;
}

inline double largest_difference(LogitsSource& source, const FamilyText& text) {
  source.begin(text.ids);
  std::vector<float> logits(static_cast<std::size_t>(source.vocab_size()));
  double largest = 0;
  for (std::size_t r = 0; r < text.rows.size(); ++r) {
    source.logits(text.rows[r], 1, logits.data());
    for (std::size_t i = 0; i < logits.size(); ++i)
      largest = larger(largest, std::abs(static_cast<double>(logits[i]) - text.logits.at(r).at(i)));
  }
  return largest;
}

}  // namespace pare::testing
