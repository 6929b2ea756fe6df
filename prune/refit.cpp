#include "prune/refit.h"

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <algorithm>
#include <numeric>

#include "core/error.h"

namespace pare {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Floats = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

}  // namespace

std::vector<std::int64_t> most_important(const std::vector<double>& importance, std::int64_t keep) {
  std::vector<std::int64_t> order(importance.size());
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return importance[static_cast<std::size_t>(a)] > importance[static_cast<std::size_t>(b)];
  });
  order.resize(static_cast<std::size_t>(keep));
  std::sort(order.begin(), order.end());
  return order;
}

struct Refit::Factor {
  double lambda = 0;
  Matrix damped;
  Eigen::LLT<Eigen::Ref<Matrix>> llt;  // in place of `damped`
  Factor(const double* gram, std::int64_t inputs, double damping)
      : damped(Eigen::Map<const Matrix>(gram, inputs, inputs)), llt(prepare(damped, damping, lambda)) {}
  static Matrix& prepare(Matrix& matrix, double damping, double& lambda) {
    const double mean = matrix.diagonal().mean();
    lambda = mean > 0 ? damping * mean : 1.0;
    matrix.diagonal().array() += lambda;
    return matrix;
  }
};

Refit::Refit(const double* gram, std::int64_t inputs, double damping, const std::string& place)
    : factor_(std::make_unique<Factor>(gram, inputs, damping)) {
  if (factor_->llt.info() != Eigen::Success)
    throw failure("refit of " + place, "a positive definite second moment of its inputs", "a singular one",
                  "raise --damping or give more calibration text");
}

Refit::~Refit() = default;

std::vector<float> Refit::solve(const float* weights, const double* cross, std::int64_t rows) const {
  const std::int64_t inputs = factor_->damped.rows();
  const Matrix wanted = Eigen::Map<const Matrix>(cross, rows, inputs) +
                        factor_->lambda * Eigen::Map<const Floats>(weights, rows, inputs).cast<double>();
  const Matrix solution = factor_->llt.solve(wanted.transpose()).transpose();
  std::vector<float> out(static_cast<std::size_t>(solution.size()));
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(solution.data()[i]);
  return out;
}

double squared_error(const float* weights, const double* gram, const double* cross, double energy, std::int64_t rows,
                     std::int64_t inputs) {
  const Matrix w = Eigen::Map<const Floats>(weights, rows, inputs).cast<double>();
  const double square = (w * Eigen::Map<const Matrix>(gram, inputs, inputs)).cwiseProduct(w).sum();
  return energy - 2 * w.cwiseProduct(Eigen::Map<const Matrix>(cross, rows, inputs)).sum() + square;
}

}  // namespace pare
