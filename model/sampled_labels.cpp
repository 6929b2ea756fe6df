#include "model/sampled_labels.h"

#include <algorithm>
#include <cmath>

#include "core/uniform.h"

namespace pare {
namespace {

using torch::Tensor;

constexpr std::int64_t kLabelRows = 64;  // logits that are held at a time, in positions

}  // namespace

Tensor sampled_labels(Decoder& decoder, const Tensor& hidden, std::uint64_t seed, std::uint64_t first_place,
                      std::int64_t among) {
  const torch::NoGradGuard no_grad;
  const std::int64_t n = hidden.size(0);
  Tensor labels = torch::zeros({n}, torch::kLong);
  for (std::int64_t first = 0; first < n; first += kLabelRows) {
    const std::int64_t count = std::min(kLabelRows, n - first);
    const Tensor logits =
        decoder->head_logits(hidden.narrow(0, first, count)).to(torch::kCPU, torch::kFloat).contiguous();
    const std::int64_t width = logits.size(1), vocab = among > 0 ? among : width;
    for (std::int64_t i = 0; i < count; ++i) {
      const float* row = logits.data_ptr<float>() + i * width;
      const float top = *std::max_element(row, row + vocab);
      double sum = 0;
      for (std::int64_t v = 0; v < vocab; ++v) sum += std::exp(static_cast<double>(row[v] - top));
      double left = uniform_at(seed, first_place + static_cast<std::uint64_t>(first + i)) * sum;
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
