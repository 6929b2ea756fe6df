// Zeros and codes chosen in one sweep.
#include <gtest/gtest.h>

#include <Eigen/LU>
#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"
#include "quantize/gptq.h"
#include "quantize/scales.h"
#include "tests/quantize/layers.h"
#include "tests/quantize/tiny_model.h"

namespace pare {
namespace {

using testing::random_hessian;
using testing::random_weight;
using testing::run_quantize;
using testing::ScratchFolder;
using testing::tiny_config;
using testing::write_tiny;

// The optimal brain surgeon with the explicit inverse of what is left, in the factor's order and with the scales that
// were found: the lowest w^2 / [H_left^-1]_jj of `width` columns by `height` rows become 0, or with N:M (of > 0) those
// of every `of` inputs; then every weight goes to its nearest code and those after it make up for the difference.
struct Literal {
  std::vector<std::uint8_t> keep;
  std::vector<int> codes;
};

Literal literal(const std::vector<float>& weight, const QuantizedTensor& found, const std::vector<double>& h,
                const SweepFactor& factor, std::int64_t width, std::int64_t height, std::int64_t of, double share) {
  const std::int64_t rows = found.rows, n = found.cols, size = n / found.codec.groups(n);
  const auto column = [&](std::int64_t i) { return factor.order[static_cast<std::size_t>(i)]; };
  double mean = 0;
  for (std::int64_t j = 0; j < n; ++j) mean += h[static_cast<std::size_t>(j * n + j)] / static_cast<double>(n);
  Eigen::MatrixXd hessian(n, n), w(rows, n);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) hessian(i, j) = h[static_cast<std::size_t>(column(i) * n + column(j))];
    hessian(i, i) += factor.damping * mean;
    for (std::int64_t r = 0; r < rows; ++r)
      w(r, i) = static_cast<double>(weight[static_cast<std::size_t>(r * n + column(i))]);
  }
  std::vector<Eigen::VectorXd> lines;
  for (std::int64_t i = 0; i < n; ++i) lines.push_back(hessian.bottomRightCorner(n - i, n - i).inverse().col(0));
  Literal out{std::vector<std::uint8_t>(weight.size(), 1), std::vector<int>(weight.size())};
  const auto drop = [&](std::vector<std::pair<double, std::size_t>> scores) {
    std::sort(scores.begin(), scores.end());
    const auto gone = static_cast<std::size_t>(std::lround(share * static_cast<double>(scores.size())));
    for (std::size_t k = 0; k < gone; ++k) out.keep[scores[k].second] = 0;
  };
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t top = 0; i % width == 0 && top < rows; top += height) {
      std::vector<std::pair<double, std::size_t>> scores;
      for (std::int64_t r = top; r < std::min(rows, top + height); ++r)
        for (std::int64_t k = i; k < std::min(n, i + width); ++k)
          scores.emplace_back(w(r, k) * w(r, k) / lines[static_cast<std::size_t>(k)](0),
                              static_cast<std::size_t>(r * n + column(k)));
      if (of == 0) {
        drop(scores);
        continue;
      }
      std::sort(scores.begin(), scores.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
      for (std::size_t at = 0; at < scores.size(); at += static_cast<std::size_t>(of))
        drop({scores.begin() + static_cast<std::ptrdiff_t>(at), scores.begin() + static_cast<std::ptrdiff_t>(at) + of});
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const auto at = static_cast<std::size_t>(r * n + column(i));
      const auto group = static_cast<std::size_t>(r * (n / size) + column(i) / size);
      const double scale = static_cast<double>(f16_to_f32(found.scales[group]));
      const bool zero = out.keep[at] == 0 || scale == 0;
      const double code = zero ? 0.0 : std::nearbyint(std::clamp(w(r, i) / scale, -8.0, 7.0));
      const Eigen::VectorXd& line = lines[static_cast<std::size_t>(i)];
      const double error = (w(r, i) - code * scale) / line(0);
      for (std::int64_t k = i + 1; k < n; ++k) w(r, k) -= error * line(k - i);
      out.codes[at] = static_cast<int>(code);
    }
  }
  return out;
}

TEST(Joint, EqualsTheOptimalBrainSurgeonWithTheScalesFound) {
  std::mt19937_64 random(12);
  const std::int64_t rows = 70, n = 160;
  const std::vector<float> weight = random_weight(random, rows, n);
  const std::vector<double> h = random_hessian(random, n, 400);
  const Codec codec = Codec::parse("q4", "test");
  const QuantizedTensor nearest =
      round_to_nearest(weight.data(), rows, n, codec, ScaleRule::kSearched, {h.data()}, "test", 2);
  const SweepFactor factor = factor_hessian(SquareMatrix(h), n, {0.01, true, 32}, "h", 2);
  for (const char* pattern : {"", "2:4", "4:8"}) {
    const Sparsity sparsity = *pattern ? Sparsity::pattern(pattern, "") : Sparsity{0.5};
    SweepMask mask(factor, rows, sparsity), again(factor, rows, sparsity);
    const QuantizedTensor found = prune_and_sweep(weight.data(), nearest, factor, mask, 1);
    const Literal expected = sparsity.n_of_m() ? literal(weight, found, h, factor, 32, 1, sparsity.of, 0.5)
                                               : literal(weight, found, h, factor, 128, 64, 0, 0.5);
    EXPECT_EQ(mask.keep(), expected.keep) << pattern;
    std::int64_t different = 0;
    for (std::size_t i = 0; i < expected.codes.size(); ++i) different += found.codes[i] != expected.codes[i];
    EXPECT_EQ(different, 0) << pattern;
    EXPECT_EQ(prune_and_sweep(weight.data(), nearest, factor, again, 3).codes, found.codes);
    EXPECT_EQ(mask.keep(), again.keep());
  }
}

TEST(Joint, BeatsNearestCodesOfTheSameZerosInEveryRowAndPolishingKeepsThem) {
  std::mt19937_64 random(13);
  const std::int64_t rows = 40, n = 128;
  const std::vector<float> weight = random_weight(random, rows, n);
  const std::vector<double> h = random_hessian(random, n, 400);
  for (const char* name : {"q4", "q4a", "q3", "q8c"}) {
    const Codec codec = Codec::parse(name, "test");
    const auto rounded = [&](const std::vector<float>& values) {
      return round_to_nearest(values.data(), rows, n, codec, ScaleRule::kSearched, {h.data()}, "test", 2);
    };
    const SweepFactor factor =
        factor_hessian(SquareMatrix(h), n, {0.01, true, codec.group > 0 ? codec.group : 4}, "h", 2);
    SweepMask mask(factor, rows, Sparsity::pattern("2:4", ""));
    QuantizedTensor swept = prune_and_sweep(weight.data(), rounded(weight), factor, mask, 2);
    std::vector<float> left = weight;
    for (std::size_t i = 0; i < left.size(); ++i) left[i] *= mask.keep()[i];
    GptqResult result = better_rows(weight.data(), rounded(left), std::move(swept), h.data(), 2);
    EXPECT_LT(result.sweep_error, 0.8 * result.nearest_error) << name;
    const double polished = polish(weight.data(), result.tensor, h.data(), mask.keep(), 2, 2);
    EXPECT_LT(polished, result.error) << name;
    std::vector<float> unpacked(weight.size());
    result.tensor.unpack(unpacked.data());
    for (std::size_t i = 0; i < unpacked.size(); ++i) {
      if (mask.keep()[i] == 0) {
        ASSERT_EQ(unpacked[i], 0.0f) << name;
      }
    }
  }
}

TEST(Joint, StageWritesThePatternAsZerosTheSameAtAnyThreadCount) {
  ScratchFolder scratch;
  write_tiny(scratch / "m", tiny_config(2));
  const auto given = [&](const std::string& out, const Json& more) {
    Json options = {{"model", (scratch / "m").string()}, {"out", (scratch / out).string()}, {"random-tokens", true},
                    {"samples", 12}, {"context", 32}};
    options.update(more);
    return options;
  };
  const Json result = run_quantize(given("a", {{"pattern", "2:4"}, {"retarget", true}}), 1);
  run_quantize(given("b", {{"pattern", "2:4"}, {"retarget", true}}), 3);
  EXPECT_EQ(hash_file(scratch / "a" / "model.safetensors"), hash_file(scratch / "b" / "model.safetensors"));
  EXPECT_EQ(result.at("sparsity").get<double>(), 0.5);
  const Json half = run_quantize(given("c", {{"sparsity", 0.25}, {"codec", "q8c"}}));
  EXPECT_NEAR(half.at("sparsity").get<double>(), 0.25, 1e-4);
  for (const auto& [folder, share] : {std::pair{"a", 0.5}, {"c", 0.25}}) {
    const Checkpoint out(scratch / folder);
    for (const TensorSpec& spec : out.tensors()) {
      if (spec.role != TensorRole::kLinear || spec.layer < 0) continue;
      EXPECT_TRUE(out.is_quantized(spec.name));
      const std::vector<float> w = out.read_f32(spec.name);
      EXPECT_GE(std::count(w.begin(), w.end(), 0.0f), static_cast<std::int64_t>(share * static_cast<double>(w.size())));
      for (auto at = w.begin(); folder[0] == 'a' && at != w.end(); at += 4) ASSERT_GE(std::count(at, at + 4, 0.0f), 2);
    }
  }
  for (const Json& row : result.at("linears")) {
    if (!row.contains("zeros")) continue;
    EXPECT_LT(row.at("after").get<double>(), row.at("before").get<double>()) << row.dump();
    EXPECT_EQ(row.at("zeros").get<double>() * 2, row.at("rows").get<double>() * row.at("columns").get<double>());
  }
}

TEST(Joint, RefusesWhatLeavesNoZerosOrHasThemAlready) {
  ScratchFolder scratch;
  write_tiny(scratch / "m", tiny_config(1));
  const auto code = [&](const Json& more) {
    Json options = {{"model", (scratch / "m").string()}, {"out", (scratch / "out").string()}, {"random-tokens", true},
                    {"samples", 10}, {"context", 16}};
    options.update(more);
    try {
      run_quantize(options);
    } catch (const Error& error) {
      EXPECT_FALSE(fs::exists(scratch / "out"));
      return error.code();
    }
    return ExitCode::kOk;
  };
  const auto usage = ExitCode::kUsage;
  EXPECT_EQ(code({{"sparsity", 0.5}, {"pattern", "2:4"}}), usage);
  EXPECT_EQ(code({{"pattern", "two of four"}}), usage);
  EXPECT_EQ(code({{"pattern", "3:5"}}), usage);                        // 64 inputs
  EXPECT_EQ(code({{"pattern", "20:48"}, {"codec", "q8c"}}), usage);    // 64 inputs
  EXPECT_EQ(code({{"sparsity", 0.001}}), usage);                       // nothing would go
  EXPECT_EQ(code({{"sparsity", 0.5}, {"method", "rtn"}}), usage);
  EXPECT_EQ(code({{"sparsity", 0.5}, {"codec", "q4m"}}), usage);       // no code for 0
  EXPECT_EQ(code({{"sparsity", 0.5}, {"policy", {"*.q_proj=keep"}}}), usage);
  EXPECT_EQ(code({{"sparsity", 0.5}, {"bits", 4.5}}), usage);
  EXPECT_EQ(code({{"sparsity", 0.5}, {"tune-codes", 2}}), usage);
  write_tiny(scratch / "zeros", tiny_config(1), "float32", [](Decoder& decoder) {
    for (auto& item : decoder->named_parameters())
      if (item.key().find("up_proj") != std::string::npos) item.value().narrow(1, 0, 16).zero_();
  });
  EXPECT_EQ(code({{"model", (scratch / "zeros").string()}, {"sparsity", 0.5}}), ExitCode::kInput);
}

}  // namespace
}  // namespace pare
