// tokenizer.json -> the keys from which llama.cpp builds its own tokenizer (llama-vocab.cpp, convert_hf_to_gguf.py).
#include <algorithm>
#include <map>

#include "core/error.h"
#include "core/gguf_arch.h"
#include "core/tokenizer.h"

namespace pare {
namespace {

using namespace gguf_token;

// llama.cpp knows pre-tokenizers by name; an unknown one would split text differently without a word.
std::string pre_tokenizer_name(const Json& tokenizer, const std::string& place) {
  if (const GgufPreTokenizer* row = find_pre_tokenizer(tokenizer)) return row->name;
  throw input_error(place, "a pre-tokenizer that llama.cpp knows by name (" + pre_tokenizer_names() + ")",
                    tokenizer.value("pre_tokenizer", Json()).dump().substr(0, 200),
                    "export --to compact carries every tokenizer");
}

// Where a space is put before the text: "always" (before each stretch between added tokens), "first" (at the very
// beginning, and not before a space) or "never".
std::string prepend_scheme(const Json& tokenizer) {
  for (const Json& part : component_members(tokenizer.value("normalizer", Json()), "normalizers"))
    if (component_type(part) == "Prepend") return "always";
  for (const Json& part : component_members(tokenizer.value("pre_tokenizer", Json()), "pretokenizers"))
    if (component_type(part) == "Metaspace") return part.value("prepend_scheme", std::string("always"));
  return "never";
}

std::vector<std::pair<std::string, std::string>> merges_of(const Json& model) {
  std::vector<std::pair<std::string, std::string>> merges;
  for (const Json& merge : model.at("merges")) {
    if (merge.is_array()) {
      merges.emplace_back(merge.at(0).get<std::string>(), merge.at(1).get<std::string>());
      continue;
    }
    const auto text = merge.get<std::string>();
    const auto space = text.find(' ');
    merges.emplace_back(text.substr(0, space), text.substr(space + 1));
  }
  return merges;
}

bool is_byte_piece(const std::string& piece) {
  return piece.size() == 6 && piece.starts_with("<0x") && piece.back() == '>';
}

}  // namespace

GgufPairs gguf_tokenizer_keys(const std::string& text, const std::string& place, const ModelConfig& config,
                              const std::optional<std::string>& chat, std::vector<std::string>& notes) {
  const Tokenizer tokenizer = Tokenizer::from_text(text, place);  // refuses what is malformed
  const Json json = parse_json(text, place);
  const Json& model = json.at("model");
  const bool sentencepiece = model.value("byte_fallback", false);

  const auto rows = static_cast<std::size_t>(config.vocab_size);
  if (tokenizer.size() > config.vocab_size)
    throw input_error(place, "at most " + std::to_string(rows) + " tokens, the rows of the embedding",
                      std::to_string(tokenizer.size()));
  std::vector<std::string> tokens(rows);
  std::vector<std::int32_t> types(rows, kUnused);
  std::vector<float> scores(rows, 0.0f);
  for (std::size_t i = 0; i < rows; ++i) tokens[i] = "[PAD" + std::to_string(i) + "]";
  for (const auto& [piece, id] : model.at("vocab").items()) {
    const auto at = id.get<std::size_t>();
    tokens[at] = piece;
    types[at] = sentencepiece && is_byte_piece(piece) ? kByte : kNormal;
  }
  const std::string unknown =
      model.contains("unk_token") && model["unk_token"].is_string() ? model["unk_token"].get<std::string>() : "";
  int particular = 0;
  for (const Json& added : json.value("added_tokens", Json::array())) {
    for (const char* flag : {"lstrip", "rstrip", "single_word"}) particular += added.value(flag, false) ? 1 : 0;
    const auto at = added.at("id").get<std::size_t>();
    tokens[at] = added.at("content").get<std::string>();
    types[at] = added.value("special", false) ? kControl : kUserDefined;
  }

  if (particular > 0)
    notes.push_back(
        "added tokens that take spaces around them, or stand as whole words alone: llama.cpp does not see to "
        "that");

  GgufPairs out;
  const auto merges = merges_of(model);
  out.emplace_back("tokenizer.ggml.model", std::string(sentencepiece ? "llama" : "gpt2"));
  if (sentencepiece) {
    if (!unknown.empty() && tokenizer.id(unknown) >= 0)
      types[static_cast<std::size_t>(tokenizer.id(unknown))] = kUnknown;
    // SentencePiece merges the pair whose result has the highest score; the order of merges is the order of scores.
    std::map<std::string, float, std::less<>> rank;
    for (std::size_t i = 0; i < merges.size(); ++i)
      rank.emplace(merges[i].first + merges[i].second, -static_cast<float>(i));
    for (std::size_t i = 0; i < rows; ++i) {
      if (types[i] != kNormal) continue;
      const auto found = rank.find(tokens[i]);
      scores[i] = found != rank.end() ? found->second : -static_cast<float>(merges.size() + i);
    }
    out.emplace_back("tokenizer.ggml.pre", std::string("default"));
  } else {
    out.emplace_back("tokenizer.ggml.pre", pre_tokenizer_name(json, place));
    for (const Json& part : component_members(json.value("normalizer", Json()), "normalizers"))
      notes.push_back("llama.cpp does not apply the tokenizer's " + component_type(part) + " normalizer");
  }
  out.emplace_back("tokenizer.ggml.tokens", tokens);
  out.emplace_back("tokenizer.ggml.token_type", types);
  if (sentencepiece) {
    out.emplace_back("tokenizer.ggml.scores", scores);
    const std::string prepend = prepend_scheme(json);
    out.emplace_back("tokenizer.ggml.add_space_prefix", prepend != "never");
    if (prepend == "first") {
      out.emplace_back("pare.prepend", prepend);
      notes.push_back("llama.cpp puts a space before texts that begin with one too, and after special tokens");
    }
  } else {
    std::vector<std::string> lines;
    for (const auto& [left, right] : merges) lines.push_back(left + " " + right);
    out.emplace_back("tokenizer.ggml.merges", lines);
  }

  const auto named = [&](const char* key) -> std::optional<std::int64_t> {
    const auto found = config.source.find(key);
    if (found == config.source.end() || !found->is_number_integer()) return std::nullopt;
    return found->get<std::int64_t>();
  };
  const auto identifier = [&](const char* key, std::optional<std::int64_t> id) {
    if (id && *id >= 0 && *id < config.vocab_size) out.emplace_back(key, static_cast<std::uint32_t>(*id));
  };
  const auto prefix = tokenizer.prefix_ids();
  identifier("tokenizer.ggml.bos_token_id",
             prefix.empty() ? named("bos_token_id") : std::optional<std::int64_t>(prefix[0]));
  identifier("tokenizer.ggml.eos_token_id", config.eos_ids.empty() ? named("eos_token_id") : config.eos_ids[0]);
  // Further ends: of a message that waits for a tool, and of a turn.
  bool message = false, turn = false;
  for (std::size_t i = 1; i < config.eos_ids.size(); ++i) {
    const std::string piece = config.eos_ids[i] < tokenizer.size()
                                  ? tokenizer.token(static_cast<std::int32_t>(config.eos_ids[i]))
                                  : std::string();
    const bool waits = piece.find("eom") != std::string::npos;
    if (waits ? message : turn) {
      notes.push_back("generation ends at \"" + piece + "\" too, for which GGUF has no key of its own");
      continue;
    }
    (waits ? message : turn) = true;
    identifier(waits ? "tokenizer.ggml.eom_token_id" : "tokenizer.ggml.eot_token_id", config.eos_ids[i]);
  }
  if (!unknown.empty()) identifier("tokenizer.ggml.unknown_token_id", tokenizer.id(unknown));
  identifier("tokenizer.ggml.padding_token_id", named("pad_token_id"));
  const auto bare = tokenizer.encode("a", false), dressed = tokenizer.encode("a", true);
  if (prefix.size() > 1 || dressed.size() > prefix.size() + bare.size() + 1)
    throw input_error(place, "a post-processor that adds at most one token before and one after the text", "more");
  out.emplace_back("tokenizer.ggml.add_bos_token", !prefix.empty());
  out.emplace_back("tokenizer.ggml.add_eos_token", dressed.size() > prefix.size() + bare.size());
  if (chat) out.emplace_back("tokenizer.chat_template", *chat);
  return out;
}

}  // namespace pare
