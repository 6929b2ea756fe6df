// Windows of tokens that activations are measured on. No LibTorch types here.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/file.h"
#include "core/tokenizer.h"

namespace pare {

// Calibration tokens: `count` windows of exactly `length` ids, one after the other.
struct CalibrationWindows {
  std::int64_t count = 0, length = 0;
  std::vector<std::int32_t> ids;  // [count * length]
  bool prefixed = false;          // every window starts with the tokenizer's prefix (BOS), which attracts outliers
  std::string hash() const;       // of the ids: part of a resume manifest
};

// Between which parts of the joined text windows are drawn.
struct TextPart {
  double begin = 0, end = 1;
};
// Seeded random windows over the documents joined in order; every window starts with the prefix ids, if the tokenizer
// has any. Errors: exit 3 when the text has fewer tokens than one window.
CalibrationWindows sample_windows(const Tokenizer& tokenizer, const std::vector<fs::path>& texts, std::int64_t count,
                                  std::int64_t length, std::uint64_t seed,
                                  const std::optional<std::string>& split = std::nullopt, TextPart part = {});
// Error: exit 3 at an id that the model has no embedding for.
void require_ids(const CalibrationWindows& windows, std::int64_t vocab_size);
// Uniform random ids below vocab_size, for tests and for models without a tokenizer.
CalibrationWindows random_windows(std::int64_t vocab_size, std::int64_t count, std::int64_t length, std::uint64_t seed);

}  // namespace pare
