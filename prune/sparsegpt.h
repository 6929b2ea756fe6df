// SparseGPT on one matrix. Plain arrays, no LibTorch types.
#pragma once

#include <cstdint>
#include <vector>

#include "model/sparsity.h"

namespace pare {

struct SparseWeights {
  std::vector<float> weight;       // [rows * cols], exactly 0 where removed
  std::vector<std::uint8_t> keep;  // [rows * cols], 1 = stays
};

// Frantar & Alistarh 2023: columns one after the other, those to come compensate for what goes. The mask is chosen for
// kSweepBlock columns of kSweepRows rows at a time, or with N:M for M columns of a row, by what removing costs on
// weights as compensated by then. weight: [rows * cols], not modified. factor: in the order of the columns, or with N:M
// in groups of a multiple of M. The same bits at any number of threads.
SparseWeights sparsegpt(const float* weight, std::int64_t rows, const SweepFactor& factor, const Sparsity& sparsity,
                        int threads);

}  // namespace pare
