#include "quantize/scales.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <algorithm>

#include "core/error.h"
#include "tests/quantize/layers.h"

namespace pare {
namespace {

using testing::diagonal;
using testing::quadratic;
using testing::random_hessian;
using testing::random_weight;

const std::vector<std::string> kCodecs = {"q4", "q4g64", "q4g128", "q4a",    "q4ag64", "q8", "q8c",
                                         "q3", "q3g64", "q3g128", "q2", "q2g64",  "q2g128", "w8a8", "q4m", "q4mg128"};

double group_error(const std::vector<float>& weight, const QuantizedTensor& q, std::int64_t row, std::int64_t begin,
                   std::int64_t end, const std::vector<double>& metric) {
  std::vector<float> unpacked(static_cast<std::size_t>(q.cols));
  q.unpack_row(row, unpacked.data());
  std::vector<double> d(static_cast<std::size_t>(q.cols));
  for (std::int64_t j = 0; j < q.cols; ++j) {
    d[static_cast<std::size_t>(j)] = static_cast<double>(weight[static_cast<std::size_t>(row * q.cols + j)]) -
                                     static_cast<double>(unpacked[static_cast<std::size_t>(j)]);
  }
  return quadratic(metric, q.cols, d, begin, end);
}

TEST(Scales, AbsmaxIsTheTextbookGrid) {
  std::mt19937_64 random(1);
  const std::vector<float> w = random_weight(random, 5, 64);
  const QuantizedTensor q = round_to_nearest(w.data(), 5, 64, Codec::parse("q4", "t"), ScaleRule::kAbsmax, {}, "w", 1);
  q.validate("w");
  for (std::size_t g = 0; g < 10; ++g) {
    float absmax = 0;
    for (std::size_t j = 0; j < 32; ++j) absmax = std::max(absmax, std::fabs(w[g * 32 + j]));
    EXPECT_EQ(q.scales[g], f32_to_f16(absmax / 7.0f));
    const double scale = static_cast<double>(f16_to_f32(q.scales[g]));
    for (std::size_t j = 0; j < 32; ++j) {
      const double code = std::clamp(std::nearbyint(static_cast<double>(w[g * 32 + j]) / scale), -8.0, 7.0);
      EXPECT_EQ(q.codes[g * 32 + j], static_cast<int>(code));
    }
  }
}

TEST(Scales, SearchIsNeverWorseThanAbsmaxUnderItsObjective) {
  std::mt19937_64 random(2);
  const std::int64_t rows = 21, cols = 256;
  const std::vector<float> w = random_weight(random, rows, cols);
  const std::vector<double> h = random_hessian(random, cols, 600), diag = diagonal(h, cols);
  std::vector<double> squares(h.size(), 0.0), weighted(h.size(), 0.0);
  for (std::int64_t i = 0; i < cols; ++i) {
    squares[static_cast<std::size_t>(i * cols + i)] = 1.0;
    weighted[static_cast<std::size_t>(i * cols + i)] = diag[static_cast<std::size_t>(i)];
  }
  for (const std::string& name : kCodecs) {
    const Codec codec = Codec::parse(name, "t");
    const std::int64_t groups = codec.groups(cols), size = cols / groups;
    for (int objective = 0; objective < 3; ++objective) {
      const Importance importance{objective == 2 ? h.data() : nullptr, objective >= 1 ? diag.data() : nullptr};
      const std::vector<double>& metric = objective == 0 ? squares
                                          : objective == 2 && size <= kBlockObjectiveLimit ? h : weighted;
      const QuantizedTensor plain =
          round_to_nearest(w.data(), rows, cols, codec, ScaleRule::kAbsmax, importance, "w", 2);
      const QuantizedTensor best =
          round_to_nearest(w.data(), rows, cols, codec, ScaleRule::kSearched, importance, "w", 2);
      best.validate("w");
      double plain_sum = 0, best_sum = 0;
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t g = 0; g < groups; ++g) {
          const double before = group_error(w, plain, r, g * size, (g + 1) * size, metric);
          const double after = group_error(w, best, r, g * size, (g + 1) * size, metric);
          ASSERT_LE(after, before * (1 + 1e-6)) << name << " objective " << objective << " row " << r << " group " << g;
          plain_sum += before;
          best_sum += after;
        }
      }
      EXPECT_LT(best_sum, plain_sum) << name;
      if (codec.kind != CodecKind::kQ8) {
        EXPECT_LT(best_sum, (code_range(codec.kind).low == 0 ? 0.97 : 0.9) * plain_sum)
            << name << " objective " << objective;
      }
    }
  }
}

// Candidates are compared in floats, but not where those would overflow or vanish.
TEST(Scales, SearchDoesNotDependOnTheSizeOfTheMetric) {
  std::mt19937_64 random(12);
  const std::int64_t rows = 16, cols = 64;
  const std::vector<float> w = random_weight(random, rows, cols);
  const std::vector<double> h = random_hessian(random, cols, 200);
  const auto searched = [&](double factor) {
    std::vector<double> scaled = h;
    for (double& value : scaled) value *= factor;
    const std::vector<double> diag = diagonal(scaled, cols);
    const QuantizedTensor q = round_to_nearest(w.data(), rows, cols, Codec::parse("q4", "t"), ScaleRule::kSearched,
                                               {scaled.data(), diag.data()}, "w", 1);
    double error = 0;
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t begin = 0; begin < cols; begin += 32) error += group_error(w, q, r, begin, begin + 32, h);
    return error;
  };
  const double usual = searched(1);
  for (const double factor : {0x1p-140, 0x1p-60, 0x1p60, 0x1p126, 0x1p200})
    EXPECT_NEAR(searched(factor), usual, 1e-3 * usual) << factor;
}

TEST(Scales, CodesAreTheNearestUnderTheStoredScale) {
  std::mt19937_64 random(3);
  const std::vector<float> w = random_weight(random, 18, 128);
  for (const std::string& name : kCodecs) {
    const Codec codec = Codec::parse(name, "t");
    const CodeRange range = code_range(codec.kind);
    const QuantizedTensor q = round_to_nearest(w.data(), 18, 128, codec, ScaleRule::kSearched, {}, "w", 1);
    const std::int64_t groups = codec.groups(128), size = 128 / groups;
    for (std::int64_t i = 0; i < 18 * 128; ++i) {
      const std::size_t g = static_cast<std::size_t>(i / 128 * groups + i % 128 / size);
      const double scale = static_cast<double>(f16_to_f32(q.scales[g]));
      const int zero = q.zeros.empty() ? 0 : q.zeros[g];
      const double minimum = q.minima.empty() ? 0.0 : static_cast<double>(f16_to_f32(q.minima[g]));
      const double value = static_cast<double>(w[static_cast<std::size_t>(i)]) - minimum;
      double best = std::numeric_limits<double>::infinity();
      for (int code = range.low; code <= range.high; ++code) {
        best = std::min(best, std::fabs(value - (code - zero) * scale));
      }
      const double own = std::fabs(value - (q.codes[static_cast<std::size_t>(i)] - zero) * scale);
      ASSERT_LE(own, best + 1e-12) << name << " " << i;
    }
  }
}

// Every scale f16 can hold near the optimum, tried one by one: the grid with refit must come within 2 % in sum.
TEST(Scales, SearchIsCloseToTheExhaustiveOptimum) {
  for (const CodecKind kind : {CodecKind::kQ4, CodecKind::kQ3, CodecKind::kQ2}) {
    std::mt19937_64 random(4);
    const std::int64_t rows = 40, cols = 32;
    const std::vector<float> w = random_weight(random, rows, cols);
    const QuantizedTensor q =
        round_to_nearest(w.data(), rows, cols, {kind, 32}, ScaleRule::kSearched, {}, "w", 1);
    const CodeRange range = code_range(kind);
    std::vector<double> identity(static_cast<std::size_t>(cols * cols), 0.0);
    for (std::int64_t i = 0; i < cols; ++i) identity[static_cast<std::size_t>(i * cols + i)] = 1.0;
    double found = 0, optimum = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      found += group_error(w, q, r, 0, cols, identity);
      double absmax = 0, best = std::numeric_limits<double>::infinity();
      for (std::int64_t j = 0; j < cols; ++j)
        absmax = std::max(absmax, std::fabs(static_cast<double>(w[static_cast<std::size_t>(r * cols + j)])));
      for (std::uint16_t bits = 1; bits < 0x7c00; ++bits) {
        const double scale = static_cast<double>(f16_to_f32(bits));
        if (scale < absmax / 40 || scale > absmax * 1.1 / range.high) continue;
        for (const double sign : {1.0, -1.0}) {
          double error = 0;
          for (std::int64_t j = 0; j < cols; ++j) {
            const double value = sign * static_cast<double>(w[static_cast<std::size_t>(r * cols + j)]);
            const double d = value - scale * std::clamp<double>(std::nearbyint(value / scale), range.low, range.high);
            error += d * d;
          }
          best = std::min(best, error);
        }
      }
      optimum += best;
    }
    EXPECT_GE(found, optimum * 0.999999);
    EXPECT_LE(found, optimum * 1.02) << range.high;
  }
}

TEST(Scales, EdgesZeroGroupsTinyHugeAndZeros) {
  for (const std::string& name : kCodecs) {
    const Codec codec = Codec::parse(name, "t");
    std::vector<float> w(128, 0.0f);
    QuantizedTensor q = round_to_nearest(w.data(), 1, 128, codec, ScaleRule::kSearched, {}, "w", 1);
    q.validate("w");
    std::vector<float> back(128, 1.0f);
    q.unpack_row(0, back.data());
    EXPECT_EQ(back, w) << name;

    if (codec.kind == CodecKind::kQ4m) std::fill(w.begin(), w.end(), -1e-9f);  // it takes no single zeros
    w[3] = 1e-9f;  // below what an f16 scale can resolve
    w[7] = -1e-9f;
    q = round_to_nearest(w.data(), 1, 128, codec, ScaleRule::kSearched, {}, "w", 1);
    q.validate("w");
    q.unpack_row(0, back.data());
    for (float value : back) EXPECT_LE(std::fabs(value), 1e-6f) << name;

    w[3] = 4e5f;  // scale near the end of f16
    w[7] = -1e5f;
    if (codec.kind == CodecKind::kQ4) {
      q = round_to_nearest(w.data(), 1, 128, codec, ScaleRule::kSearched, {}, "w", 1);
      q.validate("w");
    }
    w[3] = 3e7f;
    EXPECT_THROW(round_to_nearest(w.data(), 1, 128, codec, ScaleRule::kSearched, {}, "w", 1), Error) << name;

    std::mt19937_64 random(9);
    std::vector<float> pruned = random_weight(random, 3, 128);
    for (std::size_t i = 0; i < pruned.size(); i += 2) pruned[i] = 0.0f;
    if (codec.kind == CodecKind::kQ4m) {
      EXPECT_THROW(round_to_nearest(pruned.data(), 3, 128, codec, ScaleRule::kSearched, {}, "w", 1), Error);
      continue;
    }
    q = round_to_nearest(pruned.data(), 3, 128, codec, ScaleRule::kSearched, {}, "w", 1);
    std::vector<float> all(pruned.size());
    q.unpack(all.data());
    for (std::size_t i = 0; i < pruned.size(); i += 2) EXPECT_EQ(all[i], 0.0f) << name;
  }
}

TEST(Scales, DamagedWeightsAreRefusedByName) {
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    std::vector<float> w(64, 0.5f);
    w[40] = bad;
    try {
      round_to_nearest(w.data(), 2, 32, Codec::parse("q4", "t"), ScaleRule::kSearched, {},
                       "model.layers.3.mlp.up_proj.weight", 1);
      FAIL() << "accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput);
      EXPECT_EQ(error.place(), "model.layers.3.mlp.up_proj.weight");
      EXPECT_NE(error.found().find("row 1, column 8"), std::string::npos) << error.found();
    }
  }
}

TEST(Scales, SameBitsAtAnyThreadCount) {
  std::mt19937_64 random(5);
  const std::vector<float> w = random_weight(random, 70, 256);
  const std::vector<double> h = random_hessian(random, 256, 300);
  for (const std::string& name : kCodecs) {
    const Codec codec = Codec::parse(name, "t");
    const QuantizedTensor one =
        round_to_nearest(w.data(), 70, 256, codec, ScaleRule::kSearched, {h.data(), nullptr}, "w", 1);
    const QuantizedTensor three =
        round_to_nearest(w.data(), 70, 256, codec, ScaleRule::kSearched, {h.data(), nullptr}, "w", 3);
    EXPECT_EQ(one.codes, three.codes);
    EXPECT_EQ(one.scales, three.scales);
    EXPECT_EQ(one.zeros, three.zeros);
    EXPECT_EQ(one.minima, three.minima);
  }
}

}  // namespace
}  // namespace pare
