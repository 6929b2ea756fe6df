// The cut to a smaller shape against the nulls, and the search of a shape.
#include <gtest/gtest.h>

#include "prune/shape.h"
#include "prune/speed.h"
#include "tests/prune/small_model.h"

namespace pare {
namespace {

using testing::Folder;
using testing::base;
using testing::make_model;
using testing::run_prune;
using testing::with_text;

Json shape(const Folder& folder, const std::string& out, const Json& asked) {
  Json options = with_text(base(folder / "m", folder / out, "shape"), folder / "text.txt");
  options.update(asked);
  return options;
}

// What is measured beats the nulls, and the refit beats the bare cut, of each kind of part.
TEST(PruneShape, MeasuredBeatsRandomAndRefitBeatsNone) {
  const Folder folder("nulls");
  make_model(folder / "m", {.hidden = 64, .seed = 4}, [](const TensorSpec& spec, std::vector<float>& values) {
    // Parts that matter and parts that do not: some inputs of o and down and some channels are quiet.
    const auto quiet = [](std::int64_t i) { return i / 16 % 2 == 0 ? 1.0f : 0.25f; };
    const std::int64_t cols = spec.shape.back();
    if (spec.module == "mlp.down_proj" || spec.module == "self_attn.o_proj")
      for (std::size_t i = 0; i < values.size(); ++i)
        values[i] *= quiet(static_cast<std::int64_t>(i) % cols) * quiet(static_cast<std::int64_t>(i) / cols);
    if (spec.role == TensorRole::kEmbedding)
      for (std::size_t i = 0; i < values.size(); ++i) values[i] *= quiet(static_cast<std::int64_t>(i) % cols);
  });
  int number = 0;
  for (const Json& asked : {Json{{"ffn", 64}}, Json{{"kv-heads", 1}}, Json{{"heads", 2}}, Json{{"hidden", 32}}}) {
    const auto kl = [&](const Json& more) {
      Json options = shape(folder, "out" + std::to_string(number++), asked);
      options.update(more);
      return run_prune(options).after("calibration mean_kl");
    };
    const double measured = kl({{"no-correction", true}}), refitted = kl(Json::object());
    double random = 0;
    for (const std::uint64_t seed : {1, 2, 3}) {
      Json options = shape(folder, "out" + std::to_string(number++), asked);
      options["rank-by"] = "random";
      options["no-correction"] = true;
      random += run_prune(options, 1, seed).after("calibration mean_kl") / 3;
    }
    EXPECT_LT(measured, random) << asked;
    EXPECT_LT(refitted, measured) << asked;
    EXPECT_GT(kl({{"no-correction", true}, {"rank-by", "weights"}}), 0.0) << asked;
  }
}

// A third of the neurons does nothing: a budget that it pays for takes nothing else.
TEST(PruneSearch, FindsTheCutThatCostsNothing) {
  const Folder folder("search");
  make_model(folder / "m", {.hidden = 64}, [](const TensorSpec& spec, std::vector<float>& values) {
    if (spec.module != "mlp.up_proj") return;
    for (std::int64_t j = 0; j < 96; j += 3) std::fill_n(values.begin() + j * 64, 64, 0.0f);
  });
  const ModelConfig config = Checkpoint(folder / "m").config();
  const Shape wanted{4, 4, 2, 64, 64, 0};
  Json options = shape(folder, "out", {{"max-params", parameter_count(cut_config(config, wanted))}});
  options["samples"] = 6;
  const Command command = prune_command();
  const PlannedModel input = planned_model(Checkpoint(folder / "m"));
  const StagePlan plan = command.plan(Options(command.options, options, "test"), input);
  EXPECT_LE(parameter_count(plan.result.config), options["max-params"].get<std::int64_t>());
  const auto outcome = run_prune(options);
  EXPECT_EQ(shape_of(Checkpoint(folder / "out").config()), wanted);
  EXPECT_NEAR(outcome.after("calibration mean_kl"), 0.0, 1e-8);
  int chosen = 0;
  for (const ReportRow& row : outcome.report.rows())
    if (row.metric.ends_with("(chosen)")) {
      ++chosen;
      EXPECT_NEAR(row.after.value(), 0.0, 1e-8);
      EXPECT_NE(row.metric.find("64 neurons"), std::string::npos) << row.metric;
    }
  EXPECT_EQ(chosen, 1);
  EXPECT_FALSE(fs::exists(folder / "out" / "prune.state"));
}

// A speed, measured with the runtime. Other work on the machine may slow down a shape that was fast, which is an error
// and no model: the same command then measures anew. What is chosen, on timings that stay, tests/prune/search.cpp tests.
TEST(PruneSearch, ASpeedIsMeasured) {
  const Folder folder("speed");
  make_model(folder / "m", {.hidden = 256, .intermediate = 768, .layers = 6, .heads = 8, .kv_heads = 4});
  const ModelConfig config = Checkpoint(folder / "m").config();
  const StoredAs stored = stored_as("q4", "float32");
  double own = 1e9;
  for (int i = 0; i < 3; ++i) own = std::min(own, seconds_per_token(config, stored, 1, folder / "own.pare"));
  EXPECT_FALSE(fs::exists(folder / "own.pare"));
  for (const bool per_layer : {false, true}) {
    const std::string out = per_layer ? "per-layer" : "uniform";
    Json given = shape(folder, out, {{"min-tokens-per-second", 1.2 / own}, {"codec", "q4"}, {"samples", 4}});
    given["per-layer"] = per_layer;
    testing::Outcome outcome;
    for (int tries = 1; !fs::exists(folder / out); ++tries) {
      try {
        outcome = run_prune(given);
      } catch (const Error& error) {
        ASSERT_TRUE(error.code() == ExitCode::kFailure || error.code() == ExitCode::kUsage) << error.what();
        ASSERT_FALSE(fs::exists(folder / out));
        ASSERT_LT(tries, 5) << error.what();
      }
    }
    const ModelConfig made = Checkpoint(folder / out).config();
    EXPECT_LT(parameter_count(made), parameter_count(config));
    const std::string chosen = shape_of(made).in_words();
    double fastest = 0, own_row = 0;
    for (const ReportRow& row : outcome.report.rows()) {
      if (!row.metric.ends_with("expected and measured")) continue;
      EXPECT_FALSE(row.deterministic);
      fastest = std::max(fastest, row.after.value());
      if (row.metric.find(chosen) != std::string::npos) own_row = row.after.value();
    }
    EXPECT_GE(per_layer ? fastest : own_row, 1.2 / own) << out;
  }
}

}  // namespace
}  // namespace pare
