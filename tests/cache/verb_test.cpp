// `pare eval --cache`: written on the first run, read instead of the original on the second.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "core/error.h"
#include "eval/logit_cache.h"
#include "runtime/export.h"
#include "runtime/verbs/eval.h"
#include "tests/compress/tiny_model.h"

namespace pare {
namespace {

TEST(EvalCacheVerb, WritesThenReusesAndRefusesAnotherText) {
  const fs::path folder = fs::temp_directory_path() / ("pare_eval_cache_" + std::to_string(::getpid()));
  fs::create_directories(folder);
  testing::make_tiny_model(folder / "model", {});
  write_text(folder / "text.txt", testing::tiny_text(3, 5));
  write_text(folder / "other.txt", testing::tiny_text(4, 5));
  Progress quiet(true);
  Context context;
  context.quiet = context.json = true;
  context.progress = &quiet;
  ExportOptions q4;
  q4.out = folder / "q4.pare";
  q4.codec = "q4";
  export_compact(Checkpoint(folder / "model"), q4, context);

  int opened = 0;
  EvalBackend backend;
  backend.folder = [&](const Checkpoint& checkpoint, const std::string&, Context& c) {
    ++opened;
    return folder_logits_by_runtime(checkpoint, c);
  };
  backend.open_cache = [](const fs::path& file, const LogitCacheInfo& expected) { return std::make_unique<LogitCacheReader>(file, expected); };
  backend.create_cache = [](const fs::path& file, const LogitCacheInfo& info) { return std::make_unique<LogitCacheWriter>(file, info); };
  const Command command = make_eval_command(backend);
  Json given = {{"model", q4.out.string()}, {"against", (folder / "model").string()}, {"text", {(folder / "text.txt").string()}},
                {"split", "<|endoftext|>"}, {"ctx", 48}, {"cache", (folder / "cache.h5").string()}, {"speed", false}};
  const Json first = command.run(Options(command.options, given, "eval"), context);
  EXPECT_EQ(first["cache"]["state"], "written");
  EXPECT_EQ(opened, 1);
  const Json second = command.run(Options(command.options, given, "eval"), context);
  EXPECT_EQ(second["cache"]["state"], "reused");
  EXPECT_EQ(opened, 1);  // the original did not run again
  EXPECT_FALSE(second["text"].contains("mean_kl"));
  EXPECT_TRUE(second["text"]["kl_is_lower_bound"].get<bool>());
  const double exact = first["text"]["mean_kl"]["value"].get<double>(), bound = second["text"]["mean_topk_kl"]["value"].get<double>();
  EXPECT_GT(exact, 0);
  EXPECT_LE(bound, exact * 1.001 + 1e-6);
  EXPECT_GT(bound, exact * 0.3);
  EXPECT_EQ(first["text"]["top1_agreement"], second["text"]["top1_agreement"]);
  EXPECT_EQ(first["text"]["compressed"]["loss"], second["text"]["compressed"]["loss"]);
  EXPECT_EQ(first["text"]["predictions"], second["text"]["predictions"]);

  given["text"] = {(folder / "other.txt").string()};
  const auto before = fs::last_write_time(folder / "cache.h5");
  try {
    command.run(Options(command.options, given, "eval"), context);
    ADD_FAILURE() << "a cache of another text was used";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInput);
    EXPECT_NE(error.expected().find("corpus"), std::string::npos) << error.what();
  }
  EXPECT_EQ(fs::last_write_time(folder / "cache.h5"), before);
  given.erase("against");
  EXPECT_THROW(command.run(Options(command.options, given, "eval"), context), Error);
  fs::remove_all(folder);
}

}  // namespace
}  // namespace pare
