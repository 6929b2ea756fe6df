// Scales after AWQ. No LibTorch types.
#pragma once

#include <span>
#include <vector>

namespace pare {

// The exponents of the grid: 0, 1/20, ..., 19/20. The first leaves everything as it is.
inline constexpr int kAwqGrid = 20;

// s_j = a_j^exponent, divided by sqrt(max s min s), with a_j the magnitude of input channel j, at least 1e-4 of the
// largest: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization". Their a is the mean of |x|, ours the root of
// the mean of x^2, which the block walk has.
std::vector<float> awq_scales(std::span<const double> magnitude, double exponent);

}  // namespace pare
