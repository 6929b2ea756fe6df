#include "prune/refit.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "core/error.h"

namespace pare {
namespace {

constexpr std::int64_t kOut = 4, kIn = 6, kTokens = 200;

struct Layer {
  std::vector<float> weights, inputs, targets;  // [kOut, kIn], [kTokens, kIn], [kTokens, kOut]
  std::vector<double> gram, cross;
  double energy = 0;
};

Layer layer() {
  std::mt19937 engine(3);
  std::normal_distribution<float> draw;
  Layer l;
  l.weights.resize(kOut * kIn);
  l.inputs.resize(kTokens * kIn);
  l.targets.resize(kTokens * kOut);
  for (auto* list : {&l.weights, &l.inputs, &l.targets})
    for (float& x : *list) x = draw(engine);
  l.gram.assign(kIn * kIn, 0.0);
  l.cross.assign(kOut * kIn, 0.0);
  for (std::int64_t t = 0; t < kTokens; ++t) {
    const float *x = l.inputs.data() + t * kIn, *y = l.targets.data() + t * kOut;
    for (std::int64_t i = 0; i < kIn; ++i)
      for (std::int64_t j = 0; j < kIn; ++j)
        l.gram[static_cast<std::size_t>(i * kIn + j)] += static_cast<double>(x[i]) * static_cast<double>(x[j]);
    for (std::int64_t i = 0; i < kOut; ++i) {
      l.energy += static_cast<double>(y[i]) * static_cast<double>(y[i]);
      for (std::int64_t j = 0; j < kIn; ++j)
        l.cross[static_cast<std::size_t>(i * kIn + j)] += static_cast<double>(y[i]) * static_cast<double>(x[j]);
    }
  }
  return l;
}

double brute_force_error(const Layer& l, const std::vector<float>& weights) {
  double error = 0;
  for (std::int64_t t = 0; t < kTokens; ++t)
    for (std::int64_t i = 0; i < kOut; ++i) {
      double y = l.targets[static_cast<std::size_t>(t * kOut + i)];
      for (std::int64_t j = 0; j < kIn; ++j)
        y -= static_cast<double>(weights[static_cast<std::size_t>(i * kIn + j)]) *
             static_cast<double>(l.inputs[static_cast<std::size_t>(t * kIn + j)]);
      error += y * y;
    }
  return error;
}

TEST(Refit, SquaredErrorIsThatOfTheTokens) {
  const Layer l = layer();
  EXPECT_NEAR(squared_error(l.weights.data(), l.gram.data(), l.cross.data(), l.energy, kOut, kIn),
              brute_force_error(l, l.weights), 1e-6 * l.energy);
}

// No step in any direction lowers sum |t - W x|^2 + lambda |W - W0|^2.
TEST(Refit, IsTheMinimumOfItsObjective) {
  const Layer l = layer();
  const double damping = 0.05;
  double lambda = 0;
  for (std::int64_t i = 0; i < kIn; ++i) lambda += damping * l.gram[static_cast<std::size_t>(i * kIn + i)] / kIn;
  const auto objective = [&](const std::vector<float>& w) {
    double distance = 0;
    for (std::size_t i = 0; i < w.size(); ++i)
      distance += std::pow(static_cast<double>(w[i]) - static_cast<double>(l.weights[i]), 2);
    return brute_force_error(l, w) + lambda * distance;
  };
  const Refit refit(l.gram.data(), kIn, damping, "test");
  const std::vector<float> solved = refit.solve(l.weights.data(), l.cross.data(), kOut);
  const double least = objective(solved);
  EXPECT_LT(least, objective(l.weights));
  for (std::size_t i = 0; i < solved.size(); ++i)
    for (const float step : {-1e-2f, 1e-2f}) {
      auto moved = solved;
      moved[i] += step;
      EXPECT_GT(objective(moved), least) << i;
    }
}

TEST(Refit, KeepsWeightsWhoseTargetsAreTheirOwnOutputs) {
  Layer l = layer();
  for (std::int64_t i = 0; i < kOut; ++i)
    for (std::int64_t j = 0; j < kIn; ++j) {
      double sum = 0;
      for (std::int64_t k = 0; k < kIn; ++k)
        sum += static_cast<double>(l.weights[static_cast<std::size_t>(i * kIn + k)]) *
               l.gram[static_cast<std::size_t>(k * kIn + j)];
      l.cross[static_cast<std::size_t>(i * kIn + j)] = sum;
    }
  const auto solved = Refit(l.gram.data(), kIn, 0.01, "test").solve(l.weights.data(), l.cross.data(), kOut);
  for (std::size_t i = 0; i < solved.size(); ++i) EXPECT_NEAR(solved[i], l.weights[i], 1e-6);
}

TEST(Refit, InputsThatAreAlwaysZeroLeaveTheirWeights) {
  const std::vector<double> gram(kIn * kIn, 0.0), cross(kOut * kIn, 0.0);
  const Layer l = layer();
  EXPECT_EQ(Refit(gram.data(), kIn, 0.01, "test").solve(l.weights.data(), cross.data(), kOut), l.weights);
}

TEST(Refit, RefusesWhatIsNoSecondMoment) {
  const double gram[] = {1, 2, 2, 1};
  try {
    Refit(gram, 2, 1e-9, "o_proj");
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kFailure);
    EXPECT_NE(std::string(error.what()).find("o_proj"), std::string::npos);
  }
}

TEST(MostImportant, LargestStayInOrderAndOfEqualOnesTheFirst) {
  EXPECT_EQ(most_important({3, 1, 2, 2, 5}, 3), (std::vector<std::int64_t>{0, 2, 4}));
  EXPECT_EQ(most_important({1, 1, 1}, 2), (std::vector<std::int64_t>{0, 1}));
}

}  // namespace
}  // namespace pare
