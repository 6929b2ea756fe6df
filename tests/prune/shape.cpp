// The cut to a smaller shape: what goes, that nothing is lost where nothing can be, and the nulls.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "prune/shape.h"
#include "tests/prune/small_model.h"

namespace pare {
namespace {

using testing::Folder;
using testing::base;
using testing::SmallModel;
using testing::failing_code;
using testing::make_model;
using testing::run_prune;
using testing::with_text;

using Rows = std::vector<std::int64_t>;

// [rows, cols] -> the rows and columns that stay; a vector has one column.
std::vector<float> taken(const std::vector<float>& values, std::int64_t cols, const Rows& rows, const Rows& columns) {
  std::vector<float> out;
  for (const std::int64_t i : rows)
    for (const std::int64_t j : columns) out.push_back(values[static_cast<std::size_t>(i * cols + j)]);
  return out;
}

Rows without(std::int64_t count, const std::function<bool(std::int64_t)>& gone) {
  Rows out;
  for (std::int64_t i = 0; i < count; ++i)
    if (!gone(i)) out.push_back(i);
  return out;
}

Json shape(const Folder& folder, const std::string& out, const Json& asked) {
  Json options = with_text(base(folder / "m", folder / out, "shape"), folder / "text.txt");
  options.update(asked);
  return options;
}

// A block whose attention and MLP add nothing costs nothing: chosen first, and the rest is the original, renumbered.
TEST(PruneShape, DepthRemovesThePlantedIdentityBlock) {
  const Folder folder("depth");
  make_model(folder / "m", {}, [](const TensorSpec& spec, std::vector<float>& values) {
    if (spec.layer == 2 && (spec.module == "self_attn.o_proj" || spec.module == "mlp.down_proj"))
      std::fill(values.begin(), values.end(), 0.0f);
  });
  Json options = with_text(base(folder / "m", folder / "out", "shape"), folder / "text.txt");
  options["layers"] = 3;
  const auto outcome = run_prune(options, 2);
  const Checkpoint before(folder / "m"), after(folder / "out");
  ASSERT_EQ(after.config().num_layers, 3);
  EXPECT_EQ(outcome.after("blocks"), 3.0);
  const std::string card = read_text(folder / "out" / "README.md");
  EXPECT_EQ(card.find("without block"), std::string::npos) << card;
  EXPECT_NE(card.find("| prune | calibration mean_kl |"), std::string::npos) << card;
  EXPECT_EQ(outcome.after("trial: mean_kl without block 2 (removed), round 1"), 0.0);
  EXPECT_GT(outcome.after("trial: mean_kl without block 1, round 1"), 1e-6);
  EXPECT_EQ(outcome.after("calibration mean_kl"), 0.0);
  EXPECT_LT(outcome.after("parameters"), static_cast<double>(parameter_count(before.config())));
  const int from[] = {0, 1, 3};
  for (const TensorSpec& spec : after.tensors()) {
    std::string name = spec.name;
    if (spec.layer >= 0) {
      const std::string prefix = "model.layers." + std::to_string(spec.layer) + ".";
      name = "model.layers." + std::to_string(from[spec.layer]) + "." + spec.name.substr(prefix.size());
    }
    EXPECT_EQ(after.read_f32(spec.name), before.read_f32(name)) << spec.name;
  }
}

// The divergence of the written folder is measured apart from the search: it has to be the cost of the last choice.
TEST(PruneShape, DepthMeasuresAgainAfterEachRemoval) {
  const Folder folder("depth2");
  make_model(folder / "m", {.layers = 5, .seed = 3});
  Json options = with_text(base(folder / "m", folder / "out", "shape"), folder / "text.txt");
  options["layers"] = 3;
  options["no-correction"] = true;
  const auto outcome = run_prune(options);
  int rows[2] = {0, 0};
  double chosen[2] = {-1, -1}, least[2] = {1e9, 1e9};
  for (const ReportRow& row : outcome.report.rows()) {
    if (!row.metric.starts_with("trial: mean_kl without block")) continue;
    const int round = row.metric.back() - '1';
    ASSERT_TRUE(round == 0 || round == 1);
    ++rows[round];
    least[round] = std::min(least[round], row.after.value());
    if (row.metric.find("(removed)") != std::string::npos) chosen[round] = row.after.value();
  }
  EXPECT_EQ(rows[0], 5);
  EXPECT_EQ(rows[1], 4);
  EXPECT_EQ(chosen[0], least[0]);
  EXPECT_EQ(chosen[1], least[1]);
  EXPECT_NEAR(outcome.after("calibration mean_kl"), chosen[1], 1e-9);
  EXPECT_EQ(Checkpoint(folder / "out").config().num_layers, 3);
}

// Parts of every kind that do nothing: chosen all together, and what is left is the original, row by row.
TEST(PruneShape, RemovesPlantedDeadPartsAtNoCost) {
  const Folder folder("dead");
  // 32 of 96 neurons, the first of two key heads with its queries, 32 of 64 channels.
  const auto dead_neuron = [](int layer, std::int64_t j) { return (j + layer) % 3 == 0; };
  const auto dead_channel = [](std::int64_t j) { return j % 2 == 1; };
  const auto dead_group = [](int layer, std::int64_t g) { return g == layer % 2; };
  const SmallModel small{.hidden = 64, .layers = 3, .mlp_bias = true};
  make_model(folder / "m", small, [&](const TensorSpec& spec, std::vector<float>& values) {
    const std::int64_t cols = spec.shape.size() == 2 ? spec.shape[1] : 1;
    const auto clear_row = [&](std::int64_t i) { std::fill_n(values.begin() + i * cols, cols, 0.0f); };
    if (spec.module == "mlp.up_proj")
      for (std::int64_t j = 0; j < 96; ++j)
        if (dead_neuron(spec.layer, j)) clear_row(j);
    if (spec.module == "self_attn.v_proj")
      for (std::int64_t i = 0; i < 32; ++i)
        if (dead_group(spec.layer, i / 16)) clear_row(i);
    if (spec.module == "self_attn.o_proj" || spec.module == "mlp.down_proj")
      for (std::int64_t i = 0; i < 64; ++i)
        if (dead_channel(i)) clear_row(i);
    if (spec.role == TensorRole::kEmbedding)
      for (std::int64_t i = 0; i < spec.shape[0]; ++i)
        for (std::int64_t j = 0; j < 64; ++j)
          if (dead_channel(j)) values[static_cast<std::size_t>(i * 64 + j)] = 0.0f;
  });
  const auto outcome = run_prune(shape(folder, "out", {{"ffn", 64}, {"kv-heads", 1}, {"hidden", 32}}), 2);
  EXPECT_NEAR(outcome.after("calibration mean_kl"), 0.0, 1e-8);
  const Checkpoint before(folder / "m"), after(folder / "out");
  EXPECT_EQ(shape_of(after.config()), (Shape{3, 2, 1, 64, 32, 0}));
  const Rows channels = without(64, dead_channel);
  for (const TensorSpec& spec : after.tensors()) {
    const auto w = before.read_f32(spec.name), p = after.read_f32(spec.name);
    if (spec.role == TensorRole::kNorm) {
      for (std::size_t j = 0; j < p.size(); ++j)  // the mean square is of half as many, none of them 0
        EXPECT_NEAR(p[j], w[static_cast<std::size_t>(channels[j])] * std::sqrt(2.0), 1e-3) << spec.name;
      continue;
    }
    const Rows neurons = without(96, [&](std::int64_t j) { return dead_neuron(spec.layer, j); });
    const Rows queries = without(64, [&](std::int64_t i) { return dead_group(spec.layer, i / 32); });
    const Rows keys = without(32, [&](std::int64_t i) { return dead_group(spec.layer, i / 16); });
    const bool bias = spec.role == TensorRole::kBias;
    const Rows one = {0};
    const auto part = [&](const Rows& rows, std::int64_t cols, const Rows& columns) {
      return taken(w, bias ? 1 : cols, rows, bias ? one : columns);
    };
    std::vector<float> expected;
    if (spec.layer < 0) expected = part(without(300, [](std::int64_t) { return false; }), 64, channels);
    else if (spec.module == "self_attn.q_proj") expected = part(queries, 64, channels);
    else if (spec.module == "self_attn.o_proj") expected = part(channels, 64, queries);
    else if (spec.module.starts_with("self_attn")) expected = part(keys, 64, channels);
    else if (spec.module == "mlp.down_proj") expected = part(channels, 96, neurons);
    else expected = part(neurons, 64, channels);
    ASSERT_EQ(p.size(), expected.size()) << spec.name;
    for (std::size_t i = 0; i < p.size(); ++i) ASSERT_NEAR(p[i], expected[i], 2e-3) << spec.name;
  }
}

// By weights: the block and the neurons whose weights are small go, whatever the text says, and the rest is copied.
TEST(PruneShape, ByWeightsTheStrongestStay) {
  const Folder folder("weights");
  const auto weak = [](std::int64_t j) { return j == 3 || j == 7; };
  make_model(folder / "m", {}, [&](const TensorSpec& spec, std::vector<float>& values) {
    if (spec.layer == 1 && spec.role == TensorRole::kLinear)
      for (float& x : values) x *= 0.9f;
    if (spec.module == "mlp.up_proj")
      for (std::int64_t i = 0; i < 96; ++i)
        if (weak(i))
          for (std::int64_t j = 0; j < 32; ++j) values[static_cast<std::size_t>(i * 32 + j)] *= 1e-3f;
  });
  Json given = shape(folder, "out", {{"layers", 3}, {"ffn", 94}, {"multiple-of", 2}});
  given["rank-by"] = "weights";
  given["no-correction"] = true;
  run_prune(given);
  const Checkpoint before(folder / "m"), after(folder / "out");
  EXPECT_EQ(shape_of(after.config()), (Shape{3, 4, 2, 94, 32, 0}));
  const Rows neurons = without(96, weak), channels = without(32, [](std::int64_t) { return false; });
  const int from[] = {0, 2, 3};
  for (int layer = 0; layer < 3; ++layer) {
    const auto name = [](int of, const std::string& module) {
      return "model.layers." + std::to_string(of) + "." + module + ".weight";
    };
    const auto was = [&](const std::string& module) { return before.read_f32(name(from[layer], module)); };
    const auto is = [&](const std::string& module) { return after.read_f32(name(layer, module)); };
    EXPECT_EQ(is("self_attn.q_proj"), was("self_attn.q_proj"));
    for (const std::string module : {"mlp.gate_proj", "mlp.up_proj"})
      EXPECT_EQ(is(module), taken(was(module), 32, neurons, channels)) << module;
    EXPECT_EQ(is("mlp.down_proj"), taken(was("mlp.down_proj"), 96, channels, neurons));
  }
}

// Experts 1 and 5 of eight are the loudest, and no token chooses them: each has a channel that is large in all states.
TEST(PruneShape, ExpertsThatNoTokenHearsGo) {
  const Folder folder("experts");
  const SmallModel small{.architecture = "MixtralForCausalLM", .type = "mixtral", .layers = 2};
  make_model(folder / "m", small, [](const TensorSpec& spec, std::vector<float>& values) {
    const bool unheard = spec.expert == 1 || spec.expert == 5;
    if (spec.role == TensorRole::kEmbedding)
      for (std::int64_t id = 0; id < 300; ++id) values[static_cast<std::size_t>(id * 32)] = 12.0f;
    if (spec.role == TensorRole::kRouter)
      for (std::int64_t e = 0; e < 8; ++e)
        values[static_cast<std::size_t>(e * 32)] = e == 1 || e == 5 ? -20.0f : 0.0f;
    if (unheard)
      for (float& x : values) x *= 4;
  });
  const auto cut = [&](const std::string& out) {  // on all ids alike: a text of few words leaves more experts unheard
    Json given = shape(folder, out, {{"experts", 6}, {"random-tokens", true}});
    given.erase("text");
    return given;
  };
  const auto outcome = run_prune(cut("out"));
  Json by_weights = cut("loud");
  by_weights["rank-by"] = "weights";
  EXPECT_GT(run_prune(by_weights).after("calibration mean_kl"), 1e-4) << "by their weights they would stay";
  const Checkpoint before(folder / "m"), after(folder / "out");
  EXPECT_EQ(after.config().experts.count, 6);
  EXPECT_LT(outcome.after("calibration mean_kl"), 1e-6);
  const int from[] = {0, 2, 3, 4, 6, 7};
  // In the later block others may stay unheard as well.
  const auto router = before.read_f32("model.layers.0.block_sparse_moe.gate.weight");
  Rows rows(std::begin(from), std::end(from)), columns(32);
  std::iota(columns.begin(), columns.end(), 0);
  EXPECT_EQ(after.read_f32("model.layers.0.block_sparse_moe.gate.weight"), taken(router, 32, rows, columns));
  Json plain = cut("plain");
  plain["no-correction"] = true;
  EXPECT_NEAR(run_prune(plain).after("calibration mean_kl"), 0.0, 1e-9);
  const Checkpoint bare(folder / "plain");
  for (int e = 0; e < 6; ++e) {
    const auto name = [](int expert) {
      return "model.layers.0.block_sparse_moe.experts." + std::to_string(expert) + ".w2.weight";
    };
    EXPECT_EQ(bare.read_f32(name(e)), before.read_f32(name(from[e])));
  }
}

// Shares that are not made to sum to 1 grow when experts leave the softmax: all experts alike, half of them gone, each
// token hears twice as much of the same, which the refit has to take back.
TEST(PruneShape, SharesThatGrowAreTakenBack) {
  const Folder folder("shares");
  Json config = {{"architectures", {"Qwen3MoeForCausalLM"}}, {"model_type", "qwen3_moe"}, {"vocab_size", 300},
                 {"hidden_size", 32}, {"intermediate_size", 96}, {"moe_intermediate_size", 32}, {"head_dim", 8},
                 {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"num_experts", 8},
                 {"num_experts_per_tok", 2}, {"norm_topk_prob", false}, {"max_position_embeddings", 128},
                 {"rms_norm_eps", 1e-5}, {"tie_word_embeddings", true}, {"torch_dtype", "float32"}};
  make_model(folder / "m", {.config = config}, [&](const TensorSpec& spec, std::vector<float>& values) {
    if (spec.role == TensorRole::kRouter)
      for (float& x : values) x *= 0.05f;
    if (spec.expert < 0) return;
    std::mt19937 engine(static_cast<unsigned>(spec.layer) * 3 + static_cast<unsigned>(spec.module.back()) +
                        static_cast<unsigned>(spec.module[spec.module.size() - 6]));
    const bool down = spec.module.ends_with("down_proj");
    for (float& x : values) x = (down ? 3.0f : 0.5f) * (static_cast<float>(engine() >> 8) / 16777216.0f - 0.5f);
  });
  const auto kl = [&](const std::string& out, bool corrected) {
    Json given = shape(folder, out, {{"experts", 4}, {"samples", 40}});
    given["no-correction"] = !corrected;
    return run_prune(given).after("calibration mean_kl");
  };
  const double plain = kl("plain", false), refitted = kl("refitted", true);
  EXPECT_GT(plain, 1e-3);
  EXPECT_LT(refitted, 0.2 * plain);
}

TEST(PruneShape, RefusesShapesThatTheModelCannotHave) {
  const Folder folder("refuse");
  make_model(folder / "m");  // hidden 32, 4 heads of 8, 2 of keys, 96 neurons, 4 blocks
  const auto refused = [&](const Json& asked, const std::string& words) {
    try {
      run_prune(shape(folder, "out", asked));
      ADD_FAILURE() << asked;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage) << asked << error.what();
      EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << asked << error.what();
    }
    EXPECT_FALSE(fs::exists(folder / "out"));
    EXPECT_FALSE(fs::exists(folder / "out.partial"));
  };
  refused(Json::object(), "needs --layers, --heads");
  refused({{"layers", 4}}, "the model has 4 blocks");
  refused({{"ffn", 96}}, "the model has 96 neurons");
  refused({{"ffn", 65}}, "rounded up to a multiple of 32");
  refused({{"hidden", 20}}, "is 32, rounded up");
  refused({{"heads", 3}}, "no multiple of 2 heads of keys");
  refused({{"heads", 2}}, "no multiple of --multiple-of 32");
  refused({{"heads", 3}, {"kv-heads", 1}, {"multiple-of", 8}}, "has 2 query heads, not 3");
  refused({{"hidden", 24}, {"multiple-of", 1}, {"kv-heads", 1}, {"ffn", 200}}, "the model has 96 neurons");
  refused({{"hidden", 30}, {"multiple-of", 2}}, "only where --hidden is a multiple of --heads: 30 and 4");
  refused({{"experts", 2}}, "--experts: the model has none");
  refused({{"max-params", 10}}, "the search goes down to half");
  refused({{"layers", 3}, {"multiple-of", 16}}, "no use for --multiple-of");
  refused({{"max-bytes", "10"}}, "bytes of tensors as f32");
  refused({{"max-bytes", "1G"}}, "less than the model's own");
  refused({{"max-bytes", "100K"}, {"max-params", 40000}}, "one of --max-params");
  refused({{"max-bytes", "100K"}, {"codec", "q5"}}, "q4");
  refused({{"max-params", 40000}, {"codec", "q4"}}, "--codec without them");
  refused({{"ffn", 64}, {"codec", "q4"}}, "--codec without them");
  refused({{"layers", 3}, {"per-layer", true}}, "--ffn or --kv-heads");
  refused({{"heads", 2}, {"multiple-of", 16}, {"per-layer", true}}, "all their query heads");
  refused({{"max-params", 10}, {"per-layer", true}}, "leaves channels and vocabulary");
  refused({{"max-params", 10000000}}, "less than the model's own");
  refused({{"max-params", 40000}, {"layers", 3}}, "--max-params and --layers");
  refused({{"ffn", 64}, {"sparsity", 0.5}}, "no use for --sparsity");
  refused({{"ffn", 64}, {"no-correction", true}, {"damping", 0.1}}, "no use for --damping");
  refused({{"ffn", 64}, {"rank-by", "size"}}, "rank-by");
}

TEST(PruneShape, PlanKnowsTheShapeAndNotesWhatIsRounded) {
  const Folder folder("plan");
  make_model(folder / "m", {.hidden = 64});
  const Command command = prune_command();
  const Json given = shape(folder, "out", {{"layers", 3}, {"hidden", 30}, {"kv-heads", 1}});
  const StagePlan plan = command.plan(Options(command.options, given, "test"), planned_model(Checkpoint(folder / "m")));
  EXPECT_EQ(shape_of(plan.result.config), (Shape{3, 2, 1, 96, 32, 0}));
  ASSERT_EQ(plan.notes.size(), 1u);
  EXPECT_NE(plan.notes[0].find("--hidden rounded up to 32"), std::string::npos);
  run_prune(given);
  EXPECT_EQ(plan.out_bytes, Checkpoint(folder / "out").tensor_bytes());
}

}  // namespace
}  // namespace pare
