#include <algorithm>

#include "core/error.h"
#include "core/tokenizer_pipeline.h"
#include "core/tokenizer_text.h"

namespace pare::tok {
namespace {

char32_t last_char(std::string_view text) {
  std::size_t at = text.size() - 1;
  while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) --at;
  return next_char(text, at);
}

}  // namespace

void AddedTokens::load(const Node& list, const PieceTable& pieces, const Normalizer& normalizer) {
  if (list.is_null()) return;
  if (!list.json().is_array()) list.refuse("a list", list.json().type_name());
  std::int64_t next_free = pieces.count();
  std::size_t position = 0;
  for (const Json& item : list.json()) {
    const Node node(item, list.path() + "[" + std::to_string(position++) + "]");
    AddedToken token;
    token.content = node.text("content");
    token.id = static_cast<std::int32_t>(node.at("id").integer(0, kMaxId));
    token.special = node.flag("special");
    token.single_word = node.flag_or("single_word", false);
    token.lstrip = node.flag_or("lstrip", false);
    token.rstrip = node.flag_or("rstrip", false);
    token.normalized = node.flag_or("normalized", !token.special);
    if (token.content.empty()) node.refuse("a token of at least one character", "an empty one");
    if (by_content_.count(token.content)) node.refuse("every added token once", "\"" + token.content + "\" twice");
    // The reference ignores the stated id of a token outside the vocabulary and counts on; where the two differ the
    // file means something else than its readers would do with it.
    std::int64_t expected = pieces.find(token.content);
    if (expected < 0) expected = next_free++;
    else next_free = std::max<std::int64_t>(next_free, expected + 1);
    if (expected != token.id)
      node.refuse("id " + std::to_string(expected) + " for \"" + token.content + "\"", std::to_string(token.id),
                  "ids of added tokens follow the vocabulary without gaps");
    if (!by_id_.emplace(token.id, tokens_.size()).second)
      node.refuse("every id once", "id " + std::to_string(token.id) + " twice");
    by_content_.emplace(token.content, tokens_.size());
    largest_id_ = std::max(largest_id_, token.id);
    tokens_.push_back(std::move(token));
  }
  // Special tokens first: among equal spellings the first one added wins.
  for (const bool special : {true, false}) {
    for (std::size_t i = 0; i < tokens_.size(); ++i) {
      const AddedToken& token = tokens_[i];
      if (token.special != special) continue;
      if (!token.normalized) {
        raw_.add(token.content, i);
        continue;
      }
      const std::string spelling = normalizer.apply(token.content);
      if (spelling.empty())
        throw input_error(list.path(), "added tokens that survive the normalizer", "\"" + token.content + "\"");
      normalized_.add(spelling, i);
    }
  }
}

const AddedToken* AddedTokens::find(std::int32_t id) const {
  const auto at = by_id_.find(id);
  return at == by_id_.end() ? nullptr : &tokens_[at->second];
}

const AddedToken* AddedTokens::find(std::string_view content) const {
  const auto at = by_content_.find(std::string(content));
  return at == by_content_.end() ? nullptr : &tokens_[at->second];
}

bool AddedTokens::widen(const AddedToken& token, std::string_view text, std::size_t start_offset, std::size_t& begin,
                        std::size_t& end) const {
  if (token.single_word) {
    std::size_t i = end;
    if (begin > 0 && is_word(last_char(text.substr(0, begin)))) return false;
    if (end < text.size() && is_word(next_char(text, i))) return false;
  }
  if (token.lstrip) {
    while (begin > 0) {
      const char32_t code = last_char(text.substr(0, begin));
      if (!is_whitespace(code)) break;
      do --begin;
      while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80);
    }
    begin = std::max(begin, start_offset);
  }
  if (token.rstrip) {
    while (end < text.size()) {
      std::size_t i = end;
      if (!is_whitespace(next_char(text, i))) break;
      end = i;
    }
  }
  return true;
}

void AddedTokens::Matcher::add(std::string_view text, std::size_t index) {
  if (nodes_.empty()) nodes_.emplace_back();
  std::uint32_t at = 0;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    auto& children = nodes_[at].children;
    auto place = std::lower_bound(children.begin(), children.end(), std::pair<unsigned char, std::uint32_t>{byte, 0});
    if (place != children.end() && place->first == byte) {
      at = place->second;
      continue;
    }
    const auto fresh = static_cast<std::uint32_t>(nodes_.size());
    children.insert(place, {byte, fresh});
    if (at == 0) first_[byte] = fresh;
    nodes_.emplace_back();
    at = fresh;
  }
  if (nodes_[at].index < 0) nodes_[at].index = static_cast<std::int64_t>(index);
}

bool AddedTokens::Matcher::find(std::string_view text, std::size_t from, std::size_t& begin, std::size_t& end,
                                std::size_t& index) const {
  if (nodes_.empty()) return false;
  for (; from < text.size(); ++from) {
    std::uint32_t at = first_[static_cast<unsigned char>(text[from])];
    std::int64_t best = -1;
    for (std::size_t i = from + 1; at != 0; ++i) {
      if (nodes_[at].index >= 0) {
        best = nodes_[at].index;
        end = i;
      }
      if (i >= text.size()) break;
      const auto byte = static_cast<unsigned char>(text[i]);
      const auto& children = nodes_[at].children;
      const auto place = std::lower_bound(children.begin(), children.end(), std::pair<unsigned char, std::uint32_t>{byte, 0});
      at = place != children.end() && place->first == byte ? place->second : 0;
    }
    if (best >= 0) {
      begin = from;
      index = static_cast<std::size_t>(best);
      return true;
    }
  }
  return false;
}

}  // namespace pare::tok
