// Scales, zero points and nearest codes, searched group by group. No LibTorch types.
#pragma once

#include <cstdint>
#include <string>

#include "core/codec.h"

namespace pare {

enum class ScaleRule {
  kAbsmax,    // absmax / largest code, (max - min) / 15: the null that everything is measured against
  kSearched,  // the best of a grid around it, refined by least squares, under the importance below
};

// What an error in a group costs. With `hessian` and groups of at most 128: d^T H_gg d for the group's diagonal block
// of H. Else with `mean_square`: sum E[x_j^2] d_j^2. Else plain squares.
struct Importance {
  const double* hessian = nullptr;      // [cols * cols]
  const double* mean_square = nullptr;  // [cols]
  bool blocks_only = false;             // hessian: the groups' diagonal blocks alone, [groups][size * size]
};
inline constexpr std::int64_t kBlockObjectiveLimit = 128;

// Scales (rounded to f16 first, finite; of searched int4, int3 and int2 of either sign, else >= 0), zero points or
// minima and the nearest codes of weight [rows * cols]. A weight that is exactly 0 gets a code that means exactly 0, but for
// q4m, which has no such code. kSearched is never worse than kAbsmax under the objective, in any group. Errors (exit 3,
// naming `place`): NaN or infinity, a magnitude whose scale f16 cannot hold, or for q4m a pruned matrix. The same bits
// at any number of threads.
QuantizedTensor round_to_nearest(const float* weight, std::int64_t rows, std::int64_t cols, const Codec& codec,
                                 ScaleRule rule, const Importance& importance, const std::string& place, int threads);

// Searched scales, zero points or minima of one group in rows [first, first + rows) of `tensor`, whose codes stay.
// values: [size][stride], that of row first + r at [j * stride + r]; metric: [size * size].
void search_group(const double* values, std::int64_t stride, std::int64_t first, std::int64_t rows, std::int64_t group,
                  const double* metric, QuantizedTensor& tensor);

// Exact zeros never come in such numbers by themselves.
inline constexpr double kPrunedShare = 0.05;

// Throws (exit 3) at the first value that is NaN or infinite, naming place, row and column.
void require_finite(const float* weight, std::int64_t rows, std::int64_t cols, const std::string& place);

}  // namespace pare
