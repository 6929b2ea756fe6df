// Training gives the merges of the reference's BpeTrainer.
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/tokenizer.h"

namespace pare {
namespace {

const fs::path kGolden = fs::path(PARE_SOURCE_DIR) / "tests/golden/tokenizers";

// gpt2.json was trained by the reference on training.txt (tests/golden/make_tokenizers.py).
TEST(TokenizerTraining, MergesOfTheReference) {
  TokenizerTraining options;
  options.vocab_size = 400;
  options.special_tokens = {"<unk>", "<s>", "</s>"};
  const Json ours = parse_json(train_tokenizer({read_text(kGolden / "training.txt")}, options), "trained");
  const Json theirs = read_json(kGolden / "gpt2.json");
  EXPECT_EQ(ours["model"]["vocab"], theirs["model"]["vocab"]);
  EXPECT_EQ(ours["model"]["merges"], theirs["model"]["merges"]);
  ASSERT_EQ(ours["model"]["vocab"].size(), 400u);
}

TEST(TokenizerTraining, WorkedExample) {
  TokenizerTraining options;
  options.vocab_size = 261;
  // Pairs: "ab" 3 times, "bc" 3 times, " a" 2 times: the tie goes to the smaller ids, a b before b c.
  const Tokenizer tokenizer = Tokenizer::from_text(train_tokenizer({"abc abc abc"}, options), "trained");
  EXPECT_EQ(tokenizer.size(), 260);  // nothing is left to merge: "abc" and " abc" are whole
  EXPECT_EQ(tokenizer.token(0), "<|endoftext|>");
  EXPECT_EQ(tokenizer.token(257), "ab");
  EXPECT_EQ(tokenizer.token(258), "abc");
  EXPECT_EQ(tokenizer.token(259), "\u0120abc");
  EXPECT_EQ(tokenizer.encode("abc abc"), (std::vector<std::int32_t>{258, 259}));
}

TEST(TokenizerTraining, AnyTextSurvives) {
  TokenizerTraining options;
  options.vocab_size = 300;
  const Tokenizer tokenizer = Tokenizer::from_text(train_tokenizer({"some text \xFF here", "more text"}, options), "trained");
  const std::string text = "\u4f60\u597d \U0001F999\n\t\x01 end<|endoftext|>";
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, true, false)), text);
  EXPECT_EQ(tokenizer.encode("<|endoftext|>"), std::vector<std::int32_t>{0});
}

TEST(TokenizerTraining, RefusesWhatCannotBe) {
  TokenizerTraining options;
  options.vocab_size = 256;
  EXPECT_THROW(train_tokenizer({"text"}, options), Error);
  options.vocab_size = 300;
  EXPECT_THROW(train_tokenizer({}, options), Error);
  EXPECT_THROW(train_tokenizer({""}, options), Error);
  for (const std::vector<std::string>& bad : {std::vector<std::string>{""}, {"x", "<a>"}, {"<a>", "<a>"}, {"\xFF\xFF"}}) {
    options.special_tokens = bad;
    EXPECT_THROW(train_tokenizer({"text"}, options), Error);
  }
}

}  // namespace
}  // namespace pare
