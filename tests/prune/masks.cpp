#include "prune/masks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "core/error.h"

namespace pare {
namespace {

// Sort everything, drop from the front: lowest score first, of equal ones the higher index first.
std::vector<std::uint8_t> sorted_mask(const std::vector<float>& scores, std::size_t unit, std::size_t remove) {
  std::vector<std::uint8_t> keep(scores.size(), 1);
  for (std::size_t first = 0; first < scores.size(); first += unit) {
    std::vector<std::size_t> order(unit);
    std::iota(order.begin(), order.end(), first);
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return scores[a] != scores[b] ? scores[a] < scores[b] : a > b;
    });
    for (std::size_t i = 0; i < remove; ++i) keep[order[i]] = 0;
  }
  return keep;
}

std::vector<float> normal(std::size_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> draw;
  std::vector<float> out(count);
  for (float& x : out) x = draw(engine);
  return out;
}

TEST(Masks, EqualsSortingForRowsAndTensorWithRaggedWidths) {
  for (const std::int64_t cols : {1, 2, 7, 33, 100}) {
    for (const double fraction : {0.01, 0.29, 0.3, 0.5, 0.75, 0.99}) {
      const std::int64_t rows = 5;
      const auto weights = normal(static_cast<std::size_t>(rows * cols), static_cast<unsigned>(cols));
      const auto scores = magnitude_scores(weights.data(), rows, cols);
      const Sparsity sparsity{fraction};
      const auto exact = [&](std::int64_t n) {  // hundredths are integers: no rounding in the expectation
        return static_cast<std::size_t>(n * std::lround(fraction * 100) / 100);
      };
      EXPECT_EQ(keep_mask(scores.data(), rows, cols, sparsity, Scope::kRow),
                sorted_mask(scores, static_cast<std::size_t>(cols), exact(cols)));
      EXPECT_EQ(keep_mask(scores.data(), rows, cols, sparsity, Scope::kTensor),
                sorted_mask(scores, scores.size(), exact(rows * cols)));
    }
  }
}

TEST(Masks, TiesKeepTheLowerIndex) {
  const std::vector<float> scores = {1, 0, 1, 1, 0, 1, 2, 1};
  const std::vector<std::uint8_t> expected = {1, 0, 1, 0, 0, 0, 1, 0};  // zeros, then the 1 at 7, 5, 3
  EXPECT_EQ(keep_mask(scores.data(), 1, 8, Sparsity{0.625}, Scope::kRow), expected);
  std::mt19937 engine(3);
  std::vector<float> coarse(600);
  for (float& x : coarse) x = static_cast<float>(engine() % 4);
  EXPECT_EQ(keep_mask(coarse.data(), 6, 100, Sparsity{0.5}, Scope::kRow), sorted_mask(coarse, 100, 50));
  EXPECT_EQ(keep_mask(coarse.data(), 6, 100, Sparsity{0.5}, Scope::kTensor), sorted_mask(coarse, 600, 300));
}

TEST(Masks, NOfMKeepsExactlyNInEveryGroup) {
  for (const auto& [text, keep_n, of_m] : {std::tuple{"2:4", 2, 4}, {"4:8", 4, 8}, {"1:4", 1, 4}, {"3:4", 3, 4}}) {
    const Sparsity sparsity = Sparsity::pattern(text, "--pattern");
    const auto scores = normal(9 * 40, 11);
    const auto mask = keep_mask(scores.data(), 9, 40, sparsity, Scope::kTensor);
    for (std::size_t first = 0; first < mask.size(); first += static_cast<std::size_t>(of_m))
      EXPECT_EQ(std::accumulate(mask.begin() + static_cast<std::ptrdiff_t>(first),
                                mask.begin() + static_cast<std::ptrdiff_t>(first) + of_m, 0), keep_n);
    EXPECT_EQ(mask, sorted_mask(scores, static_cast<std::size_t>(of_m), static_cast<std::size_t>(of_m - keep_n)));
  }
  const auto scores = normal(12, 1);
  EXPECT_THROW(keep_mask(scores.data(), 2, 6, Sparsity::pattern("2:4", ""), Scope::kRow), Error);
}

TEST(Masks, PatternRefusesNonsense) {
  for (const char* text : {"", "2", "2:", ":4", "4:4", "5:4", "0:4", "-1:4", "2:4x", "2:65", "2:4:8", " 2:4"})
    EXPECT_THROW(Sparsity::pattern(text, "--pattern"), Error) << text;
  EXPECT_EQ(Sparsity::pattern("2:4", "").name(), "2:4");
  EXPECT_EQ(Sparsity{0.5}.name(), "50 %");
  EXPECT_EQ(Sparsity{0.625}.name(), "62.5 %");
  EXPECT_EQ(Sparsity{0.005}.name(), "0.5 %");
}

TEST(Masks, WandaScoresAgainstDoubleAndIsotropicInputsGiveMagnitude) {
  const std::int64_t rows = 7, cols = 24;
  const auto weights = normal(static_cast<std::size_t>(rows * cols), 5);
  std::vector<double> mean_square(static_cast<std::size_t>(cols));
  for (std::size_t j = 0; j < mean_square.size(); ++j) mean_square[j] = 0.01 * static_cast<double>((j * 7) % 24);
  const auto scores = wanda_scores(weights.data(), mean_square.data(), rows, cols);
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const double expected = std::fabs(static_cast<double>(weights[i])) * std::sqrt(mean_square[i % 24]);
    EXPECT_NEAR(scores[i], expected, 1e-6 * (expected + 1e-3));
  }
  const std::vector<double> flat(static_cast<std::size_t>(cols), 0.25);
  const auto same = wanda_scores(weights.data(), flat.data(), rows, cols);
  const auto magnitude = magnitude_scores(weights.data(), rows, cols);
  EXPECT_EQ(keep_mask(same.data(), rows, cols, Sparsity{0.5}, Scope::kRow),
            keep_mask(magnitude.data(), rows, cols, Sparsity{0.5}, Scope::kRow));
  EXPECT_NE(keep_mask(scores.data(), rows, cols, Sparsity{0.5}, Scope::kRow),
            keep_mask(magnitude.data(), rows, cols, Sparsity{0.5}, Scope::kRow));
}

TEST(Masks, RandomDependsOnSeedAndNameOnly) {
  const auto a = random_scores(1, "x", 4, 50), again = random_scores(1, "x", 4, 50);
  EXPECT_EQ(a, again);
  EXPECT_NE(a, random_scores(2, "x", 4, 50));
  EXPECT_NE(a, random_scores(1, "y", 4, 50));
  const auto big = random_scores(7, "w", 100, 100);
  double mean = 0;
  for (const float x : big) {
    ASSERT_GE(x, 0.0f);
    ASSERT_LT(x, 1.0f);
    mean += x / 10000.0;
  }
  EXPECT_NEAR(mean, 0.5, 0.015);  // 5 standard errors of a uniform mean
}

TEST(Masks, RemovedWeightsAreExactPositiveZero) {
  std::vector<float> weights = {-3.0f, -0.5f, 2.0f, 1.0f};
  apply_mask({0, 1, 0, 1}, weights.data());
  EXPECT_EQ(weights, (std::vector<float>{0.0f, -0.5f, 0.0f, 1.0f}));
  EXPECT_FALSE(std::signbit(weights[0]));
}

}  // namespace
}  // namespace pare
