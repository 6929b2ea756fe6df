#include "model/sweep.h"

#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "core/error.h"
#include "model/split_products.h"

namespace pare {
namespace {

std::vector<float> normal(std::mt19937_64& random, std::int64_t count, double scale = 1.0) {
  std::normal_distribution<double> distribution(0.0, scale);
  std::vector<float> out(static_cast<std::size_t>(count));
  for (float& value : out) value = static_cast<float>(distribution(random));
  return out;
}

// E[x x^T] of correlated inputs with very unequal energies.
std::vector<double> random_hessian(std::mt19937_64& random, std::int64_t n, std::int64_t tokens) {
  std::vector<float> x = normal(random, tokens * n);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t j = n - 1; j > 0; --j) {
      float& value = x[static_cast<std::size_t>(t * n + j)];
      value = (value + 0.7f * x[static_cast<std::size_t>(t * n + j - 1)]) * (1.0f + static_cast<float>(j % 5));
    }
  }
  std::vector<double> h(static_cast<std::size_t>(n * n), 0.0);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      for (std::int64_t t = 0; t < tokens; ++t) {
        h[static_cast<std::size_t>(i * n + j)] += static_cast<double>(x[static_cast<std::size_t>(t * n + i)]) *
                                                  static_cast<double>(x[static_cast<std::size_t>(t * n + j)]) /
                                                  static_cast<double>(tokens);
      }
    }
  }
  return h;
}

void expect_grams_of_double_sums(double tolerance) {
  std::mt19937_64 random(1);
  for (std::int64_t n : {1, 7, 32, 33, 172}) {
    for (std::int64_t rows : {1, 5, 513}) {
      const std::vector<float> a = normal(random, rows * n), b = normal(random, rows * n);
      std::vector<double> own(static_cast<std::size_t>(n * n), 0.0), cross = own;
      add_gram(a.data(), a.data(), rows, n, own.data(), 2);
      mirror_upper(own.data(), n);
      add_gram(a.data(), b.data(), rows, n, cross.data(), 2);
      for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < n; ++j) {
          double own_sum = 0, cross_sum = 0;
          for (std::int64_t t = 0; t < rows; ++t) {
            const double left = static_cast<double>(a[static_cast<std::size_t>(t * n + i)]);
            own_sum += left * static_cast<double>(a[static_cast<std::size_t>(t * n + j)]);
            cross_sum += left * static_cast<double>(b[static_cast<std::size_t>(t * n + j)]);
          }
          const std::size_t at = static_cast<std::size_t>(i * n + j);
          ASSERT_NEAR(own[at], own_sum, tolerance) << n << " " << rows << " " << i << " " << j;
          ASSERT_NEAR(cross[at], cross_sum, tolerance) << n << " " << rows << " " << i << " " << j;
        }
      }
    }
  }
}

TEST(Gram, MatchesDoubleSumsWithRaggedEdges) { expect_grams_of_double_sums(1e-3); }

TEST(Gram, OfSplitProductsToo) {
  if (!has_split_products()) GTEST_SKIP() << "no AMX with bfloat16 here, or PARE_KERNELS names other kernels";
  const SplitProductsScope split;
  expect_grams_of_double_sums(0x1p-18 * 700);  // no sum of sizes is larger
}

TEST(Gram, SameBitsAtAnyThreadCount) {
  std::mt19937_64 random(2);
  const std::vector<float> x = normal(random, 700 * 130);
  std::vector<double> one(130 * 130, 0.0), four = one;
  add_gram(x.data(), x.data(), 700, 130, one.data(), 1);
  add_gram(x.data(), x.data(), 700, 130, four.data(), 4);
  EXPECT_EQ(one, four);
  const std::vector<double> plain = one;
  const SplitProductsScope split;
  std::fill(one.begin(), one.end(), 0.0);
  four = one;
  add_gram(x.data(), x.data(), 700, 130, one.data(), 1);
  add_gram(x.data(), x.data(), 700, 130, four.data(), 4);
  EXPECT_EQ(one, four);
  EXPECT_EQ(one != plain, has_split_products());
}

TEST(Factor, InverseOfTheDampedHessianIsUTransposedU) {
  std::mt19937_64 random(3);
  for (bool ordered : {false, true}) {
    const std::int64_t n = 150;
    std::vector<double> h = random_hessian(random, n, 400);
    const SweepFactor factor = factor_hessian(SquareMatrix(h), n, {0.01, ordered}, "h", 2);
    EXPECT_EQ(factor.damping, 0.01);
    Eigen::MatrixXd damped(n, n), u(n, n);
    double mean = 0;
    for (std::int64_t i = 0; i < n; ++i) mean += h[static_cast<std::size_t>(i * n + i)] / static_cast<double>(n);
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        damped(i, j) = h[static_cast<std::size_t>(factor.order[static_cast<std::size_t>(i)] * n +
                                                  factor.order[static_cast<std::size_t>(j)])];
        u(i, j) = factor.u[static_cast<std::size_t>(i * n + j)];
        if (j < i) {
          ASSERT_EQ(u(i, j), 0.0);
        }
      }
      damped(i, i) += 0.01 * mean;
      if (ordered && i > 0) {
        ASSERT_LE(damped(i, i), damped(i - 1, i - 1));
      }
    }
    const Eigen::MatrixXd inverse = damped.inverse();
    EXPECT_LT((inverse - u.transpose() * u).norm(), 1e-9 * inverse.norm());
  }
}

TEST(Factor, GroupsStayTogetherInTheOrderOfTheirSums) {
  std::mt19937_64 random(7);
  const std::int64_t n = 96, size = 32;
  std::vector<double> h = random_hessian(random, n, 300);
  for (std::int64_t j = 0; j < n; ++j)  // a dead column
    h[static_cast<std::size_t>(40 * n + j)] = h[static_cast<std::size_t>(j * n + 40)] = 0;
  for (std::int64_t j = 0; j < n; ++j) {  // the largest single entry lies in the group of the least sum
    h[static_cast<std::size_t>(70 * n + j)] *= 8;
    h[static_cast<std::size_t>(j * n + 70)] *= 8;
    for (std::int64_t i = 64; i < 96 && i != 70; ++i) {
      h[static_cast<std::size_t>(i * n + j)] *= 0.05;
      h[static_cast<std::size_t>(j * n + i)] *= 0.05;
    }
  }
  const SweepFactor factor = factor_hessian(SquareMatrix(h), n, {0.01, true, size}, "h", 2);
  EXPECT_EQ(factor.group, size);
  const auto energy = [&](std::int64_t i) { return h[static_cast<std::size_t>(i * n + i)]; };
  std::vector<std::int64_t> seen;
  double last = std::numeric_limits<double>::infinity();
  for (std::int64_t first = 0; first < n; first += size) {
    double sum = 0;
    for (std::int64_t i = first; i < first + size; ++i) {
      const std::int64_t column = factor.order[static_cast<std::size_t>(i)];
      ASSERT_EQ(column / size, factor.order[static_cast<std::size_t>(first)] / size);
      if (i > first) {
        ASSERT_LE(energy(column), energy(factor.order[static_cast<std::size_t>(i - 1)]));
      }
      sum += energy(column);
      seen.push_back(column);
    }
    EXPECT_LE(sum, last);
    last = sum;
  }
  std::sort(seen.begin(), seen.end());
  for (std::int64_t i = 0; i < n; ++i) EXPECT_EQ(seen[static_cast<std::size_t>(i)], i);

  // What an error costs once later columns compensate: the damped Hessian's block less what the later ones explain.
  Eigen::MatrixXd damped(n, n);
  double mean = 0;
  for (std::int64_t i = 0; i < n; ++i) mean += energy(i) / static_cast<double>(n - 1);
  const auto dead = [&](std::int64_t i) { return factor.order[static_cast<std::size_t>(i)] == 40; };
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j)
      damped(i, j) = h[static_cast<std::size_t>(factor.order[static_cast<std::size_t>(i)] * n +
                                                factor.order[static_cast<std::size_t>(j)])];
    damped(i, i) = dead(i) ? mean : damped(i, i) + 0.01 * mean;
  }
  for (std::int64_t first = 0; first < n; first += size) {
    const std::int64_t later = n - first - size;
    Eigen::MatrixXd expected = damped.block(first, first, size, size);
    if (later > 0)
      expected -= damped.block(first, first + size, size, later) *
                  damped.bottomRightCorner(later, later).inverse() * damped.block(first + size, first, later, size);
    const std::vector<double> found = remaining_hessian(factor, first, size);
    for (std::int64_t i = 0; i < size; ++i) {
      for (std::int64_t j = 0; j < size; ++j)
        ASSERT_NEAR(found[static_cast<std::size_t>(i * size + j)],
                    dead(first + i) || dead(first + j) ? 0.0 : expected(i, j), 1e-8 * mean);
    }
  }
}

// Several block columns of the inversion, the last of them ragged, in both precisions.
TEST(Factor, FloatsGiveNearlyTheFactorOfDoubles) {
  std::mt19937_64 random(4);
  const std::int64_t n = 333;
  const std::vector<float> x = normal(random, 900 * n);
  SquareMatrix wide(n, n), narrow(n, n - 1);
  ASSERT_FALSE(wide.single());
  ASSERT_TRUE(narrow.single());
  for (SquareMatrix* matrix : {&wide, &narrow}) {
    matrix->visit([&](auto* sum) {
      add_gram(x.data(), x.data(), 900, n, sum, 2);
      mirror_upper(sum, n);
    });
  }
  const SweepFactor exact = factor_hessian(wide, n, {0.01, true}, "h", 2),
                    near = factor_hessian(narrow, n, {0.01, true}, "h", 1);
  EXPECT_TRUE(near.u.single());
  EXPECT_EQ(exact.order, near.order);
  Eigen::MatrixXd damped(n, n), u(n, n);
  double difference = 0, size = 0, mean = 0;
  for (std::int64_t i = 0; i < n; ++i) mean += wide[static_cast<std::size_t>(i * n + i)] / static_cast<double>(n);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      const std::size_t at = static_cast<std::size_t>(i * n + j);
      u(i, j) = exact.u[at];
      damped(i, j) = wide[static_cast<std::size_t>(exact.order[static_cast<std::size_t>(i)] * n +
                                                   exact.order[static_cast<std::size_t>(j)])];
      difference += (exact.u[at] - near.u[at]) * (exact.u[at] - near.u[at]);
      size += exact.u[at] * exact.u[at];
    }
    damped(i, i) += 0.01 * mean;
  }
  EXPECT_LT((damped * u.transpose() * u - Eigen::MatrixXd::Identity(n, n)).norm(),
            1e-9 * std::sqrt(static_cast<double>(n)));
  EXPECT_LT(std::sqrt(difference / size), 1e-4);
}

TEST(Rows, ProductsAndErrorsEqualBruteForceInBothPrecisions) {
  std::mt19937_64 random(5);
  const std::int64_t rows = 37, n = 35;
  const std::vector<float> a = normal(random, rows * n), b = normal(random, rows * n);
  const std::vector<double> h = random_hessian(random, n, 90);
  const std::vector<float> narrow(h.begin(), h.end());
  std::vector<double> found(static_cast<std::size_t>(rows * n)), found_narrow = found;
  const auto into = [&](std::vector<double>& out) {
    return [&out, n](RowTile tile, std::span<double> products) {
      for (std::int64_t r = 0; r < tile.count; ++r) {
        for (std::int64_t j = 0; j < n; ++j) {
          out[static_cast<std::size_t>((tile.first + r) * n + j)] = products[static_cast<std::size_t>(j * kSweepRows + r)];
        }
      }
    };
  };
  row_products(a.data(), b.data(), rows, n, h.data(), 2, into(found));
  row_products(a.data(), b.data(), rows, n, narrow.data(), 2, into(found_narrow));
  const std::vector<double> errors = row_errors(a.data(), b.data(), rows, n, h.data(), 1);
  const std::vector<double> errors_narrow = row_errors(a.data(), b.data(), rows, n, narrow.data(), 1);
  for (std::int64_t r = 0; r < rows; ++r) {
    double error = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (std::int64_t j = 0; j < n; ++j) {
        const std::size_t at = static_cast<std::size_t>(r * n + j);
        sum += h[static_cast<std::size_t>(i * n + j)] * (static_cast<double>(a[at]) - static_cast<double>(b[at]));
      }
      const std::size_t at = static_cast<std::size_t>(r * n + i);
      ASSERT_NEAR(found[at], sum, 1e-4);  // floats over 64 columns
      ASSERT_NEAR(found_narrow[at], sum, 1e-3);
      error += sum * (static_cast<double>(a[at]) - static_cast<double>(b[at]));
    }
    EXPECT_NEAR(errors[static_cast<std::size_t>(r)], error, 1e-6 * error);
    EXPECT_NEAR(errors_narrow[static_cast<std::size_t>(r)], error, 1e-4 * error);
  }
}

TEST(Factor, DampingGrowsUntilTheHessianIsDefinite) {
  // Indefinite as statistics can become through rounding, here grossly: eigenvalues 3.5 and -1.5.
  const std::vector<double> h = {1, 2.5, 2.5, 1};
  const SweepFactor factor = factor_hessian(SquareMatrix(h), 2, {0.01, true}, "h", 1);
  EXPECT_NEAR(factor.damping, 10.0, 1e-9);
  const std::vector<double> hopeless = {1, 200, 200, 1};
  EXPECT_THROW(factor_hessian(SquareMatrix(hopeless), 2, {0.01, true}, "h", 1), Error);
  const std::vector<double> nan = {1, NAN, NAN, 1};
  EXPECT_THROW(factor_hessian(SquareMatrix(nan), 2, {0.01, true}, "h", 1), Error);
}

TEST(Factor, DeadColumnsAreMarkedAndTouchNothing) {
  const std::vector<double> h = {2, 0, 1, 0, 0, 0, 1, 0, 3};
  const SweepFactor factor = factor_hessian(SquareMatrix(h), 3, {0.01, true}, "h", 1);
  EXPECT_EQ(factor.dead, (std::vector<std::uint8_t>{0, 1, 0}));
  EXPECT_EQ(factor.order, (std::vector<std::int64_t>{2, 0, 1}));
  EXPECT_EQ(factor.u[0 * 3 + 2], 0.0);
  EXPECT_EQ(factor.u[1 * 3 + 2], 0.0);
  const std::vector<double> nothing(9, 0.0);
  EXPECT_EQ(factor_hessian(SquareMatrix(nothing), 3, {0.01, true}, "h", 1).dead, (std::vector<std::uint8_t>{1, 1, 1}));
}

// Rounds to a grid of step 0.25 and records what it saw.
class GridRule : public SweepRule {
 public:
  void decide(RowTile tile, std::int64_t column, const double* current, double* decided) override {
    for (std::int64_t r = 0; r < tile.count; ++r) {
      decided[r] = std::nearbyint(current[r] * 4.0) / 4.0;
      out[static_cast<std::size_t>((tile.first + r) * cols + column)] = decided[r];
    }
  }
  std::int64_t cols = 0;
  std::vector<double> out;
};

// The optimal brain surgeon, literally: explicit inverse, one elimination per column, no blocks, no factor.
std::vector<double> surgeon(const std::vector<float>& weight, std::int64_t rows, const std::vector<double>& h,
                            const SweepFactor& factor) {
  const std::int64_t n = factor.columns;
  double mean = 0;
  std::int64_t live = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    if (factor.dead[static_cast<std::size_t>(i)]) continue;
    mean += h[static_cast<std::size_t>(i * n + i)];
    ++live;
  }
  mean /= static_cast<double>(live);
  Eigen::MatrixXd damped(n, n);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) damped(i, j) = h[static_cast<std::size_t>(i * n + j)];
    damped(i, i) = factor.dead[static_cast<std::size_t>(i)] ? 1.0 : damped(i, i) + factor.damping * mean;
  }
  Eigen::MatrixXd inverse = damped.inverse();
  Eigen::MatrixXd w(rows, n);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t j = 0; j < n; ++j) w(r, j) = static_cast<double>(weight[static_cast<std::size_t>(r * n + j)]);
  }
  for (std::int64_t i : factor.order) {
    for (std::int64_t r = 0; r < rows; ++r) {
      const double kept = std::nearbyint(w(r, i) * 4.0) / 4.0;
      const double error = (w(r, i) - kept) / inverse(i, i);
      for (std::int64_t j = 0; j < n; ++j) w(r, j) -= error * inverse(i, j);
      w(r, i) = kept;
    }
    const Eigen::MatrixXd column = inverse.col(i);
    inverse -= column * column.transpose() / inverse(i, i);
    inverse.row(i).setZero();  // visited columns never move again
    inverse.col(i).setZero();
  }
  std::vector<double> out(static_cast<std::size_t>(rows * n));
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t j = 0; j < n; ++j) out[static_cast<std::size_t>(r * n + j)] = w(r, j);
  }
  return out;
}

TEST(Sweep, EqualsTheLiteralAlgorithm) {
  std::mt19937_64 random(4);
  for (bool ordered : {false, true}) {
    for (std::int64_t n : {1, 5, 128, 129, 172, 300}) {
      const std::int64_t rows = 37;
      std::vector<double> h = random_hessian(random, n, 2 * n + 3);
      for (std::int64_t dead : {n / 2, n - 1}) {
        if (n < 5) break;
        for (std::int64_t j = 0; j < n; ++j)
          h[static_cast<std::size_t>(dead * n + j)] = h[static_cast<std::size_t>(j * n + dead)] = 0;
      }
      const std::vector<float> weight = normal(random, rows * n);
      const SweepFactor factor = factor_hessian(SquareMatrix(h), n, {0.01, ordered}, "h", 2);
      GridRule rule;
      rule.cols = n;
      rule.out.resize(weight.size());
      sweep_columns(weight.data(), rows, factor, rule, 2);
      const std::vector<double> expected = surgeon(weight, rows, h, factor);
      std::int64_t different = 0;
      for (std::size_t i = 0; i < expected.size(); ++i) different += rule.out[i] != expected[i];
      EXPECT_EQ(different, 0) << "columns " << n << " ordered " << ordered;
      GridRule alone;
      alone.cols = n;
      alone.out.resize(weight.size());
      sweep_columns(weight.data(), rows, factor, alone, 1);
      EXPECT_EQ(alone.out, rule.out);
    }
  }
}

TEST(RowErrors, AreTheQuadraticForm) {
  std::mt19937_64 random(5);
  for (std::int64_t n : {1, 3, 4, 66}) {
    const std::int64_t rows = 35;
    const std::vector<double> h = random_hessian(random, n, 90);
    const std::vector<float> a = normal(random, rows * n), b = normal(random, rows * n);
    const std::vector<double> errors = row_errors(a.data(), b.data(), rows, n, h.data(), 2);
    for (std::int64_t r = 0; r < rows; ++r) {
      double expected = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < n; ++j) {
          const std::size_t left = static_cast<std::size_t>(r * n + i), right = static_cast<std::size_t>(r * n + j);
          expected += (static_cast<double>(a[left]) - static_cast<double>(b[left])) *
                      h[static_cast<std::size_t>(i * n + j)] *
                      (static_cast<double>(a[right]) - static_cast<double>(b[right]));
        }
      }
      EXPECT_NEAR(errors[static_cast<std::size_t>(r)], expected, 1e-6 * std::fabs(expected));
    }
  }
}

}  // namespace
}  // namespace pare
