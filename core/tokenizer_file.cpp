#include "core/tokenizer_file.h"

#include "core/error.h"
#include "core/tokenizer_text.h"

namespace pare::tok {
namespace {

constexpr std::size_t kMaxDepth = 64;
constexpr std::size_t kMaxKeys = 4096;  // per object outside the vocabulary: key look-up is linear there

class Reader {
 public:
  explicit Reader(TokenizerFile& out) : out_(out) {}

  bool null() { return value(nullptr, "null"); }
  bool boolean(bool v) { return value(v, "a truth value"); }
  bool number_integer(std::int64_t v) { return number(v); }
  bool number_unsigned(std::uint64_t v) { return number(v > INT64_MAX ? INT64_MAX : static_cast<std::int64_t>(v)); }
  bool number_float(double v, const std::string&) { return value(v, "a fraction"); }
  bool binary(Json::binary_t&) { return false; }

  bool string(std::string& v) {
    if (mode_ == Mode::kMerges) {
      if (depth_ == 3) merge_line(v);
      else if (pair_size_++ == 0) out_.merges.back().first = std::move(v);
      else out_.merges.back().second = std::move(v);
      return true;
    }
    return value(std::move(v), "a text");
  }

  bool key(std::string& v) {
    if (mode_ == Mode::kVocab) {
      out_.vocab.emplace_back(std::move(v), -1);
      return true;
    }
    if (mode_ == Mode::kSkip) return true;
    if (mode_ == Mode::kMerges) refuse_merge("an object");
    Json& object = *stack_.back();
    if (object.contains(v)) throw input_error(out_.place, "every key once", "key \"" + v + "\" twice");
    if (object.size() >= kMaxKeys) throw input_error(out_.place, "objects of at most 4096 keys", "a larger one");
    if (depth_ == 1) in_model_ = v == "model";
    if (depth_ == 2 && in_model_ && (v == "vocab" || v == "merges")) pending_ = v == "vocab" ? Mode::kVocab : Mode::kMerges;
    key_ = std::move(v);
    return true;
  }

  bool start_object(std::size_t) {
    ++depth_;
    if (depth_ > kMaxDepth) throw input_error(out_.place, "nesting of at most 64 levels", "deeper nesting");
    if (mode_ == Mode::kVocab) refuse_id("an object");
    if (mode_ == Mode::kMerges) refuse_merge("an object");
    if (mode_ == Mode::kSkip) return true;
    if (pending_ == Mode::kVocab) {
      enter(Mode::kVocab, out_.has_vocab);
      return true;
    }
    if (pending_ == Mode::kMerges) throw input_error(out_.place + ": model.merges", "a list", "an object");
    stack_.push_back(add(Json::object()));
    return true;
  }
  bool start_array(std::size_t) {
    ++depth_;
    if (depth_ > kMaxDepth) throw input_error(out_.place, "nesting of at most 64 levels", "deeper nesting");
    if (mode_ == Mode::kVocab) refuse_id("a list");
    if (mode_ == Mode::kMerges) {
      if (depth_ != 4) refuse_merge("a list in a list");
      out_.merges.emplace_back();
      pair_size_ = 0;
      return true;
    }
    if (mode_ == Mode::kSkip) return true;
    if (pending_ == Mode::kMerges) {
      enter(Mode::kMerges, out_.has_merges);
      return true;
    }
    if (pending_ == Mode::kVocab) {  // Unigram: refused by its type, later
      pending_ = Mode::kTree;
      mode_ = Mode::kSkip;
      return true;
    }
    stack_.push_back(add(Json::array()));
    return true;
  }
  bool end_object() { return end(); }
  bool end_array() {
    if (mode_ == Mode::kMerges && depth_ == 4 && pair_size_ != 2)
      refuse_merge("a list of " + std::to_string(pair_size_));
    return end();
  }
  bool parse_error(std::size_t, const std::string&, const Json::exception& problem) {
    throw input_error(out_.place, "valid JSON", problem.what());
  }

 private:
  enum class Mode { kTree, kVocab, kMerges, kSkip };

  bool end() {
    // The vocabulary, the merges and what is skipped all stand at depth 3: inside the model, inside the file.
    if (mode_ != Mode::kTree) {
      if (depth_ == 3) mode_ = Mode::kTree;
    } else {
      stack_.pop_back();
    }
    --depth_;
    return true;
  }

  void enter(Mode mode, bool& seen) {
    if (seen) throw input_error(out_.place, "every key once", "model.vocab or model.merges twice");
    seen = true;
    pending_ = Mode::kTree;
    mode_ = mode;
  }

  bool number(std::int64_t v) {
    if (mode_ == Mode::kVocab) {
      if (v < 0 || v > kMaxId) refuse_id(std::to_string(v));
      out_.vocab.back().second = static_cast<std::int32_t>(v);
      return true;
    }
    return value(v, "a number");
  }

  template <class T>
  bool value(T&& v, const char* what) {
    if (mode_ == Mode::kSkip) return true;
    if (mode_ == Mode::kVocab) refuse_id(what);
    if (mode_ == Mode::kMerges) refuse_merge(what);
    if (pending_ != Mode::kTree)
      throw input_error(out_.place + (pending_ == Mode::kVocab ? ": model.vocab" : ": model.merges"),
                        pending_ == Mode::kVocab ? "an object" : "a list", what);
    add(Json(std::forward<T>(v)));
    return true;
  }

  Json* add(Json&& v) {
    if (stack_.empty()) {
      out_.rest = std::move(v);
      return &out_.rest;
    }
    Json& parent = *stack_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(v));
      return &parent.back();
    }
    return &(parent[key_] = std::move(v));
  }

  void merge_line(const std::string& line) {
    if (line.rfind("#version", 0) == 0) return;
    const std::size_t space = line.find(' ');
    if (space == std::string::npos || line.find(' ', space + 1) != std::string::npos)
      refuse_merge("\"" + line + "\"");
    out_.merges.emplace_back(line.substr(0, space), line.substr(space + 1));
  }

  [[noreturn]] void refuse_id(const std::string& found) const {
    throw input_error(out_.place + ": model.vocab[\"" + (out_.vocab.empty() ? "" : out_.vocab.back().first) + "\"]",
                      "an id from 0 to " + std::to_string(kMaxId), found);
  }
  [[noreturn]] void refuse_merge(const std::string& found) const {
    throw input_error(out_.place + ": model.merges[" + std::to_string(out_.merges.size()) + "]",
                      "\"left right\" or [\"left\", \"right\"]", found);
  }

  TokenizerFile& out_;
  std::vector<Json*> stack_;
  std::string key_;
  Mode mode_ = Mode::kTree, pending_ = Mode::kTree;
  std::size_t depth_ = 0;
  int pair_size_ = 0;
  bool in_model_ = false;
};

}  // namespace

TokenizerFile parse_tokenizer_file(std::string_view text, const std::string& place) {
  TokenizerFile file;
  file.place = place;
  Reader reader(file);
  Json::sax_parse(text.begin(), text.end(), &reader);
  if (!file.rest.is_object()) throw input_error(place, "a JSON object", file.rest.type_name());
  return file;
}

Node Node::at(const char* key) const {
  if (!json_->is_object()) refuse("an object", json_->type_name());
  if (!json_->contains(key)) refuse(std::string("the key \"") + key + "\"", "none");
  return {json_->at(key), path_ + "." + key};
}

Node Node::at_or_null(const char* key) const {
  static const Json null;
  if (!json_->is_object()) refuse("an object", json_->type_name());
  return {json_->contains(key) ? json_->at(key) : null, path_ + "." + key};
}

std::vector<Node> Node::items(const char* key) const {
  const Node list = at(key);
  if (!list.json().is_array()) list.refuse("a list", list.json().type_name());
  std::vector<Node> nodes;
  std::size_t i = 0;
  for (const Json& item : list.json()) nodes.emplace_back(item, list.path() + "[" + std::to_string(i++) + "]");
  return nodes;
}

std::string Node::type() const { return text("type"); }

std::string Node::text() const {
  if (!json_->is_string()) refuse("a text", json_->type_name());
  return json_->get<std::string>();
}

bool Node::flag() const {
  if (!json_->is_boolean()) refuse("true or false", json_->type_name());
  return json_->get<bool>();
}

bool Node::flag_or(const char* key, bool fallback) const {
  const Node node = at_or_null(key);
  return node.is_null() ? fallback : node.flag();
}

std::int64_t Node::integer(std::int64_t low, std::int64_t high) const {
  const std::string range = "a whole number from " + std::to_string(low) + " to " + std::to_string(high);
  if (!json_->is_number_integer()) refuse(range, json_->type_name());
  const auto value = json_->get<std::int64_t>();
  if (value < low || value > high) refuse(range, std::to_string(value));
  return value;
}

void Node::refuse(const std::string& expected, const std::string& found, const std::string& hint) const {
  throw input_error(path_, expected, found, hint);
}

void Node::unsupported(const std::string& supported) const {
  refuse("one of the supported components: " + supported, type());
}

char32_t single_char(const Node& node) {
  const std::string text = node.text();
  std::size_t i = 0;
  const char32_t code = text.empty() ? 0 : next_char(text, i);
  if (text.empty() || i != text.size()) node.refuse("one character", "\"" + text + "\"");
  return code;
}

}  // namespace pare::tok
