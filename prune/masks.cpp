#include "prune/masks.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace pare {
namespace {

std::uint64_t mix(std::uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace

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
  const bool counted = sparsity.weights >= 0 && !sparsity.n_of_m();
  std::vector<float> work;
  for (std::int64_t first = 0; first < total; first += unit) {
    const std::int64_t remove = counted ? sparsity.removed_before(first + unit, total) -
                                              sparsity.removed_before(first, total)
                                        : sparsity.removed(unit);
    drop_lowest(scores + first, unit, remove, work, keep.data() + first);
  }
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
