#include "prune/masks.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "core/error.h"

namespace pare {
namespace {

// Marks the `remove` lowest of scores[0, count) with 0 in keep. work: scratch, reused between calls.
void drop_lowest(const float* scores, std::int64_t count, std::int64_t remove, std::vector<float>& work,
                 std::uint8_t* keep) {
  std::fill(keep, keep + count, std::uint8_t{1});
  if (remove <= 0) return;
  work.assign(scores, scores + count);
  std::nth_element(work.begin(), work.begin() + (remove - 1), work.end());
  const float threshold = work[static_cast<std::size_t>(remove - 1)];
  std::int64_t left = remove;
  for (std::int64_t i = 0; i < count; ++i) {
    if (scores[i] < threshold) {
      keep[i] = 0;
      --left;
    }
  }
  for (std::int64_t i = count - 1; i >= 0 && left > 0; --i) {
    if (scores[i] == threshold) {
      keep[i] = 0;
      --left;
    }
  }
}

std::uint64_t mix(std::uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace

Sparsity Sparsity::pattern(std::string_view text, const std::string& place) {
  Sparsity out;
  const std::size_t colon = text.find(':');
  const auto number = [](std::string_view digits, int& value) {
    const auto [end, problem] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    return problem == std::errc() && end == digits.data() + digits.size() && !digits.empty();
  };
  if (colon == std::string_view::npos || !number(text.substr(0, colon), out.keep) ||
      !number(text.substr(colon + 1), out.of) || out.keep < 1 || out.keep >= out.of || out.of > 64)
    throw usage_error(place, "N:M with 0 < N < M <= 64, N weights kept of every M", "\"" + std::string(text) + "\"",
                      "for example 2:4 or 4:8");
  out.fraction = 1.0 - static_cast<double>(out.keep) / out.of;
  return out;
}

std::string Sparsity::name() const {
  if (n_of_m()) return std::to_string(keep) + ":" + std::to_string(of);
  std::string percent = std::to_string(std::lround(fraction * 1000));  // tenths of a percent
  if (percent.size() < 2) percent.insert(0, "0");
  const char tenth = percent.back();
  percent.pop_back();
  return percent + (tenth == '0' ? "" : std::string(".") + tenth) + " %";
}

std::int64_t Sparsity::removed(std::int64_t count) const {
  if (n_of_m()) return count / of * (of - keep);
  // The small term undoes products such as 100 * 0.29 = 28.999999999999996.
  return static_cast<std::int64_t>(std::floor(static_cast<double>(count) * fraction + 1e-9));
}

std::vector<std::uint8_t> keep_mask(const float* scores, std::int64_t rows, std::int64_t cols, const Sparsity& sparsity,
                                    Scope scope) {
  const std::int64_t total = rows * cols;
  std::vector<std::uint8_t> keep(static_cast<std::size_t>(total));
  std::int64_t unit = scope == Scope::kTensor ? total : cols;
  if (sparsity.n_of_m()) {
    if (cols % sparsity.of != 0)
      throw input_error("mask", "rows of a multiple of " + std::to_string(sparsity.of) + " weights",
                        std::to_string(cols) + " weights");
    unit = sparsity.of;
  }
  if (unit == 0) return keep;
  const std::int64_t remove = sparsity.removed(unit);
  std::vector<float> work;
  for (std::int64_t first = 0; first < total; first += unit)
    drop_lowest(scores + first, unit, remove, work, keep.data() + first);
  return keep;
}

std::vector<float> magnitude_scores(const float* weights, std::int64_t rows, std::int64_t cols) {
  std::vector<float> scores(static_cast<std::size_t>(rows * cols));
  for (std::size_t i = 0; i < scores.size(); ++i) scores[i] = std::fabs(weights[i]);
  return scores;
}

std::vector<float> wanda_scores(const float* weights, const double* mean_square, std::int64_t rows, std::int64_t cols) {
  std::vector<float> norm(static_cast<std::size_t>(cols));
  for (std::size_t j = 0; j < norm.size(); ++j) norm[j] = static_cast<float>(std::sqrt(mean_square[j]));
  std::vector<float> scores(static_cast<std::size_t>(rows * cols));
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < cols; ++j)
      scores[static_cast<std::size_t>(i * cols + j)] =
          std::fabs(weights[i * cols + j]) * norm[static_cast<std::size_t>(j)];
  return scores;
}

std::vector<float> random_scores(std::uint64_t seed, std::string_view tensor, std::int64_t rows, std::int64_t cols) {
  std::uint64_t key = 0xcbf29ce484222325ULL;  // FNV-1a over the name
  for (const char c : tensor) key = (key ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
  key = mix(key ^ mix(seed));
  std::vector<float> scores(static_cast<std::size_t>(rows * cols));
  for (std::size_t i = 0; i < scores.size(); ++i)
    scores[i] = static_cast<float>(mix(key + i) >> 40) * 0x1p-24f;
  return scores;
}

void apply_mask(const std::vector<std::uint8_t>& keep, float* weights) {
  for (std::size_t i = 0; i < keep.size(); ++i)
    if (keep[i] == 0) weights[i] = 0.0f;
}

}  // namespace pare
