#include "eval/rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "tests/eval/fake_logits.h"

namespace pare {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> random_row(std::int64_t n, std::uint64_t seed, double scale) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(0, scale);
  std::vector<float> row(static_cast<std::size_t>(n));
  for (float& x : row) x = static_cast<float>(normal(random));
  return row;
}

TEST(Rows, ExponentialMatchesLongDouble) {
  std::mt19937_64 random(5);
  std::uniform_real_distribution<double> wide(-707, 0), narrow(-2, 0);
  for (int i = 0; i < 200000; ++i) {
    const double x = i % 2 ? wide(random) : narrow(random);
    const long double exact = expl(static_cast<long double>(x));
    ASSERT_LT(fabsl((row_exp(x) - exact) / exact), 1e-15L) << x;
  }
  EXPECT_EQ(row_exp(0), 1.0);
  EXPECT_EQ(row_exp(-709), 0.0);
  EXPECT_EQ(row_exp(-std::numeric_limits<double>::infinity()), 0.0);
  EXPECT_TRUE(std::isnan(row_exp(std::nan(""))));
}

TEST(Rows, SoftmaxAndDivergenceMatchBruteForceAtEveryWidth) {
  for (const std::int64_t n : {1, 2, 7, 8, 9, 15, 16, 17, 64, 257, 2048, 32001}) {
    for (const double scale : {0.01, 1.0, 8.0, 100.0}) {
      const auto p = random_row(n, static_cast<std::uint64_t>(n), scale), q = random_row(n, static_cast<std::uint64_t>(n) + 99, scale);
      RowSoftmax a, b;
      double kl = -1;
      ASSERT_TRUE(row_divergence(p.data(), q.data(), n, a, b, kl));
      const auto lp = exact_log_softmax(p), lq = exact_log_softmax(q);
      for (const std::int64_t i : {std::int64_t{0}, n / 2, n - 1}) {
        EXPECT_NEAR(a.log_prob(p.data(), i), static_cast<double>(lp[static_cast<std::size_t>(i)]), 1e-12 * (1 + scale));
        EXPECT_NEAR(b.log_prob(q.data(), i), static_cast<double>(lq[static_cast<std::size_t>(i)]), 1e-12 * (1 + scale));
      }
      EXPECT_NEAR(kl, static_cast<double>(exact_kl(p, q)), 1e-12 * (1 + scale)) << n << " " << scale;
      RowSoftmax alone;
      ASSERT_TRUE(row_softmax(p.data(), n, alone));
      EXPECT_EQ(alone.log_z, a.log_z);
      EXPECT_EQ(alone.argmax, std::max_element(p.begin(), p.end()) - p.begin());
    }
  }
}

TEST(Rows, EqualRowsGiveExactlyZero) {
  const auto p = random_row(1003, 3, 5);
  RowSoftmax a, b;
  double kl = -1;
  ASSERT_TRUE(row_divergence(p.data(), p.data(), 1003, a, b, kl));
  EXPECT_EQ(kl, 0.0);
  // A shift that floats represent changes nothing either.
  std::vector<float> whole(100), shifted(100);
  for (int i = 0; i < 100; ++i) {
    whole[static_cast<std::size_t>(i)] = static_cast<float>(i % 17);
    shifted[static_cast<std::size_t>(i)] = static_cast<float>(i % 17 + 4096);
  }
  ASSERT_TRUE(row_divergence(whole.data(), shifted.data(), 100, a, b, kl));
  EXPECT_EQ(kl, 0.0);
}

TEST(Rows, TiesGoToTheLowestId) {
  std::vector<float> row(40, 1.0f);
  row[13] = row[14] = row[37] = 2.0f;
  RowSoftmax s;
  ASSERT_TRUE(row_softmax(row.data(), 40, s));
  EXPECT_EQ(s.argmax, 13);
  std::fill(row.begin(), row.end(), -0.0f);
  row[20] = 0.0f;
  ASSERT_TRUE(row_softmax(row.data(), 40, s));
  EXPECT_EQ(s.argmax, 0);  // -0 and 0 tie
}

TEST(Rows, HugeLogitsAndImpossibleIds) {
  const std::vector<float> p = {3e38f, -3e38f, -kInfinity, 2.9999e38f}, q = {1, 2, 3, -kInfinity};
  RowSoftmax a, b;
  double kl = -1;
  ASSERT_TRUE(row_divergence(p.data(), q.data(), 4, a, b, kl));
  EXPECT_EQ(a.log_z, 0.0);
  EXPECT_NEAR(kl, -static_cast<double>(exact_log_softmax(q)[0]), 1e-14);  // p is certain of id 0; ids of probability 0 do not count
  ASSERT_TRUE(row_divergence(q.data(), p.data(), 4, b, a, kl));
  EXPECT_EQ(kl, std::numeric_limits<double>::infinity());  // p gives id 2 no chance, q does
  EXPECT_EQ(a.log_prob(p.data(), 2), -std::numeric_limits<double>::infinity());
}

TEST(Rows, RowsWithoutASoftmaxAreRefused) {
  const float nan = std::nanf("");
  RowSoftmax a, b;
  double kl = 0;
  for (const std::size_t at : {std::size_t{0}, std::size_t{5}, std::size_t{8}, std::size_t{10}}) {
    for (const float bad : {nan, kInfinity}) {
      std::vector<float> row = random_row(11, 1, 1), good = row;
      row[at] = bad;
      EXPECT_FALSE(row_softmax(row.data(), 11, a)) << at << " " << bad;
      EXPECT_FALSE(row_divergence(row.data(), good.data(), 11, a, b, kl));
      EXPECT_FALSE(row_divergence(good.data(), row.data(), 11, a, b, kl));
    }
  }
  const std::vector<float> nothing(9, -kInfinity);
  EXPECT_FALSE(row_softmax(nothing.data(), 9, a));
}

}  // namespace
}  // namespace pare
