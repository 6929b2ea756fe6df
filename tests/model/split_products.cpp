#include "model/split_products.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "model/fused.h"

namespace pare {
namespace {

std::vector<float> normal(std::mt19937_64& random, std::int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> out(static_cast<std::size_t>(count));
  for (float& value : out) value = distribution(random) * std::exp(distribution(random));
  return out;
}

// Lines of the result lie `outputs` + 3 apart; what lies between them must stay.
std::vector<float> product(const std::vector<float>& x, std::int64_t rows, std::int64_t depth, const std::vector<float>& w,
                           std::int64_t outputs) {
  std::vector<float> out(static_cast<std::size_t>(rows * (outputs + 3)), -7.0f);
  split_product(x.data(), rows, depth, w.data(), outputs, out.data(), outputs + 3);
  return out;
}

class SplitProducts : public testing::Test {
  void SetUp() override {
    if (!has_split_products()) GTEST_SKIP() << "no AMX with bfloat16 here, or PARE_KERNELS names other kernels";
  }
};

TEST_F(SplitProducts, AreWithinTheirBoundOfDoubleSums) {
  std::mt19937_64 random(1);
  const std::int64_t sizes[][3] = {{0, 32, 32}, {1, 1, 1}, {2, 31, 33}, {16, 32, 32}, {33, 64, 16}, {70, 257, 95}, {40, 1500, 70}};
  for (const auto& [rows, depth, outputs] : sizes) {
    const std::vector<float> x = normal(random, rows * depth), w = normal(random, outputs * depth);
    const std::vector<float> out = product(x, rows, depth, w, outputs);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < outputs; ++j) {
        double sum = 0, size = 0;
        for (std::int64_t k = 0; k < depth; ++k) {
          const double term = static_cast<double>(x[static_cast<std::size_t>(i * depth + k)]) *
                              static_cast<double>(w[static_cast<std::size_t>(j * depth + k)]);
          sum += term;
          size += std::abs(term);
        }
        ASSERT_NEAR(static_cast<double>(out[static_cast<std::size_t>(i * (outputs + 3) + j)]), sum, size * 0x1p-16)
            << rows << " x " << depth << " x " << outputs << ": " << i << ", " << j;
      }
      for (std::int64_t j = outputs; j < outputs + 3; ++j)
        ASSERT_EQ(out[static_cast<std::size_t>(i * (outputs + 3) + j)], -7.0f);
    }
  }
}

TEST_F(SplitProducts, BitsDependOnTheRowAlone) {
  std::mt19937_64 random(2);
  const std::int64_t rows = 75, depth = 100, outputs = 40;
  const std::vector<float> x = normal(random, rows * depth), w = normal(random, outputs * depth);
  const std::vector<float> all = product(x, rows, depth, w, outputs);
  for (std::int64_t row : {0, 31, 32, 50, 74}) {
    const std::vector<float> one(x.begin() + row * depth, x.begin() + (row + 1) * depth);
    const std::vector<float> alone = product(one, 1, depth, w, outputs);
    EXPECT_EQ(std::memcmp(alone.data(), all.data() + row * (outputs + 3), outputs * sizeof(float)), 0) << row;
  }
}

// Values of one half are multiplied without loss: what stays is float32 addition of few terms.
TEST_F(SplitProducts, OfSmallIntegersAreExact) {
  std::mt19937_64 random(3);
  const std::int64_t rows = 40, depth = 90, outputs = 50;
  std::vector<float> x(rows * depth), w(outputs * depth);
  for (auto* list : {&x, &w})
    for (float& value : *list) value = static_cast<float>(static_cast<std::int64_t>(random() % 257) - 128);
  const std::vector<float> out = product(x, rows, depth, w, outputs);
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < outputs; ++j) {
      float sum = 0;
      for (std::int64_t k = 0; k < depth; ++k)
        sum += x[static_cast<std::size_t>(i * depth + k)] * w[static_cast<std::size_t>(j * depth + k)];
      ASSERT_EQ(out[static_cast<std::size_t>(i * (outputs + 3) + j)], sum) << i << ", " << j;
    }
  }
}

TEST_F(SplitProducts, OnlyWhereTheyAreWantedAndWithoutGradients) {
  const torch::Tensor x = torch::randn({3, 5, 64}), weight = torch::randn({48, 64}), bias = torch::randn({48});
  const auto computed = [&](bool gradients, bool wanted) {
    const torch::AutoGradMode mode(gradients);
    if (!wanted) return project(x, weight, bias);
    const SplitProductsScope split;
    return project(x, weight, bias);
  };
  const torch::Tensor plain = computed(false, false), split = computed(false, true);
  EXPECT_FALSE(torch::equal(split, plain));
  EXPECT_TRUE(torch::allclose(split, plain, 1e-4, 1e-3));  // 64 terms of size 1 in 2^16
  EXPECT_EQ(split.sizes(), plain.sizes());
  EXPECT_TRUE(torch::equal(computed(true, true), computed(true, false)));
  EXPECT_FALSE(split_products_wanted());
}

}  // namespace
}  // namespace pare
