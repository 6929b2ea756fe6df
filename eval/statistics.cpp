#include "eval/statistics.h"

#include <algorithm>
#include <cassert>
#include <cmath>

namespace pare {

Estimate clustered_mean(std::span<const double> values, std::span<const std::int64_t> cluster, std::int64_t clusters) {
  assert(values.size() == cluster.size());
  Estimate result;
  const double n = static_cast<double>(values.size());
  if (values.empty()) return result;
  double sum = 0;
  for (const double value : values) sum += value;
  result.value = sum / n;
  std::vector<double> residual(static_cast<std::size_t>(clusters), 0.0);
  std::vector<char> used(static_cast<std::size_t>(clusters), 0);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto g = static_cast<std::size_t>(cluster[i]);
    residual[g] += values[i] - result.value;
    used[g] = 1;
  }
  const double g = static_cast<double>(std::count(used.begin(), used.end(), 1));
  if (g < 2) return result;
  double squares = 0;
  for (const double r : residual) squares += r * r;
  result.standard_error = std::sqrt(g / (g - 1) * squares) / n;
  return result;
}

Estimate plain_mean(std::span<const double> values) {
  Estimate result;
  const double n = static_cast<double>(values.size());
  if (values.empty()) return result;
  double sum = 0;
  for (const double value : values) sum += value;
  result.value = sum / n;
  if (values.size() < 2) return result;
  double squares = 0;
  for (const double value : values) squares += (value - result.value) * (value - result.value);
  result.standard_error = std::sqrt(squares / (n - 1) / n);
  return result;
}

double quantile(std::span<const double> sorted, double q) {
  assert(!sorted.empty() && q >= 0 && q <= 1);
  const double h = static_cast<double>(sorted.size() - 1) * q;
  const auto low = static_cast<std::size_t>(std::floor(h));
  const std::size_t high = std::min(low + 1, sorted.size() - 1);
  const double fraction = h - static_cast<double>(low);
  if (fraction == 0 || sorted[low] == sorted[high]) return sorted[low];  // also: no inf - inf
  return sorted[low] + fraction * (sorted[high] - sorted[low]);
}

}  // namespace pare
