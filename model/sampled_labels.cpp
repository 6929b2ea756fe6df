#include "model/sampled_labels.h"

#include <algorithm>
#include <cmath>

namespace pare {
namespace {

using torch::Tensor;

constexpr std::int64_t kLabelRows = 64;  // logits that are held at a time, in positions

// Uniform in (0, 1): SplitMix64 of the place.
double uniform(std::uint64_t seed, std::uint64_t place) {
  std::uint64_t z = seed + (place + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return (static_cast<double>(z >> 11) + 0.5) * 0x1p-53;
}

}  // namespace

Tensor sampled_labels(Decoder& decoder, const Tensor& hidden, std::uint64_t seed, std::uint64_t first_place) {
  const torch::NoGradGuard no_grad;
  const std::int64_t n = hidden.size(0);
  Tensor labels = torch::zeros({n}, torch::kLong);
  for (std::int64_t first = 0; first < n; first += kLabelRows) {
    const std::int64_t count = std::min(kLabelRows, n - first);
    const Tensor logits =
        decoder->head_logits(hidden.narrow(0, first, count)).to(torch::kCPU, torch::kFloat).contiguous();
    const std::int64_t vocab = logits.size(1);
    for (std::int64_t i = 0; i < count; ++i) {
      const float* row = logits.data_ptr<float>() + i * vocab;
      const float top = *std::max_element(row, row + vocab);
      double sum = 0;
      for (std::int64_t v = 0; v < vocab; ++v) sum += std::exp(static_cast<double>(row[v] - top));
      double left = uniform(seed, first_place + static_cast<std::uint64_t>(first + i)) * sum;
      std::int64_t label = 0;
      for (; label + 1 < vocab; ++label) {
        left -= std::exp(static_cast<double>(row[label] - top));
        if (left <= 0) break;
      }
      labels.data_ptr<std::int64_t>()[first + i] = label;
    }
  }
  return labels.to(hidden.device());
}

}  // namespace pare
