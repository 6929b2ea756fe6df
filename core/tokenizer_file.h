// tokenizer.json as text -> its parts. The vocabulary and the merges (most of the bytes) go straight into lists; the
// rest is small and becomes JSON.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/json.h"

namespace pare::tok {

struct TokenizerFile {
  Json rest = Json::object();  // everything but model.vocab and model.merges
  std::vector<std::pair<std::string, std::int32_t>> vocab;          // in file order
  std::vector<std::pair<std::string, std::string>> merges;          // in rank order
  bool has_vocab = false, has_merges = false;
  std::string place;
};

// Ids are bounded so that a lying file cannot make us allocate: the largest vocabularies in use have 2^20 entries.
constexpr std::int32_t kMaxId = (1 << 22) - 1;

// Errors: exit 3, naming the key; syntax, duplicate keys, nesting deeper than 64, ids that are not whole numbers in
// range, merges that are not pairs.
TokenizerFile parse_tokenizer_file(std::string_view text, const std::string& place);

// Typed access to one component of the file, with the path for messages.
class Node {
 public:
  Node(const Json& json, std::string path) : json_(&json), path_(std::move(path)) {}
  const Json& json() const { return *json_; }
  const std::string& path() const { return path_; }
  bool is_null() const { return json_->is_null(); }
  bool has(const char* key) const { return json_->is_object() && json_->contains(key); }
  Node at(const char* key) const;                 // error when missing
  Node at_or_null(const char* key) const;
  std::vector<Node> items(const char* key) const; // a list, error when missing or of another type
  std::string type() const;                       // the "type" tag
  std::string text() const;
  bool flag() const;
  std::int64_t integer(std::int64_t low, std::int64_t high) const;
  std::string text(const char* key) const { return at(key).text(); }
  bool flag(const char* key) const { return at(key).flag(); }
  bool flag_or(const char* key, bool fallback) const;
  // "model: expected ..., found ..."
  [[noreturn]] void refuse(const std::string& expected, const std::string& found, const std::string& hint = {}) const;
  [[noreturn]] void unsupported(const std::string& supported) const;  // of this component's type

 private:
  const Json* json_;
  std::string path_;
};

// The single character of a JSON text.
char32_t single_char(const Node& node);

}  // namespace pare::tok
