// How much each decoder block loses, where not all lose the same. Plain arrays, no model.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace pare {

// OWL (Yin et al. 2023): blocks in which more of |W_ij| sqrt(E[x_j^2]) are outliers keep more. An outlier is above
// kOutlierFactor times the block's mean.
inline constexpr double kOutlierFactor = 5.0;
inline constexpr double kOwlSpread = 0.08;  // their lambda

// Sparsity of each block from its share of outliers: the shares stretched to a range of 2 lambda, the more outliers the
// denser, and moved so that the mean, blocks counting by `weights` (how many each has), is the target. lambda is
// kOwlSpread, and at most 3/8 of what lies between the target and 0 or 1: no block loses all or nothing. Equal shares:
// the target.
std::vector<double> owl_sparsities(std::span<const double> outliers, std::span<const std::int64_t> weights,
                                   double target);

// What each matrix loses in whole weights: sparsities[i] of sizes[i] each, rounded so that all together lose `total`,
// which their products sum up to but for less than one weight.
std::vector<std::int64_t> whole_weights(std::span<const double> sparsities, std::span<const std::int64_t> sizes,
                                        std::int64_t total);

}  // namespace pare
