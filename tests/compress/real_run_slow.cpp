// Whole runs with the real tools on a random model.
#include <gtest/gtest.h>

#include <cmath>

#include "compress/pipeline.h"
#include "compress/sample.h"
#include "core/checkpoint.h"
#include "core/compact.h"
#include "core/corpus.h"
#include "fake_tools.h"
#include "runtime/verbs/cli.h"
#include "tiny_model.h"

namespace pare {
namespace {

using testing::Files;

class RealRun : public ::testing::Test {
 protected:
  RealRun() : tools(real_toolbox()), progress(true) {
    testing::make_tiny_model(scratch.path() / "model", {});
    write_text(scratch.path() / "text.txt", testing::tiny_text(3, 60));
    write_text(scratch.path() / "held-out.txt", testing::tiny_text(4, 20));
    context.progress = &progress;
    context.json = true;
    context.threads = 2;
  }
  Json run(const std::string& yaml, const std::string& out, bool text = true, bool calibrates = true) {
    Json flags = {{"model", (scratch.path() / "model").string()}, {"out", (scratch.path() / out).string()}};
    if (text) {
      if (calibrates) flags["text"] = {(scratch.path() / "text.txt").string()};
      flags["split"] = "<|endoftext|>";
      flags["eval-text"] = {(scratch.path() / "held-out.txt").string()};
    }
    return Pipeline(parse_recipe(yaml, "r.yaml", scratch.path(), flags, tools.stages), tools).run(context);
  }
  double figure(const std::string& stage, const std::string& metric) const {
    for (const auto& row : context.report.rows())
      if (row.stage == stage && row.metric == metric && row.after) return *row.after;
    ADD_FAILURE() << "no row " << stage << " " << metric;
    return std::nan("");
  }

  Files scratch;
  Toolbox tools;
  Progress progress;
  Context context;
};

TEST_F(RealRun, DefaultRecipeGivesAFileThatComputesWhatTheFolderSays) {
  const std::string before = scratch.snapshot("model");
  run("", "out");
  EXPECT_EQ(scratch.snapshot("model"), before);
  const CompactFile file(scratch.path() / "out/model.pare");
  EXPECT_TRUE(file.verify().empty());
  EXPECT_TRUE(file.embedded("recipe").has_value());
  ASSERT_TRUE(file.embedded("report").has_value());
  // The folder and the file were scored on the same text: int8 activations may add a little, never much.
  const double folder = figure("quantize", "mean_kl"), compact = figure("compact file", "mean_kl");
  EXPECT_GT(folder, 0);
  EXPECT_LT(std::abs(compact - folder), 0.2 * folder + 1e-3);
  EXPECT_LE(figure("compact file", "runtime_mean_kl"), 1e-5);
  EXPECT_LT(figure("compact file", "bits_per_weight"), 12);
  EXPECT_DOUBLE_EQ(figure("compact file", "file_bytes"),
                   static_cast<double>(fs::file_size(scratch.path() / "out/model.pare")));
  const Command inspect = inspect_command();  // reads the run's rows out of the file
  const Json seen =
      inspect.run(Options(inspect.options, {{"path", (scratch.path() / "out/model.pare").string()}}, "test"), context);
  EXPECT_FALSE(seen.at("report").at("rows").empty());
  // Codes in the file are those of the folder.
  const Checkpoint folder_model(scratch.path() / "out/model");
  for (const auto& tensor : file.tensors())
    EXPECT_EQ(tensor.codec.is_float(), !folder_model.is_quantized(tensor.name)) << tensor.name;
}

TEST_F(RealRun, SameBytesFromTheSameRecipe) {
  run("stages: [{prune: {method: wanda, sparsity: 0.3}}, quantize]", "a");
  run("stages: [{prune: {method: wanda, sparsity: 0.3}}, quantize]", "b");
  EXPECT_EQ(hash_file(scratch.path() / "a/model.pare"), hash_file(scratch.path() / "b/model.pare"));
  EXPECT_EQ(hash_path(scratch.path() / "a/model"), hash_path(scratch.path() / "b/model"));
}

TEST_F(RealRun, WithoutTextItSamplesItsOwn) {
  const Json result = run("samples: 8\ncontext: 64", "out", false);
  EXPECT_EQ(result["text"], "sampled from the model itself");
  EXPECT_EQ(result["eval_text"], "sampled from the model itself");
  EXPECT_GT(figure("compact file", "mean_kl"), 0);
}

TEST_F(RealRun, ExportAloneIsNearlyLossless) {
  run("stages: []\nexport: {codec: f32}\nrequire: {mean-kl: 1.0e-6}", "out", true, false);
  EXPECT_LE(figure("compact file", "mean_kl"), 1e-6);
}

TEST_F(RealRun, SampledTextIsTheSameAtAnyThreadCount) {
  const Toolbox& t = tools;
  Context one = context;
  one.threads = 1;
  t.sample({scratch.path() / "model", scratch.path() / "one.jsonl", 6, 48, 5, scratch.path()}, one);
  t.sample({scratch.path() / "model", scratch.path() / "two.jsonl", 6, 48, 5, scratch.path()}, context);
  t.sample({scratch.path() / "model", scratch.path() / "other.jsonl", 6, 48, 6, scratch.path()}, context);
  EXPECT_EQ(read_text(scratch.path() / "one.jsonl"), read_text(scratch.path() / "two.jsonl"));
  EXPECT_NE(read_text(scratch.path() / "one.jsonl"), read_text(scratch.path() / "other.jsonl"));
  EXPECT_GE(read_documents({scratch.path() / "one.jsonl"}, {}).size(), 6u);
  EXPECT_FALSE(fs::exists(scratch.path() / "sampling.pare"));
}

}  // namespace
}  // namespace pare
