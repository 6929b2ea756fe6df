// tokenizer.json executed as data: ids and texts of the reference library (tests/golden/make_tokenizers.py), a
// brute-force BPE, real tokenizers where ../shared holds them.
#include "core/tokenizer.h"

#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <random>
#include <sstream>
#include <thread>

#include "core/tokenizer_regex.h"
#include "core/tokenizer_text.h"

namespace pare {
namespace {

const fs::path kGolden = fs::path(PARE_SOURCE_DIR) / "tests/golden/tokenizers";
const fs::path kShared = fs::path(PARE_SOURCE_DIR) / ".." / "shared";

using Ids = std::vector<std::int32_t>;

std::vector<Json> cases_of(const std::string& name) {
  std::vector<Json> cases;
  std::istringstream lines(read_text(kGolden / (name + ".jsonl")));
  for (std::string line; std::getline(lines, line);) cases.push_back(parse_json(line, name));
  return cases;
}

std::string streamed(const Tokenizer& tokenizer, const Ids& ids, bool skip_special = true) {
  StreamDecoder decoder(tokenizer, skip_special);
  std::string text;
  for (const std::int32_t id : ids) {
    const std::string piece = decoder.push(id);
    EXPECT_TRUE(tok::is_valid_utf8(piece));
    text += piece;
  }
  return text + decoder.finish();
}

class Golden : public ::testing::TestWithParam<std::string> {};

TEST_P(Golden, IdsAndTextsOfTheReference) {
  const Tokenizer tokenizer = Tokenizer::from_file(kGolden / (GetParam() + ".json"));
  const std::vector<Json> cases = cases_of(GetParam());
  ASSERT_GT(cases.size(), 90u);
  for (const Json& item : cases) {
    const auto text = item["text"].get<std::string>();
    const auto ids = item["ids"].get<Ids>();
    const auto plain = item.contains("plain") ? item["plain"].get<Ids>() : ids;
    EXPECT_EQ(tokenizer.encode(text, false, true), ids) << item;
    EXPECT_EQ(tokenizer.encode(text, false, false), plain) << item;
    if (item.contains("whole")) {
      EXPECT_EQ(tokenizer.encode(text), item["whole"].get<Ids>()) << item;
    }
    if (item.contains("decoded") && item["decoded"].is_null()) continue;  // not recorded
    const auto decoded = item.contains("decoded") ? item["decoded"].get<std::string>() : text;
    EXPECT_EQ(tokenizer.decode(plain), decoded) << item;
    EXPECT_EQ(streamed(tokenizer, plain), decoded) << item;
  }
}

// Every way to cut random ids gives the text of decoding them at once, in pieces that are valid UTF-8.
TEST_P(Golden, StreamingDecodesAnyIds) {
  const Tokenizer tokenizer = Tokenizer::from_file(kGolden / (GetParam() + ".json"));
  std::mt19937 random(5);
  for (int round = 0; round < 300; ++round) {
    Ids ids(random() % 30);
    for (auto& id : ids) id = static_cast<std::int32_t>(random() % static_cast<unsigned>(tokenizer.size() + 1));
    const bool skip = round % 2 == 0;
    EXPECT_EQ(streamed(tokenizer, ids, skip), tokenizer.decode(ids, skip)) << Json(ids);
  }
}

INSTANTIATE_TEST_SUITE_P(Fixtures, Golden,
                         ::testing::Values("gpt2", "smollm", "llama3", "qwen2", "llama2", "mistral", "gemma",
                                           "deepseek"),
                         [](const auto& fixture) { return fixture.param; });

// Characters of Unicode 15 to 16 have the category that the reference knows, whatever version PCRE2 has.
TEST(TokenizerRegex, NewCharactersHaveTheirCategories) {
  const auto matches = [](const std::string& pattern, const std::string& text) {
    std::vector<std::string> out;
    tok::Regex::compile(pattern, "test").for_each(
        text, [&](std::size_t begin, std::size_t end) { out.push_back(text.substr(begin, end - begin)); });
    return out;
  };
  using Texts = std::vector<std::string>;
  EXPECT_EQ(matches(R"(\p{L}+)", "plain ascii a\U000140FCb!"), (Texts{"plain", "ascii", "a\U000140FCb"}));
  EXPECT_EQ(matches(R"([^\s\p{L}]?\p{L}+)", "\U0002EBF0\u2019s"), (Texts{"\U0002EBF0", "\u2019s"}));
  EXPECT_EQ(matches(R"(\p{N}+)", "x\U0001E5F1\U000116E3y"), (Texts{"\U0001E5F1\U000116E3"}));
  EXPECT_EQ(matches(R"([\p{Lu}]+)", "\u1C89\u1C8A\uA7CB"), (Texts{"\u1C89", "\uA7CB"}));
  EXPECT_EQ(matches(R"(\p{M}|\p{P}|\p{S})", "\u0897 \u1B4E \u2427"), (Texts{"\u0897", "\u1B4E", "\u2427"}));
  EXPECT_EQ(matches(R"(\p{L})", "\u0378\U000143FB\u4E00"), (Texts{"\u4E00"}));  // two that are unassigned still
  std::string known;
  EXPECT_FALSE(tok::stand_ins_for_new_characters("abcdefgh\u00e9\u4E00\U0001F600", known));
  EXPECT_TRUE(tok::stand_ins_for_new_characters("abcdefgh\u4E00\u1C89", known));
  EXPECT_EQ(known, "abcdefgh\u4E00\uA640");
}

// The definition: join the pair of lowest rank, leftmost first, until none is left.
TEST(TokenizerBpe, LongWordsEqualBruteForce) {
  const Json file = read_json(kGolden / "gpt2.json");
  std::map<std::pair<std::string, std::string>, std::size_t> rank;
  for (const Json& merge : file["model"]["merges"]) {
    const auto line = merge.get<std::string>();
    rank.emplace(std::pair{line.substr(0, line.find(' ')), line.substr(line.find(' ') + 1)}, rank.size());
  }
  ASSERT_GT(rank.size(), 50u);
  const Tokenizer tokenizer = Tokenizer::from_file(kGolden / "gpt2.json");
  std::mt19937 random(11);
  const std::string parts[] = {"the", "er", "a", "ing", "o", "ther", "h", "e", "t", "re"};
  for (const int count : {1, 5, 11, 12, 13, 14, 15, 16, 30, 200}) {
    std::string word;
    for (int i = 0; i < count; ++i) word += parts[random() % std::size(parts)];
    std::vector<std::string> symbols;
    for (const char c : word) symbols.emplace_back(1, c);
    while (true) {
      std::size_t best = rank.size(), at = 0;
      for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
        const auto found = rank.find({symbols[i], symbols[i + 1]});
        if (found != rank.end() && found->second < best) best = found->second, at = i;
      }
      if (best == rank.size()) break;
      symbols[at] += symbols[at + 1];
      symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(at) + 1);
    }
    Ids expected;
    for (const auto& symbol : symbols) expected.push_back(tokenizer.id(symbol));
    EXPECT_EQ(tokenizer.encode(word), expected) << word;
  }
}

TEST(Tokenizer, KnowsItsTokens) {
  const Tokenizer tokenizer = Tokenizer::from_file(kGolden / "llama3.json");
  EXPECT_EQ(tokenizer.prefix_ids(), Ids{1});
  EXPECT_EQ(tokenizer.token(1), "<s>");
  EXPECT_EQ(tokenizer.id("<s>"), 1);
  EXPECT_TRUE(tokenizer.is_special(1));
  EXPECT_EQ(tokenizer.id("<|word|>"), 402);
  EXPECT_FALSE(tokenizer.is_special(402));
  EXPECT_EQ(tokenizer.size(), 405);
  EXPECT_EQ(tokenizer.id("no such piece"), -1);
  EXPECT_EQ(tokenizer.token(-1), "");
  EXPECT_EQ(tokenizer.token(1 << 30), "");
  EXPECT_EQ(tokenizer.decode(Ids{1, 5, -3, 1 << 30}), tokenizer.decode(Ids{5}));
}

TEST(Tokenizer, InvalidUtf8BecomesTheReplacementCharacter) {
  const Tokenizer tokenizer = Tokenizer::from_file(kGolden / "gpt2.json");
  const std::pair<const char*, const char*> pairs[] = {
      {"a\xFF z", "a\uFFFD z"}, {"\xE2\x82", "\uFFFD"}, {"\xE2\x28\xA1", "\uFFFD(\uFFFD"}, {"\xC0\xAF", "\uFFFD\uFFFD"},
      {"\xED\xA0\x80", "\uFFFD\uFFFD\uFFFD"}, {"\xF0\x9F\x98x", "\uFFFDx"}, {"\xF4\x90\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD"}};
  for (const auto& [broken, repaired] : pairs) EXPECT_EQ(tokenizer.encode(broken), tokenizer.encode(repaired)) << repaired;
}

TEST(Tokenizer, StreamHoldsBackIncompleteCharacters) {
  const Tokenizer tokenizer = Tokenizer::from_file(kGolden / "gpt2.json");
  const Ids ids = tokenizer.encode("\U0001F999x");
  ASSERT_EQ(ids.size(), 5u);
  StreamDecoder decoder(tokenizer);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(decoder.push(ids[static_cast<std::size_t>(i)]), "");
  EXPECT_EQ(decoder.push(ids[3]), "\U0001F999");
  EXPECT_EQ(decoder.push(ids[4]), "x");
  EXPECT_EQ(decoder.push(ids[0]), "");
  EXPECT_EQ(decoder.finish(), "\uFFFD");
}

TEST(Tokenizer, StreamsPassOverWhatIsInNoText) {
  const Tokenizer tokenizer = Tokenizer::from_file(kGolden / "llama3.json");
  const Ids animal = tokenizer.encode("\U0001F999x", false);
  ASSERT_GT(animal.size(), 2u);
  Ids ids = {animal[0]};
  ids.insert(ids.end(), 100000, 1);  // not decoded again with every one of them
  ids.insert(ids.end(), animal.begin() + 1, animal.end());
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(streamed(tokenizer, ids), "\U0001F999x");
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
}

TEST(Tokenizer, ConcurrentCallsAgree) {
  const Tokenizer tokenizer = Tokenizer::from_file(kGolden / "qwen2.json");
  const std::string text = read_text(kGolden / "training.txt");
  const Ids expected = tokenizer.encode(text);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (std::size_t t = 0; t < wrong.size(); ++t)
    threads.emplace_back([&, t] {
      for (int round = 0; round < 20; ++round) wrong[t] += tokenizer.encode(text) != expected;
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4, 0));
}

TEST(Tokenizer, FromJsonEqualsFromText) {
  const Tokenizer one = Tokenizer::from_file(kGolden / "llama2.json");
  const Tokenizer two = Tokenizer::from_json(read_json(kGolden / "llama2.json"), "llama2");
  const std::string text = read_text(kGolden / "training.txt");
  EXPECT_EQ(one.encode(text), two.encode(text));
}

// 47 awkward strings and the ids that another implementation records for five real tokenizers.
TEST(TokenizerShared, RecordedVectors) {
  if (!fs::exists(kShared / "tokenizers")) GTEST_SKIP() << "no real tokenizers in " << kShared;
  const std::map<std::string, std::string> sets = {{"gpt-2", "gpt2"}, {"llama-bpe", "llama3"}, {"llama-spm", "llama2"},
                                                   {"phi-3", "phi3"}, {"qwen2", "qwen2.5"}};
  for (const auto& [vectors, folder] : sets) {
    std::string text = read_text(kShared / "tokenizers" / folder / "tokenizer.json");
    if (folder == "gpt2") {
      // This file has runs of blanks as added tokens, which GPT-2 itself, and so the recorded ids, do not have.
      nlohmann::json json = nlohmann::json::parse(text);
      json["added_tokens"] = {json["added_tokens"][0]};
      text = json.dump();
    }
    const Tokenizer tokenizer = Tokenizer::from_text(text, folder);
    const std::string inputs = read_text(kShared / "tokenizers/vectors" / (vectors + ".inp"));
    std::istringstream lines(read_text(kShared / "tokenizers/vectors" / (vectors + ".out")));
    const std::string separator = "\n__ggml_vocab_test__\n";
    int count = 0;
    std::string line;
    for (std::size_t begin = 0; begin <= inputs.size(); ++count) {
      if (!std::getline(lines, line)) line.clear();  // the last string is empty and has no ids
      const std::size_t end = std::min(inputs.find(separator, begin), inputs.size());
      Ids expected;
      std::istringstream numbers(line);
      for (std::int32_t id; numbers >> id;) expected.push_back(id);
      const std::string input = inputs.substr(begin, end - begin);
      EXPECT_EQ(tokenizer.encode(input, false), expected) << vectors << ": " << input;
      begin = end + separator.size();
    }
    EXPECT_EQ(count, 47) << vectors;
  }
}

TEST(TokenizerShared, Stories260K) {
  const fs::path file = kShared / "models/stories260K/tokenizer.json";
  if (!fs::exists(file)) GTEST_SKIP() << "no " << file;
  const Tokenizer tokenizer = Tokenizer::from_file(file);
  EXPECT_EQ(tokenizer.encode("Once upon a time"), (Ids{1, 403, 407, 261, 378}));
  EXPECT_EQ(tokenizer.decode(Ids{1, 403, 407, 261, 378}), "Once upon a time");
}

}  // namespace
}  // namespace pare
