// Patterns are those of the published tokenizer.json files whose names llama.cpp gives to them.
#include "core/gguf_arch.h"

namespace pare {
namespace {

const std::vector<GgufPreTokenizer>& table() {
  static const std::string kLlama3 = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3})"
                                     R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  static const std::string kQwen2 = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})"
                                    R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  static const std::string kUpper = R"([\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])", kLower = R"([\p{Ll}\p{Lm}\p{Lo}\p{M}])";
  static const std::string kWord = R"([^\r\n\p{L}\p{N}]?)", kShort = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?)";
  static const std::string kRest = R"(| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  static const std::string kTekken =
      kWord + kUpper + "*" + kLower + "+|" + kWord + kUpper + "+" + kLower + R"(*|\p{N})" + kRest;
  static const std::string kGpt4o = kWord + kUpper + "*" + kLower + "+" + kShort + "|" + kWord + kUpper + "+" + kLower +
                                    "*" + kShort + R"(|\p{N}{1,3})" + kRest;
  static const std::string kDeepSeek =
      R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+)"
      R"(| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  static const std::vector<GgufPreTokenizer> kTable = {
      {.name = "gpt-2", .splits = {"gpt2"}},
      {.name = "smollm", .splits = {"digits", "gpt2"}},
      {.name = "llama-bpe", .splits = {kLlama3}, .ignore_merges = true, .bos = true},
      {.name = "qwen2", .nfc = true, .splits = {kQwen2}},
      {.name = "deepseek-r1-qwen", .splits = {kQwen2}},
      {.name = "tekken", .splits = {kTekken}, .ignore_merges = true, .bos = true},
      {.name = "gpt-4o", .splits = {kGpt4o}},
      {.name = "deepseek-v3", .splits = {R"(\p{N}{1,3})", "[一-龥\u3040-ゟ゠-ヿ]+", kDeepSeek}}};
  return kTable;
}

// In the words of GgufPreTokenizer; empty: something that it has no words for.
std::vector<std::string> splits_of(const Json& tokenizer) {
  std::vector<std::string> splits;
  bool bytes = false;
  for (const Json& part : component_members(tokenizer.value("pre_tokenizer", Json()), "pretokenizers")) {
    if (bytes) return {};
    if (component_type(part) == "ByteLevel") {
      if (part.value("add_prefix_space", true)) return {};
      if (part.value("use_regex", true)) splits.emplace_back("gpt2");
      bytes = true;
    } else if (component_type(part) == "Digits" && part.value("individual_digits", false)) {
      splits.emplace_back("digits");
    } else if (component_type(part) == "Split" && part.value("behavior", std::string()) == "Isolated" &&
               !part.value("invert", false)) {
      splits.push_back(part.value("pattern", Json::object()).value("Regex", std::string()));
      // For single characters both spellings split alike.
      if (splits.back() == R"(\p{N})") splits.back() = "digits";
    } else {
      return {};
    }
  }
  return bytes ? splits : std::vector<std::string>();
}

}  // namespace

std::string component_type(const Json& component) {
  return component.is_object() ? component.value("type", std::string()) : std::string();
}

std::vector<Json> component_members(const Json& component, const char* key) {
  if (component.is_null()) return {};
  if (component_type(component) == "Sequence") return component.at(key).get<std::vector<Json>>();
  return {component};
}

const GgufPreTokenizer* find_pre_tokenizer(const Json& tokenizer) {
  const std::vector<std::string> splits = splits_of(tokenizer);
  const bool ignore_merges = tokenizer.at("model").value("ignore_merges", false);
  const auto normalizers = component_members(tokenizer.value("normalizer", Json()), "normalizers");
  const bool nfc = normalizers.size() == 1 && component_type(normalizers[0]) == "NFC";
  const GgufPreTokenizer* near = nullptr;
  for (const GgufPreTokenizer& row : table()) {
    if (row.splits != splits || row.ignore_merges != ignore_merges) continue;
    if (row.nfc == nfc) return &row;
    if (near == nullptr) near = &row;  // llama.cpp applies no normalizer anyway
  }
  return near;
}

const GgufPreTokenizer* named_pre_tokenizer(const std::string& name) {
  for (const GgufPreTokenizer& row : table())
    if (name == row.name) return &row;
  if (name == "llama3" || name == "llama-v3") return named_pre_tokenizer("llama-bpe");
  return nullptr;
}

std::string pre_tokenizer_names() {
  std::string names;
  for (const GgufPreTokenizer& row : table()) names += (names.empty() ? "" : ", ") + std::string(row.name);
  return names;
}

Json pre_tokenizer_json(const GgufPreTokenizer& row) {
  Json parts = Json::array();
  bool own_pattern = false;
  for (const std::string& split : row.splits) {
    if (split == "gpt2")
      own_pattern = true;
    else if (split == "digits")
      parts.push_back({{"type", "Digits"}, {"individual_digits", true}});
    else
      parts.push_back(
          {{"type", "Split"}, {"pattern", {{"Regex", split}}}, {"behavior", "Isolated"}, {"invert", false}});
  }
  parts.push_back(
      {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", false}, {"use_regex", own_pattern}});
  if (parts.size() == 1) return parts[0];
  return {{"type", "Sequence"}, {"pretokenizers", std::move(parts)}};
}

}  // namespace pare
