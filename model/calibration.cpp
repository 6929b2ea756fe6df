#include "model/calibration.h"

#include <algorithm>
#include <random>
#include <span>

#include "core/corpus.h"
#include "core/error.h"

namespace pare {

std::string CalibrationWindows::hash() const {
  Hasher hasher;
  hasher.update(std::to_string(count) + "x" + std::to_string(length) + (prefixed ? "p" : "") + ":");
  hasher.update(std::as_bytes(std::span(ids)));
  return hasher.hex();
}

CalibrationWindows sample_windows(const Tokenizer& tokenizer, const std::vector<fs::path>& texts, std::int64_t count,
                                  std::int64_t length, std::uint64_t seed, const std::optional<std::string>& split,
                                  TextPart part) {
  const std::vector<std::int32_t> prefix = tokenizer.prefix_ids();
  std::vector<std::int32_t> joined;
  for (const Document& document : read_documents(texts, split)) {
    const std::vector<std::int32_t> ids = encode_document(tokenizer, document);
    joined.insert(joined.end(), ids.begin(), ids.end());
  }
  if (part.begin > 0 || part.end < 1) {
    const auto at = [&](double share) {
      return joined.begin() + static_cast<std::ptrdiff_t>(share * static_cast<double>(joined.size()));
    };
    joined = std::vector<std::int32_t>(at(part.begin), at(part.end));
  }
  const std::int64_t body = length - static_cast<std::int64_t>(prefix.size());
  if (body < 1 || static_cast<std::int64_t>(joined.size()) < body) {
    throw input_error(texts.empty() ? "calibration text" : texts.front().string(),
                      "at least " + std::to_string(length) + " tokens for one window",
                      std::to_string(joined.size()) + " tokens", "more text, or a smaller --context");
  }
  CalibrationWindows windows;
  windows.count = count;
  windows.length = length;
  windows.prefixed = !prefix.empty();
  windows.ids.reserve(static_cast<std::size_t>(count * length));
  std::mt19937_64 random(seed);
  const std::uint64_t starts = joined.size() - static_cast<std::uint64_t>(body) + 1;
  for (std::int64_t w = 0; w < count; ++w) {
    const auto start = static_cast<std::ptrdiff_t>(random() % starts);
    windows.ids.insert(windows.ids.end(), prefix.begin(), prefix.end());
    windows.ids.insert(windows.ids.end(), joined.begin() + start, joined.begin() + start + body);
  }
  return windows;
}

CalibrationWindows random_windows(std::int64_t vocab_size, std::int64_t count, std::int64_t length,
                                  std::uint64_t seed) {
  CalibrationWindows windows;
  windows.count = count;
  windows.length = length;
  std::mt19937_64 random(seed);
  windows.ids.resize(static_cast<std::size_t>(count * length));
  for (std::int32_t& id : windows.ids) {
    id = static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(vocab_size));
  }
  return windows;
}

void require_ids(const CalibrationWindows& windows, std::int64_t vocab_size) {
  for (std::int32_t id : windows.ids) {
    if (id < 0 || id >= vocab_size) {
      throw input_error("calibration tokens", "ids below " + std::to_string(vocab_size), std::to_string(id),
                        "the tokenizer does not belong to this model");
    }
  }
}

}  // namespace pare
