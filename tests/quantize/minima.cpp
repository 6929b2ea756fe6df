#include "quantize/minima.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "quantize/scales.h"
#include "tests/quantize/layers.h"

namespace pare {
namespace {

using testing::diagonal;
using testing::random_hessian;
using testing::random_weight;

// sum h_j d_j^2 of the nearest codes.
double loss(const float* w, const std::vector<double>& h, double scale, double minimum) {
  double sum = 0;
  for (std::size_t j = 0; j < h.size(); ++j) {
    const double value = static_cast<double>(w[j]);
    const double code = std::clamp(std::nearbyint((value - minimum) / scale), 0.0, 15.0);
    sum += h[j] * (value - code * scale - minimum) * (value - code * scale - minimum);
  }
  return sum;
}

// NeUQI (Lin et al. 2025), literally: for a given scale the loss is a parabola of the minimum between places where a
// code changes; the least of all of them, in float64.
double best_for_scale(const float* w, const std::vector<double>& h, double scale) {
  struct Change {
    double at;
    std::size_t j;
    int code;  // from here on
  };
  std::vector<Change> changes;
  double weight = 0, first = 0, second = 0;  // sums of h, h r and h r^2 of r = w - code * scale
  std::vector<int> codes(h.size(), 15);
  const auto add = [&](std::size_t j, double sign) {
    const double r = static_cast<double>(w[j]) - codes[j] * scale;
    weight += sign * h[j];
    first += sign * h[j] * r;
    second += sign * h[j] * r * r;
  };
  for (std::size_t j = 0; j < h.size(); ++j) {
    add(j, 1);
    for (int code = 14; code >= 0; --code)  // (w - minimum) / scale falls below code + 1/2
      changes.push_back({static_cast<double>(w[j]) - (code + 0.5) * scale, j, code});
  }
  std::sort(changes.begin(), changes.end(), [](const Change& a, const Change& b) { return a.at < b.at; });
  double best = std::numeric_limits<double>::infinity(), from = -std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i <= changes.size(); ++i) {
    const double to = i < changes.size() ? changes[i].at : std::numeric_limits<double>::infinity();
    const double m = std::clamp(first / weight, from, to);
    best = std::min(best, second - 2 * m * first + m * m * weight);
    if (i == changes.size()) break;
    add(changes[i].j, -1);
    codes[changes[i].j] = changes[i].code;
    add(changes[i].j, 1);
    from = to;
  }
  return best;
}

TEST(Minima, AreCloseToTheBestOfAllScalesWithTheirExactMinima) {
  std::mt19937_64 random(1);
  const std::int64_t rows = 24, size = 32;
  const std::vector<float> w = random_weight(random, rows, size);
  const std::vector<double> h = diagonal(random_hessian(random, size, 200), size);
  double found = 0, optimum = 0, plain = 0;
  const Importance importance{nullptr, h.data(), false};
  const Codec codec = Codec::parse("q4m", "t");
  const QuantizedTensor q = round_to_nearest(w.data(), rows, size, codec, ScaleRule::kSearched, importance, "w", 1);
  const QuantizedTensor p = round_to_nearest(w.data(), rows, size, codec, ScaleRule::kAbsmax, importance, "w", 1);
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* row = w.data() + r * size;
    const auto value = [](std::uint16_t bits) { return static_cast<double>(f16_to_f32(bits)); };
    const auto at = static_cast<std::size_t>(r);
    found += loss(row, h, value(q.scales[at]), value(q.minima[at]));
    plain += loss(row, h, value(p.scales[at]), value(p.minima[at]));
    const auto [low, high] = std::minmax_element(row, row + size);
    const double range = static_cast<double>(*high) - static_cast<double>(*low);
    double best = std::numeric_limits<double>::infinity();
    for (double scale = range / 15 * 1.1; scale > range / 15 * 0.25; scale *= 0.997)
      best = std::min(best, best_for_scale(row, h, scale));
    EXPECT_EQ(p.scales[at], f32_to_f16(static_cast<float>(range / 15)));
    EXPECT_EQ(p.minima[at], f32_to_f16(*low));
    optimum += best;
  }
  EXPECT_GE(found, 0.999 * optimum);  // scales between those tried, and rounding to half
  EXPECT_LE(found, 1.12 * optimum);
  EXPECT_GE(plain, 1.2 * found);
  std::printf("range %.4f, search %.4f of the best\n", plain / optimum, found / optimum);
}

// With a whole block as metric there is no exact minimum for a scale: against a fine grid of both.
TEST(Minima, AreCloseToTheBestOfAGridUnderAWholeBlock) {
  std::mt19937_64 random(2);
  const std::int64_t rows = 8, size = 32;
  const std::vector<float> w = random_weight(random, rows, size);
  const std::vector<double> h = random_hessian(random, size, 200);
  const QuantizedTensor q =
      round_to_nearest(w.data(), rows, size, Codec::parse("q4m", "t"), ScaleRule::kSearched, {h.data()}, "w", 1);
  double found = 0, optimum = 0, plain = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* row = w.data() + r * size;
    const auto error = [&](double scale, double minimum) {
      std::vector<double> d(static_cast<std::size_t>(size));
      for (std::size_t j = 0; j < d.size(); ++j) {
        const double value = static_cast<double>(row[j]);
        d[j] = value - minimum - scale * std::clamp(std::nearbyint((value - minimum) / scale), 0.0, 15.0);
      }
      return testing::quadratic(h, size, d, 0, size);
    };
    const auto value = [](std::uint16_t bits) { return static_cast<double>(f16_to_f32(bits)); };
    found += error(value(q.scales[static_cast<std::size_t>(r)]), value(q.minima[static_cast<std::size_t>(r)]));
    const auto [low, high] = std::minmax_element(row, row + size);
    const double range = static_cast<double>(*high) - static_cast<double>(*low);
    const double centre = (static_cast<double>(*high) + static_cast<double>(*low)) / 2;
    plain += error(range / 15, static_cast<double>(*low));
    double best = std::numeric_limits<double>::infinity();
    for (double scale = range / 15 * 1.05; scale > range / 15 * 0.4; scale *= 0.985) {
      for (double shift = -3; shift <= 3; shift += 0.1) best = std::min(best, error(scale, centre + (shift - 7.5) * scale));
    }
    optimum += best;
  }
  // Under such a metric nearest codes are good or bad by luck, and the grid has 3,700 tries a group.
  EXPECT_LE(found, 1.45 * optimum);
  EXPECT_GE(plain, 1.7 * optimum);
  std::printf("range %.4f, search %.4f of the grid's best\n", plain / optimum, found / optimum);
}

TEST(Minima, EqualWeightsOneSidedWeightsAndNearestCodes) {
  const Codec codec = Codec::parse("q4m", "t");
  for (const float value : {0.0f, 0.25f, -3.0f}) {
    const std::vector<float> w(32, value);
    std::vector<float> back(32);
    const QuantizedTensor q = round_to_nearest(w.data(), 1, 32, codec, ScaleRule::kSearched, {}, "w", 1);
    q.validate("w");
    q.unpack(back.data());
    EXPECT_EQ(back, w);
    EXPECT_EQ(q.scales[0], 0);
  }
  std::vector<float> w(32), back(32);
  for (std::size_t j = 0; j < 32; ++j) w[j] = 7.0f + 0.25f * static_cast<float>(j % 16);  // on a grid far from zero
  const QuantizedTensor q = round_to_nearest(w.data(), 1, 32, codec, ScaleRule::kSearched, {}, "w", 1);
  q.unpack(back.data());
  EXPECT_EQ(back, w);
  EXPECT_EQ(nearest_code(1.26, 0.5, 0.0), 3);
  EXPECT_EQ(nearest_code(-9.0, 0.5, 0.0), 0);
  EXPECT_EQ(nearest_code(99.0, 0.5, 0.0), 15);
  EXPECT_EQ(nearest_code(1.0, 0.0, 1.0), 0);
}

}  // namespace
}  // namespace pare
