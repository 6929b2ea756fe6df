// Every family in the runtime against transformers, and decoding in pieces against decoding at once.
#include "tests/families.h"

#include <gtest/gtest.h>

#include "core/context.h"
#include "runtime/continuation.h"
#include "runtime/export.h"
#include "runtime/forward.h"
#include "runtime/kernels.h"
#include "tests/runtime/tiny_model.h"
#include "tests/scratch.h"

namespace pare {
namespace {

using testing::FamilyText;
using testing::family_texts;
using testing::larger;

class RuntimeFamily : public ::testing::TestWithParam<std::string> {
 protected:
  RuntimeFamily()
      : scratch_("family"), golden_(read_json(testing::golden_families() / (GetParam() + ".json"))) {
    testing::make_family_folder(golden_.at("config"), scratch_ / "model");
    Progress progress(true);
    Context context;
    context.progress = &progress;
    ExportOptions options;
    options.out = scratch_ / "model.pare";
    options.codec = "f32";
    export_compact(Checkpoint(scratch_ / "model"), options, context);
  }
  std::shared_ptr<const Engine> engine(const std::string& kernels = "", int threads = 1) const {
    EngineOptions options;
    options.threads = threads;
    options.kernels = kernels;
    options.int8_activations = false;
    return Engine::open(scratch_ / "model.pare", options);
  }
  testing::Scratch scratch_;
  Json golden_;
};

TEST_P(RuntimeFamily, LogitsAreThoseOfTransformers) {
  double largest = 0;
  for (const std::string& kernels : available_kernels()) {
    for (const int threads : {1, 2}) {
      const auto source = runtime_logits(engine(kernels, threads));
      for (const FamilyText& text : family_texts(golden_)) {
        const double difference = testing::largest_difference(*source, text);
        EXPECT_LT(difference, 1e-3) << text.ids.size() << " tokens, " << kernels << ", " << threads << " threads";
        largest = larger(largest, difference);
      }
    }
  }
  RecordProperty("difference", std::to_string(largest * 1e6));  // read by tests/bench/families_table.py
}

// Long calls are parted among threads, whichever ingredients a family has: also for an expert that has most tokens.
TEST_P(RuntimeFamily, AnyThreadCountGivesTheBitsOfOne) {
  const auto opened = engine();
  const ModelConfig& config = opened->config();
  const std::int64_t count = config.learned_positions ? config.max_position_embeddings : Forward::kBatch;
  for (const bool mostly_one : {false, true}) {
    auto ids = testing::random_ids(count, config.vocab_size, 3);
    for (std::size_t i = 0; mostly_one && i < ids.size(); ++i)
      if (i % 16 != 0) ids[i] = 7;
    std::vector<float> want(static_cast<std::size_t>(count * config.vocab_size)), got(want.size());
    for (const int threads : {1, 2, 3}) {
      Session session(engine("", threads), count);
      session.feed(ids);
      session.logits(0, count, threads == 1 ? want.data() : got.data());
      if (threads > 1) {
        EXPECT_EQ(want, got) << threads << " threads";
      }
    }
  }
}

// Whatever the pieces in which a text is fed, and also where a sliding window or LongRoPE's switch lies inside it.
TEST_P(RuntimeFamily, DecodingInPiecesEqualsPrefill) {
  const auto opened = engine();
  const auto vocab = static_cast<std::size_t>(opened->config().vocab_size);
  const FamilyText text = family_texts(golden_).back();
  const auto count = static_cast<std::int64_t>(text.ids.size());
  std::vector<float> step(vocab), whole(vocab);
  double largest = 0;
  for (const std::int64_t piece : {1, 5}) {
    Session session(opened), reference(opened);
    for (std::int64_t at = 0; at < count; at += piece) {
      const auto n = static_cast<std::size_t>(std::min(piece, count - at));
      session.feed(std::span(text.ids).subspan(static_cast<std::size_t>(at), n));
      session.logits(static_cast<std::int64_t>(n) - 1, 1, step.data());
      reference.reset();
      reference.feed(std::span(text.ids).first(static_cast<std::size_t>(at) + n));
      reference.logits(at + static_cast<std::int64_t>(n) - 1, 1, whole.data());
      ASSERT_GT(std::abs(*std::max_element(whole.begin(), whole.end())), 1e-2f) << "logits were written";
      for (std::size_t i = 0; i < vocab; ++i)
        largest = larger(largest, std::abs(static_cast<double>(step[i]) - static_cast<double>(whole[i])));
      ASSERT_LT(largest, 1e-3) << "position " << at << ", pieces of " << piece;
    }
  }
  RecordProperty("difference", std::to_string(largest * 1e6));
}

// What --draft and --lookup stand on: a pass over several tokens has the bits of one pass for each, and so has what
// follows where the session was taken back; whichever ingredients a family has.
TEST_P(RuntimeFamily, PassesOfSeveralTokensAndStepsBackKeepTheBits) {
  const auto opened = engine();
  const ModelConfig& config = opened->config();
  const auto vocab = static_cast<std::size_t>(config.vocab_size);
  std::vector<std::int32_t> text;
  for (const FamilyText& each : family_texts(golden_))
    if (each.ids.size() > text.size()) text = each.ids;
  const auto count = static_cast<std::int64_t>(text.size());
  Session single(opened), several(opened);
  std::vector<float> want(vocab), got(17 * vocab);
  std::int64_t at = 0;
  for (std::int64_t step = 0; at < count; ++step) {
    std::int64_t n = std::min(1 + step * 5 % 17, count - at);
    // Behind LongRoPE's switch the tokens of a pass would be turned otherwise: no pass goes across.
    while (rope_beyond(config, at + n) != rope_beyond(config, at + 1)) --n;
    const auto ids = std::span(text).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n));
    // Something else first, which is taken back.
    const std::int64_t wrong = std::min<std::int64_t>(1 + step % 7, config.max_position_embeddings - at);
    several.feed(std::vector<std::int32_t>(static_cast<std::size_t>(wrong), 5));
    several.truncate(at);
    several.feed(ids);
    several.logits(0, n, got.data());
    for (std::int64_t i = 0; i < n; ++i) {
      single.feed(ids.subspan(static_cast<std::size_t>(i), 1));
      single.logits(0, 1, want.data());
      ASSERT_TRUE(std::equal(want.begin(), want.end(), got.begin() + i * static_cast<std::int64_t>(vocab)))
          << "position " << at + i << ", of a pass of " << n;
    }
    at += n;
  }
  EXPECT_EQ(single.position(), count);
}

// The greedy tokens, with guesses that are right (its own) and that are mostly wrong (what stood before); across
// LongRoPE's switch where there is one.
TEST_P(RuntimeFamily, GuessingAheadGivesTheSameTokens) {
  const auto opened = engine();
  const ModelConfig& config = opened->config();
  constexpr std::int64_t kTokens = 24;
  std::vector<std::int32_t> prompt;
  for (const FamilyText& each : family_texts(golden_)) prompt.insert(prompt.end(), each.ids.begin(), each.ids.end());
  std::int64_t length = std::min<std::int64_t>(static_cast<std::int64_t>(prompt.size()), 200);
  if (config.rope_long) length = std::min(length, config.rope_long->original_max_position - kTokens / 2);
  length = std::min(length, config.max_position_embeddings - kTokens);
  ASSERT_GT(length, 0);
  prompt.resize(static_cast<std::size_t>(length));
  Sampler sampler(SamplerOptions{});
  const auto take = [&](std::unique_ptr<Drafter> drafter) {
    const auto by = continue_by(opened, sampler, {}, std::move(drafter));
    by->feed(prompt);
    std::vector<std::int32_t> out;
    while (static_cast<std::int64_t>(out.size()) < kTokens)
      for (const std::int32_t id : by->next(kTokens - static_cast<std::int64_t>(out.size()))) out.push_back(id);
    return out;
  };
  const auto want = take(nullptr);
  EXPECT_EQ(take(model_drafter(opened, config.vocab_size, sampler, {5, 0, {}})), want);
  EXPECT_EQ(take(lookup_drafter(1, {6, 0, {}})), want);
}

// Learned positions end; what stands behind their table must not be read, whatever limit a caller asks for.
TEST_P(RuntimeFamily, NoTextIsLongerThanLearnedPositions) {
  const auto opened = engine();
  if (!opened->config().learned_positions) return;
  const std::int64_t most = opened->config().max_position_embeddings;
  for (const std::int64_t asked : {std::int64_t{0}, most + 40}) {
    Session session(opened, asked);
    session.feed(std::vector<std::int32_t>(static_cast<std::size_t>(most), 3));
    const std::vector<std::int32_t> one = {5};
    try {
      session.feed(one);
      ADD_FAILURE() << "fed position " << most;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput);
      EXPECT_NE(std::string(error.what()).find(std::to_string(most) + " positions"), std::string::npos) << error.what();
    }
    EXPECT_EQ(session.position(), most);
  }
}

// Their table takes no codes: half precision where the rest has some.
TEST_P(RuntimeFamily, LearnedPositionsStayFloats) {
  const Checkpoint model(scratch_ / "model");
  for (const auto& [codec, expected] : {std::pair("q4", "f16"), std::pair("q8", "f16"), std::pair("bf16", "bf16"),
                                        std::pair("keep", "f32")}) {
    ExportOptions options;
    options.codec = codec;
    int tables = 0;
    for (const CompactWriter::Plan& tensor : plan_export(model, options).tensors) {
      if (tensor.name != "model.embed_positions.weight") continue;
      EXPECT_EQ(tensor.codec.name(), expected) << codec;
      ++tables;
    }
    EXPECT_EQ(tables, model.config().learned_positions ? 1 : 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Goldens, RuntimeFamily, ::testing::ValuesIn(testing::family_names()),
                         [](const auto& golden) { return golden.param; });

}  // namespace
}  // namespace pare
