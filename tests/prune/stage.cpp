#include <gtest/gtest.h>

#include <cstring>
#include <fstream>

#include "prune/masks.h"
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

bool is_block_linear(const TensorSpec& spec) { return spec.role == TensorRole::kLinear && spec.layer >= 0; }

TEST(PruneStage, MagnitudeEqualsBruteForceAndKeepsDtypeAndTheRest) {
  const Folder folder("magnitude");
  make_model(folder / "m", {.dtype = "bfloat16"});
  Json options = base(folder / "m", folder / "out", "magnitude");
  options["sparsity"] = 0.3;
  const auto outcome = run_prune(options);
  const Checkpoint before(folder / "m"), after(folder / "out");
  std::int64_t zeros = 0, all = 0;
  for (const TensorSpec& spec : before.tensors()) {
    EXPECT_EQ(after.dtype(spec.name), DType::kBF16);
    const auto w = before.read_f32(spec.name), p = after.read_f32(spec.name);
    if (!is_block_linear(spec)) {
      EXPECT_EQ(w, p) << spec.name;
      continue;
    }
    std::vector<std::pair<float, std::size_t>> order;  // lowest first, of equal ones the higher index first
    for (std::size_t i = 0; i < w.size(); ++i) order.emplace_back(std::fabs(w[i]), w.size() - 1 - i);
    std::sort(order.begin(), order.end());
    auto expected = w;
    const std::size_t remove = w.size() * 3 / 10;
    for (std::size_t i = 0; i < remove; ++i) expected[w.size() - 1 - order[i].second] = 0.0f;
    EXPECT_EQ(0, std::memcmp(expected.data(), p.data(), p.size() * sizeof(float))) << spec.name;  // no -0.0 either
    zeros += static_cast<std::int64_t>(remove);
    all += static_cast<std::int64_t>(w.size());
  }
  EXPECT_NEAR(outcome.after("sparsity of all block linears"), static_cast<double>(zeros) / static_cast<double>(all),
              1e-3);
  EXPECT_FALSE(fs::exists(folder / "out.partial"));
  EXPECT_EQ(read_text(folder / "m" / "tokenizer.json"), read_text(folder / "out" / "tokenizer.json"));
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder / "out")) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  EXPECT_EQ(names, (std::vector<std::string>{"README.md", "config.json", "model.safetensors", "prune.json",
                                             "tokenizer.json"}));
}

TEST(PruneStage, RandomTakesHalfOfEveryRowBySeed) {
  const Folder folder("random");
  make_model(folder / "m");
  Json options = base(folder / "m", folder / "a", "random");
  options["sparsity"] = 0.5;
  run_prune(options, 1, 1);
  options["out"] = (folder / "b").string();
  run_prune(options, 1, 2);
  const Checkpoint a(folder / "a"), b(folder / "b");
  for (const TensorSpec& spec : a.tensors()) {
    if (!is_block_linear(spec)) continue;
    const auto w = a.read_f32(spec.name);
    for (std::int64_t r = 0; r < spec.shape[0]; ++r)
      EXPECT_EQ(std::count(w.begin() + r * spec.shape[1], w.begin() + (r + 1) * spec.shape[1], 0.0f),
                spec.shape[1] / 2);
    EXPECT_NE(w, b.read_f32(spec.name));
  }
}

TEST(PruneStage, WandaKeepsTwoOfFourAndMeasures) {
  const Folder folder("pattern");
  make_model(folder / "m", {.tied = false});
  Json options = with_text(base(folder / "m", folder / "out", "wanda"), folder / "text.txt");
  options["pattern"] = "2:4";
  const auto outcome = run_prune(options);
  const Checkpoint after(folder / "out");
  for (const TensorSpec& spec : after.tensors()) {
    if (!is_block_linear(spec)) continue;
    const auto w = after.read_f32(spec.name);
    for (auto at = w.begin(); at != w.end(); at += 4) ASSERT_EQ(std::count(at, at + 4, 0.0f), 2);
  }
  EXPECT_EQ(outcome.after("sparsity of all block linears"), 0.5);
  EXPECT_GT(outcome.after("calibration mean_kl"), 0.0);
  EXPECT_GT(outcome.after("calibration loss"), 0.0);
}

TEST(PruneStage, RefusesWhatItCannotDo) {
  const Folder folder("refuse");
  make_model(folder / "m");
  const auto options = [&](const std::string& method, const Json& more) {
    Json out = base(folder / "m", folder / "out", method);
    out.update(more);
    return out;
  };
  write_text(folder / "text.txt", testing::small_text());
  const Json text = {(folder / "text.txt").string()};
  const auto usage = ExitCode::kUsage;
  EXPECT_EQ(failing_code(options("magnitude", Json::object())), usage);
  EXPECT_EQ(failing_code(options("magnitude", {{"sparsity", 0.5}, {"pattern", "2:4"}})), usage);
  EXPECT_EQ(failing_code(options("magnitude", {{"sparsity", 0.5}, {"ffn", 32}})), usage);
  EXPECT_EQ(failing_code(options("magnitude", {{"sparsity", 0.5}, {"no-correction", true}})), usage);
  EXPECT_EQ(failing_code(options("magnitude", {{"sparsity", 0.5}, {"rank-by", "random"}})), usage);
  EXPECT_EQ(failing_code(options("magnitude", {{"pattern", "5:7"}})), usage);   // 32 inputs
  EXPECT_EQ(failing_code(options("magnitude", {{"sparsity", 0.001}})), usage);  // nothing would go
  EXPECT_EQ(failing_code(options("wanda", {{"sparsity", 0.5}})), usage);        // no text
  for (const char* unused : {"split", "samples", "context", "device"}) {
    const Json value = std::string(unused) == "split"    ? Json("x")
                       : std::string(unused) == "device" ? Json("cuda")
                                                         : Json(16);
    EXPECT_EQ(failing_code(options("magnitude", {{"sparsity", 0.5}, {unused, value}})), usage) << unused;
  }
  EXPECT_EQ(failing_code(options("wanda", {{"sparsity", 0.5}, {"text", text}, {"context", 129}})), usage);
  EXPECT_EQ(failing_code(options("wanda", {{"sparsity", 0.5}, {"text", {"/nonexistent"}}})), ExitCode::kInput);
  EXPECT_FALSE(fs::exists(folder / "out"));
  EXPECT_FALSE(fs::exists(folder / "out.partial"));
  fs::create_directories(folder / "out");
  EXPECT_EQ(failing_code(options("magnitude", {{"sparsity", 0.5}})), usage);
  EXPECT_TRUE(fs::is_empty(folder / "out"));
}

// How long ranks wait, and how much memory they may take, decides nothing about the result.
TEST(PruneStage, ARunThatWasKilledMayWaitLongerForItsRanks) {
  const Folder folder("waits");
  make_model(folder / "m");
  const Command command = prune_command();
  const auto run = [&](Json more, bool dies) {
    Json given = base(folder / "m", folder / "out", "magnitude");
    given["sparsity"] = 0.5;
    given.update(more);
    Progress progress(true);
    Context context;
    context.json = context.quiet = true;
    context.progress = &progress;
    if (dies) context.before_commit = [] { throw failure("test", "", "killed"); };
    command.run(Options(command.options, given, "test"), context);
  };
  EXPECT_THROW(run({{"rank-timeout", 5}}, true), Error);
  ASSERT_TRUE(fs::exists(folder / "out.partial"));
  EXPECT_THROW(run({{"rank-timeout", 5}, {"sparsity", 0.25}}, false), Error);
  run({{"rank-timeout", 7}}, false);
  EXPECT_TRUE(fs::exists(folder / "out"));
  EXPECT_EQ(read_text(folder / "out" / "README.md").find("rank-timeout"), std::string::npos);
}

TEST(PruneStage, LeavesTheUnfinishedWorkOfAnotherCommandAlone) {
  const Folder folder("foreign");
  make_model(folder / "m");
  fs::create_directories(folder / "out.partial");
  write_text(folder / "out.partial" / "training_state.safetensors", "hours of work");
  Json options = base(folder / "m", folder / "out", "magnitude");
  options["sparsity"] = 0.5;
  EXPECT_EQ(failing_code(options), ExitCode::kUsage);
  EXPECT_EQ(read_text(folder / "out.partial" / "training_state.safetensors"), "hours of work");
  // A file on the way to its name is what a run killed in its first moment leaves.
  fs::rename(folder / "out.partial" / "training_state.safetensors", folder / "out.partial" / "prune.json.tmp-1");
  run_prune(options);
  EXPECT_FALSE(fs::exists(folder / "out" / "prune.json.tmp-1"));
}

// A whole model under the work folder's name may be a download of somebody's: only a manifest makes it ours.
TEST(PruneStage, AWholeModelUnderTheWorkNameIsNotTakenForOurs) {
  const Folder folder("download");
  make_model(folder / "m");
  make_model(folder / "out.partial", {.seed = 2});
  const std::string weights = hash_file(folder / "out.partial" / "model.safetensors");
  Json options = base(folder / "m", folder / "out", "magnitude");
  options["sparsity"] = 0.5;
  EXPECT_EQ(failing_code(options), ExitCode::kUsage);
  EXPECT_EQ(hash_file(folder / "out.partial" / "model.safetensors"), weights);
}

TEST(PruneStage, KilledJustBeforeTheRenameIsRepeated) {
  const Folder folder("late");
  make_model(folder / "m");
  Json options = with_text(base(folder / "m", folder / "out", "wanda"), folder / "text.txt");
  options["sparsity"] = 0.5;
  const auto whole = run_prune(options);
  const std::string weights = hash_file(folder / "out" / "model.safetensors");
  fs::rename(folder / "out", folder / "out.partial");
  const auto again = run_prune(options);
  EXPECT_EQ(hash_file(folder / "out" / "model.safetensors"), weights);
  EXPECT_EQ(again.report.to_json(), whole.report.to_json());
}

TEST(PruneStage, TooLittleTextLeavesNothing) {
  const Folder folder("short");
  make_model(folder / "m");
  write_text(folder / "short.txt", "a");
  Json options = base(folder / "m", folder / "out", "wanda");
  options["sparsity"] = 0.5;
  options["text"] = Json::array({(folder / "short.txt").string()});
  EXPECT_EQ(failing_code(options), ExitCode::kInput);
  EXPECT_FALSE(fs::exists(folder / "out.partial"));
}

TEST(PruneStage, RefusesNaNAndLeavesNothing) {
  const Folder folder("nan");
  make_model(folder / "m");
  const std::string victim = "model.layers.3.mlp.up_proj.weight";
  std::ptrdiff_t offset = 0;
  {
    const SafetensorsFile file(folder / "m" / "model.safetensors");
    offset = file.find(victim)->data.data() - file.file().bytes().data() + 4 * 17;
  }
  {
    std::fstream stream(folder / "m" / "model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
    stream.seekp(offset);
    const float nan = NAN;
    stream.write(reinterpret_cast<const char*>(&nan), 4);
  }
  for (const auto& [method, key, value] :
       std::vector<std::tuple<std::string, std::string, Json>>{{"magnitude", "sparsity", 0.5},
                                                               {"wanda", "sparsity", 0.5},
                                                               {"shape", "layers", 3},
                                                               {"shape", "ffn", 64}}) {
    Json options = with_text(base(folder / "m", folder / "out", method), folder / "text.txt");
    options[key] = value;
    try {
      run_prune(options);
      ADD_FAILURE() << method;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput) << method << error.what();
      EXPECT_NE(std::string(error.what()).find(victim), std::string::npos) << method << error.what();
    }
    EXPECT_FALSE(fs::exists(folder / "out")) << method;
    EXPECT_FALSE(fs::exists(folder / "out.partial")) << method;
  }
}

TEST(PruneStage, RefusesAQuantizedFolder) {
  const Folder folder("codes");
  make_model(folder / "m");
  {
    const Checkpoint model(folder / "m");
    FolderTransaction out(folder / "q");
    CheckpointWriter writer(out.work(), model.config(), "float32");
    for (const TensorSpec& spec : model.tensors()) {
      if (spec.name != "model.layers.0.mlp.up_proj.weight") {
        writer.put(spec.name, model.read_f32(spec.name).data());
        continue;
      }
      QuantizedTensor codes{Codec::parse("q8", "test"), spec.shape[0], spec.shape[1], {}, {}, {}, {}};
      codes.codes.assign(static_cast<std::size_t>(codes.rows * codes.cols), 3);
      codes.scales.assign(static_cast<std::size_t>(codes.rows * codes.codec.groups(codes.cols)), f32_to_f16(0.01f));
      writer.put_codes(spec.name, codes);
    }
    writer.finish();
    out.commit();
  }
  Json options = base(folder / "q", folder / "out", "magnitude");
  options["sparsity"] = 0.5;
  EXPECT_EQ(failing_code(options), ExitCode::kInput);
  EXPECT_FALSE(fs::exists(folder / "out.partial"));
}

TEST(PruneStage, RandomTokensCalibrateAModelWithoutATokenizer) {
  const Folder folder("random-tokens");
  make_model(folder / "m");
  fs::remove(folder / "m" / "tokenizer.json");
  Json given = base(folder / "m", folder / "out", "wanda");
  given["pattern"] = "2:4";
  EXPECT_EQ(failing_code(given), ExitCode::kUsage);
  given["random-tokens"] = true;
  given["samples"] = 6;
  given["context"] = 32;
  const auto outcome = run_prune(given);
  EXPECT_GT(outcome.after("calibration mean_kl"), 0.0);
  EXPECT_NEAR(outcome.after("sparsity of all block linears"), 0.5, 1e-9);
  given["out"] = (folder / "again").string();
  given["context"] = 1 << 20;
  EXPECT_EQ(failing_code(given), ExitCode::kUsage);
  given["context"] = 32;
  given["text"] = {(folder / "text.txt").string()};
  EXPECT_EQ(failing_code(given), ExitCode::kUsage);
  EXPECT_FALSE(fs::exists(folder / "again.partial"));
}

TEST(PruneStage, MaxRamMovesActivationsToAFileOrRefuses) {
  const Folder folder("max-ram");
  make_model(folder / "m", {.layers = 1});
  for (const char* method : {"wanda", "shape"}) {
    Json given = with_text(base(folder / "m", folder / "out", method), folder / "text.txt");
    if (std::string(method) == "wanda") given["sparsity"] = 0.5;
    else given["ffn"] = 64;
    given["samples"] = 400;  // more than the measurement holds at a time
    given["context"] = 64;
    const Command command = prune_command();
    const auto planned = [&] {
      return command.plan(Options(command.options, given, "test"), planned_model(Checkpoint(folder / "m")));
    };
    const StagePlan roomy = planned();
    given["max-ram"] = std::to_string(roomy.peak_bytes);
    EXPECT_EQ(planned().peak_bytes, roomy.peak_bytes);
    given["max-ram"] = std::to_string(roomy.peak_bytes - 1);
    const StagePlan tight = planned();
    EXPECT_LT(tight.peak_bytes, roomy.peak_bytes);
    EXPECT_NE(std::find_if(tight.notes.begin(), tight.notes.end(),
                           [](const std::string& note) { return note.find("HDF5") != std::string::npos; }),
              tight.notes.end());
    given["max-ram"] = "100M";
    EXPECT_EQ(failing_code(given), ExitCode::kResources);
    given["max-ram"] = "much";
    EXPECT_EQ(failing_code(given), ExitCode::kUsage);
    EXPECT_FALSE(fs::exists(folder / "out.partial"));

    given["max-ram"] = std::to_string(roomy.peak_bytes - 1);
    run_prune(given);
    const std::string spilled = hash_file(folder / "out" / "model.safetensors");
    fs::remove_all(folder / "out");
    given.erase("max-ram");
    run_prune(given);
    EXPECT_EQ(hash_file(folder / "out" / "model.safetensors"), spilled);
    fs::remove_all(folder / "out");
  }
}

TEST(PruneStage, PlanAgreesWithWhatIsWritten) {
  const Folder folder("plan");
  make_model(folder / "m", {.dtype = "bfloat16"});
  Json given = with_text(base(folder / "m", folder / "out", "shape"), folder / "text.txt");
  given["ffn"] = 50;
  const Command command = prune_command();
  const Options options(command.options, given, "test");
  const PlannedModel input = planned_model(Checkpoint(folder / "m"));
  const StagePlan plan = command.plan(options, input);
  EXPECT_GT(plan.peak_bytes, 0u);
  ASSERT_EQ(plan.notes.size(), 1u);
  EXPECT_NE(plan.notes[0].find("64"), std::string::npos);
  run_prune(given);
  const Checkpoint written(folder / "out");
  EXPECT_EQ(plan.out_bytes, written.tensor_bytes());
  EXPECT_EQ(plan.result.config.intermediate_size, written.config().intermediate_size);
  EXPECT_EQ(plan.result.dtype, written.float_dtype());
  EXPECT_THROW(command.plan(options, input), Error);  // the output exists now
}

}  // namespace
}  // namespace pare
