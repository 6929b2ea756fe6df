// The two roundings of llama.cpp's Q4_0, restated as baselines. No LibTorch types.
#pragma once

#include <cstdint>
#include <string>

#include "core/codec.h"

namespace pare {

// weight [rows * cols] as q4 with any group. Per group, in single precision:
// - importance null, `quantize_row_q4_0_ref`: scale = the weight of largest magnitude (the first of several) / -8, so
//   that it meets code -8; codes = floor(w / scale + 8.5) - 8, at most 7, with the scale before it is rounded to half.
// - importance [cols], E[x_j^2] of the inputs, `quantize_row_q4_0_impl` with `make_qx_quants`: an error d_j costs
//   importance_j sqrt(s + w_j^2) d_j^2, s the mean square of the row. Of 19 grids, the widest weight at -7.1 ... -8.9
//   steps, the one whose codes under their least-squares scale cost least; that scale, rounded to half at the end.
// Scales have the sign of the rule. Codes and scales are those of llama.cpp bit for bit for groups of 32, but where a
// scale rounds to zero: there the codes are 0 here. Source: ggml/src/ggml-quants.c at commit 3f545be (2026-08).
// Errors (exit 3, naming `place`): NaN or infinity, or a magnitude whose scale half precision cannot hold. The same
// bits at any number of threads.
QuantizedTensor round_q4_0(const float* weight, std::int64_t rows, std::int64_t cols, const Codec& codec,
                           const double* importance, const std::string& place, int threads);

}  // namespace pare
