// Which weights go: masks over one [rows, cols] matrix from one score per weight. Plain arrays, no model.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "model/sparsity.h"

namespace pare {

// What competes: every weight of the tensor, or only those of one row (Wanda). N:M always competes within M. Where the
// sparsity is a number of weights, rows lose as many or one more.
enum class Scope { kTensor, kRow };

// 1 = stays. The lowest scores go; of equal scores the one with the higher index goes first.
// scores: rows * cols, finite. With N:M, M divides cols.
std::vector<std::uint8_t> keep_mask(const float* scores, std::int64_t rows, std::int64_t cols, const Sparsity& sparsity,
                                    Scope scope);

// |W|, [rows * cols].
std::vector<float> magnitude_scores(const float* weights, std::int64_t rows, std::int64_t cols);
// |W_ij| * sqrt(E[x_j^2]) (Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models").
// mean_square: cols values of E[x_j^2].
std::vector<float> wanda_scores(const float* weights, const double* mean_square, std::int64_t rows, std::int64_t cols);
// Uniform in [0, 1) from the seed, the tensor's name and the element alone: the null that a method has to beat.
std::vector<float> random_scores(std::uint64_t seed, std::string_view tensor, std::int64_t rows, std::int64_t cols);

// Exact 0.0 where the mask is 0.
void apply_mask(const std::vector<std::uint8_t>& keep, float* weights);

}  // namespace pare
