#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>

#include "core/error.h"
#include "core/tokenizer_pipeline.h"
#include "core/tokenizer_text.h"

namespace pare::tok {
namespace {

constexpr int kMaxNesting = 8;

// Below U+00A0 nothing composes, decomposes or has a compatibility form; below U+00C0 only compatibility forms exist,
// and NFC leaves everything below U+0300 alone.
bool already_normal(std::string_view text, char32_t first_affected) {
  for (std::size_t i = 0; i < text.size();)
    if (next_char(text, i) >= first_affected) return false;
  return true;
}

// The reference normalizes with the tables of Unicode 9. Marks and compatibility characters assigned since then are
// left alone by it: they neither reorder, compose nor decompose, and are no marks.
constexpr struct {
  char32_t first, last;
} kAfterUnicode9[] = {
    {0x7FD, 0x7FD}, {0x898, 0x89F}, {0x8CA, 0x8D3}, {0x9FE, 0x9FE}, {0xAFA, 0xAFF}, {0xB55, 0xB55}, {0xC04, 0xC04},
    {0xC3C, 0xC3C}, {0xCF3, 0xCF3}, {0xD00, 0xD00}, {0xD3B, 0xD3C}, {0xD81, 0xD81}, {0xEBA, 0xEBA}, {0xECE, 0xECE},
    {0x1715, 0x1715}, {0x180F, 0x180F}, {0x1ABF, 0x1ACE}, {0x1CF7, 0x1CF7}, {0x1DF6, 0x1DFA}, {0x32FF, 0x32FF},
    {0xA7F2, 0xA7F4}, {0xA82C, 0xA82C}, {0xA8FF, 0xA8FF}, {0xAB69, 0xAB69}, {0x10781, 0x10785}, {0x10787, 0x107B0},
    {0x107B2, 0x107BA}, {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF}, {0x10F46, 0x10F50},
    {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x11073, 0x11074}, {0x110C2, 0x110C2}, {0x11145, 0x11146},
    {0x111C9, 0x111C9}, {0x111CE, 0x111CF}, {0x11241, 0x11241}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E},
    {0x1182C, 0x1183A}, {0x11930, 0x11935}, {0x11937, 0x11938}, {0x1193B, 0x1193E}, {0x11940, 0x11940},
    {0x11942, 0x11943}, {0x119D1, 0x119D7}, {0x119DA, 0x119E0}, {0x119E4, 0x119E4}, {0x11A01, 0x11A0A},
    {0x11A33, 0x11A39}, {0x11A3B, 0x11A3E}, {0x11A47, 0x11A47}, {0x11A51, 0x11A5B}, {0x11A8A, 0x11A99},
    {0x11D31, 0x11D36}, {0x11D3A, 0x11D3A}, {0x11D3C, 0x11D3D}, {0x11D3F, 0x11D45}, {0x11D47, 0x11D47},
    {0x11D8A, 0x11D8E}, {0x11D90, 0x11D91}, {0x11D93, 0x11D97}, {0x11EF3, 0x11EF6}, {0x11F00, 0x11F03},
    {0x11F34, 0x11F3A}, {0x11F3E, 0x11F42}, {0x13440, 0x13440}, {0x13447, 0x13455}, {0x16F4F, 0x16F4F},
    {0x16F7F, 0x16F87}, {0x16FE4, 0x16FE4}, {0x16FF0, 0x16FF1}, {0x1CF00, 0x1CF2D}, {0x1CF30, 0x1CF46},
    {0x1E030, 0x1E06D}, {0x1E08F, 0x1E08F}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF},
    {0x1E4EC, 0x1E4EF}, {0x1F16C, 0x1F16C}, {0x1FBF0, 0x1FBF9},
};

bool after_unicode9(char32_t code) {
  if (code < kAfterUnicode9[0].first) return false;
  const auto* range = std::lower_bound(std::begin(kAfterUnicode9), std::end(kAfterUnicode9), code,
                                       [](const auto& item, char32_t value) { return item.last < value; });
  return range != std::end(kAfterUnicode9) && range->first <= code;
}

std::string unicode_form_of_known(std::string_view text, utf8proc_option_t options) {
  if (text.empty()) return {};
  utf8proc_uint8_t* mapped = nullptr;
  const utf8proc_ssize_t length =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                   &mapped, static_cast<utf8proc_option_t>(options | UTF8PROC_STABLE));
  if (length < 0) throw failure("Unicode normalization", "", utf8proc_errmsg(length));
  std::string out(reinterpret_cast<const char*>(mapped), static_cast<std::size_t>(length));
  std::free(mapped);
  return out;
}

std::string unicode_form(std::string_view text, utf8proc_option_t options, char32_t first_affected) {
  if (already_normal(text, first_affected)) return std::string(text);
  std::string out;
  std::size_t done = 0;
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t begin = i;
    if (!after_unicode9(next_char(text, i))) continue;
    out += unicode_form_of_known(text.substr(done, begin - done), options);
    out.append(text, begin, i - begin);
    done = i;
  }
  return out += unicode_form_of_known(text.substr(done), options);
}

// Characters that NFC leaves alone, that start a combining sequence and never compose with what stands before them.
bool is_stable_in_nfc(char32_t code) {
  return code < 0x300 || (code >= 0x410 && code <= 0x44F) || (code >= 0x2010 && code <= 0x2027) ||
         (code >= 0x2030 && code <= 0x205E) || (code >= 0x3041 && code <= 0x3096) ||
         (code >= 0x30A1 && code <= 0x30FA) || (code >= 0x4E00 && code <= 0x9FFF);
}

// Only the stretches that may change are normalized, each with the character that it may combine with.
std::string nfc(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  std::size_t done = 0, before = 0;
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t begin = i;
    if (is_stable_in_nfc(next_char(text, i))) {
      before = begin;
      continue;
    }
    const std::size_t from = before >= done && before < begin ? before : begin;
    std::size_t end = i;
    while (i < text.size() && !is_stable_in_nfc(next_char(text, i))) end = i;
    out.append(text, done, from - done);
    out += unicode_form(text.substr(from, end - from), UTF8PROC_COMPOSE, 0x300);
    before = done = i = end;
  }
  return out.append(text, done);
}

bool is_accent(char32_t code) {
  return code == 0x1CF2 || code == 0x1CF3 || (is_mark(code) && !after_unicode9(code));
}

std::string lowercase(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t i = 0; i < text.size();) {
    const char32_t code = next_char(text, i);
    if (code == 0x130) out += "i\xCC\x87";  // the one character whose lower case is two
    else append_char(out, static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(code))));
  }
  return out;
}

std::string strip(std::string_view text, bool left, bool right) {
  std::size_t begin = 0, end = text.size();
  while (left && begin < end) {
    std::size_t i = begin;
    if (!is_whitespace(next_char(text, i))) break;
    begin = i;
  }
  while (right && end > begin) {
    std::size_t at = end - 1;
    while (at > begin && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) --at;
    std::size_t i = at;
    if (!is_whitespace(next_char(text, i))) break;
    end = at;
  }
  return std::string(text.substr(begin, end - begin));
}

std::string replace_all(const Regex& pattern, std::string_view text, const std::string& content) {
  std::string out;
  std::size_t done = 0;
  pattern.for_each(text, [&](std::size_t begin, std::size_t end) {
    out.append(text, done, begin - done);
    out += content;
    done = end;
  });
  return out.append(text, done);
}

}  // namespace

Regex load_pattern(const Node& node) {
  if (node.has("String")) return Regex::literal(node.text("String"));
  if (node.has("Regex")) return Regex::compile(node.text("Regex"), node.path());
  node.refuse("{\"String\": ...} or {\"Regex\": ...}", node.json().dump().substr(0, 80));
}

void Normalizer::load(const Node& node) {
  steps_.clear();
  if (!node.is_null()) add(node, 0);
}

void Normalizer::add(const Node& node, int depth) {
  if (depth > kMaxNesting) node.refuse("sequences nested at most 8 deep", "deeper nesting");
  const std::string type = node.type();
  const auto simple = [&](Kind kind) { steps_.push_back({.kind = kind, .content = {}}); };
  if (type == "Sequence") {
    for (const Node& item : node.items("normalizers")) add(item, depth + 1);
  } else if (type == "Prepend") {
    steps_.push_back({.kind = Kind::kPrepend, .content = node.text("prepend")});
  } else if (type == "Replace") {
    steps_.push_back({.kind = Kind::kReplace, .content = node.text("content"), .pattern = load_pattern(node.at("pattern"))});
  } else if (type == "Strip") {
    steps_.push_back({.kind = Kind::kStrip, .content = {}, .left = node.flag("strip_left"), .right = node.flag("strip_right")});
  } else if (type == "NFC") {
    simple(Kind::kNfc);
  } else if (type == "NFD") {
    simple(Kind::kNfd);
  } else if (type == "NFKC") {
    simple(Kind::kNfkc);
  } else if (type == "NFKD") {
    simple(Kind::kNfkd);
  } else if (type == "Lowercase") {
    simple(Kind::kLowercase);
  } else if (type == "StripAccents") {
    simple(Kind::kStripAccents);
  } else if (type == "ByteLevel") {
    simple(Kind::kByteLevel);
  } else {
    node.unsupported("Sequence, Prepend, Replace, Strip, NFC, NFD, NFKC, NFKD, Lowercase, StripAccents, ByteLevel");
  }
}

std::string Normalizer::apply(std::string_view input, bool* front_kept) const {
  std::string text(input);
  const auto removed = [&](bool from_front) {
    if (front_kept && from_front) *front_kept = false;
  };
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::kPrepend:
        if (!text.empty()) text.insert(0, step.content);
        break;
      case Kind::kReplace: text = replace_all(step.pattern, text, step.content); break;
      case Kind::kNfc: text = nfc(text); break;
      case Kind::kNfd: text = unicode_form(text, UTF8PROC_DECOMPOSE, 0xC0); break;
      case Kind::kNfkc:
        text = unicode_form(text, static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_COMPAT), 0xA0);
        break;
      case Kind::kNfkd:
        text = unicode_form(text, static_cast<utf8proc_option_t>(UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT), 0xA0);
        break;
      case Kind::kLowercase: text = lowercase(text); break;
      case Kind::kStrip: {
        std::size_t i = 0;
        removed(step.left && !text.empty() && is_whitespace(next_char(text, i)));
        text = strip(text, step.left, step.right);
        break;
      }
      case Kind::kStripAccents: {
        std::string kept;
        for (std::size_t i = 0; i < text.size();) {
          const bool front = i == 0;
          const char32_t code = next_char(text, i);
          if (is_accent(code)) removed(front);
          else append_char(kept, code);
        }
        text = std::move(kept);
        break;
      }
      case Kind::kByteLevel: {
        std::string mapped;
        for (const char c : text) mapped += byte_to_piece(static_cast<unsigned char>(c));
        text = std::move(mapped);
        break;
      }
    }
  }
  return text;
}

}  // namespace pare::tok
