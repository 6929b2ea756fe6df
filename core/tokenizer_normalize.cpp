#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>

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

std::string unicode_form(std::string_view text, utf8proc_option_t options, char32_t first_affected) {
  if (already_normal(text, first_affected)) return std::string(text);
  utf8proc_uint8_t* mapped = nullptr;
  const utf8proc_ssize_t length =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                   &mapped, static_cast<utf8proc_option_t>(options | UTF8PROC_STABLE));
  if (length < 0) throw failure("Unicode normalization", "", utf8proc_errmsg(length));
  std::string out(reinterpret_cast<const char*>(mapped), static_cast<std::size_t>(length));
  std::free(mapped);
  return out;
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

std::string Normalizer::apply(std::string_view input) const {
  std::string text(input);
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::kPrepend:
        if (!text.empty()) text.insert(0, step.content);
        break;
      case Kind::kReplace: text = replace_all(step.pattern, text, step.content); break;
      case Kind::kNfc: text = unicode_form(text, UTF8PROC_COMPOSE, 0x300); break;
      case Kind::kNfd: text = unicode_form(text, UTF8PROC_DECOMPOSE, 0xC0); break;
      case Kind::kNfkc:
        text = unicode_form(text, static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_COMPAT), 0xA0);
        break;
      case Kind::kNfkd:
        text = unicode_form(text, static_cast<utf8proc_option_t>(UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT), 0xA0);
        break;
      case Kind::kLowercase: text = lowercase(text); break;
      case Kind::kStrip: text = strip(text, step.left, step.right); break;
      case Kind::kStripAccents: {
        std::string kept;
        for (std::size_t i = 0; i < text.size();) {
          const char32_t code = next_char(text, i);
          if (!is_mark(code)) append_char(kept, code);
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
