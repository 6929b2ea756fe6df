// Texts by code points: white space, stripping, case.
#include <utf8proc.h>

#include <algorithm>

#include "core/template/value.h"
#include "core/tokenizer_text.h"

namespace pare::chat {
namespace {

// Letters whose upper or title case Unicode writes with several letters (SpecialCasing.txt), and their neighbours.
bool has_special_case(char32_t point) {
  static constexpr std::pair<char32_t, char32_t> kRanges[] = {
      {0xDF, 0xDF},   {0x130, 0x130}, {0x149, 0x149},   {0x1F0, 0x1F0},   {0x390, 0x390},  {0x3A3, 0x3A3},
      {0x3B0, 0x3B0}, {0x587, 0x587}, {0x1E96, 0x1E9A}, {0x1F50, 0x1FFC}, {0xFB00, 0xFB17}};
  return std::any_of(std::begin(kRanges), std::end(kRanges),
                     [point](const auto& range) { return point >= range.first && point <= range.second; });
}

template <utf8proc_int32_t (*kMap)(utf8proc_int32_t)>
void append_mapped(std::string& out, char32_t point) {
  if (has_special_case(point)) {
    std::string letter;
    tok::append_char(letter, point);
    throw Fault{"changing the case of the letter " + letter + " is not supported"};
  }
  tok::append_char(out, static_cast<char32_t>(kMap(static_cast<utf8proc_int32_t>(point))));
}

template <class Strips>
std::string_view strip_if(std::string_view text, bool left, bool right, Strips strips) {
  while (left && !text.empty()) {
    std::size_t next = 0;
    if (!strips(tok::next_char(text, next))) break;
    text.remove_prefix(next);
  }
  while (right && !text.empty()) {
    std::size_t last = text.size() - 1;
    while (last > 0 && (static_cast<unsigned char>(text[last]) & 0xC0) == 0x80) --last;
    std::size_t next = last;
    if (!strips(tok::next_char(text, next))) break;
    text = text.substr(0, last);
  }
  return text;
}

}  // namespace

std::size_t count_points(std::string_view text) {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}
std::size_t byte_of_point(std::string_view text, std::size_t point) {
  std::size_t at = 0;
  for (; point > 0 && at < text.size(); --point) at += tok::char_length(text[at]);
  return at;
}

bool is_space(char32_t point) { return (point >= 0x1C && point <= 0x1F) || tok::is_whitespace(point); }
std::string_view strip(std::string_view text, bool left, bool right) { return strip_if(text, left, right, is_space); }
std::string_view strip(std::string_view text, std::string_view points, bool left, bool right) {
  return strip_if(text, left, right, [points](char32_t point) {
    std::string wanted;
    tok::append_char(wanted, point);
    return points.find(wanted) != std::string_view::npos;
  });
}

std::string upper(std::string_view text) {
  std::string out;
  for (std::size_t at = 0; at < text.size();) append_mapped<utf8proc_toupper>(out, tok::next_char(text, at));
  return out;
}
std::string lower(std::string_view text) {
  std::string out;
  for (std::size_t at = 0; at < text.size();) append_mapped<utf8proc_tolower>(out, tok::next_char(text, at));
  return out;
}
std::string capitalize(std::string_view text) {
  std::string out;
  std::size_t at = 0;
  if (!text.empty()) append_mapped<utf8proc_totitle>(out, tok::next_char(text, at));
  return out + lower(text.substr(at));
}
std::string title_words(std::string_view text) {
  std::string out;
  for (std::size_t at = 0; at < text.size();) {
    const auto splits = [&](std::size_t i) {
      return std::string_view("-({[<").find(text[i]) != std::string_view::npos || is_space(tok::next_char(text, i));
    };
    const std::size_t begin = at;
    if (splits(at)) {
      at += tok::char_length(text[at]);
      out += text.substr(begin, at - begin);
      continue;
    }
    append_mapped<utf8proc_toupper>(out, tok::next_char(text, at));
    const std::size_t rest = at;
    while (at < text.size() && !splits(at)) at += tok::char_length(text[at]);
    out += lower(text.substr(rest, at - rest));
  }
  return out;
}

std::string replace_all(std::string_view text, std::string_view from, std::string_view to, std::int64_t count,
                        Budget& budget) {
  std::string out;
  std::size_t at = 0;
  budget.text(text.size());
  while (count-- != 0) {
    const std::size_t found = text.find(from, at);
    if (found == std::string_view::npos) break;
    // An empty `from` stands before every letter and at the end.
    const std::size_t letter = !from.empty() ? 0 : found < text.size() ? tok::char_length(text[found]) : 0;
    out += text.substr(at, found - at);
    out += to;
    out += text.substr(found, letter);
    at = found + from.size() + letter;
    budget.spend();
    if (out.size() > Budget::kMaxText) break;
    if (from.empty() && letter == 0) return out;
  }
  if (at < text.size()) out += text.substr(at);
  budget.text(out.size());
  return out;
}

}  // namespace pare::chat
