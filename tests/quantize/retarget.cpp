#include "quantize/retarget.h"

#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <cmath>

#include "tests/quantize/layers.h"

namespace pare {
namespace {

using testing::random_weight;

// Inputs of the original and of the quantized model, [tokens, columns]; every fifth row is held out.
struct Streams {
  Eigen::MatrixXd original, quantized;
};

Streams random_streams(std::mt19937_64& random, std::int64_t tokens, std::int64_t n, double noise, double gain) {
  std::normal_distribution<double> normal;
  Streams streams{Eigen::MatrixXd(tokens, n), Eigen::MatrixXd(tokens, n)};
  for (std::int64_t t = 0; t < tokens; ++t) {
    double shared = 0;
    for (std::int64_t j = 0; j < n; ++j) {
      shared = 0.7 * shared + normal(random);
      streams.original(t, j) = shared * (1.0 + static_cast<double>(j % 5));
    }
    for (std::int64_t j = 0; j < n; ++j)
      streams.quantized(t, j) = streams.original(t, j) * (1 - gain) + gain * streams.original(t, (j + 1) % n) +
                                noise * normal(random);
  }
  return streams;
}

SquareMatrix stored(const Eigen::MatrixXd& m, bool single) {
  const std::int64_t n = m.rows();
  SquareMatrix out(n, single ? 0 : n);
  out.visit([&](auto* values) {
    using Value = std::remove_reference_t<decltype(*values)>;
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t j = 0; j < n; ++j) values[i * n + j] = static_cast<Value>(m(i, j));
  });
  return out;
}

struct Parts {
  Eigen::MatrixXd hessian, cross;  // means
  std::int64_t tokens = 0, paired = 0;
};
enum class Rows { kAll, kHeldOut, kOthers };
// Every `stride`-th token is in both streams; of those every fifth is held out.
Parts means(const Streams& s, Rows wanted, std::int64_t stride = 1) {
  const std::int64_t n = s.original.cols();
  Parts parts{Eigen::MatrixXd::Zero(n, n), Eigen::MatrixXd::Zero(n, n)};
  for (std::int64_t t = 0; t < s.original.rows(); ++t) {
    const bool paired = t % stride == 0, held = paired && t / stride % 5 == 4;
    if (wanted != Rows::kAll && held != (wanted == Rows::kHeldOut)) continue;
    parts.hessian += s.quantized.row(t).transpose() * s.quantized.row(t);
    ++parts.tokens;
    if (!paired) continue;
    parts.cross += (s.original.row(t) - s.quantized.row(t)).transpose() * s.quantized.row(t);
    ++parts.paired;
  }
  parts.hessian /= static_cast<double>(parts.tokens);
  parts.cross /= static_cast<double>(parts.paired);
  return parts;
}

// The minimiser with its ridge, straight from the definition.
Eigen::MatrixXd correction(const Eigen::MatrixXd& w, const Parts& parts, double damping) {
  Eigen::MatrixXd damped = parts.hessian;
  damped.diagonal().array() += damping * parts.hessian.diagonal().mean();
  return damped.ldlt().solve((w * parts.cross).transpose()).transpose();
}

double held_error(const Streams& s, const Eigen::MatrixXd& w, const Eigen::MatrixXd& v, std::int64_t stride) {
  double error = 0;
  for (std::int64_t t = 4 * stride; t < s.original.rows(); t += 5 * stride)
    error += (w * s.original.row(t).transpose() - v * s.quantized.row(t).transpose()).squaredNorm();
  return error;
}

InputStatistics statistics(const Streams& s, bool single, std::int64_t stride = 1) {
  InputStatistics input;
  input.columns = s.original.cols();
  const Parts all = means(s, Rows::kAll, stride), held = means(s, Rows::kHeldOut, stride);
  input.tokens = all.tokens;
  input.paired_tokens = all.paired;
  input.held_tokens = held.tokens;
  input.hessian = stored(all.hessian, single);
  input.cross = stored(all.cross, single);
  input.held_hessian = stored(held.hessian, true);
  input.held_cross = stored(held.cross, true);
  return input;
}

Eigen::MatrixXd matrix(const std::vector<float>& values, std::int64_t rows, std::int64_t n) {
  Eigen::MatrixXd out(rows, n);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t j = 0; j < n; ++j) out(r, j) = static_cast<double>(values[static_cast<std::size_t>(r * n + j)]);
  return out;
}

TEST(Retarget, IsTheRidgeSolutionShrunkToWhatHeldOutTokensBear) {
  std::mt19937_64 random(3);
  for (const auto& [tokens, noise, single, stride] :
       {std::tuple(120, 0.5, false, 1), {400, 0.3, false, 1}, {400, 0.3, true, 1}, {800, 0.3, false, 3}}) {
    const std::int64_t n = 40, rows = 66;
    const Streams streams = random_streams(random, tokens, n, noise, 0.1);
    const std::vector<float> weight = random_weight(random, rows, n);
    const Eigen::MatrixXd w = matrix(weight, rows, n);
    const InputStatistics input = statistics(streams, single, stride);
    const SweepFactor factor = factor_hessian(input.hessian, n, {0.01, true}, "test", 2);
    const Retargeting found = Retargeter(input, factor, 0.01, "test", 2).retarget(weight.data(), rows, false);

    const Eigen::MatrixXd part = correction(w, means(streams, Rows::kOthers, stride), 0.01);
    double best = 0, least = held_error(streams, w, w, stride);
    for (double a = 0; a <= 1.0; a += 1e-3) {
      const double error = held_error(streams, w, w + a * part, stride);
      if (error < least) {
        least = error;
        best = a;
      }
    }
    EXPECT_NEAR(found.shrink, best, 2e-3);
    EXPECT_GT(found.shrink, 0.05);
    const Eigen::MatrixXd expected = w + found.shrink * correction(w, means(streams, Rows::kAll, stride), 0.01);
    EXPECT_LT((matrix(found.weight, rows, n) - expected).cwiseAbs().maxCoeff(),
              (single ? 1e-4 : 1e-6) * expected.cwiseAbs().maxCoeff());
    EXPECT_EQ(Retargeter(input, factor, 0.01, "test", 1).retarget(weight.data(), rows, false).weight, found.weight);
  }
}

TEST(Retarget, NoiseAloneIsShrunkAwayAndEqualStreamsChangeNothing) {
  std::mt19937_64 random(5);
  const std::int64_t n = 48, rows = 20;
  const std::vector<float> weight = random_weight(random, rows, n);
  Streams streams = random_streams(random, 60, n, 0.0, 0.0);
  {
    const InputStatistics input = statistics(streams, false);
    const SweepFactor factor = factor_hessian(input.hessian, n, {0.01, true}, "test", 2);
    const Retargeting same = Retargeter(input, factor, 0.01, "test", 2).retarget(weight.data(), rows, false);
    for (std::size_t i = 0; i < weight.size(); ++i) EXPECT_NEAR(same.weight[i], weight[i], 1e-6);
  }
  // Fewer tokens than columns: what fits them says little about others.
  streams = random_streams(random, 35, n, 2.0, 0.0);
  const InputStatistics input = statistics(streams, false);
  const SweepFactor factor = factor_hessian(input.hessian, n, {0.01, true}, "test", 2);
  EXPECT_LT(Retargeter(input, factor, 0.01, "test", 2).retarget(weight.data(), rows, false).shrink, 0.6);
}

TEST(Retarget, KeptZerosAndDeadColumnsStay) {
  std::mt19937_64 random(7);
  const std::int64_t n = 32, rows = 8;
  Streams streams = random_streams(random, 200, n, 0.3, 0.1);
  streams.original.col(3).setZero();
  streams.quantized.col(3).setZero();
  std::vector<float> weight = random_weight(random, rows, n);
  for (std::size_t i = 0; i < weight.size(); i += 3) weight[i] = 0;
  const InputStatistics input = statistics(streams, false);
  const SweepFactor factor = factor_hessian(input.hessian, n, {0.01, true}, "test", 2);
  const Retargeting found = Retargeter(input, factor, 0.01, "test", 2).retarget(weight.data(), rows, true);
  EXPECT_GT(found.shrink, 0);
  int changed = 0;
  for (std::size_t i = 0; i < weight.size(); ++i) {
    if (weight[i] == 0 || i % n == 3)
      EXPECT_EQ(found.weight[i], weight[i]) << i;
    else
      changed += found.weight[i] != weight[i];
  }
  EXPECT_GT(changed, 100);
}

}  // namespace
}  // namespace pare
