// The search of a shape: the knapsack against every combination, costs against what is written, scores against folders.
#include "prune/search.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <random>

#include "prune/knapsack.h"
#include "prune/measure.h"
#include "prune/moments.h"
#include "prune/speed.h"
#include "tests/prune/small_model.h"

namespace pare {
namespace {

using testing::Folder;
using testing::base;
using testing::make_model;
using testing::run_prune;
using testing::SmallModel;
using testing::with_text;

Json shape(const Folder& folder, const std::string& out, const Json& asked) {
  Json options = with_text(base(folder / "m", folder / out, "shape"), folder / "text.txt");
  options.update(asked);
  return options;
}

const SmallModel kExperts{.architecture = "MixtralForCausalLM", .type = "mixtral", .hidden = 64, .layers = 3};

TEST(Knapsack, EqualsTheBestOfAllCombinations) {
  std::mt19937 engine(3);
  const auto uniform = [&] { return static_cast<double>(engine() >> 8) / 16777216.0; };
  for (int round = 0; round < 60; ++round) {
    std::vector<std::vector<Choice>> groups(1 + engine() % 6);
    double least = 0, most = 0;
    for (auto& group : groups) {
      group.resize(1 + engine() % 5);
      for (Choice& choice : group) choice = {round % 2 == 0 ? std::floor(20 * uniform()) : 20 * uniform(), uniform()};
      const auto [low, high] = std::minmax_element(group.begin(), group.end(), [](const Choice& a, const Choice& b) {
        return a.size < b.size;
      });
      least += low->size;
      most += high->size;
    }
    const double budget = least + (most - least) * (1.2 * uniform() - 0.1);
    double best = INFINITY;
    std::vector<std::size_t> at(groups.size(), 0);
    for (bool more = true; more;) {
      double size = 0, cost = 0;
      for (std::size_t g = 0; g < groups.size(); ++g) {
        size += groups[g][at[g]].size;
        cost += groups[g][at[g]].cost;
      }
      if (size <= budget) best = std::min(best, cost);
      more = false;
      for (std::size_t g = 0; g < groups.size() && !more; ++g) {
        more = ++at[g] < groups[g].size();
        if (!more) at[g] = 0;
      }
    }
    const auto chosen = cheapest_choices(groups, budget);
    ASSERT_EQ(chosen.empty(), std::isinf(best)) << round;
    if (chosen.empty()) continue;
    double size = 0, cost = 0;
    for (std::size_t g = 0; g < groups.size(); ++g) {
      size += groups[g][chosen[g]].size;
      cost += groups[g][chosen[g]].cost;
    }
    EXPECT_LE(size, budget + 1e-9);
    EXPECT_NEAR(cost, best, 1e-12) << round;
  }
}

// More sums than are kept: within the budget, and as good as the exact answer of a problem that has one. Costs fall
// linearly with size, one slope a group: the steepest groups stay whole.
TEST(Knapsack, ManySumsAreThinnedNotLost) {
  constexpr int kGroups = 12, kSizes = 64;
  std::vector<std::vector<Choice>> groups(kGroups);
  for (int g = 0; g < kGroups; ++g)
    for (int s = 0; s < kSizes; ++s)
      groups[static_cast<std::size_t>(g)].push_back({1 + s * (1 + g / 1000.0), (kSizes - s) * (g + 1.0)});
  double budget = kGroups;
  for (int g = kGroups / 2; g < kGroups; ++g) budget += (kSizes - 1) * (1 + g / 1000.0);
  const auto chosen = cheapest_choices(groups, budget);
  double size = 0, cost = 0, exact = 0;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    size += groups[g][chosen[g]].size;
    cost += groups[g][chosen[g]].cost;
    exact += groups[g][g < kGroups / 2 ? 0 : kSizes - 1].cost;
  }
  EXPECT_LE(size, budget * (1 + 1e-9));
  EXPECT_LT(cost, 1.01 * exact);
}

TEST(ShapeCosts, AreThoseOfTheConfigsThatAreWritten) {
  const Folder folder("costs");
  make_model(folder / "dense", {.hidden = 64, .tied = false, .mlp_bias = true});
  make_model(folder / "experts", kExperts);
  for (const char* name : {"dense", "experts"}) {
    const ModelConfig config = Checkpoint(folder / name).config();
    ShapeCosts costs(config, Unit::kParameters, {});
    int shapes = 0;
    for (const auto& axis : search_axes(config, 8))
      for (Shape one : axis)
        for (const std::int64_t layers : {config.num_layers, config.num_layers - 1}) {
          one.layers = std::min(one.layers, layers);
          const ModelConfig cut = cut_config(config, one);
          EXPECT_EQ(costs.of(one), static_cast<double>(parameter_count(cut))) << name << one.in_words();
          EXPECT_EQ(costs.of(cut), costs.of(one));
          ++shapes;
        }
    EXPECT_GT(shapes, 20);
  }
}

// 6,144 experts: every candidate is counted from parts, not from a list of its tensors.
TEST(ShapeCosts, ManyExpertsAreNoListOfTensors) {
  const Json json = {{"architectures", {"Qwen3MoeForCausalLM"}}, {"model_type", "qwen3_moe"}, {"vocab_size", 151936},
                     {"hidden_size", 2048}, {"intermediate_size", 6144}, {"moe_intermediate_size", 768},
                     {"head_dim", 128}, {"num_hidden_layers", 48}, {"num_attention_heads", 32},
                     {"num_key_value_heads", 4}, {"num_experts", 128}, {"num_experts_per_tok", 8},
                     {"max_position_embeddings", 40960}};
  const ModelConfig config = parse_config(json, nullptr, "test");
  ShapeCosts costs(config, Unit::kParameters, {});
  const Budget budget{Unit::kParameters, 15e9, {}};
  const auto shapes = shapes_within(config, 32, budget, costs);
  EXPECT_GT(shapes.size(), 1000u);
  for (const Shape& one : {shapes.front(), shapes.back()})
    EXPECT_EQ(costs.of(one), static_cast<double>(parameter_count(cut_config(config, one)))) << one.in_words();
  EXPECT_LE(costs.of(shapes.front()), 15e9);
}

TEST(DecodeTimes, AreFoundInTimingsThatFollowThem) {
  const Folder folder("times");
  make_model(folder / "m", {.hidden = 64});
  const ModelConfig config = Checkpoint(folder / "m").config();
  const StoredAs stored = stored_as("q4", "float32");
  const DecodeTimes truth{1e-5, 3e-10, 2e-6, 5e-10, 4e-10};
  ShapeCosts costs(config, Unit::kSeconds, stored, truth);
  const Shape own = shape_of(config);
  std::vector<Timing> timings;
  for (const auto& change : {Shape{4, 4, 2, 96, 64, 0}, Shape{2, 4, 2, 96, 64, 0}, Shape{4, 4, 2, 32, 64, 0},
                             Shape{4, 2, 1, 96, 64, 0}, Shape{4, 4, 2, 96, 32, 0}})
    timings.push_back({change, costs.of(change)});
  ShapeCosts fitted(config, Unit::kSeconds, stored, fit_times(config, stored, timings));
  const Shape other{3, 2, 1, 64, 32, 0};
  EXPECT_NEAR(fitted.of(other) / costs.of(other), 1, 1e-6);
  EXPECT_NEAR(fitted.of(own) / costs.of(own), 1, 1e-6);
  // Timings with noise in them give no negative times.
  timings[2].seconds *= 1.5;
  const DecodeTimes noisy = fit_times(config, stored, timings);
  for (const double time : {noisy.fixed, noisy.head, noisy.per_block, noisy.attention, noisy.mlp}) EXPECT_GE(time, 0);
}

TEST(Scores, LevelsAndWhatLiesBetween) {
  EXPECT_EQ(even_levels(96, 32, 7), (std::vector<std::int64_t>{64, 32}));
  EXPECT_EQ(even_levels(8, 1, 7), (std::vector<std::int64_t>{7, 6, 5, 4, 3, 2, 1}));
  EXPECT_EQ(even_levels(1, 1, 7), std::vector<std::int64_t>{});
  const std::vector<std::int64_t> levels = {64, 32};
  EXPECT_EQ(level_cost(96, levels, {1, 3}, 96), 0);
  EXPECT_EQ(level_cost(96, levels, {1, 3}, 64), 1);
  EXPECT_EQ(level_cost(96, levels, {1, 3}, 80), 0.5);
  EXPECT_EQ(level_cost(96, levels, {1, 3}, 40), 2.5);
  EXPECT_EQ(level_cost(96, levels, {1, 0.5}, 32), 1);  // noise does not make fewer neurons better
  EXPECT_TRUE(std::isinf(level_cost(96, levels, {1, 3}, 31)));
}

CalibrationWindows windows_of(const ModelConfig& config) { return random_windows(config.vocab_size, 12, 40, 3); }

// A block's score is the divergence of a folder with that block cut so and no other.
TEST(Scores, AreDivergencesOfModelsWithOneBlockCut) {
  const Folder folder("scores");
  make_model(folder / "m", {.layers = 3, .heads = 8, .kv_heads = 4});
  const Checkpoint model(folder / "m");
  const Options none(prune_command().options, {{"model", "m"}, {"out", "o"}, {"method", "shape"}}, "test");
  Progress progress(true);
  Context context;
  context.progress = &progress;
  fs::create_directories(folder / "state");
  PruneJob job{model, none, context, windows_of(model.config()), folder / "work", folder / "state", "float32", {}};
  CutPlan plan;
  plan.rank = RankBy::kWeights;
  plan.refit = false;
  plan.shape = shape_of(model.config());
  const ScoreLevels levels{{64}, {2}, true};
  const auto scores = measure_scores(job, plan, {0, 2}, levels);
  ASSERT_EQ(scores.size(), 2u);
  // Of block 2, by hand: the weakest neurons by the product of norms, the weakest pair of heads, and all of it.
  const auto read = [&](const std::string& module) {
    return torch::tensor(model.read_f32("model.layers.2." + module + ".weight"))
        .view(model.spec("model.layers.2." + module + ".weight").shape)
        .to(torch::kDouble);
  };
  const torch::Tensor neurons = read("mlp.gate_proj").norm(2, {1}) * read("mlp.up_proj").norm(2, {1}) *
                                read("mlp.down_proj").norm(2, {0});
  const torch::Tensor weak = neurons.argsort().narrow(0, 0, 32);
  const torch::Tensor values = read("self_attn.v_proj").view({4, 4, -1}).flatten(1).norm(2, {1});
  const torch::Tensor outs = read("self_attn.o_proj").view({32, 8, 4}).permute({1, 0, 2}).flatten(1).norm(2, {1});
  const torch::Tensor groups = (outs * values.repeat_interleave(2)).view({4, 2}).sum(1).argsort().narrow(0, 0, 2);
  const auto divergence = [&](const std::string& out, const testing::Edit& edit) {
    CheckpointWriter writer(folder / out, model.config(), "float32");
    for (const TensorSpec& spec : model.tensors()) {
      std::vector<float> tensor = model.read_f32(spec.name);
      if (spec.layer == 2) edit(spec, tensor);
      writer.put(spec.name, tensor.data());
    }
    writer.finish();
    return compare_models(model, Checkpoint(folder / out), job.windows, torch::kCPU, context).kl;
  };
  const auto clear = [](std::vector<float>& tensor, std::int64_t cols, std::int64_t column) {
    for (std::size_t i = static_cast<std::size_t>(column); i < tensor.size(); i += static_cast<std::size_t>(cols))
      tensor[i] = 0;
  };
  EXPECT_NEAR(scores[1].ffn[0], divergence("ffn", [&](const TensorSpec& spec, std::vector<float>& tensor) {
                if (spec.module != "mlp.down_proj") return;
                for (int i = 0; i < 32; ++i) clear(tensor, 96, weak[i].item<std::int64_t>());
              }), 1e-6);
  EXPECT_NEAR(scores[1].kv_heads[0], divergence("heads", [&](const TensorSpec& spec, std::vector<float>& tensor) {
                if (spec.module != "self_attn.o_proj") return;
                for (int g = 0; g < 2; ++g)
                  for (int i = 0; i < 8; ++i) clear(tensor, 32, groups[g].item<std::int64_t>() * 8 + i);
              }), 1e-6);
  EXPECT_NEAR(scores[1].without, divergence("without", [&](const TensorSpec& spec, std::vector<float>& tensor) {
                if (spec.module == "self_attn.o_proj" || spec.module == "mlp.down_proj")
                  std::fill(tensor.begin(), tensor.end(), 0.0f);
              }), 1e-6);
  EXPECT_NE(scores[0].ffn[0], scores[1].ffn[0]);
  // Measured and refitted they are cheaper; what an earlier run measured is not measured again.
  fs::remove_all(folder / "state");
  fs::create_directories(folder / "state");
  plan.rank = RankBy::kMeasured;
  const auto ranked = measure_scores(job, plan, {2}, levels);
  fs::remove_all(folder / "state");
  fs::create_directories(folder / "state");
  plan.refit = true;
  const auto refitted = measure_scores(job, plan, {2}, levels);
  EXPECT_LT(refitted[0].ffn[0], ranked[0].ffn[0]);
  EXPECT_LT(refitted[0].kv_heads[0], ranked[0].kv_heads[0]);
  job.windows = random_windows(model.config().vocab_size, 12, 40, 4);
  EXPECT_EQ(measure_scores(job, plan, {2}, levels)[0].ffn, refitted[0].ffn);
}

// A search on a machine whose decoding is a function.
struct TimedSearch {
  explicit TimedSearch(const std::string& name) : folder(name) {
    make_model(folder / "m", {.hidden = 64, .intermediate = 256, .layers = 4});
    model.emplace(folder / "m");
    fs::create_directories(folder / "state");
    context.progress = &progress;
    context.threads = 1;
    plan.rank = RankBy::kWeights;
    plan.refit = false;
    own = costs().of(config());
    budget.unit = Unit::kSeconds;
    budget.stored = stored_as("q4", "float32");
    budget.limit = own / 1.5;
    // What differs in several things, or between blocks, takes `slower` times what the sum of its parts says.
    budget.timer = [this](const ModelConfig& cut) {
      ++timed;
      const Shape a = shape_of(config()), b = shape_of(cut);
      const int changed = (a.layers != b.layers) + (a.heads != b.heads) + (a.ffn != b.ffn) + (a.hidden != b.hidden);
      return costs().of(cut) * (changed > 1 || !cut.layer_widths.empty() ? slower : 1) * load;
    };
  }
  const ModelConfig& config() const { return model->config(); }
  ShapeCosts costs() const {
    return ShapeCosts(config(), Unit::kSeconds, stored_as("q4", "float32"), {1e-5, 3e-10, 2e-6, 5e-10, 4e-10});
  }
  PruneJob job() {
    return {*model,           none,      context, random_windows(config().vocab_size, 2, 16, 3), folder / "work",
            folder / "state", "float32", {}};
  }
  CutPlan search(bool per_layer) {
    PruneJob here = job();
    CutPlan chosen = plan;
    load = 1;
    const DecodeTimes times = decode_times(here, budget);
    load = load_then;
    (per_layer ? search_widths : search_shape)(here, chosen, 32, budget, times);
    return chosen;
  }
  double seconds(const CutPlan& chosen) {
    std::vector<int> layers = chosen.layers;
    for (int i = 0; layers.size() < static_cast<std::size_t>(chosen.shape.layers); ++i) layers.push_back(i);
    return budget.timer(cut_config(config(), chosen.shape, layers, chosen.widths));
  }

  Folder folder;
  std::optional<Checkpoint> model;
  Options none{prune_command().options, {{"model", "m"}, {"out", "o"}, {"method", "shape"}}, "test"};
  Progress progress{true};
  Context context;
  CutPlan plan;
  Budget budget;
  double own = 0, slower = 1, load = 1, load_then = 1;
  int timed = 0;
};

// What is chosen was measured to keep the limit, though every combination is slower than it was expected to be.
TEST(SpeedSearch, TheChosenShapeKeepsTheLimit) {
  for (const bool per_layer : {false, true}) {
    TimedSearch search(per_layer ? "speed-widths" : "speed");
    search.slower = 1.15;
    const CutPlan chosen = search.search(per_layer);
    EXPECT_LE(search.seconds(chosen), search.budget.limit) << per_layer;
    EXPECT_LT(search.costs().of(search.config()) / 3, search.seconds(chosen)) << "no more than needed goes";
    int missed = 0, kept = 0;
    for (const ReportRow& row : search.context.report.rows()) {
      if (!row.metric.ends_with("expected and measured")) continue;
      EXPECT_FALSE(row.deterministic);
      const bool within = row.after.value() >= 1 / search.budget.limit;
      ++(within ? kept : missed);
      const bool of_chosen = !per_layer && row.metric.find(chosen.shape.in_words()) != std::string::npos;
      EXPECT_TRUE(within || !of_chosen) << row.metric;
    }
    EXPECT_GT(kept, 0);
    EXPECT_GT(missed, 0) << "the limit was never tightened";
  }
}

// Other work on the machine made every choice slow: no time of that hour is kept, divergences are.
TEST(SpeedSearch, TimesOfABusyMachineAreForgotten) {
  for (const bool per_layer : {false, true}) {
    TimedSearch search(per_layer ? "busy-widths" : "busy");
    search.load_then = 20;
    try {
      search.search(per_layer);
      ADD_FAILURE() << "found a shape";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kFailure);
      EXPECT_NE(error.hint().find("same command again"), std::string::npos) << error.what();
    }
    EXPECT_FALSE(fs::exists(search.folder / "state" / "decode.json"));
    EXPECT_EQ(read_text(search.folder / "state" / "search.json").find("seconds"), std::string::npos);
    search.load_then = 1;
    EXPECT_LE(search.seconds(search.search(per_layer)), search.budget.limit) << per_layer;
  }
}

TEST(SpeedSearch, TimesHoldForOneNumberOfThreads) {
  TimedSearch search("threads");
  search.search(false);
  const int first = search.timed;
  EXPECT_GT(first, 3);
  search.search(false);
  EXPECT_EQ(search.timed, first);
  search.context.threads = 2;
  search.search(false);
  EXPECT_EQ(search.timed, 2 * first);
  search.context.threads = 1;
  search.search(false);
  EXPECT_EQ(search.timed, 2 * first);
}

TEST(SpeedSearch, RefusalsNameTheSpeedsThatCanBeReached) {
  TimedSearch search("words");
  ShapeCosts costs = search.costs();
  const auto refusal = [&](double seconds) -> std::string {
    Budget budget = search.budget;
    budget.limit = seconds;
    try {
      shapes_within(search.config(), 32, budget, costs);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage);
      return error.what();
    }
    return "";
  };
  EXPECT_NE(refusal(1e-9).find("expected at most what the fastest"), std::string::npos) << refusal(1e-9);
  EXPECT_NE(refusal(1e-9).find("found 1e+09 tokens a second"), std::string::npos) << refusal(1e-9);
  EXPECT_NE(refusal(1).find("expected more than the model's own"), std::string::npos) << refusal(1);
}

// Weights are finite, predictions are not: every way to a shape says so.
TEST(Scores, APredictionThatIsNoNumberIsNamed) {
  const Folder folder("overflow");
  make_model(folder / "m", {}, [](const TensorSpec& spec, std::vector<float>& values) {
    if (spec.module == "norm") std::fill(values.begin(), values.end(), 3e38f);
  });
  const std::int64_t most = parameter_count(Checkpoint(folder / "m").config()) * 9 / 10;
  for (const Json& asked : {Json{{"max-params", most}}, Json{{"max-params", most}, {"per-layer", true}},
                            Json{{"ffn", 64}, {"per-layer", true}}, Json{{"layers", 3}}, Json{{"ffn", 64}}}) {
    Json given = shape(folder, "out", asked);
    given["samples"] = 2;
    for (const int again : {0, 1}) {  // what was measured stands in the work folder
      try {
        run_prune(given);
        ADD_FAILURE() << asked;
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::kFailure) << asked << again << error.what();
        EXPECT_NE(std::string(error.what()).find("finite predictions of the "), std::string::npos) << error.what();
      }
    }
    fs::remove_all(folder / "out.partial");
  }
}

TEST(PerLayer, MeansThatNoBlockCanHaveAreRefusedAtOnce) {
  const Folder folder("means");
  make_model(folder / "m", {.hidden = 64, .intermediate = 768, .heads = 16, .kv_heads = 16});
  const Command command = prune_command();
  const auto refusal = [&](const Json& asked) -> std::string {
    Json given = shape(folder, "out", asked);
    given.update({{"per-layer", true}, {"multiple-of", 4}});
    try {
      command.plan(Options(command.options, given, "test"), planned_model(Checkpoint(folder / "m")));
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage);
      return error.what();
    }
    return "";
  };
  EXPECT_NE(refusal({{"ffn", 92}}).find("--ffn: expected with --per-layer a mean of at least 96"), std::string::npos);
  EXPECT_EQ(refusal({{"ffn", 96}}), "");
  EXPECT_NE(refusal({{"kv-heads", 1}}).find("--kv-heads: expected with --per-layer a mean of at least 2"),
            std::string::npos);
  EXPECT_EQ(refusal({{"kv-heads", 2}}), "");
}

// Dead neurons stand in one block alone: the mean is met by taking them there and nowhere else.
TEST(PerLayer, NeuronsGoWhereTheyDoNothing) {
  const Folder folder("spread");
  make_model(folder / "m", {.layers = 3}, [](const TensorSpec& spec, std::vector<float>& values) {
    const std::int64_t dead = spec.layer == 0 ? 64 : spec.layer == 2 ? 32 : 0;
    if (spec.module == "mlp.up_proj") std::fill_n(values.begin(), dead * 32, 0.0f);
  });
  const Json given = shape(folder, "out", {{"ffn", 64}, {"per-layer", true}});
  const auto outcome = run_prune(given, 2);
  const ModelConfig config = Checkpoint(folder / "out").config();
  ASSERT_EQ(config.layer_widths.size(), 3u);
  EXPECT_EQ(config.layer_widths, (std::vector<BlockWidths>{{4, 2, 32}, {4, 2, 96}, {4, 2, 64}}));
  EXPECT_NEAR(outcome.after("calibration mean_kl"), 0, 1e-8);
  EXPECT_EQ(outcome.after("neurons of block 0"), 32);
  const std::string card = read_text(folder / "out" / "README.md");
  EXPECT_NE(card.find("library_name: pare\n"), std::string::npos) << card;
  EXPECT_NE(card.find("| prune | neurons of block 0 | 96 | 32 |"), std::string::npos) << card;
  EXPECT_EQ(width_keys(config), "intermediate_size");
  // As many parameters as the uniform model, and the same plan.
  run_prune(shape(folder, "uniform", {{"ffn", 64}}), 2);
  EXPECT_EQ(parameter_count(config), parameter_count(Checkpoint(folder / "uniform").config()));
  const Command command = prune_command();
  const Json again = shape(folder, "again", {{"ffn", 64}, {"per-layer", true}});
  const StagePlan plan =
      command.plan(Options(command.options, again, "test"), planned_model(Checkpoint(folder / "m")));
  EXPECT_EQ(plan.out_bytes, Checkpoint(folder / "out").tensor_bytes());
  EXPECT_TRUE(std::any_of(plan.notes.begin(), plan.notes.end(), [](const std::string& note) {
    return note.find("transformers does not") != std::string::npos;
  }));
  // What has widths of its own is not cut again by shape, and loses weights as any other.
  Json second = with_text(base(folder / "out", folder / "second", "shape"), folder / "text.txt");
  second["ffn"] = 32;
  EXPECT_EQ(testing::failing_code(second), ExitCode::kUsage);
  Json sparse = with_text(base(folder / "out", folder / "sparse", "sparsegpt"), folder / "text.txt");
  sparse["sparsity"] = 0.5;
  run_prune(sparse);
  EXPECT_EQ(Checkpoint(folder / "sparse").config().layer_widths, config.layer_widths);
}

// A budget of bytes: heads of one block and neurons of another do nothing, a third block does nothing at all.
TEST(PerLayer, ABudgetTakesWhatDoesNothing) {
  const Folder folder("budget");
  make_model(folder / "m", {.layers = 4}, [](const TensorSpec& spec, std::vector<float>& values) {
    const bool out = spec.module == "self_attn.o_proj" || spec.module == "mlp.down_proj";
    if (spec.layer == 1 && out) std::fill(values.begin(), values.end(), 0.0f);
    if (spec.layer == 2 && spec.module == "mlp.up_proj") std::fill_n(values.begin(), 64 * 32, 0.0f);
    if (spec.layer == 3 && spec.module == "self_attn.v_proj") std::fill_n(values.begin(), 8 * 32, 0.0f);
  });
  const ModelConfig config = Checkpoint(folder / "m").config();
  const std::vector<BlockWidths> wanted = {{4, 2, 96}, {4, 2, 32}, {2, 1, 96}};
  Shape kept = shape_of(config);
  kept.layers = 3;
  ModelConfig least = cut_config(config, kept, {0, 2, 3}, wanted);
  ShapeCosts costs(config, Unit::kBytes, stored_as("", "float32"));
  Json given = shape(folder, "out", {{"max-bytes", std::to_string(static_cast<std::uint64_t>(costs.of(least)))},
                                     {"per-layer", true}, {"multiple-of", 16}});
  given["samples"] = 6;
  const auto outcome = run_prune(given);
  const Checkpoint cut(folder / "out");
  EXPECT_EQ(cut.config().layer_widths, wanted);
  EXPECT_NEAR(outcome.after("calibration mean_kl"), 0, 1e-8);
  EXPECT_LE(cut.tensor_bytes(), static_cast<std::uint64_t>(costs.of(least)));
}

// The first token of a window, where the prefix stands, counts at most kFirstTokenEnergy times the others' mean; where
// it went to another expert the first row is any token.
TEST(Moments, TheFirstTokenIsCappedWhereItIsOne) {
  torch::manual_seed(5);
  CalibrationWindows windows;
  windows.count = 4;
  windows.length = 6;
  windows.prefixed = true;
  std::vector<torch::Tensor> inputs, targets;
  for (int w = 0; w < 4; ++w) {
    inputs.push_back(torch::randn({6, 3}));
    inputs.back()[0] *= 100;
    targets.push_back(torch::randn({6, 2}));
  }
  const auto fit = [&](bool prefixed, bool first) {
    CalibrationWindows own = windows;
    own.prefixed = prefixed;
    return collect(own, 3, 2, torch::kCPU, 1, [&](std::int64_t w) {
             const auto at = static_cast<std::size_t>(w);
             return Pairs{inputs[at], targets[at], first};
           }).fitted;
  };
  const auto brute = [&](bool capped) {
    torch::Tensor gram = torch::zeros({3, 3}, torch::kDouble), cross = torch::zeros({2, 3}, torch::kDouble);
    for (int w = 0; w < 4; ++w) {  // below kHeldOutEvery: all of them are fitted
      torch::Tensor x = inputs[static_cast<std::size_t>(w)].to(torch::kDouble).clone();
      torch::Tensor t = targets[static_cast<std::size_t>(w)].to(torch::kDouble).clone();
      double scale = 1;
      for (const torch::Tensor& rows : {x, t}) {
        const torch::Tensor energy = rows.square().sum(1);
        const double others = energy.narrow(0, 1, 5).mean().item<double>();
        scale = std::min(scale, std::sqrt(kFirstTokenEnergy * others / energy[0].item<double>()));
      }
      if (capped) {
        x[0] *= scale;
        t[0] *= scale;
      }
      gram += torch::mm(x.t(), x);
      cross += torch::mm(t.t(), x);
    }
    return std::pair{gram, cross};
  };
  for (const bool prefixed : {false, true})
    for (const bool first : {false, true}) {
      const Sums sums = fit(prefixed, first);
      const auto [gram, cross] = brute(prefixed && first);
      EXPECT_TRUE(torch::allclose(sums.gram, gram, 1e-4, 1e-3)) << prefixed << first;
      EXPECT_TRUE(torch::allclose(sums.cross, cross, 1e-4, 1e-3)) << prefixed << first;
    }
  EXPECT_GT((brute(false).first[0][0] / brute(true).first[0][0]).item<double>(), 10);
}

}  // namespace
}  // namespace pare
