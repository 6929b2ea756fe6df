// Methods of texts and dicts that templates call. Those that change a value are forbidden, as in Jinja's sandbox.
#include <algorithm>
#include <iterator>

#include "core/template/value.h"
#include "core/tokenizer_text.h"

namespace pare::chat {
namespace {

using Method = Value (*)(const Value& self, const Arguments& arguments, Budget& budget);

Value texts(std::vector<std::string> parts, Budget& budget) {
  budget.items(parts.size());
  Items out;
  for (std::string& part : parts) out.push_back(Value::text(std::move(part)));
  return Value::list(std::move(out));
}

template <bool kLeft, bool kRight>
Value strip_method(const Value& self, const Arguments& arguments, Budget& budget) {
  const Bound bound("strip()", arguments, {""});
  const std::string& text = plain_text(self);
  budget.text(text.size());
  if (!bound.has(0)) return Value::text(std::string(strip(text, kLeft, kRight)));
  return Value::text(std::string(strip(text, bound.text(0), kLeft, kRight)));
}

// split() without a separator: words between white space; the last of `limit` splits leaves the rest as it is.
std::vector<std::string> words(std::string_view text, std::int64_t limit) {
  std::vector<std::string> out;
  for (std::string_view rest = strip(text, true, false); !rest.empty();) {
    std::size_t end = 0;
    if (limit-- == 0) {
      out.emplace_back(rest);
      break;
    }
    for (std::size_t next = 0; end < rest.size() && !is_space(tok::next_char(rest, next));) end = next;
    out.emplace_back(rest.substr(0, end));
    rest = strip(rest.substr(end), true, false);
  }
  return out;
}
Value split_method(const Value& self, const Arguments& arguments, Budget& budget) {
  const Bound bound("split()", arguments, {"sep", "maxsplit"});
  std::int64_t limit = bound.integer(1, -1);
  const std::string& text = plain_text(self);
  budget.text(text.size());
  if (!bound.has(0)) return texts(words(text, limit), budget);
  const std::string& separator = bound.text(0);
  if (separator.empty()) throw Fault{"empty separator"};
  std::vector<std::string> out;
  std::size_t at = 0;
  while (limit-- != 0) {
    const std::size_t found = text.find(separator, at);
    if (found == std::string::npos) break;
    out.push_back(text.substr(at, found - at));
    at = found + separator.size();
  }
  out.push_back(text.substr(at));
  return texts(std::move(out), budget);
}
Value rsplit_method(const Value& self, const Arguments& arguments, Budget& budget) {
  const Bound bound("rsplit()", arguments, {"sep", "maxsplit"});
  std::int64_t limit = bound.integer(1, -1);
  const std::string& text = plain_text(self);
  budget.text(text.size());
  if (!bound.has(0)) throw Fault{"rsplit() without a separator is not supported"};
  const std::string& separator = bound.text(0);
  if (separator.empty()) throw Fault{"empty separator"};
  std::vector<std::string> out;
  std::size_t end = text.size();
  while (limit-- != 0 && end >= separator.size()) {
    const std::size_t found = text.rfind(separator, end - separator.size());
    if (found == std::string::npos) break;
    out.push_back(text.substr(found + separator.size(), end - found - separator.size()));
    end = found;
  }
  out.push_back(text.substr(0, end));
  std::reverse(out.begin(), out.end());
  return texts(std::move(out), budget);
}

template <bool kAtEnd>
Value affix_method(const Value& self, const Arguments& arguments, Budget& budget) {
  const Bound bound(kAtEnd ? "endswith()" : "startswith()", arguments, {""}, 1);
  const std::string_view text = self.bytes();
  const Items affixes = bound[0].is_shape(Shape::kTuple) ? bound[0].items() : Items{bound[0]};
  for (const Value& affix : affixes) {
    if (affix.is_undefined()) fail_undefined(affix);
    if (!affix.is_text()) throw Fault{"an affix must be a text, not '" + std::string(affix.type()) + "'"};
    budget.text(affix.bytes().size());
    if (kAtEnd ? text.ends_with(affix.bytes()) : text.starts_with(affix.bytes())) return Value::boolean(true);
  }
  return Value::boolean(false);
}

template <bool kFromRight>
Value find_method(const Value& self, const Arguments& arguments, Budget& budget) {
  const Bound bound(kFromRight ? "rfind()" : "find()", arguments, {""}, 1);
  const std::string_view text = self.bytes();
  budget.text(text.size());
  const std::size_t found = kFromRight ? text.rfind(bound.text(0)) : text.find(bound.text(0));
  if (found == std::string_view::npos) return Value::integer(-1);
  return Value::integer(static_cast<std::int64_t>(count_points(text.substr(0, found))));
}
Value count_method(const Value& self, const Arguments& arguments, Budget& budget) {
  const Bound bound("count()", arguments, {""}, 1);
  const std::string &text = self.bytes(), &wanted = bound.text(0);
  budget.text(text.size());
  if (wanted.empty()) return Value::integer(static_cast<std::int64_t>(count_points(text)) + 1);
  std::int64_t count = 0;
  for (std::size_t at = text.find(wanted); at != std::string::npos; at = text.find(wanted, at + wanted.size())) ++count;
  return Value::integer(count);
}
Value replace_method(const Value& self, const Arguments& arguments, Budget& budget) {
  const Bound bound("replace()", arguments, {"", "", ""}, 2);
  return Value::text(replace_all(plain_text(self), bound.text(0), bound.text(1), bound.integer(2, -1), budget));
}
template <std::string (*kMap)(std::string_view)>
Value case_method(const Value& self, const Arguments& arguments, Budget& budget) {
  const Bound bound("this method", arguments, {});
  budget.text(self.bytes().size() * 4);
  return Value::text(kMap(plain_text(self)));
}
template <bool kPrefix>
Value remove_affix_method(const Value& self, const Arguments& arguments, Budget& budget) {
  const Bound bound(kPrefix ? "removeprefix()" : "removesuffix()", arguments, {""}, 1);
  const std::string& affix = bound.text(0);
  std::string text = plain_text(self);
  budget.text(text.size());
  if (kPrefix && text.starts_with(affix)) text.erase(0, affix.size());
  if (!kPrefix && text.ends_with(affix)) text.resize(text.size() - affix.size());
  return Value::text(std::move(text));
}
Value join_method(const Value& self, const Arguments& arguments, Budget& budget) {
  const Bound bound("join()", arguments, {""}, 1);
  std::string out;
  bool first = true;
  for (const Value& item : items_of(bound[0], budget)) {
    if (!item.is_text()) throw Fault{"join() needs texts, not '" + std::string(item.type()) + "'"};
    if (!std::exchange(first, false)) out += plain_text(self);
    out += plain_text(item);
    if (out.size() > Budget::kMaxText) break;
  }
  budget.text(out.size());
  return Value::text(std::move(out));
}

Value get_method(const Value& self, const Arguments& arguments, Budget& budget) {
  const Bound bound("get()", arguments, {"", ""}, 1);
  if (bound[0].depth() > 0) throw Fault{"unhashable type: '" + std::string(bound[0].type()) + "'"};
  const Value* held = bound[0].is_text() ? find(self.pairs(), bound[0].bytes(), budget) : nullptr;
  return held != nullptr ? *held : bound.given(1) ? bound[1] : Value::none();
}
template <bool kKeys, bool kValues>
Value view_method(const Value& self, const Arguments& arguments, Budget& budget) {
  const Bound bound("this method", arguments, {});
  budget.items(self.pairs().size());
  Items out;
  for (const auto& [key, value] : self.pairs()) {
    if constexpr (kKeys && kValues) out.push_back(Value::list({Value::text(key), value}, Shape::kTuple));
    else out.push_back(kKeys ? Value::text(key) : value);
  }
  return Value::list(std::move(out), Shape::kView);
}

struct Entry {
  const char* name;
  Method method;  // null: Python has it, templates may not use it here
};
constexpr Entry kTextMethods[] = {
    {"strip", strip_method<true, true>}, {"lstrip", strip_method<true, false>}, {"rstrip", strip_method<false, true>},
    {"split", split_method}, {"rsplit", rsplit_method}, {"startswith", affix_method<false>},
    {"endswith", affix_method<true>}, {"find", find_method<false>}, {"rfind", find_method<true>},
    {"count", count_method}, {"replace", replace_method}, {"upper", case_method<upper>}, {"lower", case_method<lower>},
    {"capitalize", case_method<capitalize>}, {"removeprefix", remove_affix_method<true>},
    {"removesuffix", remove_affix_method<false>}, {"join", join_method}, {"casefold", nullptr}, {"center", nullptr},
    {"encode", nullptr}, {"expandtabs", nullptr}, {"format", nullptr}, {"format_map", nullptr}, {"index", nullptr},
    {"isalnum", nullptr}, {"isalpha", nullptr}, {"isascii", nullptr}, {"isdecimal", nullptr}, {"isdigit", nullptr},
    {"isidentifier", nullptr}, {"islower", nullptr}, {"isnumeric", nullptr}, {"isprintable", nullptr},
    {"isspace", nullptr}, {"istitle", nullptr}, {"isupper", nullptr}, {"ljust", nullptr}, {"maketrans", nullptr},
    {"partition", nullptr}, {"rindex", nullptr}, {"rjust", nullptr}, {"rpartition", nullptr},
    {"splitlines", nullptr}, {"swapcase", nullptr}, {"title", nullptr}, {"translate", nullptr}, {"zfill", nullptr}};
constexpr Entry kDictMethods[] = {
    {"get", get_method}, {"items", view_method<true, true>}, {"keys", view_method<true, false>},
    {"values", view_method<false, true>}, {"clear", nullptr}, {"copy", nullptr}, {"fromkeys", nullptr},
    {"pop", nullptr}, {"popitem", nullptr}, {"setdefault", nullptr}, {"update", nullptr}};
constexpr Entry kListMethods[] = {{"append", nullptr}, {"clear", nullptr},  {"copy", nullptr},    {"count", nullptr},
                                  {"extend", nullptr}, {"index", nullptr},  {"insert", nullptr},  {"pop", nullptr},
                                  {"remove", nullptr}, {"reverse", nullptr}, {"sort", nullptr}};

[[noreturn]] void refuse(const Value& object, const std::string& name) {
  throw Fault{"." + name + " of a " + object.type() + " is not supported in chat templates"};
}

template <std::size_t kCount>
std::optional<Value> look_up(const Entry (&table)[kCount], const Value& object, const std::string& name,
                             Budget& budget) {
  const auto entry = std::find_if(std::begin(table), std::end(table), [&](const Entry& e) { return name == e.name; });
  if (entry == std::end(table)) return {};
  if (entry->method == nullptr) refuse(object, name);
  return Value::function(name, [method = entry->method, object, &budget](Arguments& arguments) {
    return method(object, arguments, budget);
  });
}

}  // namespace

std::optional<Value> method_of(const Value& object, const std::string& name, Budget& budget) {
  if (name.starts_with("__")) refuse(object, name);
  switch (object.kind()) {
    case Kind::kText:
      if (object.is_safe()) plain_text(object);
      return look_up(kTextMethods, object, name, budget);
    case Kind::kDict: return look_up(kDictMethods, object, name, budget);
    case Kind::kList: {
      auto method = look_up(kListMethods, object, name, budget);
      if (object.as_list().shape > Shape::kTuple) refuse(object, name);
      return method;
    }
    case Kind::kNone: return {};
    default: refuse(object, name);
  }
}

}  // namespace pare::chat
