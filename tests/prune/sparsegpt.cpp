// SparseGPT against the optimal brain surgeon written out, and least squares on a support against normal equations row
// by row, both in double with Eigen and without any of the product's code for them.
#include "prune/sparsegpt.h"

#include <gtest/gtest.h>

#include <Eigen/Cholesky>
#include <Eigen/LU>
#include <algorithm>
#include <cmath>
#include <numeric>

#include "prune/masks.h"
#include "prune/reconstruct.h"
#include "tests/quantize/layers.h"

namespace pare {
namespace {

using testing::diagonal;
using testing::random_hessian;
using testing::random_weight;

constexpr double kDamping = 0.01;

double error_of(const std::vector<float>& a, const std::vector<float>& b, std::int64_t rows, std::int64_t cols,
                const std::vector<double>& h) {
  double sum = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    Eigen::VectorXd d(cols);
    for (std::int64_t j = 0; j < cols; ++j) {
      const auto at = static_cast<std::size_t>(r * cols + j);
      d(j) = static_cast<double>(a[at]) - static_cast<double>(b[at]);
    }
    sum += d.dot(Eigen::Map<const Eigen::MatrixXd>(h.data(), cols, cols) * d);
  }
  return sum;
}

Eigen::MatrixXd damped(const std::vector<double>& h, std::int64_t n, double damping) {
  Eigen::MatrixXd out = Eigen::Map<const Eigen::MatrixXd>(h.data(), n, n);
  double mean = 0;
  std::int64_t live = 0;
  for (std::int64_t j = 0; j < n; ++j) {
    if (out(j, j) <= 0) continue;
    mean += out(j, j);
    ++live;
  }
  mean /= static_cast<double>(live);
  for (std::int64_t j = 0; j < n; ++j) out(j, j) = out(j, j) > 0 ? out(j, j) + damping * mean : 1.0;
  return out;
}

// Lowest scores go, of equal ones the higher index first.
std::vector<std::uint8_t> sorted_mask(const std::vector<double>& scores, std::size_t remove) {
  std::vector<std::size_t> order(scores.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return scores[a] != scores[b] ? scores[a] < scores[b] : a > b;
  });
  std::vector<std::uint8_t> keep(scores.size(), 1);
  for (std::size_t i = 0; i < remove; ++i) keep[order[i]] = 0;
  return keep;
}

struct Surgeon {
  Eigen::MatrixXd weight, keep;
};

// One column after the other, with the explicit inverse of what is left: removing w from column j costs
// w^2 / [H_left^-1]_jj and moves every later weight by -w [H_left^-1]_j: / [H_left^-1]_jj. Whenever `size` columns
// begin, `height` rows lose that share of them together.
Surgeon surgeon(const std::vector<float>& weight, std::int64_t rows, std::int64_t n, const std::vector<double>& h,
                std::int64_t size, std::int64_t height, double share) {
  const Eigen::MatrixXd hessian = damped(h, n, kDamping);
  Eigen::VectorXd cost(n);  // [H_left^-1]_jj when column j's turn comes; infinite where the input is dead
  std::vector<Eigen::VectorXd> lines;
  for (std::int64_t j = 0; j < n; ++j) {
    const Eigen::MatrixXd inverse = hessian.bottomRightCorner(n - j, n - j).inverse();
    cost(j) = h[static_cast<std::size_t>(j * n + j)] > 0 ? inverse(0, 0) : INFINITY;
    lines.push_back(inverse.col(0) / inverse(0, 0));
  }
  Surgeon out{Eigen::MatrixXd(rows, n), Eigen::MatrixXd::Ones(rows, n)};
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t j = 0; j < n; ++j)
      out.weight(r, j) = static_cast<double>(weight[static_cast<std::size_t>(r * n + j)]);
  for (std::int64_t j = 0; j < n; ++j) {
    if (j % size == 0) {
      const std::int64_t width = std::min(size, n - j);
      for (std::int64_t top = 0; top < rows; top += height) {
        const std::int64_t count = std::min(height, rows - top);
        std::vector<double> scores;
        for (std::int64_t r = top; r < top + count; ++r)
          for (std::int64_t k = j; k < j + width; ++k) scores.push_back(out.weight(r, k) * out.weight(r, k) / cost(k));
        const auto keep =
            sorted_mask(scores, static_cast<std::size_t>(std::lround(share * static_cast<double>(scores.size()))));
        for (std::size_t i = 0; i < keep.size(); ++i)
          out.keep(top + static_cast<std::int64_t>(i) / width, j + static_cast<std::int64_t>(i) % width) = keep[i];
      }
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      if (out.keep(r, j) != 0) continue;
      const double gone = out.weight(r, j);
      for (std::int64_t k = j; k < n; ++k) out.weight(r, k) -= gone * lines[static_cast<std::size_t>(j)](k - j);
      out.weight(r, j) = 0;
    }
  }
  return out;
}

TEST(SparseGpt, EqualsTheOptimalBrainSurgeonWrittenOut) {
  std::mt19937_64 random(3);
  const std::int64_t rows = 70, n = 168;  // two tiles of rows, two blocks of columns, both ragged
  const std::vector<float> weight = random_weight(random, rows, n);
  std::vector<double> h = random_hessian(random, n, 400);
  for (const std::int64_t dead : {20, 150})
    for (std::int64_t j = 0; j < n; ++j)
      h[static_cast<std::size_t>(dead * n + j)] = h[static_cast<std::size_t>(j * n + dead)] = 0;
  const SweepFactor factor = factor_hessian(SquareMatrix(h), n, {kDamping, false}, "h", 2);
  struct Case {
    Sparsity sparsity;
    std::int64_t size, height;
    double share;
  };
  for (const Case& c : {Case{{0.5}, 128, 64, 0.5}, Case{{0.75}, 128, 64, 0.75},
                        Case{Sparsity::pattern("2:4", ""), 4, 1, 0.5}, Case{Sparsity::pattern("4:8", ""), 8, 1, 0.5},
                        Case{Sparsity::pattern("1:12", ""), 12, 1, 11.0 / 12}}) {  // 12 does not divide a block
    const SparseWeights found = sparsegpt(weight.data(), rows, factor, c.sparsity, 1);
    const Surgeon expected = surgeon(weight, rows, n, h, c.size, c.height, c.share);
    std::int64_t different = 0;
    double worst = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t j = 0; j < n; ++j) {
        const auto at = static_cast<std::size_t>(r * n + j);
        different += found.keep[at] != expected.keep(r, j) ? 1 : 0;
        if (found.keep[at] == 0) {
          EXPECT_EQ(found.weight[at], 0.0f);
          EXPECT_FALSE(std::signbit(found.weight[at]));
        }
        worst = std::max(worst, std::fabs(static_cast<double>(found.weight[at]) - expected.weight(r, j)));
      }
    }
    EXPECT_EQ(different, 0) << c.sparsity.name();
    EXPECT_LT(worst, 1e-6) << c.sparsity.name();  // of weights of about 0.05 and up to 1
    for (const int threads : {2, 3}) {
      const SparseWeights again = sparsegpt(weight.data(), rows, factor, c.sparsity, threads);
      EXPECT_EQ(again.weight, found.weight);
      EXPECT_EQ(again.keep, found.keep);
    }
  }
}

TEST(SparseGpt, RemovesTheWeightsAskedForWhateverTheShape) {
  std::mt19937_64 random(5);
  for (const auto& [rows, n] : {std::pair{1, 3}, {7, 130}, {65, 129}, {130, 40}}) {
    const std::vector<float> weight = random_weight(random, rows, n);
    const SweepFactor factor =
        factor_hessian(SquareMatrix(random_hessian(random, n, 2 * n)), n, {kDamping, false}, "h", 2);
    for (const double fraction : {0.34, 0.5, 0.61}) {
      const SparseWeights found = sparsegpt(weight.data(), rows, factor, {fraction}, 2);
      EXPECT_EQ(std::count(found.keep.begin(), found.keep.end(), 0),
                static_cast<std::int64_t>(std::floor(static_cast<double>(rows * n) * fraction)));
    }
    Sparsity counted{0.5};
    counted.weights = rows * n / 2 + 1;
    const SparseWeights found = sparsegpt(weight.data(), rows, factor, counted, 2);
    EXPECT_EQ(std::count(found.keep.begin(), found.keep.end(), 0), counted.weights);
  }
}

TEST(SparseGpt, ErrorLiesBelowWandasAndMagnitudes) {
  std::mt19937_64 random(6);
  const std::int64_t rows = 96, n = 160;
  const std::vector<float> weight = random_weight(random, rows, n);
  const std::vector<double> h = random_hessian(random, n, 500), energies = diagonal(h, n);
  const SweepFactor factor = factor_hessian(SquareMatrix(h), n, {kDamping, false}, "h", 2);
  for (const Sparsity& sparsity : {Sparsity{0.5}, Sparsity::pattern("2:4", ""), Sparsity::pattern("4:8", "")}) {
    const auto zeroed = [&](const std::vector<float>& scores, Scope scope) {
      std::vector<float> out = weight;
      apply_mask(keep_mask(scores.data(), rows, n, sparsity, scope), out.data());
      return error_of(weight, out, rows, n, h);
    };
    const double own = error_of(weight, sparsegpt(weight.data(), rows, factor, sparsity, 2).weight, rows, n, h);
    const double wanda = zeroed(wanda_scores(weight.data(), energies.data(), rows, n), Scope::kRow);
    const double magnitude = zeroed(magnitude_scores(weight.data(), rows, n), Scope::kTensor);
    EXPECT_LT(own, 0.7 * wanda) << sparsity.name();
    EXPECT_LT(wanda, magnitude) << sparsity.name();
  }
}

// Normal equations of one row on its support.
std::vector<double> solved(const float* original, const std::uint8_t* keep, const Eigen::MatrixXd& hessian) {
  const auto n = hessian.rows();
  std::vector<Eigen::Index> support;
  Eigen::VectorXd w(n);
  for (Eigen::Index j = 0; j < n; ++j) {
    w(j) = static_cast<double>(original[j]);
    if (keep[j] != 0) support.push_back(j);
  }
  const Eigen::VectorXd target = hessian * w;
  std::vector<double> out(static_cast<std::size_t>(n), 0.0);
  if (support.empty()) return out;
  const Eigen::MatrixXd corner = hessian(support, support);
  const Eigen::VectorXd x = corner.ldlt().solve(target(support).eval());
  for (std::size_t i = 0; i < support.size(); ++i)
    out[static_cast<std::size_t>(support[i])] = x(static_cast<Eigen::Index>(i));
  return out;
}

class SupportRefit : public ::testing::Test {
 protected:
  static constexpr std::int64_t rows = 70, n = 90;
  std::mt19937_64 random{11};
  std::vector<float> weight = random_weight(random, rows, n);
  std::vector<double> h = random_hessian(random, n, 300);
  std::vector<std::uint8_t> keep;
  std::vector<float> masked = weight;
  Eigen::MatrixXd ridged;

  void SetUp() override {
    for (std::int64_t j = 0; j < n; ++j)  // a dead input
      h[static_cast<std::size_t>(33 * n + j)] = h[static_cast<std::size_t>(j * n + 33)] = 0;
    keep = keep_mask(wanda_scores(weight.data(), diagonal(h, n).data(), rows, n).data(), rows, n, {0.6}, Scope::kRow);
    std::fill_n(keep.begin() + 5 * n, n, std::uint8_t{0});  // rows that keep nothing, and everything
    std::fill_n(keep.begin() + 6 * n, n, std::uint8_t{1});
    apply_mask(keep, masked.data());
    ridged = damped(h, n, kDamping);
    ridged(33, 33) = kDamping * (damped(h, n, 1.0) - damped(h, n, 0.0)).diagonal().maxCoeff();
  }
  double objective(const std::vector<double>& x, std::int64_t r) const {
    Eigen::VectorXd d(n);
    for (std::int64_t j = 0; j < n; ++j)
      d(j) = static_cast<double>(weight[static_cast<std::size_t>(r * n + j)]) - x[static_cast<std::size_t>(j)];
    return d.dot(ridged * d);
  }
};

TEST_F(SupportRefit, EqualsNormalEquationsRowByRow) {
  const std::vector<float> single(h.begin(), h.end());
  std::vector<float> found = masked, again = masked, narrow = masked;
  const RefitLimits exact{0.0, 1000};
  refit_support(weight.data(), keep.data(), rows, n, h.data(), kDamping, exact, found.data(), 1);
  refit_support(weight.data(), keep.data(), rows, n, h.data(), kDamping, exact, again.data(), 3);
  refit_support(weight.data(), keep.data(), rows, n, single.data(), kDamping, exact, narrow.data(), 2);
  EXPECT_EQ(found, again);
  double worst = 0, worst_narrow = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::vector<double> expected = solved(weight.data() + r * n, keep.data() + r * n, ridged);
    for (std::int64_t j = 0; j < n; ++j) {
      const auto at = static_cast<std::size_t>(r * n + j);
      const double value = expected[static_cast<std::size_t>(j)];
      if (keep[at] == 0) {
        EXPECT_EQ(found[at], 0.0f);
      }
      worst = std::max(worst, std::fabs(static_cast<double>(found[at]) - value));
      worst_narrow = std::max(worst_narrow, std::fabs(static_cast<double>(narrow[at]) - value));
    }
  }
  EXPECT_LT(worst, 1e-6);
  EXPECT_LT(worst_narrow, 1e-4);
}

TEST_F(SupportRefit, StopsNearTheLeastAndNeverAboveTheStart) {
  std::vector<float> found = masked;
  refit_support(weight.data(), keep.data(), rows, n, h.data(), kDamping, RefitLimits{}, found.data(), 2);
  double start = 0, reached = 0, least = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto row = [&](const std::vector<float>& m) {
      return std::vector<double>(m.begin() + r * n, m.begin() + (r + 1) * n);
    };
    const double before = objective(row(masked), r), after = objective(row(found), r);
    EXPECT_LE(after, before * (1 + 1e-6));
    start += before;
    reached += after;
    least += objective(solved(weight.data() + r * n, keep.data() + r * n, ridged), r);
  }
  EXPECT_LT(least, 0.7 * start);
  EXPECT_LT(reached, 1.01 * least);
}

}  // namespace
}  // namespace pare
