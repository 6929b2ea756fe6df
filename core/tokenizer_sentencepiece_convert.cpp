// A sentencepiece BPE model as tokenizer.json, by the rules of transformers' converters.
#include <algorithm>
#include <map>
#include <unordered_map>

#include "core/error.h"
#include "core/tokenizer_sentencepiece.h"
#include "core/tokenizer_text.h"

namespace pare::tok {
namespace {

constexpr const char* kSpace = "\u2581";

using Vocabulary = std::unordered_map<std::string_view, std::int32_t>;

struct Merge {
  std::string_view left, right;
  std::size_t id;  // of the piece they make
};

// Every split of a piece into two known pieces, best score first; equal scores in the order of ids (so a model whose
// scores fall with the ids, as the trainer writes them, gives the order of ids), splits of one piece by the length of
// their left part. Pieces that sentencepiece never builds from text (control, unknown, bytes) have no merges.
std::vector<Merge> merges_of(const SpmModel& model, const Vocabulary& vocabulary,
                             const std::vector<std::string>& spelled) {
  std::vector<Merge> merges;
  for (std::size_t id = 0; id < spelled.size(); ++id) {
    const PieceType type = model.pieces[id].type;
    if (type == PieceType::kControl || type == PieceType::kUnknown || type == PieceType::kByte) continue;
    const std::string_view piece = spelled[id];
    for (std::size_t i = char_length(piece[0]); i < piece.size(); i += char_length(piece[i])) {
      const auto left = vocabulary.find(piece.substr(0, i));
      if (left == vocabulary.end()) continue;
      const auto right = vocabulary.find(piece.substr(i));
      if (right == vocabulary.end()) continue;
      merges.push_back({left->first, right->first, id});
    }
  }
  // Stable: within one piece the splits already stand by the length of their left part.
  std::stable_sort(merges.begin(), merges.end(), [&](const Merge& a, const Merge& b) {
    const float x = model.pieces[a.id].score, y = model.pieces[b.id].score;
    return x != y ? x > y : a.id < b.id;
  });
  return merges;
}

// The small files beside the model.
class Neighbours {
 public:
  Neighbours() = default;
  explicit Neighbours(const fs::path& folder)
      : config_(object(folder / "tokenizer_config.json")), config_place_((folder / "tokenizer_config.json").string()) {
    // A list of added tokens in the configuration replaces the two older files.
    if (config_.contains("added_tokens_decoder") && !config_["added_tokens_decoder"].is_null()) return;
    map_place_ = (folder / "special_tokens_map.json").string();
    added_place_ = (folder / "added_tokens.json").string();
    map_ = object(map_place_);
    added_ = object(added_place_);
  }

  std::optional<bool> flag(const char* key) const {
    const Json* value = find(config_, key);
    if (!value || value->is_null()) return std::nullopt;
    if (!value->is_boolean()) throw input_error(config_place_ + ": " + key, "true or false", value->dump());
    return value->get<bool>();
  }

  std::string tokenizer_class() const {
    const Json* value = find(config_, "tokenizer_class");
    if (!value || value->is_null()) return {};
    if (!value->is_string()) throw input_error(config_place_ + ": tokenizer_class", "a name", value->dump());
    std::string name = value->get<std::string>();
    if (name.ends_with("Fast") && name != "PreTrainedTokenizerFast") name.resize(name.size() - 4);
    static const char* const kKnown[] = {"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer",
                                         "PreTrainedTokenizerFast", "TokenizersBackend"};
    if (std::find(std::begin(kKnown), std::end(kKnown), name) == std::end(kKnown))
      throw input_error(config_place_ + ": tokenizer_class", "LlamaTokenizer, CodeLlamaTokenizer or GemmaTokenizer",
                        name, "other classes read the same file differently; give the model a tokenizer.json");
    return name;
  }

  // Added tokens that stand with their ids, as {"content", flags...}.
  std::map<std::int64_t, Json> declared() const {
    std::map<std::int64_t, Json> out;
    if (const Json* list = find(config_, "added_tokens_decoder"); list && !list->is_null()) {
      const std::string place = config_place_ + ": added_tokens_decoder";
      if (!list->is_object()) throw input_error(place, "an object", list->type_name());
      for (const auto& [key, token] : list->items()) {
        if (key.empty() || key.size() > 9 || key.find_first_not_of("0123456789") != std::string::npos)
          throw input_error(place, "ids as keys", "\"" + key + "\"");
        if (!out.emplace(std::stoll(key), added(token, place + "." + key)).second)
          throw input_error(place, "every id once", key);
      }
      return out;
    }
    for (const auto& [content, id] : added_.items()) {
      if (!id.is_number_unsigned() || id.get<std::uint64_t>() > 999999999)
        throw input_error(added_place_ + ": \"" + content + "\"", "an id", id.dump());
      const bool special = is_named(content);
      Json token = {{"content", content}, {"special", special}, {"normalized", !special}};
      if (!out.emplace(id.get<std::int64_t>(), std::move(token)).second)
        throw input_error(added_place_, "every id once", id.dump());
    }
    return out;
  }

  // bos_token and the like; "none" stands for null, nullopt for a key that is nowhere.
  std::optional<Json> named(const std::string& key) const {
    for (const auto& [from, place] : {std::pair(&map_, &map_place_), std::pair(&config_, &config_place_)}) {
      const Json* value = find(*from, key.c_str());
      if (!value) continue;
      if (value->is_null()) return Json(nullptr);
      return added(*value, *place + ": " + key);
    }
    return std::nullopt;
  }

  // additional_special_tokens and its newer name.
  std::vector<Json> more() const {
    std::vector<Json> out;
    for (const char* key : {"additional_special_tokens", "extra_special_tokens"}) {
      for (const auto& [from, place] : {std::pair(&map_, &map_place_), std::pair(&config_, &config_place_)}) {
        const Json* value = find(*from, key);
        if (!value || value->is_null()) continue;
        if (!value->is_array() && !value->is_object())
          throw input_error(*place + ": " + key, "a list", value->type_name());
        for (const Json& token : *value) out.push_back(added(token, *place + ": " + key));
        break;
      }
    }
    return out;
  }

  const std::string& config_place() const { return config_place_; }

 private:
  static Json object(const fs::path& file) {
    if (!fs::exists(file)) return Json::object();
    Json json = read_json(file);
    if (!json.is_object()) throw input_error(file.string(), "a JSON object", json.type_name());
    return json;
  }
  static const Json* find(const Json& object, const char* key) {
    const auto at = object.find(key);
    return at == object.end() ? nullptr : &*at;
  }
  // A token as text, or as an object with flags of its own.
  static Json added(const Json& token, const std::string& place) {
    if (token.is_string()) return {{"content", token}};
    if (!token.is_object() || !token.contains("content") || !token["content"].is_string())
      throw input_error(place, "a text or an object with \"content\"", token.dump());
    Json out = {{"content", token["content"]}};
    for (const char* flag : {"single_word", "lstrip", "rstrip", "normalized", "special"}) {
      if (!token.contains(flag)) continue;
      if (!token[flag].is_boolean()) throw input_error(place + "." + flag, "true or false", token[flag].dump());
      out[flag] = token[flag];
    }
    return out;
  }
  bool is_named(const std::string& content) const;

  Json config_ = Json::object(), map_ = Json::object(), added_ = Json::object();
  std::string config_place_, map_place_, added_place_;
};

constexpr const char* kNamed[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                  "pad_token", "cls_token", "mask_token"};

bool Neighbours::is_named(const std::string& content) const {
  for (const char* key : kNamed)
    if (const auto token = named(key); token && !token->is_null() && token->at("content") == content) return true;
  for (const Json& token : more())
    if (token.at("content") == content) return true;
  return false;
}

class Conversion {
 public:
  Conversion(const SpmModel& model, const fs::path& folder, const std::string& place)
      : model_(model), neighbours_(folder.empty() ? Neighbours() : Neighbours(folder)), place_(place) {
    const std::string name = neighbours_.tokenizer_class();
    gemma_ = name == "GemmaTokenizer";
    prefix_ = neighbours_.flag("add_prefix_space").value_or(model.add_dummy_prefix);
    // `legacy` (absent in older files, which mean true): the prefix stands before every stretch of text between added
    // tokens, as in the library; otherwise at the very beginning alone, and not before a space.
    legacy_ = gemma_ || neighbours_.flag("legacy").value_or(model.legacy);
    for (const SpmPiece& piece : model.pieces) spelled_.push_back(piece.text);
  }

  std::string run() {
    rename();
    index();
    collect_added();
    std::string out = "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":" + added_list();
    out += ",\"normalizer\":" + normalizer().dump();
    out += ",\"pre_tokenizer\":" + pre_tokenizer().dump();
    out += ",\"post_processor\":" + post_processor().dump();
    out += ",\"decoder\":" + decoder().dump();
    out += ",\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":" + quoted(unknown()) +
           ",\"continuing_subword_prefix\":null,\"end_of_word_suffix\":null,\"fuse_unk\":true,\"byte_fallback\":" +
           (model_.byte_fallback ? "true" : "false") + ",\"ignore_merges\":false,\"vocab\":{";
    for (std::size_t id = 0; id < spelled_.size(); ++id)
      out += (id ? "," : "") + quoted(spelled_[id]) + ":" + std::to_string(id);
    out += "},\"merges\":[";
    bool first = true;
    for (const Merge& merge : merges_of(model_, vocabulary_, spelled_)) {
      out += first ? "[" : ",[";
      out += quoted(merge.left) + "," + quoted(merge.right) + "]";
      first = false;
    }
    return out + "]}}";
  }

 private:
  static std::string quoted(std::string_view text) { return Json(text).dump(); }
  std::string unknown() const { return spelled_[static_cast<std::size_t>(model_.unknown)]; }

  // Added tokens may rename pieces that were kept free for them. Gemma's oldest files lack the tab: its byte piece
  // takes that name.
  void rename() {
    declared_ = neighbours_.declared();
    index();
    std::vector<std::pair<std::size_t, std::string>> changes;  // vocabulary_ views the spellings: applied at the end
    for (const auto& [id, token] : declared_) {
      if (id >= static_cast<std::int64_t>(spelled_.size())) break;
      const std::string content = token.at("content").get<std::string>();
      if (spelled_[static_cast<std::size_t>(id)] == content) continue;
      if (const auto other = vocabulary_.find(content); other != vocabulary_.end())
        throw input_error(neighbours_.config_place() + ": added_tokens_decoder",
                          "id " + std::to_string(other->second) + " for \"" + content + "\", as in the model",
                          "id " + std::to_string(id));
      changes.emplace_back(static_cast<std::size_t>(id), content);
    }
    if (const auto tab = vocabulary_.find("<0x09>"); gemma_ && tab != vocabulary_.end() && !vocabulary_.contains("\t"))
      changes.emplace_back(static_cast<std::size_t>(tab->second), "\t");
    for (const auto& [id, spelling] : changes) spelled_[id] = spelling;
  }

  void index() {
    vocabulary_.clear();
    vocabulary_.reserve(spelled_.size());
    for (std::size_t id = 0; id < spelled_.size(); ++id) {
      if (spelled_[id].empty()) throw input_error(place_, "pieces of at least one character", "an empty one");
      if (!vocabulary_.emplace(spelled_[id], static_cast<std::int32_t>(id)).second)
        throw input_error(place_, "every piece once", "\"" + spelled_[id] + "\" twice");
    }
  }

  // Sets what `token` states over what stands there already.
  void put(std::int64_t id, const Json& token, bool special) {
    Json& entry = added_[id];
    if (entry.is_null())
      entry = {{"id", id}, {"content", token.at("content")}, {"single_word", false}, {"lstrip", false},
               {"rstrip", false}, {"normalized", false}, {"special", special}};
    for (const char* flag : {"single_word", "lstrip", "rstrip", "normalized", "special"})
      if (token.contains(flag)) entry[flag] = token[flag];
    ids_.emplace(entry["content"].get<std::string>(), id);
  }

  void put_named(const Json& token) {
    const std::string content = token.at("content").get<std::string>();
    if (const auto there = ids_.find(content); there != ids_.end()) {
      added_[there->second]["special"] = true;
      return;
    }
    const auto piece = vocabulary_.find(content);
    std::int64_t id = piece == vocabulary_.end() ? -1 : piece->second;
    if (id < 0)
      id = std::max<std::int64_t>(static_cast<std::int64_t>(spelled_.size()),
                                  added_.empty() ? 0 : added_.rbegin()->first + 1);
    put(id, token, true);
    added_[id]["special"] = true;
  }

  void collect_added() {
    for (std::size_t id = 0; id < spelled_.size(); ++id) {
      const PieceType type = model_.pieces[id].type;
      const bool turn = gemma_ && (spelled_[id] == "<start_of_turn>" || spelled_[id] == "<end_of_turn>");
      if (type == PieceType::kControl || type == PieceType::kUserDefined)
        put(static_cast<std::int64_t>(id), {{"content", spelled_[id]}}, type == PieceType::kControl || turn);
    }
    for (const auto& [id, token] : declared_) put(id, token, false);
    for (const char* key : kNamed) {
      const std::optional<Json> token = neighbours_.named(key);
      if (token && !token->is_null()) put_named(*token);
    }
    for (const Json& token : neighbours_.more()) put_named(token);
    put_named({{"content", unknown()}});
  }

  std::string added_list() const {
    Json list = Json::array();
    for (const auto& [id, token] : added_) list.push_back(token);
    return list.dump();
  }

  static Json replace(const char* kind, const char* pattern, const char* content) {
    return {{"type", "Replace"}, {"pattern", {{kind, pattern}}}, {"content", content}};
  }

  Json normalizer() const {
    Json steps = Json::array();
    if (model_.remove_extra_whitespaces) {
      steps.push_back(replace("Regex", "\\A +|[ \u2581]+\\z", ""));
      steps.push_back(replace("Regex", " {2,}", " "));
    }
    if (legacy_) {
      if (prefix_) steps.push_back({{"type", "Prepend"}, {"prepend", kSpace}});
      steps.push_back(replace("String", " ", kSpace));
    }
    if (steps.empty()) return nullptr;
    if (steps.size() == 1) return steps[0];
    return {{"type", "Sequence"}, {"normalizers", std::move(steps)}};
  }

  Json pre_tokenizer() const {
    if (gemma_)
      return {{"type", "Split"}, {"pattern", {{"String", " "}}}, {"behavior", "MergedWithPrevious"}, {"invert", false}};
    if (legacy_) return nullptr;
    return {{"type", "Metaspace"},
            {"replacement", kSpace},
            {"prepend_scheme", prefix_ ? "first" : "never"},
            {"split", false}};
  }

  Json decoder() const {
    Json steps = {replace("String", kSpace, " "), {{"type", "ByteFallback"}}, {{"type", "Fuse"}}};
    if (prefix_) steps.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
    return {{"type", "Sequence"}, {"decoders", std::move(steps)}};
  }

  // The piece to put at one end of the text, or nothing.
  std::optional<std::string> end_piece(const char* flag, bool by_default, const char* key, std::int32_t id) const {
    const std::optional<bool> wanted = neighbours_.flag(flag);
    if (!wanted.value_or(by_default)) return std::nullopt;
    if (const std::optional<Json> token = neighbours_.named(key)) {
      if (!token->is_null()) return token->at("content").get<std::string>();
    } else if (id >= 0) {
      return spelled_[static_cast<std::size_t>(id)];
    }
    if (wanted)
      throw input_error(neighbours_.config_place() + ": " + flag, std::string("a ") + key + " to add", "none");
    return std::nullopt;
  }

  Json post_processor() const {
    const auto bos = end_piece("add_bos_token", true, "bos_token", model_.bos);
    const auto eos = end_piece("add_eos_token", model_.adds_eos, "eos_token", model_.eos);
    Json single = Json::array(), pair = Json::array(), special = Json::object();
    const auto piece = [&](Json& list, const std::string& content, int side) {
      list.push_back({{"SpecialToken", {{"id", content}, {"type_id", side}}}});
      special[content] = {{"id", content}, {"ids", {ids_.at(content)}}, {"tokens", {content}}};
    };
    for (const int side : {0, 1}) {
      for (Json* list : {&single, &pair}) {
        if (side == 1 && list == &single) continue;
        if (bos) piece(*list, *bos, side);
        list->push_back({{"Sequence", {{"id", side == 0 ? "A" : "B"}, {"type_id", side}}}});
        if (eos) piece(*list, *eos, side);
      }
    }
    return {{"type", "TemplateProcessing"}, {"single", std::move(single)}, {"pair", std::move(pair)},
            {"special_tokens", std::move(special)}};
  }

  const SpmModel& model_;
  const Neighbours neighbours_;
  const std::string& place_;
  bool gemma_ = false, prefix_ = true, legacy_ = true;
  std::vector<std::string> spelled_;  // the pieces by id, after renaming
  Vocabulary vocabulary_;
  std::map<std::int64_t, Json> declared_, added_;      // by id
  std::unordered_map<std::string, std::int64_t> ids_;  // of added_
};

}  // namespace

std::string spm_tokenizer_json(const SpmModel& model, const fs::path& folder, const std::string& place) {
  return Conversion(model, folder, place).run();
}

}  // namespace pare::tok
