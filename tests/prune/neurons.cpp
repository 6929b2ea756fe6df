#include "prune/neurons.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace pare {
namespace {

constexpr std::int64_t kOut = 6, kNeurons = 12, kTokens = 400;

struct Layer {
  std::vector<float> down, inputs;  // inputs [kTokens, kNeurons]
  std::vector<double> gram, mean_square;
};

void finish(Layer& layer) {
  layer.gram.assign(kNeurons * kNeurons, 0.0);
  layer.mean_square.assign(kNeurons, 0.0);
  for (std::int64_t i = 0; i < kNeurons; ++i)
    for (std::int64_t j = 0; j < kNeurons; ++j) {
      double sum = 0;
      for (std::int64_t t = 0; t < kTokens; ++t)
        sum += static_cast<double>(layer.inputs[static_cast<std::size_t>(t * kNeurons + i)]) *
               layer.inputs[static_cast<std::size_t>(t * kNeurons + j)];
      layer.gram[static_cast<std::size_t>(i * kNeurons + j)] = sum / kTokens;
      if (i == j) layer.mean_square[static_cast<std::size_t>(i)] = sum / kTokens;
    }
}

// Inputs of rank about half the neurons plus noise: removed neurons can be predicted from the kept ones.
Layer correlated(float noise) {
  std::mt19937 engine(17);
  std::normal_distribution<float> draw;
  Layer layer;
  layer.down.resize(kOut * kNeurons);
  for (float& w : layer.down) w = draw(engine);
  std::vector<float> basis(5 * kNeurons);
  for (float& x : basis) x = draw(engine);
  layer.inputs.resize(kTokens * kNeurons);
  for (std::int64_t t = 0; t < kTokens; ++t) {
    float factor[5];
    for (float& x : factor) x = draw(engine);
    for (std::int64_t j = 0; j < kNeurons; ++j) {
      float value = noise * draw(engine);
      for (int k = 0; k < 5; ++k) value += factor[k] * basis[static_cast<std::size_t>(k * kNeurons + j)];
      layer.inputs[static_cast<std::size_t>(t * kNeurons + j)] = value;
    }
  }
  finish(layer);
  return layer;
}

// E |W x - W' x_S|^2 / E |W x|^2 straight from the tokens.
double brute_force_error(const Layer& layer, const std::vector<float>& pruned, const std::vector<std::int64_t>& kept) {
  double error = 0, size = 0;
  for (std::int64_t t = 0; t < kTokens; ++t)
    for (std::int64_t i = 0; i < kOut; ++i) {
      double full = 0, small = 0;
      for (std::int64_t j = 0; j < kNeurons; ++j)
        full += static_cast<double>(layer.down[static_cast<std::size_t>(i * kNeurons + j)]) *
                layer.inputs[static_cast<std::size_t>(t * kNeurons + j)];
      for (std::size_t j = 0; j < kept.size(); ++j)
        small += static_cast<double>(pruned[static_cast<std::size_t>(i) * kept.size() + j]) *
                 layer.inputs[static_cast<std::size_t>(t * kNeurons + kept[j])];
      error += (full - small) * (full - small);
      size += full * full;
    }
  return error / size;
}

TEST(Neurons, MostImportantIsStableAndAscending) {
  EXPECT_EQ(most_important({1, 3, 3, 2, 3, 0}, 2), (std::vector<std::int64_t>{1, 2}));
  EXPECT_EQ(most_important({1, 3, 3, 2, 3, 0}, 4), (std::vector<std::int64_t>{1, 2, 3, 4}));
  EXPECT_EQ(most_important({0, 0, 0}, 2), (std::vector<std::int64_t>{0, 1}));
}

TEST(Neurons, ImportanceIsRootMeanSquareTimesColumnNorm) {
  const std::vector<float> down = {3, 0, 1, 4, 0, 1};
  const std::vector<double> mean_square = {4, 9, 0.25};
  const auto importance = neuron_importance(down.data(), mean_square.data(), 2, 3);
  EXPECT_NEAR(importance[0], 10.0, 1e-12);
  EXPECT_EQ(importance[1], 0.0);
  EXPECT_NEAR(importance[2], 0.5 * std::sqrt(2.0), 1e-12);
}

TEST(Neurons, TakesRowsAndColumns) {
  const std::vector<float> matrix = {0, 1, 2, 10, 11, 12};
  EXPECT_EQ(take_columns(matrix.data(), 2, 3, {0, 2}), (std::vector<float>{0, 2, 10, 12}));
  EXPECT_EQ(take_rows(matrix.data(), 3, {1}), (std::vector<float>{10, 11, 12}));
  EXPECT_EQ(take_rows(matrix.data(), 1, {1, 4}), (std::vector<float>{1, 11}));
}

TEST(Neurons, ErrorFromTheMomentEqualsTheTokens) {
  const Layer layer = correlated(0.3f);
  const std::vector<std::int64_t> kept = {0, 2, 3, 5, 8, 9, 11};
  const auto plain = take_columns(layer.down.data(), kOut, kNeurons, kept);
  EXPECT_NEAR(relative_error(layer.down.data(), plain.data(), layer.gram.data(), kOut, kNeurons, kept),
              brute_force_error(layer, plain, kept), 1e-5);
}

TEST(Neurons, CorrectionLowersTheLayerErrorAndIsLeastSquares) {
  const std::vector<std::int64_t> kept = {0, 2, 3, 5, 8, 9, 11};
  for (const float noise : {0.0f, 0.3f, 2.0f}) {
    const Layer layer = correlated(noise);
    const auto plain = take_columns(layer.down.data(), kOut, kNeurons, kept);
    const double before = brute_force_error(layer, plain, kept);
    for (const double damping : {1e-6, 0.01, 1.0}) {
      const auto corrected = corrected_down(layer.down.data(), layer.gram.data(), kOut, kNeurons, kept, damping);
      EXPECT_LT(brute_force_error(layer, corrected, kept), before) << noise << " " << damping;
    }
    // Nearly undamped: no single weight can be moved to lower the error (a stationary point of the tokens' error).
    auto best = corrected_down(layer.down.data(), layer.gram.data(), kOut, kNeurons, kept, 1e-6);
    const double least = brute_force_error(layer, best, kept);
    if (noise > 0) {
      for (const std::size_t at : {std::size_t{0}, std::size_t{9}, std::size_t{25}})
        for (const float step : {-0.05f, 0.05f}) {
          best[at] += step;
          EXPECT_GT(brute_force_error(layer, best, kept), least);
          best[at] -= step;
        }
    } else {
      EXPECT_LT(least, 1e-6);  // five factors, seven kept neurons: everything is predictable
    }
  }
}

TEST(Neurons, DeadNeuronsCostNothingAndLeaveTheRestBitForBit) {
  Layer layer = correlated(0.3f);
  for (std::int64_t t = 0; t < kTokens; ++t)
    for (const std::int64_t dead : {1, 4, 6, 7, 10}) layer.inputs[static_cast<std::size_t>(t * kNeurons + dead)] = 0;
  finish(layer);
  const auto importance = neuron_importance(layer.down.data(), layer.mean_square.data(), kOut, kNeurons);
  const auto kept = most_important(importance, 7);
  EXPECT_EQ(kept, (std::vector<std::int64_t>{0, 2, 3, 5, 8, 9, 11}));
  const auto corrected = corrected_down(layer.down.data(), layer.gram.data(), kOut, kNeurons, kept, 0.01);
  EXPECT_EQ(corrected, take_columns(layer.down.data(), kOut, kNeurons, kept));
  EXPECT_EQ(brute_force_error(layer, corrected, kept), 0.0);
}

}  // namespace
}  // namespace pare
