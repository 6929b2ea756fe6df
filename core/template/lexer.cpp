// Text -> tokens, after Jinja2's lexer (trim_blocks and lstrip_blocks on, one trailing newline dropped).
#include <algorithm>
#include <charconv>
#include <cstdlib>

#include "core/error.h"
#include "core/template/syntax.h"
#include "core/tokenizer_text.h"

namespace pare::chat {
namespace {

constexpr std::size_t kMaxSource = 1u << 20;

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_name_start(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

std::string with_plain_newlines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (std::size_t i = 0; i < source.size(); ++i) {
    out += source[i] == '\r' ? '\n' : source[i];
    if (source[i] == '\r' && i + 1 < source.size() && source[i + 1] == '\n') ++i;
  }
  if (out.ends_with('\n')) out.pop_back();
  return out;
}

class Lexer {
 public:
  Lexer(std::string source, const std::string& place) : text_(std::move(source)), place_(place) {}

  std::vector<Token> run() {
    while (at_ < text_.size()) data();
    tokens_.push_back({TokenType::kEnd, line_});
    return std::move(tokens_);
  }

 private:
  [[noreturn]] void fail(const std::string& expected, const std::string& found) const {
    throw input_error(place_ + ": line " + std::to_string(line_), expected, found);
  }
  char peek(std::size_t i) const { return i < text_.size() ? text_[i] : '\0'; }
  bool here(std::size_t i, std::string_view what) const {
    return text_.compare(std::min(i, text_.size()), what.size(), what) == 0;
  }

  void advance_to(std::size_t end) {
    for (std::size_t i = at_; i < end; ++i) line_ += text_[i] == '\n' ? 1 : 0;
    if (end > at_) line_starting_ = text_[end - 1] == '\n';
    at_ = end;
  }
  std::size_t skip_space(std::size_t from) const {
    return text_.size() - strip(std::string_view(text_).substr(std::min(from, text_.size())), true, false).size();
  }
  // Position behind a closing mark at `from` (sign, mark, and the space or newline it takes along), or npos.
  std::size_t closing(std::size_t from, std::string_view mark) const {
    const bool print = mark == "}}";
    if (!print && peek(from) == '+' && here(from + 1, mark)) return from + 1 + mark.size();
    if (peek(from) == '-' && here(from + 1, mark)) return skip_space(from + 1 + mark.size());
    if (!here(from, mark)) return std::string::npos;
    const std::size_t end = from + mark.size();
    return end + (!print && peek(end) == '\n' ? 1 : 0);
  }
  // Text before a tag, shortened as the tag's sign asks.
  void emit_data(std::size_t end, char sign, bool lstrip) {
    std::string_view data(text_.data() + at_, end - at_);
    if (sign == '-') {
      data = strip(data, false, true);
    } else if (sign != '+' && lstrip) {
      const std::size_t begin = data.rfind('\n') + 1;  // npos + 1 is 0
      if ((begin > 0 || line_starting_) && strip(data.substr(begin), true, false).empty()) data = data.substr(0, begin);
    }
    if (!data.empty()) tokens_.push_back({TokenType::kData, line_, std::string(data)});
  }

  void data() {
    std::size_t open = text_.find('{', at_);
    while (open != std::string::npos && peek(open + 1) != '%' && peek(open + 1) != '{' && peek(open + 1) != '#')
      open = text_.find('{', open + 1);
    if (open == std::string::npos) {
      emit_data(text_.size(), '+', false);
      advance_to(text_.size());
      return;
    }
    const char kind = text_[open + 1];
    const char sign = peek(open + 2) == '-' || peek(open + 2) == '+' ? peek(open + 2) : ' ';
    const std::size_t inside = open + 2 + (sign == ' ' ? 0 : 1);
    emit_data(open, sign, kind != '{');
    if (const std::size_t word = skip_space(inside); kind == '%' && here(word, "raw")) {
      const std::size_t rest = skip_space(word + 3);
      if (here(rest, "-%}") || here(rest, "%}")) {
        advance_to(here(rest, "%}") ? rest + 2 : skip_space(rest + 3));
        raw();
        return;
      }
    }
    advance_to(inside);
    if (kind == '#') {
      comment();
      return;
    }
    tokens_.push_back({kind == '%' ? TokenType::kBlockBegin : TokenType::kPrintBegin, line_});
    tag(kind == '%' ? "%}" : "}}");
  }

  void comment() {
    for (std::size_t i = at_; i < text_.size(); ++i)
      if (const std::size_t end = closing(i, "#}"); end != std::string::npos) return advance_to(end);
    fail("the end of the comment, #}", "the end of the template");
  }

  void raw() {
    for (std::size_t i = text_.find("{%", at_); i != std::string::npos; i = text_.find("{%", i + 1)) {
      std::size_t inside = i + 2;
      const char sign = peek(inside) == '-' || peek(inside) == '+' ? text_[inside++] : ' ';
      inside = skip_space(inside);
      const std::size_t end = here(inside, "endraw") ? closing(skip_space(inside + 6), "%}") : std::string::npos;
      if (end == std::string::npos) continue;
      emit_data(i, sign, true);
      advance_to(end);
      return;
    }
    fail("{% endraw %}", "the end of the template");
  }

  void tag(std::string_view mark) {
    std::string brackets;
    while (at_ < text_.size()) {
      if (const std::size_t end = closing(at_, mark); brackets.empty() && end != std::string::npos) {
        tokens_.push_back({mark == "%}" ? TokenType::kBlockEnd : TokenType::kPrintEnd, line_});
        advance_to(end);
        return;
      }
      if (const std::size_t end = skip_space(at_); end > at_) advance_to(end);
      else if (is_digit(text_[at_])) number();
      else if (is_name_start(text_[at_])) name();
      else if (text_[at_] == '\'' || text_[at_] == '"') quoted();
      else symbol(brackets);
    }
    fail("the end of the tag, " + std::string(mark), "the end of the template");
  }

  std::size_t digits(std::size_t from) const {
    while (is_digit(peek(from))) ++from;
    return from;
  }
  void number() {
    std::size_t end = digits(at_);
    Token token{TokenType::kInteger, line_};
    // `x.0.1` indexes twice: digits behind a dot are never a fraction.
    if (peek(end) == '.' && is_digit(peek(end + 1)) && (at_ == 0 || text_[at_ - 1] != '.')) {
      end = digits(end + 1);
      token.type = TokenType::kReal;
    }
    const std::string plain = text_.substr(at_, end - at_);
    if (is_name_start(peek(end)) || (plain.size() > 1 && plain[0] == '0' && token.type == TokenType::kInteger))
      fail("a plain decimal number", plain + peek(end));
    if (token.type == TokenType::kReal) {
      token.number = Value::real(std::strtod(plain.c_str(), nullptr));
    } else {
      std::int64_t value = 0;
      if (std::from_chars(plain.data(), plain.data() + plain.size(), value).ec != std::errc{})
        fail("a whole number of 64 bits", plain.substr(0, 40));
      token.number = Value::integer(value);
    }
    tokens_.push_back(std::move(token));
    advance_to(end);
  }

  void name() {
    std::size_t end = at_;
    while (is_name_start(peek(end)) || is_digit(peek(end))) ++end;
    tokens_.push_back({TokenType::kName, line_, text_.substr(at_, end - at_)});
    advance_to(end);
  }

  char32_t escape(std::size_t begin, std::size_t count) const {
    std::uint32_t value = 0;
    const char* const first = text_.data() + std::min(begin, text_.size());
    const char* const last = text_.data() + std::min(begin + count, text_.size());
    const auto [stop, problem] = std::from_chars(first, last, value, 16);
    if (problem != std::errc{} || stop != first + count || value > 0x10FFFF || (value >= 0xD800 && value < 0xE000))
      fail("an escape that names a letter", text_.substr(begin - 2, count + 2));
    return value;
  }

  void quoted() {
    const char quote = text_[at_];
    Token token{TokenType::kText, line_};
    std::size_t i = at_ + 1;
    for (; i < text_.size() && text_[i] != quote; ++i) {
      if (text_[i] != '\\') {
        token.text += text_[i];
        continue;
      }
      const char c = peek(++i);
      static constexpr std::string_view kFrom = "\\'\"abfnrtv", kTo = "\\'\"\a\b\f\n\r\t\v";
      if (const std::size_t known = kFrom.find(c); known != std::string_view::npos) {
        token.text += kTo[known];
      } else if (c == 'x' || c == 'u' || c == 'U') {
        const std::size_t count = c == 'x' ? 2 : c == 'u' ? 4 : 8;
        tok::append_char(token.text, escape(i + 1, count));
        i += count;
      } else if (is_digit(c) || c == 'N' || c == '\n') {
        fail("escapes of one letter, or \\x, \\u and \\U", std::string("\\") + c + ", which is not supported");
      } else {
        token.text += '\\';
        if (i < text_.size()) token.text += c;
      }
    }
    if (i >= text_.size()) fail(std::string("the end of the text, ") + quote, "the end of the template");
    tokens_.push_back(std::move(token));
    advance_to(i + 1);
  }

  void symbol(std::string& brackets) {
    static constexpr std::string_view kSymbols[] = {"**", "//", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~",
                                                    "[",  "]",  "(",  ")",  "{",  "}",  ">", "<", "=", ".", ":", "|",
                                                    ","};
    for (const std::string_view symbol : kSymbols) {
      if (!here(at_, symbol)) continue;
      const char c = symbol[0];
      if (c == '{' || c == '(' || c == '[') brackets += c == '{' ? '}' : c == '(' ? ')' : ']';
      if (c == '}' || c == ')' || c == ']') {
        if (!brackets.ends_with(c)) fail("balanced brackets", "an unexpected " + std::string(symbol));
        brackets.pop_back();
      }
      tokens_.push_back({TokenType::kOperator, line_, std::string(symbol)});
      advance_to(at_ + symbol.size());
      return;
    }
    fail("an expression", "the character " + text_.substr(at_, tok::char_length(text_[at_])));
  }

  const std::string text_;
  const std::string& place_;
  std::vector<Token> tokens_;
  std::size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source, const std::string& place) {
  if (source.size() > kMaxSource)
    throw input_error(place, "a template of at most 1 MiB", std::to_string(source.size()) + " bytes");
  if (!tok::is_valid_utf8(source)) throw input_error(place, "a template in UTF-8", "bytes that are not");
  return Lexer(with_plain_newlines(source), place).run();
}

}  // namespace pare::chat
