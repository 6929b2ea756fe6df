// Broken and unsupported tokenizer.json: always an error that names the place, never a crash.
#include <gtest/gtest.h>

#include <fstream>

#include "core/error.h"
#include "core/tokenizer.h"
#include "core/tokenizer_regex.h"
#include "core/tokenizer_sentencepiece.h"
#include "tests/scratch.h"

namespace pare {
namespace {

const fs::path kGolden = fs::path(PARE_SOURCE_DIR) / "tests/golden/tokenizers";

Json minimal() {
  return Json::parse(R"({"version": "1.0", "added_tokens": [
      {"id": 4, "content": "<x>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
    "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
    "model": {"type": "BPE", "unk_token": null, "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3}, "merges": ["a b"]}})");
}

std::string message_of(const std::string& text) {
  try {
    Tokenizer::from_text(text, "file");
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInput);
    return error.what();
  }
  return "no error";
}
std::string message_of(const Json& json) { return message_of(json.dump()); }

::testing::AssertionResult contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos ? ::testing::AssertionSuccess()
                                              : ::testing::AssertionFailure() << "\"" << part << "\" is not in: " << text;
}

TEST(TokenizerErrors, SentencepieceFilesAloneAreNamed) {
  const testing::Scratch scratch;
  std::ofstream(scratch / "tokenizer.model") << "\n\x0f";
  for (const char* name : {"tokenizer.json", "tokenizer.model"}) {
    try {
      Tokenizer::from_file(scratch / name);
      ADD_FAILURE() << name;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput);
      EXPECT_TRUE(contains(error.what(), "tokenizer.model: ")) << name;
      if (tok::reads_sentencepiece()) continue;  // then the file itself is what is wrong
      EXPECT_TRUE(contains(error.what(), "only sentencepiece's tokenizer.model")) << name;
      EXPECT_TRUE(contains(error.what(), "libsentencepiece-dev")) << name;
      EXPECT_TRUE(contains(error.what(), "save_pretrained")) << name;
    }
  }
  std::ofstream(scratch / "tokenizer.json") << minimal().dump();  // beside it, the file that can be read is read
  EXPECT_EQ(Tokenizer::from_file(scratch / "tokenizer.json").id("ab"), 2);
}

TEST(TokenizerErrors, TheMinimalFileLoads) {
  const Tokenizer tokenizer = Tokenizer::from_json(minimal(), "file");
  EXPECT_EQ(tokenizer.encode("abc<x>d"), (std::vector<std::int32_t>{2, 3, 4}));  // d is dropped: no unknown token
}

TEST(TokenizerErrors, UnsupportedComponentsAreNamed) {
  const auto with = [](const char* key, const char* value) {
    Json json = minimal();
    json[key] = Json::parse(value);
    return message_of(json);
  };
  EXPECT_TRUE(contains(with("normalizer", R"({"type": "Precompiled"})"), "file: normalizer: "));
  EXPECT_TRUE(contains(with("normalizer", R"({"type": "Precompiled"})"), "found Precompiled"));
  EXPECT_TRUE(contains(with("normalizer", R"({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Nmt"}]})"),
                       "normalizer.normalizers[1]"));
  EXPECT_TRUE(contains(with("pre_tokenizer", R"({"type": "BertPreTokenizer"})"), "found BertPreTokenizer"));
  EXPECT_TRUE(contains(with("post_processor", R"({"type": "RobertaProcessing"})"), "found RobertaProcessing"));
  EXPECT_TRUE(contains(with("decoder", R"({"type": "WordPiece"})"), "found WordPiece"));
  EXPECT_TRUE(contains(with("decoder", R"({"type": 3})"), "decoder.type"));
  EXPECT_TRUE(contains(with("decoder", R"([])"), "an object"));
  EXPECT_TRUE(contains(with("pre_tokenizer", R"({"type": "Split", "pattern": {"Regex": "a("}, "behavior": "Isolated", "invert": false})"),
                       "pre_tokenizer.pattern"));
  EXPECT_TRUE(contains(with("pre_tokenizer", R"({"type": "Split", "pattern": {"String": "a"}, "behavior": "Odd", "invert": false})"),
                       "pre_tokenizer.behavior"));
  EXPECT_TRUE(contains(with("pre_tokenizer", R"({"type": "Metaspace", "replacement": "ab"})"), "one character"));
  EXPECT_TRUE(contains(with("pre_tokenizer", R"({"type": "Metaspace", "replacement": "_", "add_prefix_space": false, "prepend_scheme": "always"})"),
                       "prepend_scheme"));
  EXPECT_TRUE(contains(with("post_processor", R"({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}], "special_tokens": {}})"),
                       "<s>"));
  EXPECT_TRUE(contains(with("post_processor", R"({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "s"}}], "special_tokens": {"s": {"ids": [77]}}})"),
                       "id 77"));
  EXPECT_TRUE(contains(with("post_processor", R"({"type": "TemplateProcessing", "single": [], "special_tokens": {}})"), "sequence A"));
}

TEST(TokenizerErrors, ModelsThatAreNotPlainBpe) {
  const auto with = [](const char* key, const char* value) {
    Json json = minimal();
    json["model"][key] = Json::parse(value);
    return message_of(json);
  };
  EXPECT_TRUE(contains(with("type", "\"Unigram\""), "found Unigram"));
  EXPECT_TRUE(contains(with("dropout", "0.1"), "model.dropout"));
  EXPECT_TRUE(contains(with("continuing_subword_prefix", "\"##\""), "continuing_subword_prefix"));
  EXPECT_TRUE(contains(with("end_of_word_suffix", "\"</w>\""), "end_of_word_suffix"));
  EXPECT_TRUE(contains(with("unk_token", "\"<unk>\""), "unk_token"));
  EXPECT_TRUE(contains(with("byte_fallback", "1"), "model.byte_fallback"));
  EXPECT_TRUE(contains(with("vocab", "[[\"a\", -1.0]]"), "vocab"));
  EXPECT_TRUE(contains(with("vocab", "7"), "model.vocab"));
  EXPECT_TRUE(contains(with("vocab", R"({"a": 0, "b": 1, "ab": 1})"), "id 1"));
  EXPECT_TRUE(contains(with("vocab", R"({"a": -1})"), "model.vocab[\"a\"]"));
  EXPECT_TRUE(contains(with("vocab", R"({"a": 99999999999})"), "model.vocab[\"a\"]"));
  EXPECT_TRUE(contains(with("vocab", R"({"a": 18446744073709551615})"), "model.vocab[\"a\"]"));
  EXPECT_TRUE(contains(with("vocab", R"({"a": 4194304})"), "model.vocab[\"a\"]"));
  EXPECT_TRUE(contains(with("vocab", R"({"a": 1.5})"), "model.vocab[\"a\"]"));
  EXPECT_TRUE(contains(with("vocab", R"({"a": {}})"), "model.vocab[\"a\"]"));
  EXPECT_TRUE(contains(with("merges", R"(["a b c"])"), "model.merges[0]"));
  EXPECT_TRUE(contains(with("merges", R"(["a b", ["a"]])"), "model.merges"));
  EXPECT_TRUE(contains(with("merges", R"([["a", "b", "c"]])"), "model.merges"));
  EXPECT_TRUE(contains(with("merges", R"([["a", 1]])"), "model.merges"));
  EXPECT_TRUE(contains(with("merges", R"([["a", ["b"]]])"), "model.merges"));
  EXPECT_TRUE(contains(with("merges", R"(["b c"])"), "\"bc\""));
  EXPECT_TRUE(contains(with("merges", R"({"a": 1})"), "model.merges"));
  EXPECT_TRUE(contains(with("merges", R"("x")"), "model.merges"));
  Json missing = minimal();
  missing["model"].erase("merges");
  EXPECT_TRUE(contains(message_of(missing), "merges"));
  missing.erase("model");
  EXPECT_TRUE(contains(message_of(missing), "\"model\""));
  EXPECT_TRUE(contains(message_of(std::string(R"({"model": {"vocab": {"a": 0, "a": 1}, "merges": []}})")), "twice"));
  EXPECT_TRUE(contains(message_of(std::string(R"({"model": {"merges": [], "vocab": {}, "vocab": {}}})")), "twice"));
  EXPECT_TRUE(contains(message_of(std::string(R"({"model": {}, "model": {}})")), "twice"));
}

TEST(TokenizerErrors, AddedTokens) {
  const auto with = [](const char* key, const char* value) {
    Json json = minimal();
    json["added_tokens"][0][key] = Json::parse(value);
    return message_of(json);
  };
  EXPECT_TRUE(contains(with("id", "5"), "expected id 4"));
  EXPECT_TRUE(contains(with("id", "-1"), "added_tokens[0].id"));
  EXPECT_TRUE(contains(with("id", "1e3"), "added_tokens[0].id"));
  EXPECT_TRUE(contains(with("id", "18446744073709551615"), "added_tokens[0].id"));
  EXPECT_TRUE(contains(with("content", "\"\""), "added_tokens[0]"));
  EXPECT_TRUE(contains(with("content", "null"), "added_tokens[0].content"));
  EXPECT_TRUE(contains(with("special", "null"), "added_tokens[0].special"));
  Json twice = minimal();
  twice["added_tokens"].push_back(twice["added_tokens"][0]);
  EXPECT_TRUE(contains(message_of(twice), "twice"));
  Json object = minimal();
  object["added_tokens"] = Json::object();
  EXPECT_TRUE(contains(message_of(object), "a list"));
}

TEST(TokenizerErrors, NestingAndSyntax) {
  EXPECT_TRUE(contains(message_of(std::string(100000, '[')), "64 levels"));
  EXPECT_TRUE(contains(message_of(std::string()), "valid JSON"));
  EXPECT_TRUE(contains(message_of(std::string("[]")), "a JSON object"));
  EXPECT_TRUE(contains(message_of(minimal().dump() + "x"), "valid JSON"));
  EXPECT_TRUE(contains(message_of(std::string("{\"a\": \"\xFF\"}")), "valid JSON"));
  std::string nested = R"({"type": "NFC"})";
  for (int i = 0; i < 20; ++i) nested = R"({"type": "Sequence", "normalizers": [)" + nested + "]}";
  Json json = minimal();
  json["normalizer"] = Json::parse(nested);
  EXPECT_TRUE(contains(message_of(json), "nested at most 8 deep"));
}

// No prefix of a file loads, and none crashes.
TEST(TokenizerErrors, TruncatedFiles) {
  for (const char* name : {"llama3.json", "mistral.json"}) {
    const std::string text = read_text(kGolden / name);
    for (std::size_t length = 0; length < text.size(); length += 7)
      EXPECT_THROW(Tokenizer::from_text(text.substr(0, length), name), Error) << length;
  }
}

// Each value replaced by one of another type: an error or a tokenizer that still encodes.
void replace_each(Json& root, Json& node, const std::vector<Json>& others, int& tried) {
  if (node.is_structured() && node.size() <= 20)
    for (Json& child : node) replace_each(root, child, others, tried);
  const Json kept = node;
  for (const Json& other : others) {
    node = other;
    ++tried;
    try {
      const Tokenizer tokenizer = Tokenizer::from_text(root.dump(), "file");
      tokenizer.decode(tokenizer.encode("ab <x> c\xFF\n the end<s>"));
    } catch (const Error& error) {
      EXPECT_FALSE(error.place().empty());
    }
    node = kept;
  }
}

TEST(TokenizerErrors, WrongTypesEverywhere) {
  const std::vector<Json> others = {nullptr, true, -1, 1e300, 5000000000ll, "", "x", Json::array(), Json::object(), Json::array({1, "a"})};
  int tried = 0;
  for (const char* name : {"llama3.json", "mistral.json", "gemma.json"}) {
    Json json = read_json(kGolden / name);
    json["model"]["vocab"] = {{"a", 3}, {"b", 4}, {"ab", 5}, {"<unk>", 0}, {"<s>", 1}, {"</s>", 2}};
    json["model"]["merges"] = Json::array({"a b"});
    json["added_tokens"].erase(json["added_tokens"].begin() + 3, json["added_tokens"].end());
    replace_each(json, json, others, tried);
  }
  EXPECT_GT(tried, 1000);
}

TEST(TokenizerRegex, MeaningOfTheReferenceEngine) {
  const auto matches = [](const char* pattern, const std::string& text) {
    std::string out;
    tok::Regex::compile(pattern, "pattern").for_each(text, [&](std::size_t begin, std::size_t end) {
      out += "[" + text.substr(begin, end - begin) + "]";
    });
    return out;
  };
  EXPECT_EQ(matches(R"(\s+)", "a \u180E\u3000b"), "[ ][\u3000]");     // U+180E is no white space
  EXPECT_EQ(matches(R"([^\s]+)", "a \u180E b"), "[a][\u180E][b]");
  EXPECT_EQ(matches(R"([\S]+)", "a \u180E\u2003b"), "[a][\u180E][b]");
  EXPECT_EQ(matches(R"(\p{N}{1,3}+)", "12345"), "[12345]");           // {n,m}+ repeats, it is not possessive
  EXPECT_EQ(matches(R"((?:ab|c){2}+)", "abcab c"), "[abc]");
  EXPECT_EQ(matches(R"(a{2}?)", "aaa"), "[aa][]");                    // {n}? is "n or none", greedy
  EXPECT_EQ(matches("^.", "ab\ncd"), "[a][c]");                       // ^ and $ at every line
  EXPECT_EQ(matches("(?i:'s)", "'S '\u017F"), "['S]['\u017F]");
  EXPECT_EQ(matches("x*", "xxa"), "[xx][]");
  EXPECT_EQ(matches(R"(\w+)", "a_\u24D0\u0301 -"), "[a_\u24D0\u0301]");
  for (const char* refused : {R"([a&&b])", R"([a[bc]])", R"(\h)", R"(\R)", R"((?x:a))", R"(\k<a>)", R"(a)" "\\", "[a", R"((?{x}))"})
    EXPECT_THROW(tok::Regex::compile(refused, "pattern"), Error) << refused;
}

}  // namespace
}  // namespace pare
