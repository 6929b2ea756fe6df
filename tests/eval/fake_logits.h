// Models made of numbers: logits are a function of the ids so far and a seed.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/corpus.h"
#include "eval/logits_source.h"

namespace pare {

class FakeLogits : public LogitsSource {
 public:
  FakeLogits(std::int64_t vocab, std::uint64_t seed, double scale) : vocab_(vocab), seed_(seed), scale_(scale) {}
  std::string name() const override { return "fake " + std::to_string(seed_); }
  std::int64_t vocab_size() const override { return vocab_; }
  void begin(std::span<const std::int32_t> ids) override {
    ids_.assign(ids.begin(), ids.end());
    ++begun;
  }
  void logits(std::int64_t first, std::int64_t count, float* out) override {
    for (std::int64_t t = first; t < first + count; ++t, out += vocab_) row(t, out);
    largest_block = std::max(largest_block, count);
  }
  virtual void row(std::int64_t t, float* out) const {
    std::uint64_t key = seed_;
    for (std::int64_t i = 0; i <= t; ++i) key = key * 6364136223846793005u + static_cast<std::uint64_t>(ids_[static_cast<std::size_t>(i)]) + 1;
    std::mt19937_64 random(key);
    std::normal_distribution<double> normal(0, scale_);
    for (std::int64_t i = 0; i < vocab_; ++i) out[i] = static_cast<float>(normal(random));
  }

  std::int64_t begun = 0, largest_block = 0;

 protected:
  std::int64_t vocab_;
  std::uint64_t seed_;
  double scale_;
  std::vector<std::int32_t> ids_;
};

// One fixed table of rows, whatever the ids: row t of the window is table row t.
class TableLogits : public LogitsSource {
 public:
  explicit TableLogits(std::vector<std::vector<float>> rows) : rows_(std::move(rows)) {}
  std::string name() const override { return "table"; }
  std::int64_t vocab_size() const override { return static_cast<std::int64_t>(rows_[0].size()); }
  void begin(std::span<const std::int32_t>) override {}
  void logits(std::int64_t first, std::int64_t count, float* out) override {
    for (std::int64_t t = first; t < first + count; ++t) {
      for (const float value : rows_.at(static_cast<std::size_t>(t))) *out++ = value;
    }
  }

 private:
  std::vector<std::vector<float>> rows_;
};

inline std::vector<Window> random_windows(std::int64_t vocab, const std::vector<std::pair<std::int64_t, std::int64_t>>& length_document,
                                          std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<Window> windows;
  for (const auto& [length, document] : length_document) {
    Window window;
    window.document = document;
    for (std::int64_t i = 0; i < length; ++i) {
      window.ids.push_back(static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(vocab)));
    }
    windows.push_back(window);
  }
  return windows;
}

// log_softmax in long double.
inline std::vector<long double> exact_log_softmax(const std::vector<float>& row) {
  long double maximum = -INFINITY;
  for (const float x : row) maximum = std::max(maximum, static_cast<long double>(x));
  long double z = 0;
  for (const float x : row) z += expl(x - maximum);
  std::vector<long double> result;
  for (const float x : row) result.push_back((x - maximum) - logl(z));
  return result;
}

inline long double exact_kl(const std::vector<float>& p, const std::vector<float>& q) {
  const auto lp = exact_log_softmax(p), lq = exact_log_softmax(q);
  long double kl = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    if (lp[i] > -INFINITY && expl(lp[i]) > 0) kl += expl(lp[i]) * (lp[i] - lq[i]);
  }
  return kl;
}

}  // namespace pare
