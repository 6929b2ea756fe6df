#include "prune/reconstruct.h"

#include <omp.h>

#include <algorithm>
#include <vector>

namespace pare {
namespace {

using Rows = std::vector<double>;  // [cols][kSweepRows]
using Row = double[kSweepRows];

// Conjugate gradients on one tile. The objective of a row, d A d with d = W - W', falls by (step length) * r z a step.
template <class T>
class TileRefit {
 public:
  TileRefit(std::int64_t cols, const T* hessian, double ridge)
      : cols_(cols),
        hessian_(hessian),
        ridge_(ridge),
        support_(size()),
        x_(size()),
        r_(size()),
        p_(size()),
        product_(size()) {}

  void run(RowTile tile, const float* original, const std::uint8_t* keep, const RefitLimits& limits, float* weight) {
    Rows d(size(), 0.0);
    std::fill(support_.begin(), support_.end(), 0.0);
    std::fill(x_.begin(), x_.end(), 0.0);
    each(tile, [&](std::size_t i, std::int64_t at) {
      support_[i] = keep[at] != 0 ? 1.0 : 0.0;
      x_[i] = static_cast<double>(weight[at]);
      d[i] = static_cast<double>(original[at]) - x_[i];
    });
    multiply(d, r_);
    Row objective = {}, energy = {}, live = {};
    add_dots(d, r_, objective);
    for (std::size_t i = 0; i < r_.size(); ++i) r_[i] *= support_[i];
    std::fill(p_.begin(), p_.end(), 0.0);
    add_energy(energy);
    for (std::int64_t row = 0; row < tile.count; ++row) live[row] = energy[row] > 0 ? 1.0 : 0.0;
    Row turn = {};
    for (int step = 0; step < limits.steps && std::any_of(live, live + tile.count, [](double l) { return l > 0; });
         ++step) {
      for (std::int64_t j = 0; j < cols_; ++j) {
        const double scale = inverse_diagonal(j);
        for (std::int64_t row = 0; row < kSweepRows; ++row)
          p_[at(j, row)] = scale * r_[at(j, row)] + turn[row] * p_[at(j, row)];
      }
      multiply(p_, product_);
      Row curvature = {}, length = {}, next = {};
      add_dots(p_, product_, curvature);
      for (std::int64_t row = 0; row < kSweepRows; ++row) {
        if (!(curvature[row] > 0)) live[row] = 0;
        length[row] = live[row] > 0 ? energy[row] / curvature[row] : 0.0;
      }
      for (std::int64_t j = 0; j < cols_; ++j) {
        for (std::int64_t row = 0; row < kSweepRows; ++row) {
          x_[at(j, row)] += length[row] * p_[at(j, row)];
          r_[at(j, row)] -= length[row] * support_[at(j, row)] * product_[at(j, row)];
        }
      }
      add_energy(next);
      for (std::int64_t row = 0; row < kSweepRows; ++row) {
        const double gain = length[row] * energy[row];
        objective[row] -= gain;
        if (gain <= limits.tolerance * objective[row] || !(next[row] > 0) || objective[row] <= 0) live[row] = 0;
        turn[row] = live[row] > 0 ? next[row] / energy[row] : 0.0;
        energy[row] = next[row];
      }
    }
    each(tile, [&](std::size_t i, std::int64_t at) { weight[at] = static_cast<float>(x_[i]); });
  }

 private:
  std::size_t size() const { return static_cast<std::size_t>(cols_ * kSweepRows); }
  static std::size_t at(std::int64_t j, std::int64_t row) { return static_cast<std::size_t>(j * kSweepRows + row); }
  double inverse_diagonal(std::int64_t j) const {
    const double diagonal = static_cast<double>(hessian_[j * cols_ + j]) + ridge_;
    return diagonal > 0 ? 1.0 / diagonal : 0.0;
  }
  template <class Work>
  void each(RowTile tile, const Work& work) const {
    for (std::int64_t row = 0; row < tile.count; ++row)
      for (std::int64_t j = 0; j < cols_; ++j) work(at(j, row), (tile.first + row) * cols_ + j);
  }
  // out = rows (H + l I)
  void multiply(const Rows& rows, Rows& out) const {
    std::fill(out.begin(), out.end(), 0.0);
    subtract_products(out.data(), rows.data(), hessian_, cols_, 0, cols_, 0, cols_);
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = ridge_ * rows[i] - out[i];
  }
  void add_dots(const Rows& a, const Rows& b, Row& sum) const {
    for (std::int64_t j = 0; j < cols_; ++j)
      for (std::int64_t row = 0; row < kSweepRows; ++row) sum[row] += a[at(j, row)] * b[at(j, row)];
  }
  // r z, z the preconditioned residual
  void add_energy(Row& sum) const {
    for (std::int64_t j = 0; j < cols_; ++j) {
      const double scale = inverse_diagonal(j);
      for (std::int64_t row = 0; row < kSweepRows; ++row) sum[row] += scale * r_[at(j, row)] * r_[at(j, row)];
    }
  }

  std::int64_t cols_;
  const T* hessian_;
  double ridge_;
  Rows support_, x_, r_, p_, product_;
};

}  // namespace

template <class T>
void refit_support(const float* original, const std::uint8_t* keep, std::int64_t rows, std::int64_t cols,
                   const T* hessian, double damping, const RefitLimits& limits, float* weight, int threads) {
  double sum = 0;
  std::int64_t live = 0;
  for (std::int64_t j = 0; j < cols; ++j) {
    const auto diagonal = static_cast<double>(hessian[j * cols + j]);
    sum += diagonal;
    live += diagonal > 0 ? 1 : 0;
  }
  const double ridge = live > 0 ? damping * sum / static_cast<double>(live) : damping;
  const std::int64_t tiles = (rows + kSweepRows - 1) / kSweepRows;
#pragma omp parallel num_threads(threads > 0 ? threads : omp_get_num_procs())
  {
    TileRefit<T> refit(cols, hessian, ridge);
#pragma omp for schedule(dynamic)
    for (std::int64_t t = 0; t < tiles; ++t)
      refit.run({t * kSweepRows, std::min(kSweepRows, rows - t * kSweepRows)}, original, keep, limits, weight);
  }
}

std::uint64_t refit_support_bytes(std::int64_t cols, int threads) {
  constexpr std::uint64_t kVectors = 6;  // five of a TileRefit, and the difference that its run() begins with
  return kVectors * sizeof(double) * static_cast<std::uint64_t>(cols * kSweepRows) *
         static_cast<std::uint64_t>(threads > 0 ? threads : omp_get_num_procs());
}

template void refit_support(const float*, const std::uint8_t*, std::int64_t, std::int64_t, const double*, double,
                            const RefitLimits&, float*, int);
template void refit_support(const float*, const std::uint8_t*, std::int64_t, std::int64_t, const float*, double,
                            const RefitLimits&, float*, int);

}  // namespace pare
