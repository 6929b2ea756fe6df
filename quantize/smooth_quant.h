// Scales after SmoothQuant. No LibTorch types.
#pragma once

#include <span>
#include <vector>

namespace pare {

// The alphas of the grid: 0, 1/20, ..., 1.
inline constexpr int kSmoothGrid = 21;

// s_j = max|X_j|^alpha / max|W_j|^(1 - alpha): Xiao et al. 2022, "SmoothQuant", equation 4; divided by
// sqrt(max s min s), which neither rounding notices. A channel whose inputs or weights are all 0 counts as 1e-5 of the
// largest.
std::vector<float> smooth_scales(std::span<const double> input_peak, std::span<const double> weight_peak, double alpha);

}  // namespace pare
