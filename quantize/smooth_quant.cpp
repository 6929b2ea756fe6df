#include "quantize/smooth_quant.h"

#include <algorithm>
#include <cmath>

namespace pare {

std::vector<float> smooth_scales(std::span<const double> input_peak, std::span<const double> weight_peak,
                                 double alpha) {
  const double inputs = *std::max_element(input_peak.begin(), input_peak.end());
  const double weights = *std::max_element(weight_peak.begin(), weight_peak.end());
  std::vector<double> scales(input_peak.size(), 1.0);
  for (std::size_t j = 0; inputs > 0 && weights > 0 && j < scales.size(); ++j)
    scales[j] = std::pow(std::max(input_peak[j], 1e-5 * inputs), alpha) /
                std::pow(std::max(weight_peak[j], 1e-5 * weights), 1 - alpha);
  const auto [low, high] = std::minmax_element(scales.begin(), scales.end());
  const double middle = std::sqrt(*low * *high);
  std::vector<float> out;
  for (const double scale : scales) out.push_back(static_cast<float>(scale / middle));
  return out;
}

}  // namespace pare
