// Removing MLP neurons of one layer: which ones, and what the kept columns of down_proj take over. Plain arrays.
#pragma once

#include <cstdint>
#include <vector>

namespace pare {

// Importance of each of `neurons` MLP neurons: sqrt(E[x_j^2]) * |W_down[:, j]|_2, x = act(gate) * up. Importance from
// forward passes alone as in Minitron (Muralidharan et al. 2024), times what the consumer makes of it.
// down: [outputs, neurons]; mean_square: [neurons].
std::vector<double> neuron_importance(const float* down, const double* mean_square, std::int64_t outputs,
                                      std::int64_t neurons);

// Indices of the `keep` largest, ascending; of equal ones the lower index stays.
std::vector<std::int64_t> most_important(const std::vector<double>& importance, std::int64_t keep);

// down_proj on the kept neurons S after the removed ones D hand over what S can predict of them:
//   W' = W_S + W_D H_DS (H_SS + lambda I)^-1,  lambda = damping * mean diag(H_SS),
// the minimiser of tr((W x - W' x_S)^2) + lambda |W' - W_S|^2, so the layer error never exceeds that of W_S; for
// lambda -> 0 it is W H_{:,S} H_SS^-1. down: [outputs, neurons]; gram: H = E[x x^T], [neurons, neurons], symmetric;
// result [outputs, kept]. Exit 1 when H_SS stays singular in spite of the damping.
std::vector<float> corrected_down(const float* down, const double* gram, std::int64_t outputs, std::int64_t neurons,
                                  const std::vector<std::int64_t>& kept, double damping);

// Columns `kept` of [rows, cols].
std::vector<float> take_columns(const float* matrix, std::int64_t rows, std::int64_t cols,
                                const std::vector<std::int64_t>& kept);
// Rows `kept` of [rows, cols]; cols = 1 for a bias.
std::vector<float> take_rows(const float* matrix, std::int64_t cols, const std::vector<std::int64_t>& kept);

// E |W x - W' x_S|^2 / E |W x|^2 in double, from the same H (0 when the layer's output is 0).
double relative_error(const float* down, const float* pruned, const double* gram, std::int64_t outputs,
                      std::int64_t neurons, const std::vector<std::int64_t>& kept);

}  // namespace pare
