#include "quantize/awq.h"

#include <algorithm>
#include <cmath>

namespace pare {

std::vector<float> awq_scales(std::span<const double> magnitude, double exponent) {
  const double largest = *std::max_element(magnitude.begin(), magnitude.end());
  std::vector<double> scales;
  for (const double a : magnitude)
    scales.push_back(largest > 0 ? std::pow(std::max(a / largest, 1e-4), exponent) : 1.0);
  const auto [low, high] = std::minmax_element(scales.begin(), scales.end());
  const double middle = std::sqrt(*low * *high);
  std::vector<float> out;
  for (const double scale : scales) out.push_back(static_cast<float>(scale / middle));
  return out;
}

}  // namespace pare
