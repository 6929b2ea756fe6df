#include "quantize/gptq.h"

#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "quantize/scales.h"
#include "tests/quantize/layers.h"

namespace pare {
namespace {

using testing::diagonal;
using testing::quadratic;
using testing::random_hessian;
using testing::random_weight;

std::vector<std::uint8_t> zeros_of(const std::vector<float>& weight, bool stay) {
  return stay ? nonzero(weight) : std::vector<std::uint8_t>();
}

// The literal algorithm in double: explicit inverse Hessian, one elimination per column, no blocks, no factor. Where the
// order keeps the codec's groups together, each gets new scales when its turn comes, under the inverse of its block of
// the inverse Hessian of all columns that are left.
QuantizedTensor literal_gptq(const std::vector<float>& weight, const QuantizedTensor& nearest,
                             const std::vector<double>& h, const SweepFactor& factor, bool keep_zeros) {
  QuantizedTensor grid = nearest;
  const std::int64_t rows = grid.rows, n = grid.cols, groups = grid.codec.groups(n), size = n / groups;
  const CodeRange range = code_range(grid.codec.kind);
  Eigen::MatrixXd damped(n, n);
  double mean = 0;
  std::int64_t live = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) damped(i, j) = h[static_cast<std::size_t>(i * n + j)];
    mean += damped(i, i);
    live += damped(i, i) > 0;
  }
  for (std::int64_t i = 0; i < n; ++i)
    damped(i, i) = damped(i, i) > 0 ? damped(i, i) + 0.01 * mean / static_cast<double>(live) : 1.0;
  Eigen::MatrixXd inverse = damped.inverse(), w(rows, n);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t j = 0; j < n; ++j) w(r, j) = static_cast<double>(weight[static_cast<std::size_t>(r * n + j)]);
  }
  const auto pruned = [&](std::int64_t r, std::int64_t i) {
    return keep_zeros && weight[static_cast<std::size_t>(r * n + i)] == 0.0f;
  };
  for (std::int64_t at = 0; at < n; ++at) {
    const std::int64_t i = factor.order[static_cast<std::size_t>(at)];
    if (factor.group == grid.codec.group && at % size == 0) {
      std::vector<std::int64_t> columns(factor.order.begin() + at, factor.order.begin() + at + size);
      Eigen::MatrixXd block(size, size);
      std::vector<double> values(static_cast<std::size_t>(size * rows)), metric(static_cast<std::size_t>(size * size));
      for (std::int64_t j = 0; j < size; ++j) {
        const std::int64_t column = columns[static_cast<std::size_t>(j)];
        EXPECT_EQ(column / size, i / size);
        for (std::int64_t k = 0; k < size; ++k) block(j, k) = inverse(column, columns[static_cast<std::size_t>(k)]);
        for (std::int64_t r = 0; r < rows; ++r)
          values[static_cast<std::size_t>(j * rows + r)] = pruned(r, column) ? 0.0 : w(r, column);
      }
      const Eigen::MatrixXd left = block.inverse();
      for (std::int64_t j = 0; j < size; ++j) {
        for (std::int64_t k = 0; k < size; ++k) {
          const bool dead = factor.dead[static_cast<std::size_t>(columns[static_cast<std::size_t>(j)])] ||
                            factor.dead[static_cast<std::size_t>(columns[static_cast<std::size_t>(k)])];
          metric[static_cast<std::size_t>(j * size + k)] = dead ? 0.0 : left(j, k);
        }
      }
      search_group(values.data(), rows, 0, rows, i / size, metric.data(), grid);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::size_t g = static_cast<std::size_t>(r * groups + i / size);
      const double scale = static_cast<double>(f16_to_f32(grid.scales[g]));
      const double minimum = grid.minima.empty() ? 0.0 : static_cast<double>(f16_to_f32(grid.minima[g]));
      const int zero = grid.zeros.empty() ? 0 : grid.zeros[g];
      int code = zero;
      if (scale != 0 && !pruned(r, i)) {
        code = std::clamp(static_cast<int>(std::nearbyint((w(r, i) - minimum) / scale)) + zero, range.low, range.high);
      }
      grid.codes[static_cast<std::size_t>(r * n + i)] = static_cast<std::int8_t>(code);
      const double error = (w(r, i) - (code - zero) * scale - minimum) / inverse(i, i);
      for (std::int64_t j = 0; j < n; ++j) w(r, j) -= error * inverse(i, j);
    }
    const Eigen::MatrixXd column = inverse.col(i);
    inverse -= column * column.transpose() / inverse(i, i);
    inverse.row(i).setZero();
    inverse.col(i).setZero();
  }
  return grid;
}

double layer_error(const std::vector<float>& weight, const QuantizedTensor& q, std::int64_t row,
                   const std::vector<double>& h) {
  std::vector<float> unpacked(static_cast<std::size_t>(q.cols));
  q.unpack_row(row, unpacked.data());
  std::vector<double> d(unpacked.size());
  for (std::size_t j = 0; j < d.size(); ++j) {
    d[j] = static_cast<double>(weight[static_cast<std::size_t>(row * q.cols) + j]) - static_cast<double>(unpacked[j]);
  }
  return quadratic(h, q.cols, d, 0, q.cols);
}

struct Case {
  const char* codec;
  std::int64_t rows, cols;
  bool dead, pruned;
};

TEST(Gptq, EqualsTheLiteralAlgorithmCodeForCode) {
  std::mt19937_64 random(1);
  for (const Case& c :
       {Case{"q4", 33, 64, false, false}, Case{"q4", 5, 160, true, false}, Case{"q4g128", 40, 256, true, false},
        Case{"q4a", 17, 96, false, false}, Case{"q4ag64", 9, 192, true, true}, Case{"q8c", 12, 172, true, false},
        Case{"q8", 7, 64, false, true}, Case{"q4", 20, 128, false, true}, Case{"q3", 33, 96, true, false},
        Case{"q3g64", 9, 192, false, true}, Case{"q2", 12, 160, false, false}, Case{"q2g128", 7, 256, true, true},
        Case{"w8a8", 12, 172, false, false}, Case{"q4m", 33, 96, true, false}, Case{"q4mg64", 9, 192, false, false}}) {
    std::vector<float> w = random_weight(random, c.rows, c.cols);
    if (c.pruned) {
      for (std::size_t i = 0; i < w.size(); i += 3) w[i] = 0.0f;
    }
    std::vector<double> h = random_hessian(random, c.cols, 2 * c.cols);
    if (c.dead) {
      for (std::int64_t j = 0; j < c.cols; ++j) {
        h[static_cast<std::size_t>(3 * c.cols + j)] = h[static_cast<std::size_t>(j * c.cols + 3)] = 0.0;
      }
    }
    const std::vector<double> diag = diagonal(h, c.cols);
    const QuantizedTensor nearest = round_to_nearest(w.data(), c.rows, c.cols, Codec::parse(c.codec, "t"),
                                                     ScaleRule::kSearched, {h.data(), diag.data()}, "w", 2);
    const std::int64_t group = std::max<std::int64_t>(0, nearest.codec.group);
    for (const FactorOptions& options : {FactorOptions{0.01, true}, {0.01, false}, {0.01, true, group}}) {
      const SweepFactor factor = factor_hessian(SquareMatrix(h), c.cols, options, "w", 2);
      const GptqResult result = gptq(w.data(), nearest, h.data(), factor, zeros_of(w, c.pruned), 2);
      const QuantizedTensor literal = literal_gptq(w, nearest, h, factor, c.pruned);
      double nearest_error = 0, literal_error = 0, best_error = 0;
      QuantizedTensor expected = nearest;
      const std::int64_t groups = nearest.codec.groups(c.cols);
      for (std::int64_t r = 0; r < c.rows; ++r) {
        const double plain = layer_error(w, nearest, r, h), own = layer_error(w, literal, r, h);
        nearest_error += plain;
        literal_error += own;
        best_error += std::min(plain, own);
        if (plain < own) continue;
        const auto take = [&](const auto& from, auto& to, std::int64_t width) {
          if (!from.empty()) std::copy_n(from.begin() + r * width, width, to.begin() + r * width);
        };
        take(literal.codes, expected.codes, c.cols);
        take(literal.scales, expected.scales, groups);
        take(literal.zeros, expected.zeros, groups);
        take(literal.minima, expected.minima, groups);
      }
      EXPECT_EQ(result.tensor.codes, expected.codes) << c.codec;
      EXPECT_EQ(result.tensor.scales, expected.scales) << c.codec;
      EXPECT_EQ(result.tensor.zeros, expected.zeros) << c.codec;
      EXPECT_EQ(result.tensor.minima, expected.minima) << c.codec;
      EXPECT_EQ(result.tensor.scales != nearest.scales, group > 0 && options.group > 0) << c.codec;
      EXPECT_NEAR(result.nearest_error, nearest_error, 1e-6 * nearest_error);
      EXPECT_NEAR(result.sweep_error, literal_error, 1e-6 * literal_error);
      EXPECT_NEAR(result.error, best_error, 1e-6 * best_error);
      EXPECT_LT(result.error, nearest_error) << c.codec;
      result.tensor.validate("w");
    }
  }
}

TEST(Gptq, PrunedWeightsStayExactlyZeroAndTheRestCompensates) {
  std::mt19937_64 random(2);
  for (const char* codec : {"q4", "q4a", "q8"}) {
    std::vector<float> w = random_weight(random, 30, 128);
    for (std::size_t i = 0; i < w.size(); ++i) {
      if (i % 4 < 2) w[i] = 0.0f;
    }
    ASSERT_TRUE(is_pruned(w));
    const std::vector<double> h = random_hessian(random, 128, 400);
    const QuantizedTensor nearest = round_to_nearest(w.data(), 30, 128, Codec::parse(codec, "t"), ScaleRule::kSearched,
                                                     {h.data(), nullptr}, "w", 1);
    const SweepFactor factor = factor_hessian(SquareMatrix(h), 128, {}, "w", 1);
    const GptqResult result = gptq(w.data(), nearest, h.data(), factor, nonzero(w), 1);
    std::vector<float> back(w.size());
    result.tensor.unpack(back.data());
    for (std::size_t i = 0; i < w.size(); ++i) {
      if (w[i] == 0.0f) {
        ASSERT_EQ(back[i], 0.0f) << codec << " " << i;
      }
    }
    EXPECT_LT(result.sweep_error, result.nearest_error) << codec;
  }
  EXPECT_FALSE(is_pruned(std::vector<float>(100, 1.0f)));
}

// Every combination of codes of one group of four columns (padded with dead columns): GPTQ lies between the optimum
// and, on average, round-to-nearest.
TEST(Gptq, LiesBetweenTheExhaustiveOptimumAndNearest) {
  std::mt19937_64 random(3);
  double optimum_sum = 0, sweep_sum = 0, nearest_sum = 0;
  for (int trial = 0; trial < 40; ++trial) {
    std::vector<float> w(32, 0.0f);
    const std::vector<float> live = random_weight(random, 1, 4);
    const std::vector<double> small = random_hessian(random, 4, 12);
    std::vector<double> h(32 * 32, 0.0);
    for (std::size_t i = 0; i < 4; ++i) {
      w[i * 5] = live[i];
      for (std::size_t j = 0; j < 4; ++j) h[i * 5 * 32 + j * 5] = small[i * 4 + j];
    }
    const QuantizedTensor nearest =
        round_to_nearest(w.data(), 1, 32, Codec::parse("q4", "t"), ScaleRule::kAbsmax, {}, "w", 1);
    const SweepFactor factor = factor_hessian(SquareMatrix(h), 32, {1e-6, true}, "w", 1);
    const GptqResult result = gptq(w.data(), nearest, h.data(), factor, {}, 1);
    const double scale = static_cast<double>(f16_to_f32(nearest.scales[0]));
    double best = std::numeric_limits<double>::infinity();
    for (int combination = 0; combination < 65536; ++combination) {
      double d[4], error = 0;
      for (int i = 0; i < 4; ++i)
        d[i] = static_cast<double>(live[static_cast<std::size_t>(i)]) - scale * ((combination >> (4 * i) & 15) - 8);
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) error += d[i] * small[static_cast<std::size_t>(i * 4 + j)] * d[j];
      }
      best = std::min(best, error);
    }
    ASSERT_GE(result.error, best * (1 - 1e-5)) << trial;
    ASSERT_LE(result.error, result.nearest_error);
    optimum_sum += best;
    sweep_sum += result.sweep_error;
    nearest_sum += result.nearest_error;
  }
  EXPECT_LT(sweep_sum, 0.8 * nearest_sum);
  EXPECT_GE(sweep_sum, optimum_sum);
}

// Scale and minimum of a group by two unknowns of least squares, the scale rounded first.
void literal_minimum(QuantizedTensor& t, const std::vector<double>& h, std::int64_t r, std::int64_t group,
                     const std::function<double(std::int64_t)>& gradient) {
  const std::int64_t n = t.cols, groups = t.codec.groups(n), size = n / groups;
  const auto at = static_cast<std::size_t>(r * groups + group);
  Eigen::MatrixXd block(size, size), basis(size, 2);
  Eigen::VectorXd g(size);
  for (std::int64_t i = 0; i < size; ++i) {
    basis(i, 0) = t.codes[static_cast<std::size_t>(r * n + group * size + i)];
    basis(i, 1) = 1;
    g(i) = gradient(group * size + i);
    for (std::int64_t j = 0; j < size; ++j)
      block(i, j) = h[static_cast<std::size_t>((group * size + i) * n + group * size + j)];
  }
  const Eigen::Matrix2d curvature = basis.transpose() * block * basis;
  const Eigen::Vector2d slope = basis.transpose() * g, step = curvature.fullPivLu().solve(slope);
  const double scale = static_cast<double>(f16_to_f32(t.scales[at]));
  const double base = static_cast<double>(f16_to_f32(t.minima[at]));
  if (scale + step(0) <= 0) return;
  const std::uint16_t scale_bits = f32_to_f16(static_cast<float>(scale + step(0)));
  Eigen::Vector2d taken;
  taken(0) = static_cast<double>(f16_to_f32(scale_bits)) - scale;
  const std::uint16_t base_bits =
      f32_to_f16(static_cast<float>(base + (slope(1) - taken(0) * curvature(0, 1)) / curvature(1, 1)));
  taken(1) = static_cast<double>(f16_to_f32(base_bits)) - base;
  if (2 * taken.dot(slope) <= taken.dot(curvature * taken)) return;
  t.scales[at] = scale_bits;
  t.minima[at] = base_bits;
}

// One pass as quantize/gptq.h states it, a row at a time: codes in column order, then scales in group order, with the
// gradient g = H d taken anew for every decision.
void literal_pass(const std::vector<float>& w, QuantizedTensor& t, const std::vector<double>& h, bool keep_zeros) {
  const std::int64_t n = t.cols, groups = t.codec.groups(n), size = n / groups;
  const CodeRange range = code_range(t.codec.kind);
  for (std::int64_t r = 0; r < t.rows; ++r) {
    const auto scale = [&](std::int64_t g) {
      return static_cast<double>(f16_to_f32(t.scales[static_cast<std::size_t>(r * groups + g)]));
    };
    const auto zero = [&](std::int64_t g) {
      return t.zeros.empty() ? 0 : static_cast<int>(t.zeros[static_cast<std::size_t>(r * groups + g)]);
    };
    const auto minimum = [&](std::int64_t g) {
      return t.minima.empty() ? 0.0
                              : static_cast<double>(f16_to_f32(t.minima[static_cast<std::size_t>(r * groups + g)]));
    };
    const auto code = [&](std::int64_t j) -> std::int8_t& { return t.codes[static_cast<std::size_t>(r * n + j)]; };
    const auto gradient = [&](std::int64_t j) {
      double sum = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        const double value = scale(i / size) * (code(i) - zero(i / size)) + minimum(i / size);
        sum += h[static_cast<std::size_t>(j * n + i)] *
               (static_cast<double>(w[static_cast<std::size_t>(r * n + i)]) - value);
      }
      return sum;
    };
    for (std::int64_t j = 0; j < n; ++j) {
      const double curvature = h[static_cast<std::size_t>(j * n + j)], s = scale(j / size);
      if (!(s != 0 && curvature > 0) || (keep_zeros && w[static_cast<std::size_t>(r * n + j)] == 0.0f)) continue;
      const double g = gradient(j);
      const double step =
          std::nearbyint(std::clamp<double>(code(j) + g / (s * curvature), range.low, range.high)) - code(j);
      const double move = step * s;
      if (step != 0 && 2 * move * g > move * move * curvature * (1 + 1e-9))
        code(j) = static_cast<std::int8_t>(code(j) + static_cast<int>(step));
    }
    for (std::int64_t group = 0; group < groups; ++group) {
      if (!t.minima.empty()) {
        literal_minimum(t, h, r, group, gradient);
        continue;
      }
      double slope = 0, curvature = 0;
      for (std::int64_t i = group * size; i < (group + 1) * size; ++i) {
        slope += (code(i) - zero(group)) * gradient(i);
        for (std::int64_t j = group * size; j < (group + 1) * size; ++j)
          curvature += h[static_cast<std::size_t>(i * n + j)] * (code(i) - zero(group)) * (code(j) - zero(group));
      }
      const double wanted = scale(group) + slope / curvature;
      if (!(curvature > 0) || std::fabs(wanted) >= 65504.0 || wanted * scale(group) <= 0) continue;
      const std::uint16_t bits = f32_to_f16(static_cast<float>(wanted));
      const double step = static_cast<double>(f16_to_f32(bits)) - scale(group);
      if (step != 0 && 2 * step * slope > step * step * curvature)
        t.scales[static_cast<std::size_t>(r * groups + group)] = bits;
    }
  }
}

TEST(Polish, EqualsTheDescentOfOneRowAtATime) {
  std::mt19937_64 random(16);
  // More columns than a block and more rows than a tile; groups of a block, of less and of the whole row.
  for (const char* codec : {"q4", "q4a", "q4g128", "q8c", "q3", "q2g128", "q4m", "q4mg128"}) {
    const std::int64_t rows = 67, cols = std::string(codec) == "q4a" ? 160 : 256;  // 160: no whole blocks
    const bool minima = std::string(codec).starts_with("q4m");
    std::vector<float> w = random_weight(random, rows, cols);
    for (std::size_t i = 0; i < w.size(); i += minima ? 23 : 7) w[i] = 0.0f;
    const std::vector<double> h = random_hessian(random, cols, 700);
    const QuantizedTensor nearest = round_to_nearest(w.data(), rows, cols, Codec::parse(codec, "t"), ScaleRule::kAbsmax,
                                                     {h.data(), nullptr}, "w", 1);
    QuantizedTensor found = nearest, wanted = nearest;
    polish(w.data(), found, h.data(), zeros_of(w, !minima), 2, 2);
    literal_pass(w, wanted, h, !minima);
    literal_pass(w, wanted, h, !minima);
    std::size_t codes = 0, scales = 0, moved = 0;
    for (std::size_t i = 0; i < wanted.codes.size(); ++i) {
      codes += found.codes[i] != wanted.codes[i];
      moved += wanted.codes[i] != nearest.codes[i];
    }
    for (std::size_t i = 0; i < wanted.scales.size(); ++i) scales += found.scales[i] != wanted.scales[i];
    EXPECT_GT(moved, wanted.codes.size() / 50) << codec;
    EXPECT_EQ(codes, 0u) << codec;
    EXPECT_EQ(scales, 0u) << codec;
    EXPECT_EQ(found.minima, wanted.minima) << codec;
    EXPECT_EQ(found.minima != nearest.minima, minima) << codec;

    const std::vector<float> narrow(h.begin(), h.end());  // the same statistics to 1e-7
    QuantizedTensor same = nearest;
    const double error = polish(w.data(), same, narrow.data(), zeros_of(w, !minima), 2, 2);
    double exact = 0;
    for (std::int64_t r = 0; r < rows; ++r) exact += layer_error(w, found, r, h);
    EXPECT_NEAR(error / exact, 1.0, 1e-3) << codec;
  }
}

TEST(Polish, EndsWhereNoSingleCodeCanBeImproved) {
  std::mt19937_64 random(6);
  for (const char* codec : {"q4", "q4a", "q4g64", "q8", "q3", "q3g64", "q2"}) {
    const std::int64_t rows = 11, cols = 64;
    std::vector<float> w = random_weight(random, rows, cols);
    for (std::size_t i = 0; i < w.size(); i += 5) w[i] = 0.0f;
    std::vector<double> h = random_hessian(random, cols, 200);
    for (std::int64_t j = 0; j < cols; ++j)
      h[static_cast<std::size_t>(7 * cols + j)] = h[static_cast<std::size_t>(j * cols + 7)] = 0;
    const QuantizedTensor nearest = round_to_nearest(w.data(), rows, cols, Codec::parse(codec, "t"),
                                                     ScaleRule::kSearched, {h.data(), nullptr}, "w", 1);
    GptqResult result = gptq(w.data(), nearest, h.data(), factor_hessian(SquareMatrix(h), cols, {}, "w", 1), nonzero(w), 1);
    QuantizedTensor twice = result.tensor;
    const double error = polish(w.data(), result.tensor, h.data(), nonzero(w), 100, 2);
    EXPECT_LT(error, result.error) << codec;
    result.tensor.validate("w");
    polish(w.data(), twice, h.data(), nonzero(w), 100, 1);
    EXPECT_EQ(twice.codes, result.tensor.codes);
    EXPECT_EQ(twice.scales, result.tensor.scales);

    const CodeRange range = code_range(nearest.codec.kind);
    double sum = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      const double own = layer_error(w, result.tensor, r, h);
      sum += own;
      for (std::int64_t j = r * cols; j < (r + 1) * cols; ++j) {
        std::int8_t& code = result.tensor.codes[static_cast<std::size_t>(j)];
        if (w[static_cast<std::size_t>(j)] == 0.0f) {
          const std::int64_t groups = nearest.codec.groups(cols);
          const int zero = nearest.zeros.empty()
                               ? 0
                               : nearest.zeros[static_cast<std::size_t>(r * groups + j % cols / (cols / groups))];
          ASSERT_EQ(code, zero);
          continue;
        }
        for (int change : {-1, 1}) {
          if (code + change < range.low || code + change > range.high) continue;
          code = static_cast<std::int8_t>(code + change);
          ASSERT_GE(layer_error(w, result.tensor, r, h), own * (1 - 1e-6))
              << codec << " row " << r << " column " << j % cols;
          code = static_cast<std::int8_t>(code - change);
        }
      }
    }
    EXPECT_NEAR(error, sum, 1e-6 * sum);
  }
}

TEST(Gptq, SameBitsAtAnyThreadCount) {
  std::mt19937_64 random(4);
  const std::vector<float> w = random_weight(random, 100, 160);
  const std::vector<double> h = random_hessian(random, 160, 400);
  const QuantizedTensor nearest =
      round_to_nearest(w.data(), 100, 160, Codec::parse("q4", "t"), ScaleRule::kSearched, {h.data(), nullptr}, "w", 1);
  for (const std::int64_t group : {0, 32}) {
    const FactorOptions options{0.01, true, group};
    const GptqResult one =
        gptq(w.data(), nearest, h.data(), factor_hessian(SquareMatrix(h), 160, options, "w", 1), {}, 1);
    const GptqResult three =
        gptq(w.data(), nearest, h.data(), factor_hessian(SquareMatrix(h), 160, options, "w", 3), {}, 3);
    EXPECT_EQ(one.tensor.codes, three.tensor.codes);
    EXPECT_EQ(one.tensor.scales, three.tensor.scales);
    EXPECT_EQ(one.error, three.error);
  }
}

}  // namespace
}  // namespace pare
