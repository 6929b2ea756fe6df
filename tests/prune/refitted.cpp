// Methods that change the weights that stay, and blocks that lose different shares, from the command down.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "prune/allocation.h"
#include "tests/prune/small_model.h"

namespace pare {
namespace {

using testing::Folder;
using testing::base;
using testing::failing_code;
using testing::make_model;
using testing::run_prune;
using testing::with_text;

bool is_block_linear(const TensorSpec& spec) { return spec.role == TensorRole::kLinear && spec.layer >= 0; }

std::int64_t zeros(const std::vector<float>& values) { return std::count(values.begin(), values.end(), 0.0f); }

TEST(PruneRefitted, SparseGptKeepsThePatternAndChangesWeights) {
  const Folder folder("sparsegpt");
  make_model(folder / "m", {.dtype = "bfloat16"});
  Json options = with_text(base(folder / "m", folder / "out", "sparsegpt"), folder / "text.txt");
  options["pattern"] = "2:4";
  const auto outcome = run_prune(options);
  const Checkpoint before(folder / "m"), after(folder / "out");
  for (const TensorSpec& spec : after.tensors()) {
    const auto w = after.read_f32(spec.name), original = before.read_f32(spec.name);
    EXPECT_EQ(after.dtype(spec.name), DType::kBF16);
    if (!is_block_linear(spec)) {
      EXPECT_EQ(w, original) << spec.name;
      continue;
    }
    std::size_t moved = 0;
    for (auto at = w.begin(); at != w.end(); at += 4) ASSERT_EQ(std::count(at, at + 4, 0.0f), 2);
    for (std::size_t i = 0; i < w.size(); ++i) moved += w[i] != 0.0f && w[i] != original[i] ? 1 : 0;
    EXPECT_GT(moved, w.size() / 4) << spec.name;
  }
  EXPECT_EQ(outcome.after("sparsity of all block linears"), 0.5);
  for (const ReportRow& row : outcome.report.rows())
    if (row.metric.starts_with("output error of block")) {
      EXPECT_LT(row.after.value(), row.before.value()) << row.metric;
    }
}

// The order that the methods have in theory, on text that calibrates and measures alike.
TEST(PruneRefitted, RefittingLowersTheDivergenceOfEveryMethod) {
  const Folder folder("refit");
  make_model(folder / "m", {.layers = 2});
  std::map<std::string, double> plain, refitted;
  for (const char* method : {"magnitude", "wanda", "sparsegpt", "random"}) {
    for (const bool refit : {false, true}) {
      const fs::path out = folder / (std::string(method) + (refit ? "-refit" : ""));
      Json options = with_text(base(folder / "m", out, method), folder / "text.txt");
      options["sparsity"] = 0.5;
      options["reconstruct"] = refit;
      const auto outcome = run_prune(options);
      (refit ? refitted : plain)[method] = outcome.after("calibration mean_kl");
      EXPECT_NEAR(outcome.after("sparsity of all block linears"), 0.5, 1e-9) << method;
      if (!refit) continue;
      for (const char* block : {"0", "1"}) {
        const std::string metric = std::string("output error of block ") + block + " by refitting";
        const auto rows = outcome.report.rows();
        const auto row = std::find_if(rows.begin(), rows.end(), [&](const ReportRow& r) { return r.metric == metric; });
        ASSERT_NE(row, rows.end());
        EXPECT_LT(row->after.value(), row->before.value()) << method;
        EXPECT_LT(row->before.value(), 1.0) << method;
      }
    }
    EXPECT_LT(refitted[method], plain[method]) << method;
  }
  EXPECT_LT(plain["sparsegpt"], plain["wanda"]);
  EXPECT_LT(plain["wanda"], plain["random"]);
}

TEST(PruneRefitted, MasksOfMagnitudeAndWandaStayWhenWeightsAreRefitted) {
  const Folder folder("masks");
  make_model(folder / "m", {.layers = 1});
  Json options = with_text(base(folder / "m", folder / "plain", "magnitude"), folder / "text.txt");
  options["pattern"] = "4:8";
  run_prune(options);
  options["out"] = (folder / "refit").string();
  options["reconstruct"] = true;
  run_prune(options);
  const Checkpoint plain(folder / "plain"), refit(folder / "refit");
  for (const TensorSpec& spec : plain.tensors()) {
    if (!is_block_linear(spec)) continue;
    const auto a = plain.read_f32(spec.name), b = refit.read_f32(spec.name);
    for (std::size_t i = 0; i < a.size(); ++i) ASSERT_EQ(a[i] == 0.0f, b[i] == 0.0f) << spec.name;
    EXPECT_NE(a, b);
  }
}

TEST(Allocation, OwlKeepsTheTargetAndTheOrderOfOutliers) {
  const std::vector<double> outliers = {0.01, 0.05, 0.02, 0.03};
  const std::vector<std::int64_t> sizes = {100, 100, 100, 300};
  const std::vector<double> found = owl_sparsities(outliers, sizes, 0.7);
  // 2 lambda = 0.16 from the most to the least, linear in the share between.
  const std::vector<double> shape = {0, -0.16, -0.04, -0.08};
  const double mean = (100 * 0 - 100 * 0.16 - 100 * 0.04 - 300 * 0.08) / 600;
  for (std::size_t i = 0; i < shape.size(); ++i) EXPECT_NEAR(found[i], 0.7 + shape[i] - mean, 1e-12);
  EXPECT_EQ(owl_sparsities(std::vector<double>{0.02, 0.02}, std::vector<std::int64_t>{1, 2}, 0.5),
            (std::vector<double>{0.5, 0.5}));
  for (const double target : {0.01, 0.3, 0.9, 0.99}) {
    for (const double sparsity : owl_sparsities(outliers, sizes, target)) {
      EXPECT_GT(sparsity, 0.0);
      EXPECT_LT(sparsity, 1.0);
    }
  }
}

TEST(Allocation, WholeWeightsAddUpExactly) {
  const std::vector<double> sparsities = {0.31, 0.47, 0.111, 0.9, 0.5};
  const std::vector<std::int64_t> sizes = {7, 33, 1001, 12, 5};
  const double wanted = 7 * 0.31 + 33 * 0.47 + 1001 * 0.111 + 12 * 0.9 + 5 * 0.5;
  const auto total = static_cast<std::int64_t>(wanted);
  const std::vector<std::int64_t> counts = whole_weights(sparsities, sizes, total);
  std::int64_t sum = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    EXPECT_NEAR(static_cast<double>(counts[i]), sparsities[i] * static_cast<double>(sizes[i]), 1.0);
    sum += counts[i];
  }
  EXPECT_EQ(sum, total);
}

// A block with a few huge weights among small ones keeps most; all together lose exactly what was asked.
TEST(PruneRefitted, OwlSparesTheBlockWithPlantedOutliers) {
  const Folder folder("owl");
  make_model(folder / "m", {.layers = 3}, [](const TensorSpec& spec, std::vector<float>& values) {
    if (spec.layer != 2 || spec.role != TensorRole::kLinear) return;  // the last: later inputs would have outliers too
    for (std::size_t i = 0; i < values.size(); ++i) values[i] *= i % 40 == 0 ? 6.0f : 0.3f;
  });
  for (const char* method : {"magnitude", "wanda", "sparsegpt", "random"}) {
    Json options = with_text(base(folder / "m", folder / method, method), folder / "text.txt");
    options["sparsity"] = 0.437;
    options["allocation"] = "owl";
    const auto outcome = run_prune(options);
    const Checkpoint after(folder / method);
    std::map<int, std::pair<std::int64_t, std::int64_t>> blocks;
    std::int64_t gone = 0, all = 0;
    for (const TensorSpec& spec : after.tensors()) {
      if (!is_block_linear(spec)) continue;
      const auto w = after.read_f32(spec.name);
      blocks[spec.layer].first += zeros(w);
      blocks[spec.layer].second += static_cast<std::int64_t>(w.size());
      gone += zeros(w);
      all += static_cast<std::int64_t>(w.size());
      if (std::string(method) == "magnitude" || std::string(method) == "sparsegpt") continue;
      std::int64_t least = spec.shape[1], most = 0;  // of a row
      for (std::int64_t r = 0; r < spec.shape[0]; ++r) {
        const auto here = std::count(w.begin() + r * spec.shape[1], w.begin() + (r + 1) * spec.shape[1], 0.0f);
        least = std::min<std::int64_t>(least, here);
        most = std::max<std::int64_t>(most, here);
      }
      EXPECT_LE(most - least, 1) << method << spec.name;
    }
    EXPECT_EQ(gone, static_cast<std::int64_t>(0.437 * static_cast<double>(all))) << method;
    const auto share = [&](int block) {
      return static_cast<double>(blocks[block].first) / static_cast<double>(blocks[block].second);
    };
    EXPECT_LT(share(2), share(0) - 0.1) << method;
    EXPECT_LT(share(2), share(1) - 0.1) << method;
    EXPECT_GT(outcome.after("outliers of block 2"), outcome.after("outliers of block 0"));
    EXPECT_NEAR(outcome.after("sparsity of block 2"), share(2), 1e-3);
  }
}

TEST(PruneRefitted, RefusesWhatHasNoMeaning) {
  const Folder folder("refuse-refit");
  make_model(folder / "m");
  write_text(folder / "text.txt", testing::small_text());
  const Json text = {(folder / "text.txt").string()};
  const auto code = [&](const std::string& method, const Json& more) {
    Json options = base(folder / "m", folder / "out", method);
    options.update(more);
    return failing_code(options);
  };
  const auto usage = ExitCode::kUsage;
  EXPECT_EQ(code("sparsegpt", {{"sparsity", 0.5}}), usage);                           // no text
  EXPECT_EQ(code("sparsegpt", {{"text", text}}), usage);                              // how much?
  EXPECT_EQ(code("magnitude", {{"sparsity", 0.5}, {"reconstruct", true}}), usage);    // no text
  EXPECT_EQ(code("magnitude", {{"sparsity", 0.5}, {"allocation", "owl"}}), usage);    // no text
  EXPECT_EQ(code("wanda", {{"pattern", "2:4"}, {"allocation", "owl"}, {"text", text}}), usage);
  EXPECT_EQ(code("wanda", {{"sparsity", 0.5}, {"damping", 0.1}, {"text", text}}), usage);
  EXPECT_EQ(code("shape", {{"layers", 1}, {"reconstruct", true}, {"text", text}}), usage);
  EXPECT_EQ(code("shape", {{"ffn", 64}, {"allocation", "owl"}, {"text", text}}), usage);
  EXPECT_EQ(code("sparsegpt", {{"pattern", "5:7"}, {"text", text}}), usage);          // 32 inputs
  EXPECT_FALSE(fs::exists(folder / "out.partial"));
}

}  // namespace
}  // namespace pare
