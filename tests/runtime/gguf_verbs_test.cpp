// GGUF files given to the verbs that compute: what they say is about that file, not about the compact one in between.
#include <gtest/gtest.h>

#include "runtime/engine.h"
#include "runtime/verbs/cli.h"
#include "tests/core/gguf_bytes.h"

namespace pare {
namespace {

using testing::contains;
using testing::error_of;

class GgufVerbsTest : public ::testing::Test {
 protected:
  Json call(const Command& command, Json given) {
    given["model"] = path_.string();
    Progress progress(true);
    Context context;
    context.json = context.quiet = true;
    context.threads = 1;
    context.progress = &progress;
    return command.run(Options(command.options, given, "test"), context);
  }
  std::string error(const Command& command, const Json& given) {
    return error_of([&] { call(command, given); });
  }
  testing::Scratch scratch_;
  testing::GgufModelParts parts_;
  fs::path path_ = scratch_ / "model.gguf";
};

TEST_F(GgufVerbsTest, AnUnknownTokenizerIsNamedByWhoeverNeedsIt) {
  parts_.set("tokenizer.ggml.pre", std::string("gpt-9"));
  parts_.write(path_);
  testing::write_bytes(scratch_ / "text.txt", "some text");
  const Json text = {{"text", {(scratch_ / "text.txt").string()}}};
  for (const std::string& said : {error(run_command(), {{"prompt", "A"}}), error(eval_command_runtime(), text)}) {
    EXPECT_TRUE(said.starts_with("3 ") && contains(said, path_.string()) && contains(said, "gpt-9")) << said;
  }
  EXPECT_GT(call(bench_command(), {{"prompt", 4}, {"tokens", 2}, {"repeats", 1}}).at("results").size(), 0u);
}

TEST_F(GgufVerbsTest, AFileWithoutTokensIsNamed) {
  for (const char* key : {"model", "pre", "tokens", "token_type", "merges", "unknown_token_id", "bos_token_id"})
    parts_.erase(std::string("tokenizer.ggml.") + key);
  parts_.write(path_);
  const std::string said = error(run_command(), {{"prompt", "A"}});
  EXPECT_TRUE(said.starts_with("3 " + path_.string() + ": expected an embedded tokenizer")) << said;
}

TEST_F(GgufVerbsTest, PlacesAndSizesAreThoseOfTheFile) {
  parts_.write(path_);
  const std::string said = error(run_command(), {{"prompt", std::string(100, 'A')}});
  EXPECT_TRUE(said.starts_with("3 " + path_.string() + ": expected at most 64 positions")) << said;
  const Json bench = call(bench_command(), {{"prompt", 4}, {"tokens", 2}, {"repeats", 1}});
  EXPECT_EQ(bench.at("file_bytes"), fs::file_size(path_));
  EXPECT_EQ(bench.at("converted"), true);
  const auto engine = Engine::open(path_);
  EXPECT_EQ(engine->path(), path_);
  EXPECT_TRUE(runtime_logits(engine)->name().starts_with("model.gguf ")) << runtime_logits(engine)->name();
}

// Before the machine is measured.
TEST_F(GgufVerbsTest, RooflineRefusesDamagedGguf) {
  testing::write_bytes(path_, "GGUF");
  EXPECT_TRUE(contains(error(bench_command(), {{"roofline", true}}), "the version"));
}

}  // namespace
}  // namespace pare
