#include "compress/pipeline.h"

#include <gtest/gtest.h>
#include <sys/file.h>
#include <fcntl.h>

#include "compress/compress.h"
#include "compress/report_table.h"
#include "fake_tools.h"

namespace pare {
namespace {

using testing::FakeTools;
using testing::Files;

class PipelineTest : public ::testing::Test {
 protected:
  PipelineTest() : progress(true) {
    scratch.write("model/config.json", "{\"a\": 1}");
    scratch.write("model/model.safetensors", "weights");
    context.progress = &progress;
    context.json = true;
  }
  Recipe recipe(const std::string& yaml = "", Json flags = Json::object()) {
    if (!flags.contains("model")) flags["model"] = (scratch.path() / "model").string();
    if (!flags.contains("out")) flags["out"] = (scratch.path() / "out").string();
    return parse_recipe(yaml, "r.yaml", scratch.path(), flags, tools.stages);
  }
  Json run(const std::string& yaml = "", const Json& flags = Json::object()) {
    return Pipeline(recipe(yaml, flags), tools).run(context);
  }
  ExitCode code(const std::string& yaml = "", const Json& flags = Json::object()) {
    try {
      run(yaml, flags);
    } catch (const Error& e) {
      message = e.what();
      return e.code();
    }
    return ExitCode::kOk;
  }

  Files scratch;
  FakeTools fake;
  Toolbox tools = fake.toolbox();
  Progress progress;
  Context context;
  std::string message;
};

TEST_F(PipelineTest, LeavesModelFolderFileReportAndRecipe) {
  const std::string before = scratch.snapshot("model");
  const Json result = run("stages: [prune, quantize]");
  EXPECT_EQ(result["status"], "finished");
  EXPECT_TRUE(fs::exists(scratch.path() / "out/model.pare"));
  EXPECT_TRUE(fs::exists(scratch.path() / "out/recipe.resolved.yaml"));
  EXPECT_EQ(read_text(scratch.path() / "out/model/log.txt"), "prune q4\nquantize q4\n");
  EXPECT_FALSE(fs::exists(scratch.path() / "out.work"));
  EXPECT_FALSE(fs::exists(scratch.path() / "out.partial"));
  EXPECT_EQ(scratch.snapshot("model"), before);
  EXPECT_EQ(fake.counts.sampled, 2);
  EXPECT_EQ(fake.counts.measured, 4);  // original, prune, quantize, compact file
  EXPECT_EQ(fake.counts.compared, 1);
  const Report report = Report::from_json(read_json(scratch.path() / "out/report.json")["rows"], "report");
  int layer_errors = 0, times = 0;
  for (const auto& row : report.rows()) {
    layer_errors += row.metric == "layer_error" ? 1 : 0;
    times += row.metric == "seconds" ? 1 : 0;
  }
  EXPECT_EQ(layer_errors, 2);
  EXPECT_EQ(times, 2);
}

TEST_F(PipelineTest, OnlyDeterministicRowsAreEmbedded) {
  run();
  const std::string file = read_text(scratch.path() / "out/model.pare");
  EXPECT_NE(file.find("mean_kl"), std::string::npos);
  EXPECT_EQ(file.find("tokens_per_second"), std::string::npos);
  EXPECT_EQ(file.find("\"seconds\""), std::string::npos);
  EXPECT_EQ(file.find(scratch.path().string()), std::string::npos) << "a path of this machine is in the file";
}

TEST_F(PipelineTest, SecondRunDoesNothing) {
  run("stages: [prune, quantize]");
  const std::string before = scratch.snapshot();
  fake.counts = {};
  const Json result = run("stages: [prune, quantize]");
  EXPECT_EQ(result["status"], "already finished");
  EXPECT_EQ(result["work_done"], false);
  EXPECT_EQ(fake.counts.stages + fake.counts.sampled + fake.counts.measured + fake.counts.exported, 0);
  EXPECT_EQ(scratch.snapshot(), before);
  EXPECT_FALSE(context.report.rows().empty());
}

TEST_F(PipelineTest, ExistingOutputOfAnotherRunIsRefused) {
  scratch.write("out/precious.txt", "mine");
  EXPECT_EQ(code(), ExitCode::kUsage);
  EXPECT_EQ(read_text(scratch.path() / "out/precious.txt"), "mine");
  EXPECT_EQ(fake.counts.stages, 0);
  fs::remove_all(scratch.path() / "out");
  EXPECT_EQ(code(), ExitCode::kOk);
  EXPECT_EQ(code("stages: [{quantize: {codec: q8}}]"), ExitCode::kUsage);  // other options
  EXPECT_EQ(code("require: {mean-kl: 9}"), ExitCode::kUsage);
  scratch.write("model/model.safetensors", "other weights");
  EXPECT_EQ(code(), ExitCode::kUsage);
}

TEST_F(PipelineTest, FinishedStagesAreSkippedAfterAFailure) {
  fake.fail_stage = "quantize";
  EXPECT_EQ(code("stages: [prune, quantize]"), ExitCode::kFailure);
  EXPECT_FALSE(fs::exists(scratch.path() / "out"));
  EXPECT_EQ(fake.counts.stages, 2);
  fake.fail_stage.clear();
  fake.counts = {};
  const Json result = run("stages: [prune, quantize]");
  EXPECT_EQ(fake.counts.stages, 1);
  EXPECT_EQ(fake.counts.sampled, 0);
  EXPECT_EQ(fake.counts.measured, 2);  // quantize and the compact file
  EXPECT_EQ(result["skipped"], Json({"sample", "sample held-out", "prune"}));
  // The result of the interrupted run is the one of an uninterrupted run.
  const std::string resumed = hash_file(scratch.path() / "out/model.pare");
  run("stages: [prune, quantize]", {{"out", (scratch.path() / "other").string()}});
  EXPECT_EQ(hash_file(scratch.path() / "other/model.pare"), resumed);
}

TEST_F(PipelineTest, AChangedOptionRedoesThatStageAndTheFollowing) {
  const Json flags = {{"work", (scratch.path() / "work").string()}};
  run("stages: [prune, quantize]", flags);
  fs::remove_all(scratch.path() / "out");
  fake.counts = {};
  run("stages: [prune, {quantize: {codec: q8}}]", flags);
  EXPECT_EQ(fake.counts.stages, 1);
  fs::remove_all(scratch.path() / "out");
  fake.counts = {};
  run("stages: [{prune: {sparsity: 0.25}}, {quantize: {codec: q8}}]", flags);
  EXPECT_GE(fake.counts.stages, 1);
  EXPECT_TRUE(fs::exists(scratch.path() / "work"));
}

TEST_F(PipelineTest, ChangedTextRedoesTheStage) {
  const fs::path text = scratch.write("t.txt", "one");
  const Json flags = {{"work", (scratch.path() / "work").string()}, {"text", {text.string()}}};
  run("", flags);
  EXPECT_EQ(fake.counts.sampled, 1);  // held-out only
  EXPECT_EQ(fake.counts.stage_options[0]["text"], Json::array({text.string()}));
  fs::remove_all(scratch.path() / "out");
  fake.counts = {};
  run("", flags);
  EXPECT_EQ(fake.counts.stages, 0);
  fs::remove_all(scratch.path() / "out");
  scratch.write("t.txt", "two");
  run("", flags);
  EXPECT_EQ(fake.counts.stages, 1);
}

TEST_F(PipelineTest, WeightsAndContentsOfWeightedTextsDecide) {
  const fs::path text = scratch.write("t.txt", "one");
  const Json flags = {{"work", (scratch.path() / "work").string()}};
  const auto stages_run = [&](const std::string& weight) {
    fs::remove_all(scratch.path() / "out");
    fake.counts = {};
    run("stages: [{quantize: {text: [\"" + text.string() + "=" + weight + "\"]}}]", flags);
    return fake.counts.stages;
  };
  EXPECT_EQ(stages_run("0.5"), 1);
  EXPECT_EQ(stages_run("0.5"), 0);
  EXPECT_EQ(stages_run("0.9"), 1);
  scratch.write("t.txt", "two");
  EXPECT_EQ(stages_run("0.9"), 1);
}

TEST_F(PipelineTest, ACacheMadeByAStageDoesNotMakeItAnotherRun) {
  OptionDecl cache;
  cache.name = "cache";
  cache.type = OptionType::kPath;
  tools.stages[0].options.push_back(cache);
  const std::string yaml = "stages: [{quantize: {cache: c.h5}}]";
  run(yaml);
  scratch.write("c.h5", "made meanwhile");
  EXPECT_EQ(run(yaml)["status"], "already finished");
}

TEST_F(PipelineTest, AFolderOfSomethingElseIsNotTakenForWork) {
  const fs::path file = scratch.write("out.work/thesis.txt", "years");
  EXPECT_EQ(code(), ExitCode::kUsage);
  EXPECT_NE(message.find("out.work"), std::string::npos) << message;
  EXPECT_EQ(read_text(file), "years");
}

TEST_F(PipelineTest, AStageKilledJustAfterItsRenameIsNotRepeated) {
  fake.die_after = "prune";
  EXPECT_EQ(code("stages: [prune, quantize]"), ExitCode::kFailure);
  fake.die_after.clear();
  fake.counts = {};
  run("stages: [prune, quantize]");
  EXPECT_EQ(fake.counts.stages, 1);
  const std::string resumed = hash_file(scratch.path() / "out/model.pare");
  run("stages: [prune, quantize]", {{"out", (scratch.path() / "other").string()}});
  EXPECT_EQ(hash_file(scratch.path() / "other/model.pare"), resumed) << "rows of the stage are missing";
}

TEST_F(PipelineTest, TheUnfinishedWorkOfAnotherCommandStays) {
  const fs::path file = scratch.write("out.partial/quantize.json", "hours");  // `pare quantize --out out`, interrupted
  EXPECT_EQ(code(), ExitCode::kUsage);
  EXPECT_NE(message.find("out.partial"), std::string::npos) << message;
  EXPECT_EQ(read_text(file), "hours");
  fs::remove(file);
  EXPECT_EQ(code(), ExitCode::kOk);
}

TEST_F(PipelineTest, AKilledExportIsMadeAnew) {
  run();
  const std::string whole = hash_file(scratch.path() / "out/model.pare");
  // Just before the rename, and in the middle.
  fs::rename(scratch.path() / "out", scratch.path() / "out.partial");
  EXPECT_EQ(code(), ExitCode::kOk) << message;
  EXPECT_EQ(hash_file(scratch.path() / "out/model.pare"), whole);
  fs::remove_all(scratch.path() / "out");
  scratch.write("out.partial/lock", "");
  scratch.write("out.partial/model.pare.tmp-1", "half");
  EXPECT_EQ(code(), ExitCode::kOk) << message;
  EXPECT_EQ(hash_file(scratch.path() / "out/model.pare"), whole);
  EXPECT_FALSE(fs::exists(scratch.path() / "out/lock"));
  EXPECT_FALSE(fs::exists(scratch.path() / "out/model.pare.tmp-1"));
}

TEST_F(PipelineTest, AFolderWithoutItsRecordIsMadeAgain) {
  const Json flags = {{"work", (scratch.path() / "work").string()}};
  run("", flags);
  const std::string whole = hash_file(scratch.path() / "out/model.pare");
  fs::remove_all(scratch.path() / "out");
  for (const auto& entry : fs::directory_iterator(scratch.path() / "work"))
    if (entry.path().filename().string().starts_with("1-quantize") && entry.path().extension() == ".json")
      fs::remove(entry.path());
  fake.counts = {};
  run("", flags);
  EXPECT_EQ(fake.counts.stages, 1);
  EXPECT_EQ(hash_file(scratch.path() / "out/model.pare"), whole);
}

TEST_F(PipelineTest, TemporariesOfAKilledStageDoNotReachTheResult) {
  fake.fail_stage = "quantize";
  EXPECT_EQ(code(), ExitCode::kFailure);
  fs::path partial;
  for (const auto& entry : fs::directory_iterator(scratch.path() / "out.work"))
    if (entry.path().extension() == ".partial") partial = entry.path();
  ASSERT_FALSE(partial.empty());
  std::ofstream(partial / "model.safetensors.tmp-123") << "half";
  fake.fail_stage.clear();
  run();
  EXPECT_FALSE(fs::exists(scratch.path() / "out/model/model.safetensors.tmp-123"));
}

TEST_F(PipelineTest, MissedGateIsExitFourNamesTheFigureAndLeavesNothing) {
  fake.kl = {0.5};
  EXPECT_EQ(code("require: {mean-kl: 0.1, bytes: 100000, tokens-per-second: 500}"), ExitCode::kQuality);
  EXPECT_NE(message.find("mean-kl at most 0.1, measured 0.5"), std::string::npos) << message;
  EXPECT_NE(message.find("tokens-per-second at least 500"), std::string::npos) << message;
  EXPECT_EQ(message.find("bytes"), std::string::npos) << message;
  EXPECT_FALSE(fs::exists(scratch.path() / "out"));
  EXPECT_FALSE(fs::exists(scratch.path() / "out.partial"));
  EXPECT_TRUE(fs::exists(scratch.path() / "out.work/report.json"));
  EXPECT_NE(read_text(scratch.path() / "out.work/report.html").find("missed"), std::string::npos);
  // Relaxed, the finished stages are used.
  fake.counts = {};
  EXPECT_EQ(code("require: {mean-kl: 1}"), ExitCode::kOk);
  EXPECT_EQ(fake.counts.stages, 0);
}

TEST_F(PipelineTest, UnmeasuredOrNanFigureMissesTheGate) {
  EXPECT_EQ(code("require: {top1: 0.1}"), ExitCode::kQuality);
  EXPECT_NE(message.find("measured nothing"), std::string::npos) << message;
  fake.kl = {std::nan("")};
  EXPECT_EQ(code("require: {mean-kl: 100}"), ExitCode::kQuality);
}

TEST_F(PipelineTest, DryRunWritesNothing) {
  const std::string before = scratch.snapshot();
  const Plan plan = Pipeline(recipe("stages: [prune, quantize, quantize]"), tools).plan();
  ASSERT_EQ(plan.steps.size(), 6u);
  EXPECT_EQ(plan.steps[2].label, "prune");
  EXPECT_EQ(plan.steps[4].label, "quantize 2");
  EXPECT_GE(plan.steps[2].seconds.value(), 2.0);
  const std::string text = plan.text();
  for (const char* part : {"prune", "fallback: one tensor in q8c", "peak memory", "model.pare: pare",
                           "compressed-tensors", "sampled from the model itself"})
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  EXPECT_EQ(plan.to_json()["status"], "planned");
  EXPECT_EQ(scratch.snapshot(), before);
  EXPECT_EQ(fake.counts.stages, 0);
}

TEST_F(PipelineTest, DryRunVerbPrintsThePlan) {
  const Command verb = compress_command(tools);
  const Options options(
      verb.options,
      {{"model", (scratch.path() / "model").string()}, {"out", (scratch.path() / "out").string()}, {"dry-run", true}},
      "command line");
  EXPECT_EQ(verb.run(options, context)["status"], "planned");
  EXPECT_FALSE(fs::exists(scratch.path() / "out.work"));
}

TEST_F(PipelineTest, PlanShowsWhatIsDone) {
  fake.fail_stage = "quantize";
  EXPECT_EQ(code("stages: [prune, quantize]"), ExitCode::kFailure);
  const Plan plan = Pipeline(recipe("stages: [prune, quantize]"), tools).plan();
  EXPECT_TRUE(plan.steps[0].done);
  EXPECT_TRUE(plan.steps[2].done);
  EXPECT_FALSE(plan.steps[3].done);
}

TEST_F(PipelineTest, ResourcesAreRefusedInAdvance) {
  fake.stage_plan.out_bytes = std::uint64_t{1} << 60;
  EXPECT_EQ(code(), ExitCode::kResources);
  EXPECT_NE(message.find("free disk space"), std::string::npos) << message;
  fake.stage_plan.out_bytes = 100;
  fake.stage_plan.peak_bytes = std::uint64_t{1} << 60;
  EXPECT_EQ(code(), ExitCode::kResources);
  EXPECT_FALSE(fs::exists(scratch.path() / "out.work"));
}

TEST_F(PipelineTest, BadInputsAreToldTogether) {
  const fs::path empty = scratch.write("empty.txt", "");
  tools.stages[0].plan = [](const Options&, const PlannedModel&) -> StagePlan {
    throw input_error("mlp.down_proj", "a group that divides 172", "32");
  };
  EXPECT_EQ(code("", {{"text", {empty.string()}}}), ExitCode::kInput);
  EXPECT_NE(message.find("2 problems"), std::string::npos) << message;
  EXPECT_NE(message.find("empty.txt"), std::string::npos) << message;
  EXPECT_NE(message.find("172"), std::string::npos) << message;
  EXPECT_FALSE(fs::exists(scratch.path() / "out.work"));
}

TEST_F(PipelineTest, AStageIsPlannedOnWhatTheOneBeforeItAnnounces) {
  tools.inspect = [inspect = tools.inspect](const fs::path& model) {
    ModelFacts facts = inspect(model);
    facts.planned.config.num_layers = 6;
    facts.planned.config.intermediate_size = 172;
    return facts;
  };
  fake.stage_plan.result.config.num_layers = 5;
  fake.stage_plan.result.config.intermediate_size = 128;
  fake.stage_plan.result.compact_bytes = 77;
  std::vector<std::int64_t> layers;
  tools.stages[0].plan = [&](const Options&, const PlannedModel& input) {
    layers.push_back(input.config.num_layers);
    StagePlan plan;
    plan.result = input;
    return plan;
  };
  tools.export_bytes = [](const PlannedModel& model, const fs::path&, const std::string&) {
    return model.compact_bytes;
  };
  const Plan plan = Pipeline(recipe("stages: [quantize, prune, quantize]"), tools).plan();
  EXPECT_EQ(layers, (std::vector<std::int64_t>{6, 5}));
  EXPECT_NE(plan.text().find("layers 6 -> 5, ffn 172 -> 128"), std::string::npos) << plan.text();
  EXPECT_EQ(plan.steps.back().out_bytes, 77u);
}

TEST_F(PipelineTest, AStageThatWouldFailLaterIsRefusedNow) {
  tools.stages[0].plan = [](const Options&, const PlannedModel& input) -> StagePlan {
    if (input.quantized) throw input_error("model", "float weights", "codes");
    StagePlan plan;
    plan.result.quantized = true;
    return plan;
  };
  EXPECT_EQ(code("stages: [quantize, quantize]"), ExitCode::kInput);
  EXPECT_NE(message.find("stages[1]"), std::string::npos) << message;
  EXPECT_EQ(fake.counts.stages, 0);
}

// How long ranks wait decides nothing about a stage's result.
TEST_F(PipelineTest, AFinishedStageStandsWhateverItsRanksWaitFor) {
  fake.fail_stage = "quantize";
  EXPECT_EQ(code("stages: [{prune: {rank-timeout: 5}}, quantize]"), ExitCode::kFailure);
  EXPECT_EQ(fake.counts.stages, 2);
  fake.fail_stage.clear();
  const Json result = run("stages: [{prune: {rank-timeout: 9}}, {quantize: {rank-timeout: 9}}]");
  EXPECT_EQ(fake.counts.stages, 3) << message;
  EXPECT_EQ(result["skipped"].back(), "prune");
}

TEST_F(PipelineTest, ThePlanSaysWhatTransformersDoesNotLoad) {
  const auto loader = [&](const std::string& yaml) {
    return Pipeline(recipe(yaml), tools).plan().loaders.back();
  };
  EXPECT_EQ(loader("stages: [prune]"), "model/: transformers");
  EXPECT_EQ(loader("stages: [{prune: {per-layer: true}}, quantize]"),
            "model/: pare; transformers does not load it: blocks of different widths");
  ModelConfig& config = fake.stage_plan.result.config;
  config.family = "llama";
  config.num_layers = 2;
  config.num_heads = config.num_kv_heads = 2;
  config.layer_widths = {{2, 2, 32}, {2, 2, 16}};
  EXPECT_NE(loader("stages: [prune]").find("transformers does not load it: blocks of different widths: intermediate"),
            std::string::npos) << loader("stages: [prune]");
}

TEST_F(PipelineTest, KeysThatNothingReadsAreRefused) {
  const std::string text = scratch.write("t.txt", "one").string();
  const auto refused = [&](const std::string& yaml, const Json& flags, const std::string& key) {
    EXPECT_EQ(code(yaml, flags), ExitCode::kUsage) << yaml << flags;
    EXPECT_NE(message.find(key), std::string::npos) << message;
  };
  refused("", {{"text", {text}}, {"eval-text", {text}}, {"samples", 7}}, "--samples has no use");
  refused("", {{"text", {text}}, {"eval-text", {text}}, {"context", 99}}, "--context has no use");
  refused("split: X", Json::object(), "--split has no use");
  refused("", {{"eval-text", {text}}, {"split", "X"}, {"eval-split", "Y"}}, "--split has no use");
  refused("eval: {split: X}", Json::object(), "--split has no use");
  refused("stages: []", {{"text", {text}}}, "--text has no use");
  refused("stages: [{quantize: {text: t.txt}}]", {{"text", {text}}}, "--text has no use");
  EXPECT_EQ(fake.counts.stages, 0);
  EXPECT_EQ(code("", {{"eval-text", {text}}, {"samples", 7}}), ExitCode::kOk);
}

TEST_F(PipelineTest, ThePlanSaysWhenTheHeldOutTextIsNot) {
  const std::string text = scratch.write("t.txt", "one").string();
  const auto notes = [&](const Json& flags) { return Pipeline(recipe("", flags), tools).plan().text(); };
  EXPECT_NE(notes({{"text", {text}}, {"eval-text", {text}}}).find("t.txt is calibration text as well"),
            std::string::npos);
  EXPECT_EQ(notes({{"text", {text}}}).find("calibration text as well"), std::string::npos);
}

TEST_F(PipelineTest, ASeedOfZeroStandsOverTheRecipes) {
  const Command verb = compress_command(tools);
  const fs::path file = scratch.write("recipe.yaml", "seed: 5\n");
  context.seed = 0;
  context.seed_given = true;
  const Options options(verb.options,
                        {{"recipe", file.string()}, {"model", (scratch.path() / "model").string()},
                         {"out", (scratch.path() / "out").string()}},
                        "command line");
  verb.run(options, context);
  EXPECT_EQ(fake.counts.stage_options[0]["seed"], 0);
  fs::remove_all(scratch.path() / "out");
  context.seed_given = false;
  verb.run(options, context);
  EXPECT_EQ(fake.counts.stage_options[1]["seed"], 5);
}

TEST_F(PipelineTest, MissingModelAndText) {
  EXPECT_EQ(code("", {{"model", (scratch.path() / "nowhere").string()}}), ExitCode::kInput);
  EXPECT_EQ(code("", {{"model", (scratch.path() / "model/config.json").string()}}), ExitCode::kInput);
  EXPECT_EQ(code("", {{"text", {"/nowhere.txt"}}}), ExitCode::kInput);
  fs::remove(scratch.path() / "model/config.json");
  EXPECT_EQ(code(), ExitCode::kInput);
  EXPECT_FALSE(fs::exists(scratch.path() / "out.work"));
}

TEST_F(PipelineTest, FoldersThatContainEachOtherAreRefused) {
  for (const char* out : {"model", "model/out", "."}) {
    EXPECT_EQ(code("", {{"out", (scratch.path() / out).lexically_normal().string()}}), ExitCode::kUsage) << out;
    EXPECT_EQ(fake.counts.stages, 0);
  }
}

TEST_F(PipelineTest, UnwritableOutput) {
  const fs::path file = scratch.write("a-file", "x");
  EXPECT_EQ(code("", {{"out", (file / "out").string()}}), ExitCode::kFailure);
  EXPECT_EQ(read_text(file), "x");
}

TEST_F(PipelineTest, OneRunAtATime) {
  fs::create_directories(scratch.path() / "out.work");
  const int fd = ::open((scratch.path() / "out.work/lock").c_str(), O_RDWR | O_CREAT, 0644);
  ASSERT_EQ(::flock(fd, LOCK_EX), 0);
  EXPECT_EQ(code(), ExitCode::kResources);
  ::close(fd);
  EXPECT_EQ(code(), ExitCode::kOk);
}

TEST_F(PipelineTest, ResolvedRecipeReproducesTheRun) {
  const fs::path text = scratch.write("t.txt", "one");
  run("seed: 5\ntext: t.txt\nsplit: X\nstages: [{prune: {sparsity: 0.25}}, quantize]");
  const std::string yaml = read_text(scratch.path() / "out/recipe.resolved.yaml");
  run(yaml, {{"out", (scratch.path() / "again").string()}});
  EXPECT_EQ(fake.counts.stage_options[2]["sparsity"], 0.25);
  EXPECT_EQ(fake.counts.stage_options[2]["seed"], 5);
  EXPECT_EQ(fake.counts.stage_options[2]["split"], "X");
  for (const char* key : {"sparsity", "codec", "group-size", "seed", "split", "text"})
    EXPECT_EQ(fake.counts.stage_options[2][key], fake.counts.stage_options[0][key]) << key;
  EXPECT_EQ(read_text(scratch.path() / "again/model/log.txt"), read_text(scratch.path() / "out/model/log.txt"));
}

TEST_F(PipelineTest, ThePageShowsEverythingAndIsTheSameTwice) {
  const fs::path text = scratch.write("<b>&.txt", "one");
  const std::string yaml = "text: \"<b>&.txt\"\nrequire: {mean-kl: 1}\nstages: [prune, quantize]";
  run(yaml);
  const std::string page = read_text(scratch.path() / "out/report.html");
  for (const char* part : {"<td>compact file</td>", "<td>prune</td>", "fallback: one tensor in q8c", "layer_error",
                           "0.0100 ± 0.0010", "<td>mean-kl</td><td>at most</td><td class=n>1</td>", "met</td>",
                           "sparsity: 0.5", "&lt;b&gt;&amp;.txt", "sampled from the model itself"})
    EXPECT_NE(page.find(part), std::string::npos) << part << "\n" << page;
  for (const char* part : {"<b>", "<script", "http://", "https://", "src="})
    EXPECT_EQ(page.find(part), std::string::npos) << part;
  // Everything but the last table, which holds times and memory.
  const auto lasting = [](const std::string& whole) {
    const auto end = whole.find("<h2>Times and memory");
    EXPECT_NE(end, std::string::npos);
    EXPECT_NE(whole.find("tokens_per_second", end), std::string::npos);
    return whole.substr(0, end);
  };
  EXPECT_EQ(lasting(page).find("tokens_per_second"), std::string::npos);
  fs::remove_all(scratch.path() / "out");
  fake.fail_stage = "quantize";
  EXPECT_EQ(code(yaml), ExitCode::kFailure);
  fake.fail_stage.clear();
  run(yaml);  // resumed
  EXPECT_EQ(lasting(read_text(scratch.path() / "out/report.html")), lasting(page));
}

TEST_F(PipelineTest, WithoutStagesOnlyTheFileIsMade) {
  const Json result = run("stages: []");
  EXPECT_EQ(fake.counts.stages, 0);
  EXPECT_EQ(fake.counts.sampled, 1);  // held-out
  EXPECT_FALSE(fs::exists(scratch.path() / "out/model"));
  EXPECT_TRUE(fs::exists(scratch.path() / "out/model.pare"));
}

TEST(ReportTable, OneLinePerStageAndAlignedColumns) {
  Report report;
  report.add({"original", "perplexity", {}, 4.5, "", {}, true});
  report.add({"quantize", "layer_error", {}, 1.0, "", {}, true});
  report.add({"compact file", "mean_kl", {}, 0.0123, "nats", 0.001, true});
  report.add({"compact file", "file_bytes", {}, 1234567, "bytes", {}, true});
  const std::string table = report_table(report);
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 3) << table;
  EXPECT_NE(table.find("0.0123 ± 0.0010"), std::string::npos) << table;
  EXPECT_NE(table.find("1.23 MB"), std::string::npos) << table;
}

}  // namespace
}  // namespace pare
