#include "eval/tail_samples.h"

#include <algorithm>

namespace pare {

TailSamples sample_tail(std::span<const double> probability, std::span<const std::uint32_t> listed, std::int64_t draws,
                        double u) {
  std::vector<std::uint32_t> skipped(listed.begin(), listed.end());
  std::sort(skipped.begin(), skipped.end());
  // The same additions twice: the last place never lies beyond the sum.
  const auto walk = [&](auto&& take) {
    double sum = 0;
    auto skip = skipped.begin();
    for (std::size_t i = 0; i < probability.size(); ++i) {
      if (skip != skipped.end() && *skip == i) {
        ++skip;
        continue;
      }
      sum += probability[i];
      if (!take(i, sum)) break;
    }
    return sum;
  };
  TailSamples result;
  result.mass = walk([](std::size_t, double) { return true; });
  if (!(result.mass > 0)) return result;
  std::int64_t drawn = 0;
  const double step = result.mass / static_cast<double>(draws);
  walk([&](std::size_t i, double sum) {
    int hits = 0;
    for (; drawn < draws && (static_cast<double>(drawn) + u) * step < sum; ++drawn) ++hits;
    if (hits > 0) {
      result.index.push_back(static_cast<std::uint32_t>(i));
      result.count.push_back(static_cast<std::uint8_t>(hits));
    }
    return drawn < draws;
  });
  // Rounding may leave the last place at the very end of the tail.
  if (drawn < draws && !result.count.empty())
    result.count.back() = static_cast<std::uint8_t>(result.count.back() + draws - drawn);
  return result;
}

}  // namespace pare
