#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

#include "core/error.h"
#include "runtime/engine.h"

namespace pare {
namespace {

TEST(SamplerTest, GreedyTakesTheLargestAndTheLowestIdOfEquals) {
  Sampler sampler(SamplerOptions{});
  EXPECT_EQ(sampler(std::vector<float>{1, 3, 2}), 1);
  EXPECT_EQ(sampler(std::vector<float>{3, 1, 3}), 0);
  EXPECT_EQ(sampler(std::vector<float>{-INFINITY, -INFINITY, -5}), 2);
}

TEST(SamplerTest, FrequenciesFollowTheSoftmax) {
  const std::vector<float> logits{0.0f, 1.0f, 2.0f, -1.0f, -30.0f};
  for (const double temperature : {0.5, 1.0, 2.0}) {
    Sampler sampler({temperature, 1.0, 42});
    double total = 0;
    for (const float l : logits) total += std::exp(l / temperature);
    constexpr int kDraws = 40000;
    std::map<int, int> counts;
    for (int i = 0; i < kDraws; ++i) ++counts[sampler(logits)];
    for (int i = 0; i < 5; ++i) {
      const double p = std::exp(logits[static_cast<std::size_t>(i)] / temperature) / total;
      EXPECT_NEAR(counts[i], kDraws * p, 5 * std::sqrt(kDraws * p * (1 - p)) + 1) << temperature << ", " << i;
    }
  }
}

TEST(SamplerTest, TopPKeepsTheSmallestSetThatReachesTheMass) {
  // Probabilities 0.5, 0.3, 0.15, 0.05 in shuffled order.
  const std::vector<float> logits{std::log(0.15f), std::log(0.5f), std::log(0.05f), std::log(0.3f)};
  const auto seen = [&](double top_p) {
    Sampler sampler({1.0, top_p, 7});
    std::map<int, int> counts;
    for (int i = 0; i < 20000; ++i) ++counts[sampler(logits)];
    return counts;
  };
  auto counts = seen(0.75);
  EXPECT_EQ(counts.size(), 2u);
  EXPECT_NEAR(counts[1], 20000 * 0.5 / 0.8, 500);
  EXPECT_NEAR(counts[3], 20000 * 0.3 / 0.8, 500);
  EXPECT_EQ(seen(0.4).size(), 1u);
  EXPECT_EQ(seen(0.9).size(), 3u);
  EXPECT_EQ(seen(1.0).size(), 4u);
  EXPECT_EQ(seen(1e-9).size(), 1u);
}

TEST(SamplerTest, TinyTopPOfNearlyEqualTokensIsGreedy) {
  const std::vector<float> logits{0.0f, 1e-4f};  // top_p below 1 / 2, so below the share of every token
  Sampler sampler({1.0, 1e-3, 7});
  for (int i = 0; i < 100; ++i) EXPECT_EQ(sampler(logits), 1);
}

TEST(SamplerTest, TemperatureTooSmallToDivideByIsGreedy) {
  Sampler sampler({1e-310, 0.9, 7});
  EXPECT_EQ(sampler(std::vector<float>{1, 3, 3, 2}), 1);
}

TEST(SamplerTest, SeedsDecideTheSequence) {
  const std::vector<float> logits(100, 0.0f);
  const auto sequence = [&](std::uint64_t seed) {
    Sampler sampler({1.0, 0.9, seed});
    std::vector<int> ids;
    for (int i = 0; i < 50; ++i) ids.push_back(sampler(logits));
    return ids;
  };
  EXPECT_EQ(sequence(1), sequence(1));
  EXPECT_NE(sequence(1), sequence(2));
  EXPECT_NE(sequence(0), sequence(1));
}

TEST(SamplerTest, RefusesBadOptionsAndLogits) {
  EXPECT_THROW(Sampler({-1, 1, 0}), Error);
  EXPECT_THROW(Sampler({std::nan(""), 1, 0}), Error);
  EXPECT_THROW(Sampler({INFINITY, 1, 0}), Error);
  EXPECT_THROW(Sampler({1, 0, 0}), Error);
  EXPECT_THROW(Sampler({1, 1.5, 0}), Error);
  EXPECT_THROW(Sampler({1, std::nan(""), 0}), Error);
  for (const double temperature : {0.0, 1.0}) {
    Sampler sampler({temperature, 1, 0});
    EXPECT_THROW(sampler(std::vector<float>{}), Error);
    EXPECT_THROW(sampler(std::vector<float>{1, std::numeric_limits<float>::quiet_NaN()}), Error);
    EXPECT_THROW(sampler(std::vector<float>{1, INFINITY}), Error);
    EXPECT_THROW(sampler(std::vector<float>{-INFINITY, -INFINITY}), Error);
  }
}

}  // namespace
}  // namespace pare
