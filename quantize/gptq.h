// GPTQ on one matrix: Frantar et al. 2022, columns in activation order. No LibTorch types.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/codec.h"
#include "model/sparsity.h"

namespace pare {

struct GptqResult {
  QuantizedTensor tensor;
  double nearest_error = 0;       // tr(dW H dW^T) of the nearest codes
  double sweep_error = 0;         // ... of the sweep's codes
  double error = 0;               // ... of `tensor`: per row the better of the two, so never above nearest_error
  std::int64_t nearest_rows = 0;  // rows that kept the nearest codes because the sweep's were worse
};

// weight: [rows * cols]. nearest: scales, zeros or minima and nearest codes of `weight`. hessian: [cols * cols],
// undamped. keep: [rows * cols], 0 where the result is exactly 0 (a pruned matrix) and the others compensate; empty: no
// such weights. A factor that keeps the codec's groups together has the scales of each searched anew when the sweep
// reaches it, for the weights as compensated by then and under what an error costs that later columns can still
// compensate; another one keeps those of `nearest`.
// T: double or float, here and below.
template <class T>
GptqResult gptq(const float* weight, const QuantizedTensor& nearest, const T* hessian, const SweepFactor& factor,
                std::span<const std::uint8_t> keep, int threads);

// The sweep of gptq that also chooses which weights become 0 (SparseGPT, Frantar & Alistarh 2023): the mask before the
// scales, which are then searched for what stays. Like in prune, kSweepBlock columns at a time; with N:M the groups of
// the codec, or of the factor, are a multiple of M. `nearest` gives the codec, and its scales where they are not
// searched.
QuantizedTensor prune_and_sweep(const float* weight, const QuantizedTensor& nearest, const SweepFactor& factor,
                                SweepMask& mask, int threads);
// Of each row the better.
template <class T>
GptqResult better_rows(const float* weight, const QuantizedTensor& nearest, QuantizedTensor swept, const T* hessian,
                       int threads);

// Coordinate descent on codes and scales after the sweep (QuantEase, Behdin et al. 2023, for the codes; least squares,
// rounded to f16, for the scales): every accepted step lowers d^T H d of its row. keep: as above. Rows whose exact
// error did not fall keep what they had. Returns the exact error of all rows.
template <class T>
double polish(const float* weight, QuantizedTensor& tensor, const T* hessian, std::span<const std::uint8_t> keep,
              int passes, int threads);

// True when at least kPrunedShare of the matrix is exactly 0: it was pruned.
bool is_pruned(std::span<const float> weight);
// 1 where a weight is not exactly 0.
std::vector<std::uint8_t> nonzero(std::span<const float> weight);

}  // namespace pare
