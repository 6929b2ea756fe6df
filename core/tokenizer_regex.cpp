#define PCRE2_CODE_UNIT_WIDTH 8
#include "core/tokenizer_regex.h"

#include <pcre2.h>

#include <vector>

#include "core/error.h"

namespace pare::tok {

const char* const kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

namespace {

// \s is White_Space; PCRE2 with UCP adds U+180E. Inside a class \S needs the complement written out.
constexpr const char* kSpace =
    R"(\t-\r\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
constexpr const char* kNotSpace =
    R"(\x{0}-\x{8}\x{e}-\x{1f}\x{21}-\x{84}\x{86}-\x{9f}\x{a1}-\x{167f}\x{1681}-\x{1fff}\x{200b}-\x{2027})"
    R"(\x{202a}-\x{202e}\x{2030}-\x{205e}\x{2060}-\x{2fff}\x{3001}-\x{d7ff}\x{e000}-\x{10ffff})";
// \w of Oniguruma: Alphabetic, M, Nd, Pc; PCRE2 before 10.43 knows only L, N and underscore.
constexpr const char* kWord =
    R"(\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{24b6}-\x{24e9}\x{1f130}-\x{1f149}\x{1f150}-\x{1f169}\x{1f170}-\x{1f189})";

// One pass over the pattern. `atom_` is where the last quantifiable item begins in the output, because Ruby's
// X{n,m}+ repeats the interval, where PCRE2 would read a possessive quantifier.
class Translator {
 public:
  Translator(std::string_view pattern, const std::string& place) : in_(pattern), place_(place) {}

  std::string run() {
    while (i_ < in_.size()) step();
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw input_error(place_, "a regular expression in the part of Oniguruma's syntax that is supported",
                      what + " in " + std::string(in_));
  }

  void step() {
    const char c = in_[i_];
    if (c == '\\') return escape(false);
    if (c == '[') {
      atom_ = out_.size();
      return char_class();
    }
    if (c == '(') return open_group();
    if (c == ')') {
      out_ += c;
      ++i_;
      if (!groups_.empty()) {
        atom_ = groups_.back();
        groups_.pop_back();
      }
      return;
    }
    if (c == '{' && interval()) return;
    if (c != '?' && c != '*' && c != '+') {
      atom_ = out_.size();
      // A multi-byte character is one atom.
      do out_ += in_[i_++];
      while (i_ < in_.size() && (static_cast<unsigned char>(in_[i_]) & 0xC0) == 0x80);
      return;
    }
    out_ += in_[i_++];
  }

  void open_group() {
    groups_.push_back(out_.size());
    out_ += in_[i_++];
    if (i_ >= in_.size() || in_[i_] != '?') return;
    out_ += in_[i_++];
    // Option letters: i and x mean the same in both, Ruby's m is "dot matches newline".
    std::size_t k = i_;
    while (k < in_.size() && (std::isalpha(static_cast<unsigned char>(in_[k])) || in_[k] == '-')) ++k;
    if (k < in_.size() && k > i_ && (in_[k] == ':' || in_[k] == ')')) {
      for (; i_ < k; ++i_) {
        if (in_[i_] == 'm') out_ += 's';
        else if (in_[i_] == 'i' || in_[i_] == '-') out_ += in_[i_];
        else refuse(std::string("option letter '") + in_[i_] + "'");
      }
      // Ruby's (?i) opens a group to the end of the enclosing one, which for matching is what PCRE2 does too.
    } else if (i_ < in_.size() && (in_[i_] == '~' || in_[i_] == '{' || in_[i_] == '(' || in_[i_] == 'P' ||
                                   in_[i_] == 'R' || in_[i_] == '&' || in_[i_] == '|' || in_[i_] == 'C' ||
                                   in_[i_] == '\'' || std::isdigit(static_cast<unsigned char>(in_[i_])))) {
      refuse(std::string("group (?") + in_[i_]);
    }
  }

  // {n}, {n,}, {n,m}, {,m}; returns false when the brace is a literal.
  bool interval() {
    std::size_t k = i_ + 1;
    std::string low, high;
    bool comma = false;
    while (k < in_.size() && std::isdigit(static_cast<unsigned char>(in_[k]))) low += in_[k++];
    if (k < in_.size() && in_[k] == ',') {
      comma = true;
      ++k;
      while (k < in_.size() && std::isdigit(static_cast<unsigned char>(in_[k]))) high += in_[k++];
    }
    if (k >= in_.size() || in_[k] != '}' || (low.empty() && high.empty())) return false;
    ++k;
    out_ += '{' + (low.empty() ? "0" : low) + (comma ? "," + high : "") + '}';
    i_ = k;
    if (i_ < in_.size() && in_[i_] == '+') {
      out_.insert(atom_, "(?:");
      out_ += ")";
    } else if (i_ < in_.size() && in_[i_] == '?' && !comma) {
      // Ruby reads X{n}? as "n times or not at all".
      out_.insert(atom_, "(?:");
      out_ += ")";
    }
    return true;
  }

  void escape(bool in_class) {
    if (!in_class) atom_ = out_.size();
    if (i_ + 1 >= in_.size()) refuse("a backslash at the end");
    const char c = in_[i_ + 1];
    const auto put = [&](const char* set) { out_ += in_class ? std::string(set) : "[" + std::string(set) + "]"; };
    switch (c) {
      case 's': put(kSpace); i_ += 2; return;
      case 'S':
        if (in_class) out_ += kNotSpace;
        else out_ += "[^" + std::string(kSpace) + "]";
        i_ += 2;
        return;
      case 'w': put(kWord); i_ += 2; return;
      case 'W':
        if (in_class) refuse("\\W inside a class");
        out_ += "[^" + std::string(kWord) + "]";
        i_ += 2;
        return;
      case 'p': case 'P': {
        const std::size_t close = in_.find('}', i_);
        if (i_ + 2 >= in_.size() || in_[i_ + 2] != '{' || close == std::string_view::npos) refuse("\\p without braces");
        out_.append(in_.substr(i_, close + 1 - i_));
        i_ = close + 1;
        return;
      }
      case 'u':  // four hex digits
        if (i_ + 6 > in_.size()) refuse("a short \\u");
        out_ += "\\x{" + std::string(in_.substr(i_ + 2, 4)) + "}";
        i_ += 6;
        return;
      case 'x':
        if (i_ + 2 < in_.size() && in_[i_ + 2] == '{') {
          const std::size_t close = in_.find('}', i_);
          if (close == std::string_view::npos) refuse("an open \\x{");
          out_.append(in_.substr(i_, close + 1 - i_));
          i_ = close + 1;
        } else {
          out_.append("\\x");
          i_ += 2;
        }
        return;
      case 'd': case 'D': case 't': case 'n': case 'r': case 'f': case 'a': case 'e':
        out_ += {'\\', c};
        i_ += 2;
        return;
      case 'v':  // vertical tab in Ruby syntax, a class in PCRE2
        out_ += "\\x0b";
        i_ += 2;
        return;
      case 'A': case 'z': case 'Z':
        if (in_class) refuse("an anchor inside a class");
        out_ += {'\\', c};
        i_ += 2;
        return;
      default:
        if (std::isalnum(static_cast<unsigned char>(c))) refuse(std::string("\\") + c);
        out_ += '\\';
        ++i_;
        out_ += in_[i_++];  // the rest of a multi-byte character follows as plain bytes
        while (i_ < in_.size() && (static_cast<unsigned char>(in_[i_]) & 0xC0) == 0x80) out_ += in_[i_++];
        return;
    }
  }

  void char_class() {
    out_ += in_[i_++];
    if (i_ < in_.size() && in_[i_] == '^') out_ += in_[i_++];
    bool first = true;
    for (; i_ < in_.size(); first = false) {
      const char c = in_[i_];
      if (c == ']' && !first) {
        out_ += c;
        ++i_;
        return;
      }
      if (c == ']') refuse("a class that begins with ]");
      if (c == '\\') {
        escape(true);
      } else if (c == '[') {
        refuse("a class inside a class");
      } else if (c == '&' && i_ + 1 < in_.size() && in_[i_ + 1] == '&') {
        refuse("a class intersection (&&)");
      } else {
        out_ += in_[i_++];
      }
    }
    refuse("a class that does not end");
  }

  std::string_view in_;
  const std::string& place_;
  std::string out_;
  std::size_t i_ = 0, atom_ = 0;
  std::vector<std::size_t> groups_;
};

pcre2_match_data* match_data() {
  struct Holder {
    pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
    ~Holder() { pcre2_match_data_free(data); }
  };
  thread_local Holder holder;
  return holder.data;
}

}  // namespace

std::string translate_pattern(std::string_view pattern, const std::string& place) {
  return Translator(pattern, place).run();
}

struct Regex::Program {
  pcre2_code* code = nullptr;
  bool jit = false;
  std::string pattern;
  ~Program() { pcre2_code_free(code); }
};

Regex Regex::compile(std::string_view pattern, const std::string& place) {
  if (pattern.size() > 65536) throw input_error(place, "a regular expression of at most 64 KiB", "a longer one");
  const std::string translated = translate_pattern(pattern, place);
  auto program = std::make_shared<Program>();
  program->pattern = std::string(pattern);
  pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
  pcre2_set_newline(context, PCRE2_NEWLINE_LF);
  int code = 0;
  PCRE2_SIZE offset = 0;
  program->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                                PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &code, &offset, context);
  pcre2_compile_context_free(context);
  if (!program->code) {
    unsigned char message[256];
    pcre2_get_error_message(code, message, sizeof message);
    throw input_error(place, "a regular expression", reinterpret_cast<const char*>(message) + std::string(" in ") +
                                                         std::string(pattern));
  }
  program->jit = pcre2_jit_compile(program->code, PCRE2_JIT_COMPLETE) == 0;
  Regex regex;
  regex.program_ = std::move(program);
  return regex;
}

Regex Regex::literal(std::string_view text) {
  Regex regex;
  regex.literal_ = std::string(text);
  return regex;
}

bool Regex::find(std::string_view text, std::size_t from, std::size_t& begin, std::size_t& end) const {
  if (!program_) {
    if (literal_.empty()) return false;
    begin = text.find(literal_, from);
    end = begin + literal_.size();
    return begin != std::string_view::npos;
  }
  pcre2_match_data* data = match_data();
  const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data() ? text.data() : "");
  int result = PCRE2_ERROR_JIT_STACKLIMIT;
  if (program_->jit) result = pcre2_jit_match(program_->code, subject, text.size(), from, 0, data, nullptr);
  if (result == PCRE2_ERROR_JIT_STACKLIMIT)
    result = pcre2_match(program_->code, subject, text.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data, nullptr);
  if (result == PCRE2_ERROR_NOMATCH) return false;
  if (result < 0)
    throw failure("tokenizer pattern " + program_->pattern, "a match within PCRE2's limits",
                  "one that was given up (error " + std::to_string(result) + ")",
                  "the pattern backtracks too much on this text");
  const PCRE2_SIZE* range = pcre2_get_ovector_pointer(data);
  begin = range[0];
  end = range[1];
  return true;
}

}  // namespace pare::tok
