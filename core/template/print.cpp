// How values are printed: Python's str() and json.dumps().
#include <utf8proc.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "core/template/value.h"
#include "core/tokenizer_text.h"

namespace pare::chat {
namespace {

bool is_printable(char32_t point) {
  const auto category = utf8proc_category(static_cast<utf8proc_int32_t>(point));
  return point == ' ' || (category >= UTF8PROC_CATEGORY_LU && category < UTF8PROC_CATEGORY_ZS);
}

std::string repr_text(std::string_view text) {
  const bool single = text.find('\'') == std::string_view::npos || text.find('"') != std::string_view::npos;
  const char quote = single ? '\'' : '"';
  std::string out(1, quote);
  char escape[16];
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t begin = at;
    const char32_t point = tok::next_char(text, at);
    if (point == static_cast<char32_t>(quote) || point == '\\') (out += '\\') += static_cast<char>(point);
    else if (point == '\n') out += "\\n";
    else if (point == '\r') out += "\\r";
    else if (point == '\t') out += "\\t";
    else if (is_printable(point)) out += text.substr(begin, at - begin);
    else {
      const char* format = point < 0x100 ? "\\x%02x" : point < 0x10000 ? "\\u%04x" : "\\U%08x";
      std::snprintf(escape, sizeof escape, format, static_cast<unsigned>(point));
      out += escape;
    }
  }
  return out += quote;
}

// The shortest digits that give the number back, written as Python writes them.
std::string repr_real(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char text[64];
  const double size = std::fabs(value);
  const bool power = size != 0 && (size < 1e-4 || size >= 1e16);
  const auto style = power ? std::chars_format::scientific : std::chars_format::fixed;
  std::string out(text, std::to_chars(text, text + sizeof text, value, style).ptr);
  return out.find_first_of(".e") == std::string::npos ? out + ".0" : out;
}

class Printer {
 public:
  explicit Printer(Budget& budget) : budget_(budget) {}
  std::string out;

  void print(const Value& value) {
    switch (value.kind()) {
      case Kind::kUndefined: out += "Undefined"; break;
      case Kind::kNone: out += "None"; break;
      case Kind::kBool: out += value.whole() != 0 ? "True" : "False"; break;
      case Kind::kInteger: out += std::to_string(value.whole()); break;
      case Kind::kReal: out += repr_real(value.number()); break;
      case Kind::kText: out += repr_text(plain_text(value)); break;
      case Kind::kDict: {
        const char* before = "{";
        for (const auto& [key, held] : value.pairs()) {
          out += std::exchange(before, ", ") + repr_text(key) + ": ";
          print(held);
        }
        out += value.pairs().empty() ? "{}" : "}";
        break;
      }
      case Kind::kList:
        if (value.as_list().shape <= Shape::kTuple) {
          const bool list = value.is_shape(Shape::kList);
          out += list ? "[" : "(";
          for (std::size_t i = 0; i < value.items().size(); ++i) {
            if (i > 0) out += ", ";
            print(value.items()[i]);
          }
          out += list ? "]" : value.items().size() == 1 ? ",)" : ")";
          break;
        }
        [[fallthrough]];
      default: throw Fault{"a " + std::string(value.type()) + " cannot be printed"};
    }
    budget_.spend();
    if (out.size() > next_check_) {
      budget_.text(out.size());
      next_check_ = out.size() * 2;
    }
  }

 private:
  Budget& budget_;
  std::size_t next_check_ = 4096;
};

class JsonPrinter {
 public:
  JsonPrinter(const JsonStyle& style, Budget& budget) : style_(style), budget_(budget) {}
  std::string out;

  void print(const Value& value, int level) {
    budget_.spend();
    switch (value.kind()) {
      case Kind::kNone: out += "null"; break;
      case Kind::kBool: out += value.whole() != 0 ? "true" : "false"; break;
      case Kind::kInteger: out += std::to_string(value.whole()); break;
      case Kind::kReal: out += std::isnan(value.number()) ? "NaN" : infinite(value.number()); break;
      case Kind::kText: quoted(value.bytes()); break;
      case Kind::kDict: {
        Pairs pairs = value.pairs();
        if (style_.sort_keys)
          std::sort(pairs.begin(), pairs.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
        items(pairs, "{}", level, [&](const auto& pair) {
          quoted(pair.first);
          out += style_.key_separator;
          print(pair.second, level + 1);
        });
        break;
      }
      case Kind::kList:
        if (value.as_list().shape <= Shape::kTuple) {
          items(value.items(), "[]", level, [&](const Value& item) { print(item, level + 1); });
          break;
        }
        [[fallthrough]];
      default: throw Fault{"Object of type " + std::string(value.type()) + " is not JSON serializable"};
    }
    if (out.size() > next_check_) {
      budget_.text(out.size());
      next_check_ = out.size() * 2;
    }
  }

 private:
  static std::string infinite(double value) {
    return std::isinf(value) ? value < 0 ? "-Infinity" : "Infinity" : repr_real(value);
  }
  void unit(unsigned value) {
    char escape[8];
    std::snprintf(escape, sizeof escape, "\\u%04x", value);
    out += escape;
  }
  void quoted(std::string_view text) {
    static constexpr std::string_view kFrom = "\"\\\n\r\t\f\b", kTo = "\"\\nrtfb";
    out += '"';
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t begin = at;
      const char32_t point = tok::next_char(text, at);
      const std::size_t known = point < 0x80 ? kFrom.find(static_cast<char>(point)) : std::string_view::npos;
      if (known != std::string_view::npos) {
        (out += '\\') += kTo[known];
      } else if (point < 0x20 || (style_.ascii && point > 0x7E && point < 0x10000)) {
        unit(static_cast<unsigned>(point));
      } else if (style_.ascii && point >= 0x10000) {
        unit(0xD800 + static_cast<unsigned>((point - 0x10000) >> 10));
        unit(0xDC00 + static_cast<unsigned>((point - 0x10000) & 0x3FF));
      } else {
        out += text.substr(begin, at - begin);
      }
    }
    out += '"';
  }
  void line(int level) {
    if (!style_.indent) return;
    out += '\n';
    for (int i = 0; i < level; ++i) out += *style_.indent;
  }
  template <class List, class Print>
  void items(const List& list, const char* brackets, int level, Print print_item) {
    out += brackets[0];
    bool first = true;
    for (const auto& item : list) {
      if (!std::exchange(first, false)) out += style_.item_separator;
      line(level + 1);
      print_item(item);
    }
    if (!first) line(level);
    out += brackets[1];
  }
  const JsonStyle& style_;
  Budget& budget_;
  std::size_t next_check_ = 4096;
};

}  // namespace

const std::string& plain_text(const Value& value) {
  if (value.is_safe())
    throw Fault{"a text that went through `safe` may only be printed here", "Jinja would escape what is joined to it"};
  return value.bytes();
}

std::string to_text(const Value& value, Budget& budget) {
  if (value.is_undefined()) return "";
  if (value.is_text()) return value.bytes();
  Printer printer(budget);
  printer.print(value);
  return std::move(printer.out);
}

std::string to_json(const Value& value, const JsonStyle& style, Budget& budget) {
  JsonPrinter printer(style, budget);
  printer.print(value, 0);
  budget.text(printer.out.size());
  return std::move(printer.out);
}

}  // namespace pare::chat
