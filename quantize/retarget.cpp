#include "quantize/retarget.h"

#include <omp.h>

#include <algorithm>

namespace pare {
namespace {

using Rows = std::vector<double>;  // [columns][kSweepRows]

// U^T: products run over the rows of a matrix.
SquareMatrix transposed(const SquareMatrix& u, std::int64_t n) {
  SquareMatrix out(n, u.single() ? 0 : n);
  out.visit([&](auto* values) {
    using Value = std::remove_reference_t<decltype(*values)>;
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t j = i; j < n; ++j)
        values[j * n + i] = static_cast<Value>(u[static_cast<std::size_t>(i * n + j)]);
  });
  return out;
}

// out -= rows M
void subtract(Rows& out, const Rows& rows, const SquareMatrix& m, std::int64_t n) {
  m.visit([&](const auto* values) { subtract_products(out.data(), rows.data(), values, n, 0, n, 0, n); });
}

// rows (G - H)
Rows shifted(const Rows& rows, const SquareMatrix& cross, const SquareMatrix& hessian, std::int64_t n) {
  Rows out(rows.size(), 0.0);
  subtract(out, rows, cross, n);
  for (double& value : out) value = -value;
  subtract(out, rows, hessian, n);
  return out;
}

double dot(const Rows& a, const Rows& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace

Retargeter::Retargeter(const InputStatistics& input, const SweepFactor& factor, double damping,
                       const std::string& place, int threads)
    : input_(input), factor_(factor), threads_(threads > 0 ? threads : omp_get_num_procs()) {
  const std::int64_t n = input.columns;
  SquareMatrix part = input.hessian;
  part.visit([&](auto* values) {
    using Value = std::remove_reference_t<decltype(*values)>;
    for (std::size_t i = 0; i < static_cast<std::size_t>(n * n); ++i)
      values[i] = static_cast<Value>(static_cast<double>(values[i]) - input.held_hessian[i]);
    // Float sums are taken from double ones: an input that only windows held out have seen leaves a rest of rounding.
    for (std::int64_t i = 0; i < n; ++i)
      if (values[i * n + i] < 1e-6 * input.hessian[static_cast<std::size_t>(i * n + i)])
        for (std::int64_t j = 0; j < n; ++j) values[i * n + j] = values[j * n + i] = 0;
  });
  part_factor_ = factor_hessian(part, n, {damping, true}, place, threads);
  transposed_ = transposed(factor.u, n);
  part_transposed_ = transposed(part_factor_.u, n);
}

void Retargeter::divide(Rows& rows, const SweepFactor& factor, const SquareMatrix& u_transposed) const {
  const std::int64_t n = input_.columns;
  Rows ordered(rows.size()), half(rows.size(), 0.0);
  const auto place = [&](std::int64_t i) { return factor.order[static_cast<std::size_t>(i)] * kSweepRows; };
  for (std::int64_t i = 0; i < n; ++i)
    std::copy_n(rows.begin() + place(i), kSweepRows, ordered.begin() + i * kSweepRows);
  subtract(half, ordered, u_transposed, n);
  std::fill(ordered.begin(), ordered.end(), 0.0);
  subtract(ordered, half, factor.u, n);
  for (std::int64_t i = 0; i < n; ++i) {
    const bool dead = factor.dead[static_cast<std::size_t>(factor.order[static_cast<std::size_t>(i)])] != 0;
    for (std::int64_t r = 0; r < kSweepRows; ++r)
      rows[static_cast<std::size_t>(place(i) + r)] = dead ? 0.0 : ordered[static_cast<std::size_t>(i * kSweepRows + r)];
  }
}

Retargeting Retargeter::retarget(const float* weight, std::int64_t rows, bool keep_zeros) const {
  const std::int64_t n = input_.columns, tiles = (rows + kSweepRows - 1) / kSweepRows;
  Retargeting result;
  result.weight.assign(weight, weight + rows * n);
  std::vector<float> correction(result.weight.size());
  std::vector<double> gains(static_cast<std::size_t>(tiles)), energies(gains.size());
#pragma omp parallel for schedule(dynamic) num_threads(threads_)
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t first = t * kSweepRows, count = std::min(kSweepRows, rows - first);
    Rows w(static_cast<std::size_t>(n * kSweepRows), 0.0);
    for (std::int64_t r = 0; r < count; ++r)
      for (std::int64_t j = 0; j < n; ++j)
        w[static_cast<std::size_t>(j * kSweepRows + r)] = static_cast<double>(weight[(first + r) * n + j]);
    const auto drop_kept = [&](Rows& d) {
      for (std::size_t i = 0; keep_zeros && i < d.size(); ++i)
        if (w[i] == 0) d[i] = 0;
    };
    const Rows held = shifted(w, input_.held_cross, input_.held_hessian, n);
    Rows all = shifted(w, input_.cross, input_.hessian, n), part = all;
    for (std::size_t i = 0; i < part.size(); ++i) part[i] -= held[i];
    divide(part, part_factor_, part_transposed_);
    drop_kept(part);
    // On the windows held out a D changes E ||W x - V y||^2 by - 2 a <W (G - H), D> + a^2 <D H, D>.
    Rows product(part.size(), 0.0);
    subtract(product, part, input_.held_hessian, n);
    gains[static_cast<std::size_t>(t)] = dot(held, part);
    energies[static_cast<std::size_t>(t)] = -dot(product, part);
    divide(all, factor_, transposed_);
    drop_kept(all);
    for (std::int64_t r = 0; r < count; ++r)
      for (std::int64_t j = 0; j < n; ++j)
        correction[static_cast<std::size_t>((first + r) * n + j)] =
            static_cast<float>(all[static_cast<std::size_t>(j * kSweepRows + r)]);
  }
  double gain = 0, energy = 0;
  for (std::size_t t = 0; t < gains.size(); ++t) {
    gain += gains[t];
    energy += energies[t];
  }
  result.shrink = energy > 0 ? std::clamp(gain / energy, 0.0, 1.0) : 0.0;
  for (std::size_t i = 0; i < correction.size(); ++i)
    result.weight[i] = static_cast<float>(static_cast<double>(weight[i]) +
                                          result.shrink * static_cast<double>(correction[i]));
  return result;
}

}  // namespace pare
