#include "prune/neurons.h"

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"

namespace pare {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

std::vector<std::int64_t> complement(std::int64_t count, const std::vector<std::int64_t>& kept) {
  std::vector<std::int64_t> out;
  std::size_t next = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (next < kept.size() && kept[next] == i) ++next;
    else out.push_back(i);
  }
  return out;
}

Matrix gram_block(const double* gram, std::int64_t neurons, const std::vector<std::int64_t>& rows,
                  const std::vector<std::int64_t>& cols) {
  Matrix out(static_cast<Eigen::Index>(rows.size()), static_cast<Eigen::Index>(cols.size()));
  for (std::size_t i = 0; i < rows.size(); ++i)
    for (std::size_t j = 0; j < cols.size(); ++j)
      out(static_cast<Eigen::Index>(i), static_cast<Eigen::Index>(j)) = gram[rows[i] * neurons + cols[j]];
  return out;
}

Matrix columns(const float* matrix, std::int64_t rows, std::int64_t cols, const std::vector<std::int64_t>& kept) {
  Matrix out(rows, static_cast<Eigen::Index>(kept.size()));
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::size_t j = 0; j < kept.size(); ++j) out(i, static_cast<Eigen::Index>(j)) = matrix[i * cols + kept[j]];
  return out;
}

}  // namespace

std::vector<double> neuron_importance(const float* down, const double* mean_square, std::int64_t outputs,
                                      std::int64_t neurons) {
  std::vector<double> square(static_cast<std::size_t>(neurons), 0.0);
  for (std::int64_t i = 0; i < outputs; ++i)
    for (std::int64_t j = 0; j < neurons; ++j) {
      const double w = down[i * neurons + j];
      square[static_cast<std::size_t>(j)] += w * w;
    }
  for (std::size_t j = 0; j < square.size(); ++j) square[j] = std::sqrt(mean_square[j] * square[j]);
  return square;
}

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

std::vector<float> take_columns(const float* matrix, std::int64_t rows, std::int64_t cols,
                                const std::vector<std::int64_t>& kept) {
  std::vector<float> out(static_cast<std::size_t>(rows) * kept.size());
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::size_t j = 0; j < kept.size(); ++j)
      out[static_cast<std::size_t>(i) * kept.size() + j] = matrix[i * cols + kept[j]];
  return out;
}

std::vector<float> take_rows(const float* matrix, std::int64_t cols, const std::vector<std::int64_t>& kept) {
  std::vector<float> out;
  out.reserve(kept.size() * static_cast<std::size_t>(cols));
  for (const std::int64_t i : kept) out.insert(out.end(), matrix + i * cols, matrix + (i + 1) * cols);
  return out;
}

std::vector<float> corrected_down(const float* down, const double* gram, std::int64_t outputs, std::int64_t neurons,
                                  const std::vector<std::int64_t>& kept, double damping) {
  const std::vector<std::int64_t> removed = complement(neurons, kept);
  Matrix weights = columns(down, outputs, neurons, kept);
  if (!removed.empty()) {
    Matrix inner = gram_block(gram, neurons, kept, kept);
    const double mean = inner.diagonal().mean();
    inner.diagonal().array() += mean > 0 ? damping * mean : 1.0;
    const Matrix cross = columns(down, outputs, neurons, removed) * gram_block(gram, neurons, removed, kept);
    const Eigen::LLT<Eigen::Ref<Matrix>> factor(inner);
    if (factor.info() != Eigen::Success)
      throw failure("correction of down_proj", "a positive definite second moment of the kept neurons",
                    "a singular one", "raise --damping or give more calibration text");
    weights += factor.solve(cross.transpose()).transpose();
  }
  std::vector<float> out(static_cast<std::size_t>(weights.size()));
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(weights.data()[i]);
  return out;
}

double relative_error(const float* down, const float* pruned, const double* gram, std::int64_t outputs,
                      std::int64_t neurons, const std::vector<std::int64_t>& kept) {
  // Differences in the original columns: W - W' on the kept ones, W on the removed ones.
  Matrix full(outputs, neurons), difference(outputs, neurons);
  for (std::int64_t i = 0; i < outputs; ++i)
    for (std::int64_t j = 0; j < neurons; ++j) full(i, j) = difference(i, j) = down[i * neurons + j];
  for (std::int64_t i = 0; i < outputs; ++i)
    for (std::size_t j = 0; j < kept.size(); ++j)
      difference(i, kept[j]) -= pruned[static_cast<std::size_t>(i) * kept.size() + j];
  const Eigen::Map<const Matrix> moment(gram, neurons, neurons);
  const double error = (difference * moment).cwiseProduct(difference).sum();
  const double size = (full * moment).cwiseProduct(full).sum();
  return size > 0 ? std::max(error, 0.0) / size : 0.0;
}

}  // namespace pare
