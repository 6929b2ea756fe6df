// Regular expressions of tokenizer.json. The reference engine is Oniguruma in Ruby syntax; the patterns are
// translated to PCRE2 where the two differ and refused where no translation is known.
#pragma once

#include <memory>
#include <string>
#include <string_view>

namespace pare::tok {

// True, with `out` of the same length, where `text` has characters that the regular expressions here may not know.
bool stand_ins_for_new_characters(std::string_view text, std::string& out);

class Regex {
 public:
  // Errors: exit 3 with the place, for syntax PCRE2 refuses or whose meaning differs between the engines.
  static Regex compile(std::string_view pattern, const std::string& place);
  static Regex literal(std::string_view text);

  // Leftmost match that begins at byte `from` or later. `text` is valid UTF-8. Thread-safe.
  bool find(std::string_view text, std::size_t from, std::size_t& begin, std::size_t& end) const;

  // visit(begin, end) for all matches from left to right; an empty match right behind a match is skipped.
  template <class Visit>
  void for_each(std::string_view text, Visit&& visit) const {
    std::string known;
    if (program_ && stand_ins_for_new_characters(text, known)) text = known;
    std::size_t from = 0, begin = 0, end = 0, last_end = std::string_view::npos;
    while (from <= text.size() && find(text, from, begin, end)) {
      if (begin == end && end == last_end) {
        if (from >= text.size()) break;
        do ++from;
        while (from < text.size() && (static_cast<unsigned char>(text[from]) & 0xC0) == 0x80);
        continue;
      }
      from = last_end = end;
      visit(begin, end);
    }
  }

 private:
  struct Program;
  std::shared_ptr<const Program> program_;
  std::string literal_;  // searched as plain bytes when there is no program
};

// Oniguruma (Ruby syntax) -> PCRE2; shown to tests.
std::string translate_pattern(std::string_view pattern, const std::string& place);

// GPT-2's pre-tokenizer pattern.
extern const char* const kGpt2Pattern;

}  // namespace pare::tok
