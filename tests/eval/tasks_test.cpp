#include "eval/lm_eval_results.h"
#include "eval/tasks.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <fstream>
#include <random>

#include "core/error.h"
#include "eval/speed.h"
#include "tests/eval/fake_logits.h"

namespace pare {
namespace {

// Bytes 'a'..'z', blank and <s> as single tokens, no merges: ids are easy to follow. Blank is spelled "Ġ" by
// byte-level.
Json letter_tokenizer(bool bos) {
  Json vocab = Json::object();
  for (int i = 0; i < 26; ++i) vocab[std::string(1, static_cast<char>('a' + i))] = i;
  vocab["\xC4\xA0"] = 26;
  Json added = Json::array({{{"id", 27},
                             {"content", "<s>"},
                             {"single_word", false},
                             {"lstrip", false},
                             {"rstrip", false},
                             {"normalized", false},
                             {"special", true}}});
  Json post = nullptr;
  if (bos) {
    post = {{"type", "TemplateProcessing"},
            {"single", Json::array({{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}},
                                    {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}})},
            {"pair", Json::array({{{"Sequence", {{"id", "A"}, {"type_id", 0}}}},
                                  {{"Sequence", {{"id", "B"}, {"type_id", 1}}}}})},
            {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {27}}, {"tokens", {"<s>"}}}}}}};
  }
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added},
          {"normalizer", nullptr},
          {"pre_tokenizer",
           {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}}},
          {"post_processor", post},
          {"decoder", {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", true}, {"use_regex", true}}},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"vocab", vocab},
            {"merges", Json::array()}}}};
}

// Probability of each next id does not depend on what came before.
class Unigram : public LogitsSource {
 public:
  explicit Unigram(std::vector<double> probability) : probability_(std::move(probability)) {}
  std::string name() const override { return "unigram"; }
  std::int64_t vocab_size() const override { return static_cast<std::int64_t>(probability_.size()); }
  void begin(std::span<const std::int32_t> ids) override {
    ++begun;
    last.assign(ids.begin(), ids.end());
  }
  void logits(std::int64_t, std::int64_t count, float* out) override {
    for (; count > 0; --count) {
      for (const double p : probability_) *out++ = static_cast<float>(std::log(p));
    }
  }
  int begun = 0;
  std::vector<std::int32_t> last;

 private:
  std::vector<double> probability_;
};

// a: 1/2, blank 1/4, b 1/8, the other 25 share 1/8.
Unigram letters() {
  std::vector<double> p(28, 0.125 / 25);
  p[0] = 0.5;
  p[26] = 0.25;
  p[1] = 0.125;
  return Unigram(p);
}
const double kRare = std::log(0.125 / 25), kA = std::log(0.5), kB = std::log(0.125);

class TasksTest : public ::testing::Test {
 protected:
  void SetUp() override {
    file_ = fs::temp_directory_path() / ("pare_task_" + std::to_string(::getpid()) + ".jsonl");
  }
  void TearDown() override { fs::remove(file_); }
  Task task(const std::string& text, std::int64_t limit = 0) {
    std::ofstream(file_, std::ios::binary) << text;
    return read_task(file_, limit);
  }
  void expect_refused(const std::string& text, const std::string& place, const std::string& what) {
    try {
      task(text);
      FAIL() << "accepted: " << text;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput);
      EXPECT_EQ(error.place().substr(0, file_.string().size() + place.size()), file_.string() + place) << error.what();
      EXPECT_NE(std::string(error.what()).find(what), std::string::npos) << error.what();
    }
  }
  fs::path file_;
  Progress quiet_{true};
};

TEST_F(TasksTest, MultipleChoiceByLogProbabilityAndByCharacters) {
  // " b" is likelier than " aaaaaaaa" in total, less likely per character.
  const Task t = task(
      R"({"query": "q", "choices": ["b", "aaaaaaaa"], "gold": 0})" "\n\n"
      R"({"query": "q", "choices": ["z", "aaaaaaaa"], "gold": 1, "other": [1]})" "\r\n"
      R"({"query": "q", "choices": ["b", "aa", "a"], "gold": 1})");
  EXPECT_EQ(t.kind, TaskKind::kMultipleChoice);
  ASSERT_EQ(t.items.size(), 3u);
  EXPECT_EQ(t.items[0].pairs[1].continuation, " aaaaaaaa");
  EXPECT_EQ(t.items[0].pairs[1].characters, 8);
  Unigram model = letters();
  const Tokenizer tokenizer = Tokenizer::from_json(letter_tokenizer(true), "letters");
  const TaskResult r = score_task(model, tokenizer, t, {512, {27}}, quiet_);
  // Beside the blank: b -2.08 > aaaaaaaa -5.55, right; z -5.30 > aaaaaaaa, wrong; a -0.69 > aa, wrong.
  ASSERT_GT(kB, 8 * kA);
  ASSERT_GT(kRare, 8 * kA);
  EXPECT_EQ(r.picks, (std::vector<std::int64_t>{0, 0, 2}));
  EXPECT_DOUBLE_EQ(r.accuracy->value, 1.0 / 3);
  EXPECT_DOUBLE_EQ(*r.accuracy->standard_error, std::sqrt((1.0 / 3) * (2.0 / 3) / 2));  // sqrt(p (1 - p) / (n - 1))
  // Per character, blank included in the sum: aaaaaaaa -0.87 wins twice, aa -1.39 beats a -2.08.
  EXPECT_DOUBLE_EQ(r.accuracy_norm->value, 2.0 / 3);
  EXPECT_FALSE(r.perplexity.has_value());
}

TEST_F(TasksTest, LogitsAreTakenInBlocksAndGiveTheSameScores) {
  const Task t = task(
      R"({"query": "the quick", "choices": ["brown fox jumps", "lazy dog", "s", "x"], "gold": 0})" "\n"
      R"({"query": "over", "choices": ["a", "b", "abcdefghijklmnop"], "gold": 2})");
  const Tokenizer tokenizer = Tokenizer::from_json(letter_tokenizer(true), "letters");
  FakeLogits whole(28, 3, 2.0), blocks(28, 3, 2.0);
  const TaskResult expected = score_task(whole, tokenizer, t, {512, {27}, 1000}, quiet_);
  EXPECT_EQ(whole.largest_block, 17);
  for (const std::int64_t rows : {1, 3, 16}) {
    blocks.begun = blocks.largest_block = 0;
    const TaskResult r = score_task(blocks, tokenizer, t, {512, {27}, rows}, quiet_);
    EXPECT_LE(blocks.largest_block, rows);
    EXPECT_EQ(blocks.begun, 5) << "choices of one token share their window";
    EXPECT_EQ(to_json(r).dump(), to_json(expected).dump());
    EXPECT_EQ(r.picks, expected.picks);
  }
}

TEST_F(TasksTest, AccNormCountsCharactersNotBytes) {
  const Task t = task("{\"query\": \"q\", \"choices\": [\"\xC3\xA9t\xC3\xA9\", \" x\"], \"gold\": 0}");
  EXPECT_EQ(t.items[0].pairs[0].characters, 3);
  EXPECT_EQ(t.items[0].pairs[0].bytes, 5);
  EXPECT_EQ(t.items[0].pairs[1].continuation, "  x");  // a blank of its own does not replace the one between
  EXPECT_EQ(t.items[0].pairs[1].characters, 2);
  Unigram model = letters();
  const Tokenizer tokenizer = Tokenizer::from_json(letter_tokenizer(true), "letters");
  const TaskResult r = score_task(model, tokenizer, task(R"({"query": "q", "choices": ["bb", "aaaa"], "gold": 1})"),
                                  {512, {27}}, quiet_);
  EXPECT_DOUBLE_EQ(r.accuracy_bytes->value, r.accuracy_norm->value);  // the same in ASCII
}

TEST_F(TasksTest, ContinuationIsGreedyMatchAndPerplexity) {
  const Task t = task(R"({"context": "some text", "continuation": "a"})"
                      "\n"
                      R"({"context": "x ", "continuation": "aa"})"
                      "\n"
                      R"({"context": "x", "continuation": "b"})");
  EXPECT_EQ(t.kind, TaskKind::kContinuation);
  std::vector<double> p(28, 0.05 / 26);
  p[0] = 0.5;
  p[26] = 0.45;
  Unigram model(p);
  const Tokenizer tokenizer = Tokenizer::from_json(letter_tokenizer(true), "letters");
  const TaskResult r = score_task(model, tokenizer, t, {512, {27}}, quiet_);
  // Every continuation begins with a blank, which is not the greedy choice; the blanks of "x " count to the
  // continuation.
  EXPECT_EQ(r.picks, (std::vector<std::int64_t>{0, 0, 0}));
  const double blank = std::log(0.45), a = std::log(0.5), b = std::log(0.05 / 26);
  const double sum = (blank + a) + (2 * blank + 2 * a) + (blank + b);
  EXPECT_NEAR(r.perplexity->value, std::exp(-sum / 3), 1e-5);
}

TEST_F(TasksTest, GreedyContinuationIsFound) {
  // Answers "a" after a blank and a blank after everything else: an order-1 model.
  class Chain : public LogitsSource {
   public:
    std::string name() const override { return "chain"; }
    std::int64_t vocab_size() const override { return 28; }
    void begin(std::span<const std::int32_t> ids) override { ids_.assign(ids.begin(), ids.end()); }
    void logits(std::int64_t first, std::int64_t count, float* out) override {
      for (std::int64_t t = first; t < first + count; ++t, out += 28) {
        std::fill(out, out + 28, 0.0f);
        out[ids_[static_cast<std::size_t>(t)] == 26 ? 0 : 26] = 5.0f;
      }
    }
    std::vector<std::int32_t> ids_;
  } model;
  const Tokenizer tokenizer = Tokenizer::from_json(letter_tokenizer(true), "letters");
  const TaskResult r = score_task(model, tokenizer,
                                  task(R"({"context": "x", "continuation": "a"})"
                                       "\n"
                                       R"({"context": "x", "continuation": "ab"})"),
                                  {512, {27}}, quiet_);
  EXPECT_EQ(r.picks, (std::vector<std::int64_t>{1, 0}));
}

TEST_F(TasksTest, MinimalPairsCompareWholeSentences) {
  const Task t = task(R"({"sentence_good": "aab", "sentence_bad": "abb", "UID": "x"})"
                      "\n"
                      R"({"sentence_good": "b", "sentence_bad": "a"})"
                      "\n"
                      R"({"sentence_good": "ab", "sentence_bad": "ba"})");
  EXPECT_EQ(t.kind, TaskKind::kMinimalPair);
  Unigram model = letters();
  const Tokenizer tokenizer = Tokenizer::from_json(letter_tokenizer(true), "letters");
  const TaskResult r = score_task(model, tokenizer, t, {512, {27}}, quiet_);
  EXPECT_EQ(r.picks, (std::vector<std::int64_t>{0, 1, 0}));
  EXPECT_DOUBLE_EQ(r.accuracy->value, 2.0 / 3);  // the third is a tie, which counts for the first
  EXPECT_EQ(t.items[0].pairs[0].continuation, " aab");
  EXPECT_FALSE(r.accuracy_norm.has_value());
  EXPECT_EQ(model.last.front(), 27);
  // Without any prefix the first token is context, here the blank.
  EXPECT_EQ(score_task(model, tokenizer, t, {512, {}}, quiet_).picks, r.picks);
  // So it is where the text begins with what would be put before it.
  score_task(model, tokenizer, t, {512, {26}}, quiet_);
  EXPECT_EQ(model.last, (std::vector<std::int32_t>{26, 1}));
}

TEST_F(TasksTest, TextsAreScoredInWindowsThatOverlapByOneId) {
  const Task t = task(R"({"text": "abcdefghij"})"
                      "\n"
                      R"({"text": "a b\u00a0 \u001cc "})");
  EXPECT_EQ(t.kind, TaskKind::kText);
  EXPECT_EQ(t.items[1].pairs[0].words, 4);  // a, b, c and the empty one behind the last blank
  EXPECT_EQ(t.items[1].pairs[0].bytes, 9);
  const Tokenizer tokenizer = Tokenizer::from_json(letter_tokenizer(true), "letters");
  Unigram model = letters();
  const TaskResult r = score_task(model, tokenizer, task(R"({"text": "abcdefghij"})"), {4, {27}}, quiet_);
  EXPECT_EQ(model.last, (std::vector<std::int32_t>{5, 6, 7, 8}));  // the last two ids behind as much as fits
  EXPECT_EQ(model.begun, 3);
  const double sum = kA + kB + 8 * kRare;
  EXPECT_NEAR(*r.byte_perplexity, std::exp(-sum / 10), 1e-5);
  EXPECT_NEAR(*r.bits_per_byte, -sum / 10 / std::log(2), 1e-5);
  EXPECT_NEAR(*r.word_perplexity / std::exp(-sum), 1, 1e-5);
  EXPECT_FALSE(r.accuracy);
  // What a window sees decides: the same text by a model with memory, in windows cut by hand.
  FakeLogits memory(28, 3, 2.0);
  const TaskResult whole = score_task(memory, tokenizer, t, {512, {27}}, quiet_);
  EXPECT_EQ(whole.items, 2);
  EXPECT_THROW(score_task(memory, tokenizer, t, {512, {}}, quiet_), Error);  // nothing predicts the first token
}

TEST_F(TasksTest, ResultsInTheFormOfTheHarness) {
  const Tokenizer tokenizer = Tokenizer::from_json(letter_tokenizer(true), "letters");
  Unigram model = letters();
  std::vector<TaskResult> results;
  for (const char* text : {R"({"query": "q", "choices": ["b", "aaaaaaaa"], "gold": 0})", R"({"text": "abc"})",
                           R"({"context": "x", "continuation": "a"})"}) {
    const std::string line = std::string(text) + "\n";
    results.push_back(score_task(model, tokenizer, task(line + line + line, 2), {512, {27}}, quiet_));
    results.back().name = to_json(results.back()).at("kind").get<std::string>();
  }
  LmEvalRun run{"some/model.pare", {{"act", "int8"}}, 2, 512, 1795307004.5, 1.5};
  const Json json = lm_eval_results(results, run);
  const Json& choices = json.at("results").at("multiple_choice");
  EXPECT_EQ(choices.at("acc,none"), 1.0);
  EXPECT_EQ(choices.at("acc_stderr,none"), 0.0);
  EXPECT_EQ(choices.at("acc_norm,none"), 0.0);
  EXPECT_EQ(choices.at("acc_bytes,none"), 0.0);
  EXPECT_EQ(choices.at("sample_len"), 2);
  EXPECT_EQ(json.at("results").at("text").at("byte_perplexity_stderr,none"), "N/A");
  EXPECT_TRUE(json.at("results").at("continuation").contains("perplexity_stderr,none"));
  EXPECT_EQ(json.at("higher_is_better").at("continuation"), (Json{{"acc", true}, {"perplexity", false}}));
  EXPECT_EQ(json.at("n-samples").at("text"), (Json{{"original", 3}, {"effective", 2}}));
  EXPECT_EQ(json.at("config").at("limit"), 2);
  EXPECT_EQ(json.at("model_name_sanitized"), "model.pare");
  EXPECT_EQ(lm_eval_file("out/r.json", run), "out/r.json");
  const std::string file = lm_eval_file("out", run).string();
  EXPECT_EQ(file.substr(0, 23), "out/model.pare/results_");
  EXPECT_EQ(file.substr(file.size() - 12), ".500000.json");
}

TEST_F(TasksTest, LongContextsLoseTheirBeginning) {
  Unigram model = letters();
  const Tokenizer tokenizer = Tokenizer::from_json(letter_tokenizer(true), "letters");
  const Task t = task(R"({"query": "abcdefghij", "choices": ["a", "b"], "gold": 0})");
  score_task(model, tokenizer, t, {4, {27}}, quiet_);
  EXPECT_EQ(model.last, (std::vector<std::int32_t>{7, 8, 9, 26}));  // h i j blank; the choice is only a target
  EXPECT_THROW(
      score_task(model, tokenizer, task(R"({"query": "a", "choices": ["aaaa", "b"], "gold": 0})"), {4, {27}}, quiet_),
      Error);
}

TEST_F(TasksTest, AgreementCountsEqualPicks) {
  TaskResult a, b;
  a.picks = {0, 1, 2, 0};
  b.picks = {0, 1, 1, 0};
  set_agreement(a, b);
  EXPECT_DOUBLE_EQ(a.agreement->value, 0.75);
  EXPECT_DOUBLE_EQ(*a.agreement->standard_error, std::sqrt(0.75 * 0.25 / 3));
  b.picks.pop_back();
  EXPECT_THROW(set_agreement(a, b), Error);
}

TEST_F(TasksTest, GapSentencesScoreTheirRest) {
  const Task t =
      task(R"({"sentence": "x said _ was here", "option1": "a", "option2": "b", "label": 1, "answer": "2"})");
  EXPECT_EQ(t.items[0].pairs[0].context, "x said a");
  EXPECT_EQ(t.items[0].pairs[1].context, "x said b");
  EXPECT_EQ(t.items[0].pairs[1].continuation, " was here");
  EXPECT_EQ(t.items[0].gold, 1);
  const Task other = task(R"({"sentence": "x said _ sat", "option1": "\u00e9", "option2": "bcd", "label": 0})");
  EXPECT_EQ(other.items[0].pairs[0].characters, 8);  // the harness divides by the context, "x said é"
  EXPECT_EQ(other.items[0].pairs[0].bytes, 9);
  EXPECT_EQ(other.items[0].pairs[1].characters, 10);
}

TEST_F(TasksTest, SpecialTokensOfTheTextAreTakenAsSuch) {
  const Tokenizer tokenizer = Tokenizer::from_json(letter_tokenizer(true), "letters");
  Unigram model = letters();
  // No second <s> where the text begins with one; the last choice is only a target.
  score_task(model, tokenizer, task(R"({"query": "<s>ab", "choices": ["a", "b"], "gold": 0})"), {512, {27}}, quiet_);
  EXPECT_EQ(model.last, (std::vector<std::int32_t>{27, 0, 1, 26}));
  score_task(model, tokenizer, task(R"({"query": "a<s>b", "choices": ["a", "b"], "gold": 0})"), {512, {27}}, quiet_);
  EXPECT_EQ(model.last, (std::vector<std::int32_t>{27, 0, 27, 1, 26}));
  score_task(model, tokenizer, task(R"({"sentence_good": "a<s>", "sentence_bad": "a<s>b"})"), {512, {27}}, quiet_);
  EXPECT_EQ(model.last, (std::vector<std::int32_t>{27, 26, 0, 27}));
  score_task(model, tokenizer, task(R"({"text": "a<s>b"})"), {512, {27}}, quiet_);
  EXPECT_EQ(model.last, (std::vector<std::int32_t>{27, 0, 27}));
}

TEST_F(TasksTest, WrongLinesNameFileAndLine) {
  const std::string good = R"({"query": "q", "choices": ["a", "b"], "gold": 0})" "\n";
  expect_refused("", "", "at least one task item");
  expect_refused("\n \n", "", "at least one task item");
  expect_refused(good + "\n{\"query\": \"q\"", ":3", "");
  expect_refused(good + "[1]", ":2", "JSON object");
  expect_refused(good + R"({"query": "q", "choices": ["a"], "gold": 0})", ":2", "two texts or more");
  expect_refused(good + R"({"query": "q", "choices": ["a", 3], "gold": 0})", ":2", "choices");
  expect_refused(good + R"({"query": "q", "choices": ["a", "b"], "gold": 2})", ":2", "0 to 1");
  expect_refused(good + R"({"query": "q", "choices": ["a", "b"], "gold": -1})", ":2", "gold");
  expect_refused(good + R"({"query": "q", "choices": ["a", "b"], "gold": "0"})", ":2", "gold");
  expect_refused(good + R"({"query": "q", "choices": ["a", "b"], "gold": 18446744073709551615})", ":2", "gold");
  expect_refused(good + R"({"query": "q", "choices": ["a", "b"], "gold": 0.5})", ":2", "gold");
  expect_refused(good + R"({"query": "q", "choices": ["a", "b"]})", ":2", "gold");
  expect_refused(good + R"({"query": 4, "choices": ["a", "b"], "gold": 0})", ":2", "query");
  expect_refused(good + R"({"query": "q", "choices": ["a", " "], "gold": 0})", ":2", "empty choice");
  expect_refused(good + R"({"context": "q", "continuation": "a"})", ":2", "query");  // another kind than the first line
  expect_refused(R"({"foo": 1})", ":1", "sentence_good");
  expect_refused("{\"query\": \"\xFF\", \"choices\": [\"a\", \"b\"], \"gold\": 0}", ":1", "");
  EXPECT_THROW(read_task("/nonexistent/task.jsonl"), Error);
  const Task cut = task(good + good + "garbage", 2);  // what is beyond the limit is only counted
  EXPECT_EQ(cut.items.size(), 2u);
  EXPECT_EQ(cut.items_in_file, 3);
}

// Random damage: an error that names the file, or a task; never a crash.
TEST_F(TasksTest, DamagedLinesNeverCrash) {
  const std::string good = R"({"query": "q\u00e9", "choices": ["a", "b", "c"], "gold": 2})"
                           "\n"
                           R"({"query": "r", "choices": ["a", "b"], "gold": 0})"
                           "\n";
  std::mt19937_64 random(3);
  int refused = 0;
  for (int round = 0; round < 400; ++round) {
    std::string text = good;
    for (std::uint64_t edits = 1 + random() % 3; edits > 0; --edits) {
      const std::size_t at = random() % text.size();
      switch (random() % 3) {
        case 0: text[at] = static_cast<char>(random()); break;
        case 1: text.erase(at, 1 + random() % 8); break;
        default: text.insert(at, 1, "{}[]\",:0\\"[random() % 9]); break;
      }
      if (text.empty()) text = "x";
    }
    try {
      const Task t = task(text);
      for (const TaskItem& item : t.items) ASSERT_LT(item.gold, static_cast<std::int64_t>(item.pairs.size()));
    } catch (const Error& error) {
      ASSERT_EQ(error.code(), ExitCode::kInput);
      ASSERT_EQ(error.place().substr(0, file_.string().size()), file_.string());
      ++refused;
    }
  }
  EXPECT_GT(refused, 200);
}

TEST(Speed, CountsTokensAndKeepsTheOrderOfCalls) {
  std::vector<std::int64_t> fed;
  int resets = 0;
  DecodeProbe probe;
  probe.vocab_size = 5;
  probe.reset = [&] { ++resets; };
  probe.feed = [&](std::span<const std::int32_t> ids, float* out) {
    fed.push_back(static_cast<std::int64_t>(ids.size()));
    if (ids.size() == 1) {
      EXPECT_EQ(ids[0], 3);
    }
    for (int i = 0; i < 5; ++i) out[i] = i == 3 ? 1.0f : 0.0f;
  };
  const std::vector<std::int32_t> prompt = {3, 1};
  const SpeedResult r = measure_speed(probe, prompt, {7, 4, 2});
  EXPECT_EQ(resets, 3);
  EXPECT_EQ(fed, (std::vector<std::int64_t>{1, 1, 7, 7, 1, 1, 1, 1}));
  EXPECT_EQ(r.tokens, 4);
  EXPECT_GT(r.tokens_per_second, 0);
  EXPECT_LE(r.p50_token_seconds, r.p95_token_seconds);
  EXPECT_GT(r.peak_memory_bytes, 1u << 20);
  EXPECT_THROW(measure_speed(probe, {}, {7, 4, 2}), Error);
  EXPECT_THROW(measure_speed(probe, prompt, {7, 0, 2}), Error);
}

}  // namespace
}  // namespace pare
