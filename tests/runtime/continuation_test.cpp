// Guessing ahead changes nothing but the time: the same tokens when greedy, the same distribution when drawn.
#include "runtime/continuation.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/error.h"
#include "tests/runtime/tiny_model.h"

namespace pare {
namespace {

using namespace pare::testing;

std::shared_ptr<const Engine> open_with(const fs::path& path, int threads = 1) {
  EngineOptions options;
  options.threads = threads;
  return Engine::open(path, options);
}

// The statistic of a chi-square test against probabilities that sum to 1, as a share of the value that chance alone
// exceeds once in a million times. Cells with few expected draws are taken together.
double chi_square_share(const std::vector<int>& counts, const std::vector<double>& probabilities) {
  double draws = 0, statistic = 0, rest_expected = 0, rest_seen = 0;
  for (const int count : counts) draws += count;
  int cells = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const double expected = draws * probabilities[i];
    if (expected == 0 && counts[i] > 0) return INFINITY;
    if (expected < 8) {
      rest_expected += expected;
      rest_seen += counts[i];
      continue;
    }
    statistic += (counts[i] - expected) * (counts[i] - expected) / expected;
    ++cells;
  }
  if (rest_expected >= 8) {
    statistic += (rest_seen - rest_expected) * (rest_seen - rest_expected) / rest_expected;
    ++cells;
  }
  const double freedom = cells - 1, spread = 2 / (9 * freedom);  // Wilson and Hilferty; 4.753: normal quantile
  const double limit = freedom * std::pow(1 - spread + 4.753 * std::sqrt(spread), 3);
  return statistic / limit;
}

std::vector<double> probabilities(const Choices& choices, std::size_t vocab) {
  std::vector<double> out(vocab);
  for (std::size_t i = 0; i < vocab; ++i) out[i] = choices.probability(static_cast<std::int32_t>(i));
  return out;
}

// Rules that look right and are not.
Verdict always(const Choices&, const Guess& guess, Sampler&) { return {guess.id, true}; }
Verdict drawn_anew(const Choices& model, const Guess& guess, Sampler& sampler) {  // not from what p has over q
  if (sampler.uniform() * guess.from.probability(guess.id) < model.probability(guess.id)) return {guess.id, true};
  return {sampler.draw(model), false};
}
Verdict by_model_alone(const Choices& model, const Guess& guess, Sampler& sampler) {  // as if q were certain
  if (sampler.uniform() < model.probability(guess.id)) return {guess.id, true};
  return {accept_or_replace(model, guess, sampler).id, false};
}

TEST(AcceptanceTest, TokensAreDistributedAsTheModelSays) {
  const std::vector<float> model{1.0f, 0.2f, -0.5f, 2.0f, 0.0f, -3.0f, 1.4f, 0.9f};
  const std::vector<float> draft{0.1f, 1.2f, -0.5f, 1.1f, 1.0f, 0.5f, -2.0f, 0.9f};
  for (const double temperature : {0.6, 1.0, 2.5}) {
    for (const double top_p : {1.0, 0.8}) {
      Sampler sampler({temperature, top_p, 3});
      Choices p, q;
      sampler.weigh(model, p);
      sampler.weigh(draft, q);
      const auto share = [&](AcceptanceRule rule, const Choices& from) {
        std::vector<int> counts(model.size());
        for (int i = 0; i < 30000; ++i) {
          const Verdict verdict = rule(p, {sampler.draw(from), from}, sampler);
          ++counts[static_cast<std::size_t>(verdict.id)];
        }
        return chi_square_share(counts, probabilities(p, model.size()));
      };
      EXPECT_LT(share(accept_or_replace, q), 1) << temperature << ", " << top_p;
      EXPECT_LT(share(accept_or_replace, p), 1) << temperature << ", " << top_p;
      EXPECT_LT(share(accept_or_replace, Choices::certain(1)), 1) << temperature << ", " << top_p;
      EXPECT_GT(share(always, q), 3) << temperature << ", " << top_p;
      if (top_p < 1) continue;  // few tokens in common: all that is drawn anew is nearly right
      EXPECT_GT(share(drawn_anew, q), 3) << temperature;
      EXPECT_GT(share(by_model_alone, q), 1.2) << temperature;
      EXPECT_GT(share(drawn_anew, Choices::certain(1)), 3) << temperature;
    }
  }
}

TEST(AcceptanceTest, TheShareThatStandsIsWhatBothHaveInCommon) {
  Sampler sampler({1.0, 1.0, 3});
  Choices p, q;
  sampler.weigh(std::vector<float>{0, 1, 2}, p);
  sampler.weigh(std::vector<float>{2, 1, 0}, q);
  double common = 0;
  for (std::int32_t id = 0; id < 3; ++id) common += std::min(p.probability(id), q.probability(id));
  int stood = 0;
  for (int i = 0; i < 20000; ++i) stood += accept_or_replace(p, {sampler.draw(q), q}, sampler).accepted ? 1 : 0;
  EXPECT_NEAR(stood / 20000.0, common, 5 * std::sqrt(0.25 / 20000));
}

class ContinuationTest : public ::testing::Test {
 protected:
  fs::path write(const char* name, std::uint32_t seed, CodecKind kind, std::int64_t vocab, std::int64_t positions = 300,
                 std::map<std::string, std::string> embedded = {}) {
    ModelConfig config = tiny_config("llama", 32, 64, 4, 2, 8, vocab, true);
    config.max_position_embeddings = positions;
    const fs::path path = scratch_.path / name;
    write_tiny_model(path, config, {kind, kind == CodecKind::kF32 ? 0 : 32}, seed, std::move(embedded));
    return path;
  }
  // `count` tokens behind `prompt`, in passes of at most `most`.
  static std::vector<std::int32_t> take(Continuation& by, const std::vector<std::int32_t>& prompt, std::size_t count,
                                        std::int64_t most = 1000) {
    std::vector<std::int32_t> out;
    by.feed(prompt);
    while (out.size() < count && by.room() >= 0) {
      const auto made = by.next(std::min(most, static_cast<std::int64_t>(count - out.size())));
      EXPECT_GE(made.size(), 1u);
      out.insert(out.end(), made.begin(), made.end());
      EXPECT_EQ(by.position(), static_cast<std::int64_t>(prompt.size() + out.size()) - 1);
      if (by.room() == 0) break;
    }
    return out;
  }
  ScratchFolder scratch_;
};

TEST_F(ContinuationTest, GreedyTokensAreTheModelsOwn) {
  const fs::path model = write("m.pare", 5, CodecKind::kQ8, 40);
  write("near.pare", 5, CodecKind::kQ4, 40);   // the same weights rounded further: right now and then
  write("other.pare", 6, CodecKind::kQ8, 40);  // nearly always wrong
  write("short.pare", 5, CodecKind::kQ4, 40, 100);
  write("fewer.pare", 6, CodecKind::kQ8, 33);  // fewer rows of padding
  std::int64_t accepted = 0, refused = 0;
  for (const std::uint32_t seed : {1u, 2u}) {
    const auto prompt = random_ids(20, 33, seed);
    Sampler sampler(SamplerOptions{});
    const auto plain = continue_by(open_with(model), sampler, {});
    EXPECT_TRUE(plain->counts().is_null());
    const auto want = take(*plain, prompt, 1000);
    EXPECT_EQ(want.size(), 281u);  // the whole context, and the token that needs no position
    for (const char* name : {"m.pare", "near.pare", "other.pare", "short.pare", "fewer.pare"}) {
      for (const std::int64_t tokens : {1, 9}) {
        for (const double confidence : {0.0, 0.5}) {
          const auto engine = open_with(model, tokens == 9 && confidence > 0 ? 2 : 1);
          const auto draft = open_with(scratch_.path / name);
          const auto by = continue_by(engine, sampler, {}, model_drafter(draft, 40, sampler, {tokens, confidence, {}}));
          ASSERT_EQ(take(*by, prompt, 1000), want) << name << ", " << tokens << ", " << confidence;
          const Json counts = by->counts();
          accepted += counts.at("accepted").get<std::int64_t>();
          refused += counts.at("tested").get<std::int64_t>() - counts.at("accepted").get<std::int64_t>();
          EXPECT_EQ(counts.at("tokens").get<std::int64_t>(),
                    counts.at("passes").get<std::int64_t>() + counts.at("accepted").get<std::int64_t>());
          if (name == std::string("m.pare") && confidence == 0) {
            EXPECT_EQ(counts.at("accepted_of_drafted"), 1.0);
          }
        }
      }
    }
    const auto by = continue_by(open_with(model), sampler, {}, lookup_drafter(3, {5, 0, {}}));
    ASSERT_EQ(take(*by, prompt, 1000), want);
    EXPECT_GT(by->counts().at("drafted").get<int>(), 0);
  }
  EXPECT_GT(accepted, 1000);
  EXPECT_GT(refused, 1000);
}

TEST_F(ContinuationTest, OneMoreTextBehindTheFirst) {
  const fs::path model = write("m.pare", 5, CodecKind::kQ8, 40);
  const auto first = random_ids(12, 40, 1), second = random_ids(9, 40, 2);
  Sampler sampler(SamplerOptions{});
  const auto plain = continue_by(open_with(model), sampler, {});
  const auto draft = open_with(write("d.pare", 5, CodecKind::kQ4, 40));
  const auto drafted = continue_by(open_with(model), sampler, {}, model_drafter(draft, 40, sampler, {4, 0, {}}));
  EXPECT_EQ(take(*plain, first, 30), take(*drafted, first, 30));
  EXPECT_EQ(plain->position(), drafted->position());
  plain->feed(second);
  drafted->feed(second);
  EXPECT_EQ(plain->position(), 12 + 29 + 9);  // the last token was given and not held
  std::vector<std::int32_t> a, b;
  while (a.size() < 30) a.push_back(plain->next(1).front());
  while (b.size() < 30)
    for (const std::int32_t id : drafted->next(static_cast<std::int64_t>(30 - b.size()))) b.push_back(id);
  EXPECT_EQ(a, b);
  drafted->reset();
  plain->reset();
  EXPECT_EQ(take(*plain, second, 9), take(*drafted, second, 9));
}

TEST_F(ContinuationTest, NothingComesBehindAnEnd) {
  const fs::path model = write("m.pare", 5, CodecKind::kQ8, 40);
  const auto prompt = random_ids(20, 40, 1);
  Sampler sampler(SamplerOptions{});
  const auto free = take(*continue_by(open_with(model), sampler, {}), prompt, 100);
  const std::int64_t end = free[40];
  const auto where = static_cast<std::size_t>(std::find(free.begin(), free.end(), end) - free.begin());
  for (const bool told : {true, false}) {  // whether the draft stops there by itself
    DraftOptions options{7, 0, {}};
    if (told) options.ends = {end};
    const auto by =
        continue_by(open_with(model), sampler, {end}, model_drafter(open_with(model), 40, sampler, options));
    by->feed(prompt);
    std::vector<std::int32_t> got;
    while (got.size() <= where)
      for (const std::int32_t id : by->next(50)) got.push_back(id);
    EXPECT_EQ(got.size(), where + 1);
    EXPECT_EQ(got, std::vector<std::int32_t>(free.begin(), free.begin() + static_cast<std::ptrdiff_t>(where) + 1));
    EXPECT_EQ(by->position(), static_cast<std::int64_t>(20 + where));
  }
}

// Second and third token of many texts against their exact probabilities.
TEST_F(ContinuationTest, DrawnTokensAreDistributedAsTheModelsOwn) {
  constexpr std::int64_t kVocab = 9;
  constexpr std::size_t kCells = kVocab * kVocab;
  const fs::path model = write("m.pare", 11, CodecKind::kF32, kVocab);
  const fs::path draft = write("d.pare", 12, CodecKind::kF32, kVocab);
  const std::vector<std::int32_t> prompt{1, 5, 3};
  const auto engine = open_with(model);
  for (const double top_p : {1.0, 0.85}) {
    Sampler sampler({4.0, top_p, 9});
    const auto next = [&](std::vector<std::int32_t> text) {
      Session session(engine);
      session.feed(text);
      std::vector<float> logits(kVocab);
      session.logits(static_cast<std::int64_t>(text.size()) - 1, 1, logits.data());
      Choices choices;
      sampler.weigh(logits, choices);
      return probabilities(choices, kVocab);
    };
    std::vector<double> exact(kCells);
    const auto first = next(prompt);
    for (std::int32_t a = 0; a < kVocab; ++a) {
      const auto second = next({1, 5, 3, a});
      for (std::int32_t b = 0; b < kVocab; ++b) {
        const auto third = next({1, 5, 3, a, b});
        for (std::size_t c = 0; c < kVocab; ++c)
          exact[static_cast<std::size_t>(b) * kVocab + c] +=
              first[static_cast<std::size_t>(a)] * second[static_cast<std::size_t>(b)] * third[c];
      }
    }
    const auto share = [&](std::unique_ptr<Drafter> drafter, AcceptanceRule rule) {
      const auto by = continue_by(engine, sampler, {}, std::move(drafter), rule);
      std::vector<int> counts(kCells);
      for (int i = 0; i < 3000; ++i) {
        by->reset();
        const auto got = take(*by, prompt, 4);
        ++counts[static_cast<std::size_t>(got[1]) * kVocab + static_cast<std::size_t>(got[2])];
      }
      return chi_square_share(counts, exact);
    };
    const auto drafter = [&](double confidence) {
      return model_drafter(open_with(draft), kVocab, sampler, {3, confidence, {}});
    };
    EXPECT_LT(share(nullptr, accept_or_replace), 1) << top_p;
    EXPECT_LT(share(drafter(0), accept_or_replace), 1) << top_p;
    EXPECT_LT(share(drafter(0.3), accept_or_replace), 1) << top_p;
    EXPECT_LT(share(lookup_drafter(2, {3, 0, {}}), accept_or_replace), 1) << top_p;
    EXPECT_GT(share(drafter(0), always), 2) << top_p;
    EXPECT_GT(share(drafter(0), drawn_anew), 2) << top_p;
  }
}

TEST_F(ContinuationTest, SeedsDecideDrawnTokens) {
  const fs::path model = write("m.pare", 5, CodecKind::kQ8, 40), draft = write("d.pare", 5, CodecKind::kQ4, 40);
  const auto drawn = [&](std::uint64_t seed, int threads) {
    Sampler sampler({1.0, 0.9, seed});
    const auto by = continue_by(open_with(model, threads), sampler, {},
                                model_drafter(open_with(draft, threads), 40, sampler, {5, 0.3, {}}));
    return take(*by, {1, 2, 3}, 60);
  };
  EXPECT_EQ(drawn(1, 1), drawn(1, 2));
  EXPECT_NE(drawn(1, 1), drawn(2, 1));
}

TEST(LookupTest, TakesWhatFollowedTheLongestMatch) {
  const auto guesses = [](std::int64_t longest, std::int64_t most, const std::vector<std::int32_t>& text,
                          std::vector<std::int64_t> ends = {}) {
    const auto drafter = lookup_drafter(longest, {8, 0, std::move(ends)});
    std::vector<std::int32_t> out;
    for (const Guess& guess : drafter->guess(text, most)) {
      out.push_back(guess.id);
      EXPECT_EQ(guess.from.probability(guess.id), 1);
    }
    return out;
  };
  using Ids = std::vector<std::int32_t>;
  EXPECT_EQ(guesses(3, 2, {1, 2, 3, 4, 9, 7, 3, 5, 1, 2, 3}), (Ids{4, 9}));  // not the later 3 alone
  EXPECT_EQ(guesses(1, 2, {1, 2, 3, 4, 9, 7, 3, 5, 1, 2, 3}), (Ids{5, 1}));  // the last of the matches
  EXPECT_EQ(guesses(3, 5, {1, 2, 1, 2}), (Ids{1, 2, 1, 2, 1}));              // goes on as it repeats
  EXPECT_EQ(guesses(3, 20, {7, 7}), (Ids{7, 7, 7, 7, 7, 7, 7, 7}));
  EXPECT_EQ(guesses(3, 5, {1, 2, 3}), Ids{});
  EXPECT_EQ(guesses(3, 5, {1}), Ids{});
  EXPECT_EQ(guesses(3, 0, {1, 1}), Ids{});
  EXPECT_EQ(guesses(2, 5, {1, 2, 6, 8, 1, 2}, {6}), (Ids{6}));
}

TEST_F(ContinuationTest, TheLargeModelGivesWhatTheSmallOneIsUnsureOf) {
  const fs::path small = write("s.pare", 5, CodecKind::kQ8, 40), large = write("l.pare", 6, CodecKind::kQ8, 40);
  const auto by_hand = [&](const std::vector<std::int32_t>& prompt, double threshold, std::size_t count,
                           std::int64_t& handed_over) {
    std::vector<std::int32_t> text = prompt, out;
    const auto logits_of = [&](const fs::path& path) {
      Session session(open_with(path));
      session.feed(text);
      std::vector<float> logits(40);
      session.logits(static_cast<std::int64_t>(text.size()) - 1, 1, logits.data());
      return logits;
    };
    while (out.size() < count) {
      auto logits = logits_of(small);
      const double peak = *std::max_element(logits.begin(), logits.end());
      double total = 0;
      for (const float logit : logits) total += std::exp(logit - peak);
      if (1 / total < threshold) {
        logits = logits_of(large);
        ++handed_over;
      }
      out.push_back(static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
      text.push_back(out.back());
    }
    return out;
  };
  Sampler sampler(SamplerOptions{});
  for (const double threshold : {0.0, 0.8, 1.0}) {
    const auto by = continue_with_fallback(open_with(small), open_with(large), threshold, sampler);
    std::int64_t all = 0;
    for (std::uint32_t text = 0; text < 8; ++text) {  // short ones: such models soon repeat themselves, and are sure
      const auto prompt = random_ids(5 + text, 40, text);
      std::int64_t handed_over = 0;
      by->reset();
      EXPECT_EQ(take(*by, prompt, 8), by_hand(prompt, threshold, 8, handed_over)) << threshold;
      EXPECT_EQ(by->counts().at("handed_over"), handed_over) << threshold;
      EXPECT_EQ(by->counts().at("large_passes"), handed_over) << threshold;
      all += handed_over;
    }
    EXPECT_TRUE(threshold == 0 ? all == 0 : threshold == 1 ? all > 55 : all > 10 && all < 54)
        << threshold << ": " << all;
  }
  const auto prompt = random_ids(15, 40, 4);
  // The shorter context of both is the end.
  const auto shorter = open_with(write("c.pare", 6, CodecKind::kQ8, 40, 30));
  const auto by = continue_with_fallback(open_with(small), shorter, 0.5, sampler);
  EXPECT_EQ(take(*by, prompt, 100).size(), 16u);
  by->reset();
  EXPECT_THROW(by->feed(random_ids(31, 40, 1)), Error);
}

TEST(TopProbabilityTest, IsThatOfTheSoftmax) {
  EXPECT_NEAR(top_probability(std::vector<float>{0, std::log(3.0f)}), 0.75, 1e-6);
  EXPECT_EQ(top_probability(std::vector<float>{-3}), 1);
  for (const float bad : {std::nanf(""), INFINITY}) EXPECT_THROW(top_probability(std::vector<float>{0, bad}), Error);
  EXPECT_THROW(top_probability(std::vector<float>{-INFINITY}), Error);
}

TEST_F(ContinuationTest, TokensMustMeanTheSame) {
  const auto tokenizer = [](const char* text, std::int64_t size) {
    TokenizerTraining training;
    training.vocab_size = size;
    return train_tokenizer({text}, training);
  };
  const std::string one = tokenizer("once upon a time there was a time", 266);
  Json spelled = Json::parse(one);
  const auto model = open_with(write("m.pare", 1, CodecKind::kQ8, 270, 300, {{"tokenizer.json", one}}));
  const auto with = [&](const char* name, const std::string& text, std::int64_t vocab) {
    return open_with(write(name, 2, CodecKind::kQ8, vocab, 300, {{"tokenizer.json", text}}));
  };
  EXPECT_NO_THROW(require_same_tokens(*model, *with("same.pare", one, 270)));
  EXPECT_NO_THROW(require_same_tokens(*model, *with("padded.pare", one, 300)));
  EXPECT_NO_THROW(require_same_tokens(*model, *with("spelled.pare", spelled.dump(3), 270)));
  const auto refused = [&](const Engine& other) {
    try {
      require_same_tokens(*model, other);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput);
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  std::string renamed = one;
  for (std::size_t at = 0; (at = renamed.find("endoftext", at)) != std::string::npos;)
    renamed.replace(at, 9, "endofsong");
  const std::string other = refused(*with("other.pare", renamed, 270));
  EXPECT_NE(other.find("token 0 as in m.pare, \"<|endoftext|>\""), std::string::npos) << other;
  EXPECT_NE(other.find("<|endofsong|>"), std::string::npos) << other;
  const std::string fewer = refused(*with("fewer.pare", tokenizer("once upon a time there was a time", 258), 270));
  EXPECT_NE(fewer.find("tokens of m.pare"), std::string::npos) << fewer;
  EXPECT_NE(refused(*open_with(write("none.pare", 1, CodecKind::kQ8, 270))).find("tokenizer"), std::string::npos);
}

}  // namespace
}  // namespace pare
