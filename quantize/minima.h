// Scale and minimum of a group of q4m codes: w = code * scale + minimum. No LibTorch types.
#pragma once

#include <cstdint>

namespace pare {

inline constexpr int kMinimaRows = 16;  // searched together, one a lane

// Row r's weight j at w[j * kMinimaRows + r]. Metric A [size * size] at block[j * stride + k]; without block its
// diagonal; without both ones.
struct MinimaGroup {
  std::int64_t size = 0;
  const double* w = nullptr;
  const double* block = nullptr;
  std::int64_t stride = 0;
  const double* diagonal = nullptr;
};

// Values of half precision, scale >= 0. searched: the pair of least d^T A d that was found, for nearest codes: the range
// of the group shrunk and moved in steps, and for the codes of each such start the scale and minimum of least squares
// (two unknowns, in closed form), rounded to half one after the other. The minimum is free of the grid, as in NeUQI
// (Lin et al. 2025), whose exact minimum for a given scale needs a diagonal A. Else the range itself, as llama.cpp rounds
// Q4_1. A group of equal weights gets scale 0. Errors: none; weights are finite and within half precision.
void choose_minima(const MinimaGroup& group, bool searched, double* scale, double* minimum);

// The nearest code, for either rounded value; 0 where the scale is 0.
int nearest_code(double weight, double scale, double minimum);

}  // namespace pare
