// The verbs tokenize and train-tokenizer, called as the command line calls them.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <fstream>

#include "core/error.h"
#include "core/file.h"
#include "core/tokenizer.h"
#include "runtime/verbs/cli.h"

namespace pare {
namespace {

const fs::path kGolden = fs::path(PARE_SOURCE_DIR) / "tests/golden/tokenizers";

Json call(const Command& command, const Json& given, bool json = true) {
  Progress progress(true);
  Context context;
  context.json = json;
  context.quiet = true;
  context.progress = &progress;
  return command.run(Options(command.options, given, command.name), context);
}

ExitCode code_of(const Command& command, const Json& given) {
  try {
    call(command, given);
  } catch (const Error& error) {
    return error.code();
  }
  return ExitCode::kOk;
}

class TokenizeVerbs : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("pare_tokenize_" + std::to_string(::getpid()));
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  fs::path folder_;
};

TEST_F(TokenizeVerbs, EncodesAndDecodes) {
  const std::string file = (kGolden / "llama3.json").string();
  const Json result = call(tokenize_command(), {{"tokenizer", file}, {"text", "a a"}});
  ASSERT_EQ(result["count"], result["ids"].size());
  EXPECT_EQ(result["ids"][0], 1);
  EXPECT_EQ(result["tokens"][0], "<s>");
  EXPECT_EQ(result["tokens"][1], "a");
  EXPECT_EQ(result["tokens"][2], "\u0120a");
  Json ids = Json::array();
  for (const Json& id : result["ids"]) ids.push_back(id.dump());
  EXPECT_EQ(call(tokenize_command(), {{"tokenizer", file}, {"decode", ids}})["text"], "a a");
  EXPECT_EQ(call(tokenize_command(), {{"tokenizer", file}, {"decode", ids}, {"show-special", true}})["text"], "<s>a a");
  EXPECT_EQ(call(tokenize_command(), {{"tokenizer", file}, {"text", "<s>"}, {"no-special", true}})["ids"], Json::array({1}));
  EXPECT_EQ(call(tokenize_command(), {{"tokenizer", file}, {"text", "<s>"}, {"no-special", true}, {"plain", true}})["count"], 3);
}

TEST_F(TokenizeVerbs, RefusesContradictions) {
  const std::string file = (kGolden / "llama3.json").string();
  EXPECT_EQ(code_of(tokenize_command(), {{"tokenizer", file}}), ExitCode::kUsage);
  EXPECT_EQ(code_of(tokenize_command(), {{"tokenizer", file}, {"text", "a"}, {"file", file}}), ExitCode::kUsage);
  EXPECT_EQ(code_of(tokenize_command(), {{"tokenizer", file}, {"batch", true}}), ExitCode::kUsage);
  EXPECT_EQ(code_of(tokenize_command(), {{"tokenizer", file}, {"text", "a"}, {"decode", Json::array({"1"})}}),
            ExitCode::kUsage);
  EXPECT_EQ(code_of(tokenize_command(), {{"tokenizer", file}, {"decode", Json::array({"x"})}}), ExitCode::kUsage);
  EXPECT_EQ(code_of(tokenize_command(), {{"tokenizer", (folder_ / "none.json").string()}, {"text", "a"}}), ExitCode::kInput);
  EXPECT_EQ(code_of(tokenize_command(), {{"tokenizer", folder_.string()}, {"text", "a"}}), ExitCode::kInput);
}

TEST_F(TokenizeVerbs, ArgumentsAreBytes) {
  const std::string file = (kGolden / "llama3.json").string();
  EXPECT_EQ(call(tokenize_command(), {{"tokenizer", file}, {"text", "\xff"}})["ids"],
            call(tokenize_command(), {{"tokenizer", file}, {"text", "\xEF\xBF\xBD"}})["ids"]);
}

TEST_F(TokenizeVerbs, OptionsRefuseNumbersThatAreNone) {
  const std::vector<OptionDecl> decls = {{.name = "x", .type = OptionType::kNumber, .help = "", .minimum = 0},
                                         {.name = "n", .type = OptionType::kInteger, .help = "", .minimum = 0}};
  EXPECT_THROW(Options(decls, {{"x", std::nan("")}}, "test"), Error);
  EXPECT_THROW(Options(decls, {{"x", INFINITY}}, "test"), Error);
  EXPECT_THROW(Options(decls, {{"n", UINT64_MAX}}, "test"), Error);
  EXPECT_EQ(Options(decls, {{"n", INT64_MAX}}, "test").get<std::int64_t>("n"), INT64_MAX);
}

TEST_F(TokenizeVerbs, TrainsAFolder) {
  const std::string text = (kGolden / "training.txt").string(), out = (folder_ / "out").string();
  const Json given = {{"text", Json::array({text})}, {"vocab-size", 320}, {"out", out}};
  EXPECT_EQ(call(train_tokenizer_command(), given)["vocab_size"], 320);
  EXPECT_FALSE(fs::exists(out + ".partial"));
  const std::string trained = read_text(fs::path(out) / "tokenizer.json");
  const Tokenizer tokenizer = Tokenizer::from_file(fs::path(out) / "tokenizer.json");
  EXPECT_EQ(tokenizer.id("<|endoftext|>"), 0);
  EXPECT_EQ(read_json(fs::path(out) / "tokenizer_config.json")["eos_token"], "<|endoftext|>");
  EXPECT_EQ(call(tokenize_command(), {{"tokenizer", out}, {"text", "<|endoftext|>"}})["ids"], Json::array({0}));

  EXPECT_EQ(code_of(train_tokenizer_command(), given), ExitCode::kUsage);  // never over an existing folder
  EXPECT_EQ(read_text(fs::path(out) / "tokenizer.json"), trained);
  Json small = given;
  small["vocab-size"] = 256;
  small["out"] = (folder_ / "small").string();
  EXPECT_EQ(code_of(train_tokenizer_command(), small), ExitCode::kUsage);
  EXPECT_FALSE(fs::exists(folder_ / "small"));
  EXPECT_FALSE(fs::exists(folder_ / "small.partial"));
}

}  // namespace
}  // namespace pare
