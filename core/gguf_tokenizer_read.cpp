// tokenizer.ggml.* keys -> the text of a tokenizer.json, which core/tokenizer.h then executes.
#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "core/error.h"
#include "core/gguf_arch.h"
#include "core/gguf_file.h"
#include "core/tokenizer_sentencepiece.h"

namespace pare {
namespace {

using namespace gguf_token;

constexpr std::size_t kLongestToken = 1024;

class TokenKeys {
 public:
  TokenKeys(const GgufFile& file, std::int64_t rows) : file_(file), place_(file.path().string() + ": tokenizer.ggml.") {
    const auto list = file.texts("tokenizer.ggml.tokens");
    if (!list || list->empty()) throw input_error(place_ + "tokens", "a list of tokens", "none");
    tokens = *list;
    if (static_cast<std::int64_t>(tokens.size()) > rows)
      throw input_error(place_ + "tokens", "at most " + std::to_string(rows) + " tokens, the rows of the embedding",
                        std::to_string(tokens.size()));
    std::unordered_set<std::string_view> seen;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i].size() > kLongestToken)
        throw input_error(place_ + "tokens", "tokens of at most " + std::to_string(kLongestToken) + " bytes",
                          std::to_string(tokens[i].size()) + " of token " + std::to_string(i));
      if (tokens[i].empty()) tokens[i] = "[EMPTY_" + std::to_string(i) + "]";
      if (!seen.insert(tokens[i]).second)
        throw input_error(place_ + "tokens", "every token once", "\"" + tokens[i] + "\" twice");
    }
    types.assign(tokens.size(), kNormal);
    if (const auto given = file.integers("tokenizer.ggml.token_type")) {
      if (given->size() < tokens.size()) lengths("token_type", given->size());
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        const std::int64_t type = (*given)[i];
        if (type < 0 || type > kByte)
          throw input_error(place_ + "token_type", "types from 0 to 6",
                            std::to_string(type) + " of token " + std::to_string(i));
        types[i] = type == 0 ? static_cast<std::int64_t>(kNormal) : type;
      }
    }
    // What pads the vocabulary up to the rows of the embedding is no token.
    while (tokens.size() > 1 && types.back() == kUnused) {
      tokens.pop_back();
      types.pop_back();
    }
  }

  // nullopt: no key, or the number that stands for none.
  std::optional<std::int64_t> id(const char* key) const {
    const auto value = file_.integer(std::string("tokenizer.ggml.") + key);
    if (!value || *value == -1 || *value == UINT32_MAX) return std::nullopt;
    if (*value < 0 || *value >= static_cast<std::int64_t>(tokens.size()))
      throw input_error(place_ + key, "an id below " + std::to_string(tokens.size()), std::to_string(*value));
    return value;
  }
  bool flag(const char* key, bool fallback) const {
    return file_.flag(std::string("tokenizer.ggml.") + key).value_or(fallback);
  }
  [[noreturn]] void lengths(const char* key, std::size_t found) const {
    throw input_error(place_ + key, std::to_string(tokens.size()) + " elements, one for each token",
                      std::to_string(found));
  }
  const GgufFile& file() const { return file_; }
  const std::string& place() const { return place_; }

  std::vector<std::string> tokens;
  std::vector<std::int64_t> types;

 private:
  const GgufFile& file_;
  std::string place_;
};

// What stands before and after every text.
Json post_processor(const TokenKeys& keys, std::optional<std::int64_t> bos, std::optional<std::int64_t> eos) {
  if (!bos && !eos) return nullptr;
  Json single = Json::array(), pair = Json::array(), special = Json::object();
  const auto piece = [&](Json& list, std::int64_t id, int side) {
    const std::string& content = keys.tokens[static_cast<std::size_t>(id)];
    list.push_back({{"SpecialToken", {{"id", content}, {"type_id", side}}}});
    special[content] = {{"id", content}, {"ids", {id}}, {"tokens", {content}}};
  };
  for (const int side : {0, 1}) {
    for (Json* list : {&single, &pair}) {
      if (side == 1 && list == &single) continue;
      if (bos) piece(*list, *bos, side);
      list->push_back({{"Sequence", {{"id", side == 0 ? "A" : "B"}, {"type_id", side}}}});
      if (eos) piece(*list, *eos, side);
    }
  }
  return {{"type", "TemplateProcessing"}, {"single", single}, {"pair", pair}, {"special_tokens", special}};
}

std::string byte_level(const TokenKeys& keys) {
  const auto name = keys.file().text("tokenizer.ggml.pre");
  const GgufPreTokenizer* pre = name ? named_pre_tokenizer(*name) : nullptr;
  if (pre == nullptr)
    throw input_error(keys.place() + "pre", "one of " + pre_tokenizer_names(), name.value_or("none"),
                      "the split of text into words is not known without it");
  // Tokens that no merge makes and that stand behind all others are added to the vocabulary, not part of it.
  std::size_t size = keys.tokens.size();
  const auto added = [&](std::size_t i) { return keys.types[i] == kControl || keys.types[i] == kUserDefined; };
  while (size > 0 && added(size - 1)) --size;
  Json list = Json::array();
  for (std::size_t i = 0; i < keys.tokens.size(); ++i)
    if (added(i))
      list.push_back({{"id", i},
                      {"content", keys.tokens[i]},
                      {"single_word", false},
                      {"lstrip", false},
                      {"rstrip", false},
                      {"normalized", false},
                      {"special", keys.types[i] == kControl}});
  const auto bos = keys.flag("add_bos_token", pre->bos) ? keys.id("bos_token_id") : std::nullopt;
  const auto eos = keys.flag("add_eos_token", false) ? keys.id("eos_token_id") : std::nullopt;
  const auto quoted = [](std::string_view text) { return Json(text).dump(); };
  const Json normalizer = pre->nfc ? Json{{"type", "NFC"}} : Json(nullptr);
  // As text: an ordered object of so many keys would be searched for each.
  std::string out = R"({"version":"1.0","truncation":null,"padding":null,"added_tokens":)" + list.dump();
  out += ",\"normalizer\":" + normalizer.dump() + ",\"pre_tokenizer\":" + pre_tokenizer_json(*pre).dump();
  out += ",\"post_processor\":" + post_processor(keys, bos, eos).dump();
  out += R"(,"decoder":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true})";
  out += R"(,"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,)";
  out += R"("end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":)";
  out += pre->ignore_merges ? "true" : "false";
  out += ",\"vocab\":{";
  for (std::size_t i = 0; i < size; ++i) out += (i ? "," : "") + quoted(keys.tokens[i]) + ":" + std::to_string(i);
  out += "},\"merges\":[";
  const auto lines = keys.file().texts("tokenizer.ggml.merges");
  if (!lines) throw input_error(keys.place() + "merges", "a list of merges", "none");
  bool first = true;
  for (const std::string& line : *lines) {
    const auto space = line.find(' ', 1);
    if (space == std::string::npos || space + 1 == line.size())
      throw input_error(keys.place() + "merges", "two pieces with a space between them", "\"" + line + "\"");
    out += first ? "[" : ",[";
    out += quoted(line.substr(0, space)) + "," + quoted(line.substr(space + 1)) + "]";
    first = false;
  }
  return out + "]}}";
}

std::string sentencepiece(const TokenKeys& keys) {
  const auto scores = keys.file().numbers("tokenizer.ggml.scores");
  if (!scores) throw input_error(keys.place() + "scores", "a list of scores", "none");
  if (scores->size() < keys.tokens.size()) keys.lengths("scores", scores->size());
  tok::SpmModel model;
  for (std::size_t i = 0; i < keys.tokens.size(); ++i) {
    if (std::isnan((*scores)[i]))
      throw input_error(keys.place() + "scores", "numbers", "NaN for token " + std::to_string(i));
    model.pieces.push_back({keys.tokens[i], (*scores)[i], static_cast<tok::PieceType>(keys.types[i])});
    model.byte_fallback = model.byte_fallback || keys.types[i] == kByte;
    if (keys.types[i] == kUnknown && model.unknown < 0) model.unknown = static_cast<std::int32_t>(i);
  }
  if (const auto unknown = keys.id("unknown_token_id")) model.unknown = static_cast<std::int32_t>(*unknown);
  if (model.unknown < 0) throw input_error(keys.place() + "unknown_token_id", "an id", "none");
  const auto end = [&](const char* flag, bool fallback, const char* key, std::int64_t usual) {
    if (!keys.flag(flag, fallback)) return std::int32_t{-1};
    if (!keys.file().has(std::string("tokenizer.ggml.") + key))
      return static_cast<std::int32_t>(
          std::min<std::int64_t>(usual, static_cast<std::int64_t>(keys.tokens.size()) - 1));
    return static_cast<std::int32_t>(keys.id(key).value_or(-1));
  };
  model.bos = end("add_bos_token", true, "bos_token_id", 1);
  model.eos = end("add_eos_token", false, "eos_token_id", 2);
  model.adds_eos = model.eos >= 0;
  model.add_dummy_prefix = keys.flag("add_space_prefix", true);
  model.legacy = keys.file().text("pare.prepend").value_or("always") != "first";
  model.remove_extra_whitespaces = keys.flag("remove_extra_whitespaces", false);
  return tok::spm_tokenizer_json(model, {}, keys.place() + "tokens");
}

}  // namespace

std::optional<std::string> gguf_tokenizer_json(const GgufFile& file, std::int64_t rows) {
  const auto model = file.text("tokenizer.ggml.model");
  if (!model || *model == "none" || *model == "no_vocab") return std::nullopt;
  if (*model != "gpt2" && *model != "llama")
    throw input_error(file.path().string() + ": tokenizer.ggml.model", "gpt2 or llama", *model,
                      "this kind of tokenizer is not supported");
  const TokenKeys keys(file, rows);
  return *model == "gpt2" ? byte_level(keys) : sentencepiece(keys);
}

}  // namespace pare
