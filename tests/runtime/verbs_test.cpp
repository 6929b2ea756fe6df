// The run and bench verbs as functions: options in, JSON out.
#include <gtest/gtest.h>

#include <limits>

#include "core/error.h"
#include "runtime/engine.h"
#include "runtime/verbs/cli.h"
#include "tests/runtime/tiny_model.h"

namespace pare {
namespace {

using namespace pare::testing;

class VerbsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    TokenizerTraining training;
    training.vocab_size = 280;
    write_tiny_model(path(), tiny_config("llama", 32, 64, 4, 2, 8, 280, true), {CodecKind::kQ8, 32}, 5,
                     {{"tokenizer.json", train_tokenizer({"once upon a time there was a time"}, training)}});
  }
  fs::path path() const { return scratch_.path / "m.pare"; }
  Json call(const Command& command, Json given, std::uint64_t seed = 0, int threads = 1) {
    if (!given.contains("model")) given["model"] = path().string();
    Progress progress(true);
    Context context;
    context.json = context.quiet = true;
    context.threads = threads;
    context.seed = seed;
    context.progress = &progress;
    return command.run(Options(command.options, given, "test"), context);
  }
  ScratchFolder scratch_;
};

TEST_F(VerbsTest, RunIsDeterministicAndRespectsTheNumberOfTokens) {
  const Json greedy = call(run_command(), {{"prompt", "once upon"}, {"tokens", 12}, {"ignore-eos", true}});
  EXPECT_EQ(greedy.at("ids").size(), 12u);
  EXPECT_EQ(greedy.at("stop"), "length");
  EXPECT_EQ(greedy.at("activations"), "int8");
  EXPECT_EQ(greedy.at("ids"),
            call(run_command(), {{"prompt", "once upon"}, {"tokens", 12}, {"ignore-eos", true}}, 9).at("ids"));
  const Json drawn = {{"prompt", "once upon"}, {"tokens", 30}, {"temp", 1.5}, {"ignore-eos", true}};
  EXPECT_EQ(call(run_command(), drawn, 1).at("ids"), call(run_command(), drawn, 1).at("ids"));
  EXPECT_NE(call(run_command(), drawn, 1).at("ids"), call(run_command(), drawn, 2).at("ids"));
  EXPECT_EQ(call(run_command(), {{"prompt", "once"}, {"tokens", 0}}).at("ids").size(), 0u);
}

TEST_F(VerbsTest, RunStopsAtEndTokensAndAtTheEndOfTheContext) {
  const Json all =
      call(run_command(), {{"prompt", "once"}, {"tokens", 100000}, {"temp", 1.0}, {"ignore-eos", true}}, 3);
  EXPECT_EQ(all.at("stop"), "context");
  EXPECT_EQ(all.at("ids").size() + all.at("prompt_ids").size(), 301u);  // the last one needs no position
  // Token 2 is the end token of this model.
  bool stopped = false;
  for (std::uint64_t seed = 0; seed < 40 && !stopped; ++seed) {
    const Json some = call(run_command(), {{"prompt", "once"}, {"tokens", 250}, {"temp", 3.0}}, seed);
    if (some.at("stop") != "eos") continue;
    stopped = true;
    for (const Json& id : some.at("ids")) EXPECT_NE(id, 2);
  }
  EXPECT_TRUE(stopped);
}

TEST_F(VerbsTest, RunGuessesAheadAndSaysHowOften) {
  const std::string tokenizer = *Engine::open(path())->file().embedded("tokenizer.json");
  const auto other = [&](const char* name, std::uint32_t seed, std::int64_t vocab, std::int64_t positions,
                         const std::string& text) {
    ModelConfig config = tiny_config("llama", 32, 64, 4, 2, 8, vocab, true);
    config.max_position_embeddings = positions;
    write_tiny_model(scratch_.path / name, config, {CodecKind::kQ4, 32}, seed, {{"tokenizer.json", text}});
    return (scratch_.path / name).string();
  };
  const std::string draft = other("d.pare", 5, 288, 300, tokenizer);
  const std::string small = other("small.pare", 7, 280, 60, tokenizer);
  const Json given = {{"prompt", "once upon"}, {"tokens", 60}, {"ignore-eos", true}};
  const auto with = [&](Json more) {
    more.update(given);
    return more;
  };
  const Json plain = call(run_command(), given);
  EXPECT_FALSE(plain.contains("ahead"));
  for (const Json& more : {Json{{"draft", draft}}, Json{{"draft", draft}, {"draft-tokens", 3}}, Json{{"lookup", 2}},
                           Json{{"draft", small}, {"draft-confidence", 0.0}}, Json{{"draft", path().string()}}}) {
    const Json run = call(run_command(), with(more));
    EXPECT_EQ(run.at("ids"), plain.at("ids")) << more;
    EXPECT_EQ(run.at("text"), plain.at("text"));
    const Json& ahead = run.at("ahead");
    EXPECT_EQ(ahead.at("tokens"), 59) << more;
    EXPECT_LE(ahead.at("passes"), 59);
    EXPECT_GT(ahead.at("drafted").get<int>(), 0) << more;
    EXPECT_LE(ahead.at("accepted").get<int>(), ahead.at("tested").get<int>());
    EXPECT_EQ(more.contains("draft"), ahead.contains("draft_seconds"));
  }
  const Json never = call(run_command(), with({{"fallback", draft}, {"threshold", 0.0}}));
  EXPECT_EQ(never.at("ids"), plain.at("ids"));
  EXPECT_EQ(never.at("ahead").at("handed_over"), 0);
  const Json by_turns = call(run_command(), with({{"fallback", draft}, {"threshold", 0.6}}));
  EXPECT_GT(by_turns.at("ahead").at("handed_over").get<int>(), 0);
  EXPECT_EQ(by_turns.at("ahead").at("tokens"), 60);
  Json turn = {{"draft", draft}, {"temp", 1.0}};
  EXPECT_EQ(call(run_command(), with(turn), 4, 1).at("ids"), call(run_command(), with(turn), 4, 2).at("ids"));

  const auto refused = [&](const Json& more) {
    try {
      call(run_command(), with(more));
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_NE(refused({{"draft", draft}, {"fallback", draft}}).find("one of --draft and --fallback"), std::string::npos);
  EXPECT_NE(refused({{"draft", draft}, {"lookup", 2}}).find("one of --draft and --lookup"), std::string::npos);
  EXPECT_NE(refused({{"fallback", draft}, {"lookup", 2}}).find("one of --lookup and"), std::string::npos);
  EXPECT_NE(refused({{"threshold", 0.2}}).find("--threshold has no use"), std::string::npos);
  EXPECT_NE(refused({{"draft-tokens", 2}}).find("--draft-tokens has no use"), std::string::npos);
  EXPECT_NE(refused({{"lookup", 2}, {"draft-confidence", 0.1}}).find("--draft-confidence has no use"),
            std::string::npos);
  EXPECT_NE(refused({{"draft", draft}, {"draft-tokens", 0}}).find("draft-tokens"), std::string::npos);
  EXPECT_NE(refused({{"fallback", draft}, {"threshold", 1.5}}).find("threshold"), std::string::npos);
  EXPECT_NE(refused({{"lookup", 0}}).find("lookup"), std::string::npos);
  TokenizerTraining training;
  training.vocab_size = 280;
  const std::string strange =
      other("strange.pare", 7, 280, 60, train_tokenizer({"quite another text, that is"}, training));
  for (const char* option : {"draft", "fallback"})
    EXPECT_NE(refused({{option, strange}}).find("same tokenizer"), std::string::npos) << refused({{option, strange}});
}

TEST_F(VerbsTest, AnEmptyPromptStartsFromATokenOfTheFile) {
  const Json run = call(run_command(), {{"tokens", 3}, {"ignore-eos", true}});
  EXPECT_EQ(run.at("prompt_ids").size(), 1u);  // <|endoftext|>: this tokenizer has no begin token
  EXPECT_EQ(run.at("prompt_ids").at(0), 0);
}

TEST_F(VerbsTest, BenchMeasuresEachThreadCount) {
  const Json given = {{"prompt", 40}, {"tokens", 5}, {"threads-list", "1,2"}, {"repeats", 2}};
  const Json bench = call(bench_command(), given, 0, 0);
  EXPECT_THROW(call(bench_command(), given), Error);  // one number of threads and a list of them
  ASSERT_EQ(bench.at("results").size(), 2u);
  for (const Json& row : bench.at("results")) {
    EXPECT_GT(row.at("prefill_tokens_per_second").at("median").get<double>(), 0);
    EXPECT_GT(row.at("decode_tokens_per_second").at("median").get<double>(), 0);
    EXPECT_GT(row.at("resident_bytes").get<std::uint64_t>(), 0u);
    EXPECT_GT(row.at("cache_bytes").get<std::uint64_t>(), 0u);
    EXPECT_GT(row.at("open_seconds").at("min").get<double>(), 0);
    EXPECT_GT(row.at("first_token_seconds").get<double>(), 0);
    EXPECT_LE(row.at("token_seconds").at("median").get<double>(), row.at("token_seconds").at("p95").get<double>());
    const double decode = row.at("decode_tokens_per_second").at("median").get<double>();
    const double read = row.at("decode_bytes_per_second").get<double>();
    EXPECT_DOUBLE_EQ(read, decode * bench.at("bytes_per_token").get<double>());
    EXPECT_FALSE(row.contains("decode_read_share"));  // the machine was not measured
  }
  EXPECT_EQ(bench.at("results").at(1).at("threads"), 2);
  EXPECT_TRUE(bench.at("machine").empty());
  for (const char* bad : {"", "0", "1,", "1,x", "-1", "1 2"}) {
    EXPECT_THROW(call(bench_command(), {{"threads-list", bad}}, 0, 0), Error) << bad;
  }
  EXPECT_THROW(call(bench_command(), {{"prompt", 301}}), Error);
  EXPECT_THROW(call(bench_command(), {{"prompt", 10}, {"tokens", 0}, {"depth", 5}}), Error);
}

// The cache is filled anew for every repetition: what has to fit is the depth and one decoding.
TEST_F(VerbsTest, BenchDecodesAtTheDepthThatWasAsked) {
  for (const int prompt : {0, 10})
    call(bench_command(), {{"prompt", prompt}, {"tokens", 60}, {"depth", 240}, {"repeats", 3}});
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  for (const auto& [tokens, depth] : {std::pair<std::int64_t, std::int64_t>{60, 241},
                                      {10, most},
                                      {most, 1},
                                      {most / 3 + 1, 1},
                                      {301, 0}}) {
    const Json given = {{"prompt", 0}, {"tokens", tokens}, {"depth", depth}, {"repeats", 2}};
    EXPECT_THROW(call(bench_command(), given), Error) << tokens << " " << depth;
  }
}

TEST_F(VerbsTest, BenchCountsWhatTheFileHolds) {
  const Json bench = call(bench_command(), {{"prompt", 4}, {"tokens", 2}, {"depth", 9}, {"repeats", 1}}, 0, 1);
  const auto engine = Engine::open(path());
  double bytes = 0, products = 0;
  for (const CompactTensor& tensor : engine->file().tensors()) {
    const bool block = tensor.name.find(".layers.") != std::string::npos;
    const bool embedding = tensor.name == "model.embed_tokens.weight";
    if (!embedding || engine->config().tie_word_embeddings) bytes += static_cast<double>(tensor.payload.size());
    if (block && tensor.shape.size() == 2) products += static_cast<double>(tensor.shape[0] * tensor.shape[1]);
  }
  EXPECT_DOUBLE_EQ(bench.at("bytes_per_token").get<double>(), bytes);
  EXPECT_DOUBLE_EQ(bench.at("block_weights_per_token").get<double>(), products);
}

TEST_F(VerbsTest, BenchMeasuresTheMachine) {
  const std::string gguf = (scratch_.path / "m.gguf").string();
  call(export_command(), {{"to", "gguf"}, {"out", gguf}});
  const Json bench = call(
      bench_command(), {{"model", gguf}, {"prompt", 20}, {"tokens", 3}, {"repeats", 1}, {"roofline", true}}, 0, 1);
  ASSERT_GE(bench.at("machine").size(), 1u);
  EXPECT_EQ(bench.at("machine").at(0).at("threads"), 1);
  for (const char* key : {"read_bytes_per_second", "int8_operations_per_second", "float_operations_per_second"}) {
    const Json& peak = bench.at("machine").at(0).at(key);
    EXPECT_GT(peak.at("median").get<double>(), 0) << key;
    EXPECT_LE(peak.at("median").get<double>(), peak.at("best").get<double>()) << key;
  }
  const Json& row = bench.at("results").at(0);
  const std::string limit = bench.at("limit").get<std::string>() + "_operations_per_second";
  EXPECT_DOUBLE_EQ(row.at("prefill_peak_share").get<double>(),
                   row.at("prefill_operations_per_second").get<double>() /
                       bench.at("machine").at(0).at(limit).at("median").get<double>());
  EXPECT_GT(row.at("decode_read_share").get<double>(), 0);
}

}  // namespace
}  // namespace pare
