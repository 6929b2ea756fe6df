// What the weights that stay take over from those that went. Plain arrays, no LibTorch types.
#pragma once

#include <cstdint>

#include "model/sweep.h"

namespace pare {

struct RefitLimits {
  double tolerance = 1e-4;  // a row is done when a step gains less than this share of its objective
  int steps = 100;
};

// Least squares on the support: minimises (W' - W) (H + l I) (W' - W)^T over the W' that are 0 where keep is 0, with
// l = damping * the mean of diag H over inputs that were not zero on every token. Conjugate gradients for all rows of a
// tile at once, preconditioned with the diagonal, as the last step of ALPS (Meng et al. 2024): 2 * rows * cols^2 flop a
// step, where solving exactly takes cols^3 a row. weight [rows * cols]: start and result, 0 outside the support.
// hessian: [cols * cols]. T: double or float. The same bits at any number of threads.
template <class T>
void refit_support(const float* original, const std::uint8_t* keep, std::int64_t rows, std::int64_t cols,
                   const T* hessian, double damping, const RefitLimits& limits, float* weight, int threads);

// What refit_support() holds beside its arguments.
std::uint64_t refit_support_bytes(std::int64_t cols, int threads);

}  // namespace pare
