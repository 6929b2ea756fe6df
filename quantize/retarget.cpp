#include "quantize/retarget.h"

#include <omp.h>

#include <algorithm>

namespace pare {
namespace {

using Rows = std::vector<double>;  // [columns][kSweepRows]

enum class Shape { kFull, kUpper, kLower };

// out -= rows M, or of an upper triangular M only what is not 0: kUpper M itself, kLower its transpose.
void subtract(Rows& out, const Rows& rows, const SquareMatrix& m, std::int64_t n, Shape shape) {
  constexpr std::int64_t kStrip = 64;
  const bool lower = shape == Shape::kLower;
  m.visit([&](const auto* values) {
    if (shape == Shape::kFull) return subtract_products(out.data(), rows.data(), values, n, 0, n, 0, n);
    for (std::int64_t left = 0; left < n; left += kStrip) {
      const std::int64_t right = std::min(left + kStrip, n), first = lower ? left : 0, last = lower ? n : right;
      subtract_products(out.data() + left * kSweepRows, rows.data() + first * kSweepRows, values, n, first, last, left,
                        right, lower);
    }
  });
}

// rows M
Rows product(const Rows& rows, const SquareMatrix& m, std::int64_t n) {
  Rows out(rows.size(), 0.0);
  subtract(out, rows, m, n, Shape::kFull);
  for (double& value : out) value = -value;
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
  const auto all_tokens = static_cast<double>(input.tokens), held_tokens = static_cast<double>(input.held_tokens);
  SquareMatrix part = input.hessian;
  part.visit([&](auto* values) {
    using Value = std::remove_reference_t<decltype(*values)>;
    for (std::size_t i = 0; i < static_cast<std::size_t>(n * n); ++i)
      values[i] = static_cast<Value>((static_cast<double>(values[i]) * all_tokens - input.held_hessian[i] * held_tokens) /
                                     (all_tokens - held_tokens));
    // Float sums are taken from double ones: an input that only windows held out have seen leaves a rest of rounding.
    for (std::int64_t i = 0; i < n; ++i)
      if (values[i * n + i] < 1e-6 * input.hessian[static_cast<std::size_t>(i * n + i)])
        for (std::int64_t j = 0; j < n; ++j) values[i * n + j] = values[j * n + i] = 0;
  });
  part_factor_ = factor_hessian(part, n, {damping, true}, place, threads);
}

void Retargeter::divide(Rows& rows, const SweepFactor& factor) const {
  const std::int64_t n = input_.columns;
  Rows ordered(rows.size()), half(rows.size(), 0.0);
  const auto place = [&](std::int64_t i) { return factor.order[static_cast<std::size_t>(i)] * kSweepRows; };
  for (std::int64_t i = 0; i < n; ++i)
    std::copy_n(rows.begin() + place(i), kSweepRows, ordered.begin() + i * kSweepRows);
  subtract(half, ordered, factor.u, n, Shape::kLower);
  std::fill(ordered.begin(), ordered.end(), 0.0);
  subtract(ordered, half, factor.u, n, Shape::kUpper);
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
  const auto paired = static_cast<double>(input_.paired_tokens), apart = static_cast<double>(input_.held_tokens);
  const double all_share = paired / (paired - apart), held_share = apart / (paired - apart);
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
    const Rows held = product(w, input_.held_cross, n);
    Rows all = product(w, input_.cross, n), part(all.size());
    for (std::size_t i = 0; i < part.size(); ++i) part[i] = all[i] * all_share - held[i] * held_share;
    divide(part, part_factor_);
    drop_kept(part);
    // On the windows held out a D changes E ||W x - V y||^2 by - 2 a <W C, D> + a^2 <D H, D>.
    gains[static_cast<std::size_t>(t)] = dot(held, part);
    energies[static_cast<std::size_t>(t)] = dot(product(part, input_.held_hessian, n), part);
    divide(all, factor_);
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
