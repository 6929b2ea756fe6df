// Arithmetic on single rows of logits: log-softmax in double, Kullback-Leibler divergence of two rows, greedy choice.
// Vectorised with our own exponential (relative error below 1e-15); the same bits on every instruction set.
#pragma once

#include <cstdint>
#include <string>

namespace pare {

// log_softmax(x)[i] = (x[i] - maximum) - log_z.
struct RowSoftmax {
  float maximum = 0;
  double log_z = 0;          // log of sum exp(x - maximum), >= 0
  std::int32_t argmax = 0;   // ties: lowest id
  double log_prob(const float* row, std::int64_t id) const {
    return (static_cast<double>(row[id]) - static_cast<double>(maximum)) - log_z;
  }
  double log_sum_exp() const { return static_cast<double>(maximum) + log_z; }
};

// -inf entries have probability 0. Returns false for a row without a softmax: NaN, +inf, or -inf everywhere.
bool row_softmax(const float* row, std::int64_t n, RowSoftmax& out);

// KL(p || q) in nats of two rows over the same n ids, >= 0; exactly 0 for equal rows up to a common shift that floats
// represent; +inf where q has probability 0 and p has not. False as for row_softmax.
bool row_divergence(const float* p, const float* q, std::int64_t n, RowSoftmax& p_out, RowSoftmax& q_out, double& kl);

// exp(x) for x <= 0, the function used above; 0 below -708.
double row_exp(double x);

}  // namespace pare
