#include "prune/allocation.h"

#include <algorithm>
#include <cmath>

namespace pare {

std::vector<double> owl_sparsities(std::span<const double> outliers, std::span<const std::int64_t> weights,
                                   double target) {
  const auto [least, most] = std::minmax_element(outliers.begin(), outliers.end());
  std::vector<double> sparsities(outliers.size(), target);
  if (outliers.empty() || !(*most > *least)) return sparsities;
  const double range = 2 * std::min({kOwlSpread, 0.375 * target, 0.375 * (1 - target)});
  double sum = 0, all = 0;
  for (std::size_t i = 0; i < outliers.size(); ++i) {
    sparsities[i] = -range * (outliers[i] - *least) / (*most - *least);
    sum += sparsities[i] * static_cast<double>(weights[i]);
    all += static_cast<double>(weights[i]);
  }
  for (double& sparsity : sparsities) sparsity += target - sum / all;
  return sparsities;
}

std::vector<std::int64_t> whole_weights(std::span<const double> sparsities, std::span<const std::int64_t> sizes,
                                        std::int64_t total) {
  std::vector<std::int64_t> counts;
  double sum = 0;
  std::int64_t before = 0;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    sum += sparsities[i] * static_cast<double>(sizes[i]);
    const auto rounded = std::min(total, static_cast<std::int64_t>(std::floor(sum)));
    const std::int64_t now = i + 1 == sizes.size() ? total : rounded;
    counts.push_back(now - before);
    before = now;
  }
  return counts;
}

}  // namespace pare
