// tokenizer.model alone: ids of sentencepiece and of transformers' converters (tests/golden/make_sentencepiece.py), the
// files beside the model, and files that are refused.
#include "core/tokenizer_sentencepiece.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <map>
#include <random>
#include <sstream>

#include "core/error.h"
#include "core/tokenizer.h"
#include "core/tokenizer_file.h"
#include "tests/scratch.h"

namespace pare {
namespace {

const fs::path kGolden = fs::path(PARE_SOURCE_DIR) / "tests/golden/sentencepiece";
const fs::path kShared = fs::path(PARE_SOURCE_DIR) / ".." / "shared";

using Ids = std::vector<std::int32_t>;

// One field of a protocol buffer; at the end of a file it adds to or replaces what the message has.
std::string field(int number, const std::string& body) {
  std::string out(1, static_cast<char>(number << 3 | 2));
  std::size_t size = body.size();
  for (; size >= 128; size >>= 7) out += static_cast<char>(size | 0x80);
  return out + static_cast<char>(size) + body;
}
std::string field(int number, int value) {
  std::string key(1, static_cast<char>((number << 3 & 0x7F) | (number > 15 ? 0x80 : 0)));
  if (number > 15) key += static_cast<char>(number >> 4);
  return key + static_cast<char>(value);
}
std::string piece(const std::string& text, int type, const std::string& score = std::string("\0\0\0\0", 4)) {
  return field(1, field(1, text) + "\x15" + score + field(3, type));
}
const auto trainer = [](const std::string& body) { return field(2, body); };
const auto normalizer = [](const std::string& body) { return field(3, body); };

TEST(SentencepieceModule, IsFoundWhereItWasBuilt) { EXPECT_EQ(tok::reads_sentencepiece(), PARE_HAS_SENTENCEPIECE == 1); }

class Sentencepiece : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!tok::reads_sentencepiece()) GTEST_SKIP() << "SKIPPED: built without libsentencepiece";
  }
  void use(const std::string& name, const Json& config = nullptr, const std::string& appended = {}) {
    use_bytes(read_text(kGolden / (name + ".model")) + appended);
    put("tokenizer_config.json", config);
  }
  void use_bytes(const std::string& bytes) {
    std::ofstream out(scratch_ / "tokenizer.model", std::ios::binary);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
  void put(const std::string& name, const Json& json) {
    fs::remove(scratch_ / name);
    if (!json.is_null()) std::ofstream(scratch_ / name) << json.dump();
  }
  Tokenizer load() { return Tokenizer::from_file(scratch_ / "tokenizer.json"); }
  // Exit code and message, or "loaded".
  std::string outcome() {
    try {
      load();
    } catch (const Error& error) {
      return std::to_string(static_cast<int>(error.code())) + " " + error.what();
    }
    return "loaded";
  }
  ::testing::AssertionResult refused(const std::string& part) {
    const std::string got = outcome();
    return got.starts_with("3 ") && got.find(part) != std::string::npos
               ? ::testing::AssertionSuccess()
               : ::testing::AssertionFailure() << "\"" << part << "\" is not in: " << got;
  }
  testing::Scratch scratch_;
};

std::vector<Json> cases_of(const std::string& name) {
  std::vector<Json> cases;
  std::istringstream lines(read_text(kGolden / (name + ".jsonl")));
  for (std::string line; std::getline(lines, line);) cases.push_back(parse_json(line, name));
  return cases;
}

TEST_F(Sentencepiece, IdsOfTheConvertersOfTransformers) {
  std::size_t compared = 0;
  for (const std::string name : {"llama", "llama_spaces", "gemma", "user", "no_bytes"}) {
    use(name, {{"tokenizer_class", name == "gemma" ? "GemmaTokenizerFast" : "LlamaTokenizer"}});
    const Tokenizer tokenizer = load();
    for (const Json& item : cases_of(name)) {
      const auto text = item["text"].get<std::string>();
      const auto ids = item[item.contains("legacy") ? "legacy" : "sp"].get<Ids>();
      EXPECT_EQ(tokenizer.encode(text, false), ids) << name << item;
      ++compared;
    }
  }
  EXPECT_GT(compared, 600u);
}

// Where no symbol of a file's own is in play the library itself gives the same ids, white space trimmed or not.
TEST_F(Sentencepiece, IdsOfTheLibrary) {
  for (const std::string name : {"llama", "llama_spaces", "no_bytes", "trimmed"}) {
    use(name);
    const Tokenizer tokenizer = load();
    for (const Json& item : cases_of(name))
      EXPECT_EQ(tokenizer.encode(item["text"].get<std::string>(), false, false), item["sp"].get<Ids>()) << name << item;
  }
}

TEST_F(Sentencepiece, LegacyFalsePutsThePrefixAtTheVeryBeginning) {
  for (const std::string name : {"llama", "user"}) {
    use(name, {{"tokenizer_class", "LlamaTokenizer"}, {"legacy", false}});
    const Tokenizer tokenizer = load();
    for (const Json& item : cases_of(name))
      EXPECT_EQ(tokenizer.encode(item["text"].get<std::string>(), false),
                item[item.contains("first") ? "first" : "sp"].get<Ids>()) << name << item;
  }
}

TEST_F(Sentencepiece, TextComesBack) {
  for (const std::string name : {"llama", "gemma", "llama_spaces"}) {
    use(name);
    const Tokenizer tokenizer = load();
    for (const std::string text : {"Hello world", "  x\n\ty ", "Straße 今日は \U0001F999", "a the  b"}) {
      EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text) << name;
      StreamDecoder decoder(tokenizer);
      std::string streamed;
      for (const std::int32_t id : tokenizer.encode(text)) streamed += decoder.push(id);
      EXPECT_EQ(streamed + decoder.finish(), text) << name;
    }
  }
}

TEST_F(Sentencepiece, PrefixFollowsTheModelUnlessTheConfigurationSays) {
  use("llama");
  const Ids with = load().encode("a", false);
  use("llama", nullptr, normalizer(field(3, 0)));
  const Ids without = load().encode("a", false);
  EXPECT_NE(with, without);
  use("llama", {{"add_prefix_space", false}});
  EXPECT_EQ(load().encode("a", false), without);
  EXPECT_EQ(load().decode(load().encode(" a")), " a");
  use("llama", {{"add_prefix_space", true}}, normalizer(field(3, 0)));
  EXPECT_EQ(load().encode("a", false), with);
}

TEST_F(Sentencepiece, BosAndEos) {
  const auto around = [&](const Json& config) {
    put("tokenizer_config.json", config);
    const Ids inner = load().encode("a", false), whole = load().encode("a");
    std::string out;
    for (const std::int32_t id : whole) out += (id == inner[0] ? "x" : load().token(id)) + " ";
    return out;
  };
  use("llama");
  EXPECT_EQ(around(nullptr), "<s> x ");
  EXPECT_EQ(around({{"add_eos_token", true}}), "<s> x </s> ");
  EXPECT_EQ(around({{"add_bos_token", false}}), "x ");
  EXPECT_EQ(around({{"bos_token", nullptr}}), "x ");
  EXPECT_EQ(around({{"bos_token", {{"content", "</s>"}}}}), "</s> x ");
  EXPECT_EQ(around({{"bos_token", "<begin>"}}), "<begin> x ");
  EXPECT_EQ(load().prefix_ids(), (Ids{static_cast<std::int32_t>(load().size()) - 1}));
  put("special_tokens_map.json", {{"bos_token", {{"content", "</s>"}}}});
  EXPECT_EQ(around({{"bos_token", "<s>"}}), "</s> x ");
  use("gemma");
  fs::remove(scratch_ / "special_tokens_map.json");
  EXPECT_EQ(around({{"tokenizer_class", "GemmaTokenizer"}}), "<bos> x ");
  use("llama", {{"add_bos_token", true}, {"bos_token", nullptr}});
  EXPECT_TRUE(refused("add_bos_token"));
  use("llama", {{"add_bos_token", "yes"}});
  EXPECT_TRUE(refused("tokenizer_config.json: add_bos_token"));
}

TEST_F(Sentencepiece, AddedTokensOfTheConfiguration) {
  const auto entry = [](const char* content, bool special) {
    return Json{{"content", content},  {"lstrip", false},      {"normalized", false},
                {"rstrip", true},      {"single_word", false}, {"special", special}};
  };
  use("llama");
  const auto size = static_cast<std::int32_t>(load().size());
  const std::string next = std::to_string(size), after = std::to_string(size + 1);
  use("llama", {{"added_tokens_decoder", {{after, entry("<|b|>", false)}, {next, entry("<|a|>", true)}}}});
  put("added_tokens.json", {{"<ignored>", size + 2}});  // the newer list replaces the older files
  const Tokenizer tokenizer = load();
  EXPECT_EQ(tokenizer.size(), size + 2);
  EXPECT_EQ(tokenizer.id("<|a|>"), size);
  EXPECT_TRUE(tokenizer.is_special(size));
  EXPECT_FALSE(tokenizer.is_special(size + 1));
  EXPECT_EQ(tokenizer.encode("<|b|>   <|a|>", false), (Ids{size + 1, size}));  // rstrip
  // Another spelling of a piece that stands in the model.
  use("user", {{"added_tokens_decoder", {{"3", entry("<|other|>", true)}}}});
  EXPECT_EQ(load().encode("<|other|>", false), (Ids{3}));
  EXPECT_EQ(load().id("<|ctl|>"), -1);
  use("user", {{"added_tokens_decoder", {{"3", entry("<x>", true)}}}});
  EXPECT_TRUE(refused("added_tokens_decoder: expected id 4 for \"<x>\""));
  use("llama", {{"added_tokens_decoder", {{after, entry("<|a|>", true)}}}});
  EXPECT_TRUE(refused("without gaps"));
  for (const Json& bad : {Json{{"-1", entry("x", true)}}, Json{{"99999999999999999999", entry("x", true)}},
                          Json{{"600", "x"}}, Json{{next, {{"special", true}}}}, Json(3), Json(Json::array())}) {
    use("llama", {{"added_tokens_decoder", bad}});
    const std::string got = outcome();
    EXPECT_TRUE(got == "loaded" ? bad.is_object() : got.starts_with("3 ")) << bad << got;
  }
}

TEST_F(Sentencepiece, AddedTokensOfTheOlderFiles) {
  use("llama");
  const auto size = static_cast<std::int32_t>(load().size());
  put("added_tokens.json", {{"[PAD]", size}, {"<word>", size + 1}});
  put("special_tokens_map.json", {{"pad_token", "[PAD]"}, {"additional_special_tokens", {"<new>", "<s>"}}});
  const Tokenizer tokenizer = load();
  EXPECT_TRUE(tokenizer.is_special(size));
  EXPECT_FALSE(tokenizer.is_special(size + 1));
  EXPECT_EQ(tokenizer.id("<new>"), size + 2);  // without an id of its own it gets the next
  EXPECT_TRUE(tokenizer.is_special(size + 2));
  EXPECT_EQ(tokenizer.encode("[PAD]<new>", false), (Ids{size, size + 2}));
  for (const Json& bad : {Json{{"x", -1}}, Json{{"x", "1"}}, Json{{"x", size}, {"y", size}}, Json::array()}) {
    put("added_tokens.json", bad);
    EXPECT_TRUE(refused("added_tokens.json")) << bad;
  }
  put("added_tokens.json", nullptr);
  put("special_tokens_map.json", {{"pad_token", 3}});
  EXPECT_TRUE(refused("special_tokens_map.json: pad_token"));
}

TEST_F(Sentencepiece, ControlPiecesAreNeverMadeFromText) {
  // "<" and "s>" as pieces would let a merge spell the control piece "<s>".
  use("llama", nullptr, piece("s>", 1));
  const Tokenizer tokenizer = load();
  for (const std::int32_t id : tokenizer.encode("<s>", false, false)) EXPECT_NE(id, 1);
  EXPECT_EQ(tokenizer.encode("<s>", false, true), (Ids{1}));
}

// Gemma's first files have no piece for the tab; its byte then carries that spelling, with the same id.
TEST_F(Sentencepiece, GemmasMissingTab) {
  std::string bytes = piece("<unk>", 2) + piece("<s>", 3) + piece("</s>", 3);
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", byte);
    bytes += piece(name, 6);
  }
  for (const char* text : {"a", "\t\t", "\ta"}) bytes += piece(text, 1);
  use_bytes(bytes + trainer(field(3, 2) + std::string("\x98\x02\x01", 3)) + normalizer(field(3, 0) + field(4, 0)));
  EXPECT_EQ(load().token(3 + 9), "<0x09>");
  EXPECT_EQ(load().encode("\t\ta", false), (Ids{12, 12, 259}));
  put("tokenizer_config.json", {{"tokenizer_class", "GemmaTokenizer"}});
  EXPECT_EQ(load().token(3 + 9), "\t");
  EXPECT_EQ(load().encode("\t", false), (Ids{12}));
  EXPECT_EQ(load().encode("\t\t", false), (Ids{260}));  // merges of tabs are possible now
  EXPECT_EQ(load().decode(load().encode("a\t")), "a\t");
}

TEST_F(Sentencepiece, TheFileBesideItGoesFirst) {
  use("llama");
  EXPECT_TRUE(has_tokenizer(scratch_.path()));
  const std::string text = tokenizer_json_text(scratch_.path()).value();
  EXPECT_EQ(text, tokenizer_json_text(scratch_.path()).value());
  std::ofstream(scratch_ / "tokenizer.json") << text;
  use_bytes("not a model");
  EXPECT_EQ(load().encode("a", false), Tokenizer::from_text(text, "").encode("a", false));
  EXPECT_EQ(tokenizer_json_text(scratch_.path()), text);
  EXPECT_EQ(Tokenizer::from_file(kGolden / "llama.model").encode("a"), load().encode("a"));
  fs::remove(scratch_ / "tokenizer.json");
  fs::remove(scratch_ / "tokenizer.model");
  EXPECT_FALSE(has_tokenizer(scratch_.path()));
  EXPECT_FALSE(tokenizer_json_text(scratch_.path()).has_value());
}

TEST_F(Sentencepiece, OtherKindsOfModelsAreRefused) {
  use("unigram");
  EXPECT_TRUE(refused("trainer_spec.model_type: expected BPE, found UNIGRAM"));
  use("llama", nullptr, trainer(field(3, 3)));
  EXPECT_TRUE(refused("found WORD"));
  use("llama", nullptr, trainer(field(3, 4)));
  EXPECT_TRUE(refused("found CHAR"));
  use("llama", nullptr, trainer(field(3, 9)));
  EXPECT_TRUE(refused("a model type from 1 to 4"));
  use("llama", nullptr, trainer(field(24, 1)));
  EXPECT_TRUE(refused("treat_whitespace_as_suffix"));
  use("llama", nullptr, normalizer(field(1, "nmt_nfkc") + field(2, "rules")));
  EXPECT_TRUE(refused("the rules \"nmt_nfkc\", 5 bytes"));
  use("llama", nullptr, normalizer(field(5, 0)));
  EXPECT_TRUE(refused("escape_whitespaces"));
  use("llama", nullptr, field(5, field(2, "rules")));
  EXPECT_TRUE(refused("denormalizer_spec"));
  use("llama", {{"tokenizer_class", "XLNetTokenizer"}});
  EXPECT_TRUE(refused("found XLNetTokenizer"));
  use("llama", Json::array());
  EXPECT_TRUE(refused("tokenizer_config.json"));
}

TEST_F(Sentencepiece, DamagedFilesAreRefused) {
  for (const std::string& bytes :
       {std::string(), std::string("{\"model\": {}}"), std::string(1000, '\0'), std::string(1000, '\xff'),
        std::string("version https://git-lfs.github.com/spec/v1\n")}) {
    use_bytes(bytes);
    EXPECT_TRUE(refused("tokenizer.model")) << bytes.size();
  }
  use_bytes("\n\x0f");
  EXPECT_TRUE(refused("tokenizer.model: byte 0: expected 15 more bytes, found the end after 0"));
  use("llama", nullptr, piece("a", 1));  // stands there already
  EXPECT_TRUE(refused("tokenizer.model"));
  use("llama", nullptr, piece("", 1));
  EXPECT_TRUE(refused("a piece of at least one character"));
  use("llama", nullptr, piece("\xff\xfe", 1));
  EXPECT_TRUE(refused("a piece in UTF-8"));
  use("llama", nullptr, piece("new", 7));
  EXPECT_TRUE(refused("a type of piece from 1 to 6"));
  use("llama", nullptr, piece("new", 1, std::string("\0\0\xc0\x7f", 4)));
  EXPECT_TRUE(refused("a finite score"));
  use("llama", nullptr, piece(std::string("a\0b", 3), 4));
  EXPECT_TRUE(refused("without the character 0"));
  use("llama", nullptr, piece(std::string(2000, 'a'), 1));
  EXPECT_TRUE(refused("at most 1024 bytes"));
  use("llama", nullptr, piece("<second>", 2));  // two unknown pieces
  EXPECT_TRUE(refused("libsentencepiece accepts"));
  use("llama", nullptr, trainer(std::string("\xea\x02\x03", 3) + "<u>"));  // unk_piece (45) by another name
  EXPECT_EQ(load().encode("<unk>", false), (Ids{0}));
  use("no_bytes", nullptr, trainer(std::string("\x98\x02\x01", 3)));  // byte_fallback (35) without the 256 pieces
  EXPECT_TRUE(refused("libsentencepiece accepts"));
}

// A cut or changed file loads or is refused; nothing else.
TEST_F(Sentencepiece, AnyBytesEndInTokensOrAnError) {
  const std::string whole = read_text(kGolden / "user.model");
  std::mt19937 random(3);
  int loaded = 0, refusals = 0;
  const auto attempt = [&](const std::string& bytes) {
    use_bytes(bytes);
    const std::string got = outcome();
    EXPECT_TRUE(got == "loaded" || got.starts_with("3 ")) << got;
    ++(got == "loaded" ? loaded : refusals);
  };
  for (std::size_t cut = 0; cut < whole.size(); cut += 97) attempt(whole.substr(0, cut));
  for (int round = 0; round < 120; ++round) {
    std::string bytes = whole;
    for (int change = 0; change <= round % 3; ++change) {
      const std::size_t at = round % 2 ? random() % bytes.size() : bytes.size() - 1 - random() % 200;
      bytes[at] = static_cast<char>(random());
    }
    attempt(bytes);
  }
  EXPECT_GT(loaded, 5);
  EXPECT_GT(refusals, 100);
}

// The published conversion of Llama 2's model, turned back into a model: the same ids come out.
TEST_F(Sentencepiece, Llama2ThereAndBack) {
  const fs::path published = kShared / "tokenizers" / "llama2" / "tokenizer.json";
  if (!fs::exists(published)) GTEST_SKIP() << "SKIPPED: no " << published;
  const tok::TokenizerFile file = tok::parse_tokenizer_file(read_text(published), "published");
  std::vector<std::string> pieces(file.vocab.size());
  for (const auto& [text, id] : file.vocab) pieces.at(static_cast<std::size_t>(id)) = text;
  std::map<std::string, float> place;  // of a piece among the merges
  for (const auto& [left, right] : file.merges) place.emplace(left + right, -static_cast<float>(place.size()));
  std::string bytes;
  for (std::size_t id = 0; id < pieces.size(); ++id) {
    const auto at = place.find(pieces[id]);
    const float score = id < 259 ? 0.0f : at == place.end() ? -1e6f - static_cast<float>(id) : at->second;
    bytes += piece(pieces[id], id == 0 ? 2 : id < 3 ? 3 : id < 259 ? 6 : 1,
                   std::string(reinterpret_cast<const char*>(&score), 4));
  }
  use_bytes(bytes + trainer(field(3, 2) + std::string("\x98\x02\x01", 3)) + normalizer(field(4, 0)));
  put("tokenizer_config.json", read_json(published.parent_path() / "tokenizer_config.json"));
  const Tokenizer reference = Tokenizer::from_file(published), ours = load();
  const std::string text = read_text(fs::path(PARE_SOURCE_DIR) / "README.md");
  EXPECT_EQ(ours.encode(text), reference.encode(text));
  for (const Json& item : cases_of("llama")) {
    const auto string = item["text"].get<std::string>();
    EXPECT_EQ(ours.encode(string), reference.encode(string)) << item;
  }
  // The merges are those of the published file, but for the order among splits of one piece.
  const std::string converted = tokenizer_json_text(scratch_.path()).value();
  const auto pieces_in_order = [](const tok::TokenizerFile& from) {
    std::vector<std::string> order;
    for (const auto& [left, right] : from.merges)
      if (order.empty() || order.back() != left + right) order.push_back(left + right);
    return order;
  };
  const tok::TokenizerFile made = tok::parse_tokenizer_file(converted, "made");
  EXPECT_EQ(made.merges.size(), file.merges.size());
  EXPECT_EQ(pieces_in_order(made), pieces_in_order(file));
}

}  // namespace
}  // namespace pare
