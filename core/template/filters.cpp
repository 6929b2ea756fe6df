// Filters (value|name) and tests (value is name) of chat templates, as Jinja2 defines them.
#include <algorithm>
#include <cmath>

#include "core/template/value.h"

namespace pare::chat {
namespace {

// The text that a text filter works on: str() of anything.
std::string soft_text(const Value& value, Budget& budget) {
  std::string out = value.is_text() ? plain_text(value) : to_text(value, budget);
  budget.text(out.size());
  return out;
}

// "a.b.0" of an item: what `attribute=` names.
Value attribute_path(const Value& item, const Value& path, Budget& budget) {
  if (path.is_whole()) return get_item(item, path, budget);
  if (!path.is_text()) throw Fault{"attribute must be a text or a number, not '" + std::string(path.type()) + "'"};
  Value out = item;
  for (std::size_t at = 0; at <= path.bytes().size();) {
    const std::size_t end = std::min(path.bytes().find('.', at), path.bytes().size());
    const std::string part = path.bytes().substr(at, end - at);
    const bool number = !part.empty() && part.size() < 10 && part.find_first_not_of("0123456789") == std::string::npos;
    out = get_item(out, number ? Value::integer(std::stoll(part)) : Value::text(part), budget);
    at = end + 1;
  }
  return out;
}

template <std::string (*kMap)(std::string_view)>
Value case_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("this filter", arguments, {});
  return Value::text(kMap(soft_text(value, budget)));
}
Value default_filter(const Value& value, const Arguments& arguments, Budget&) {
  const Bound bound("default", arguments, {"default_value", "boolean"});
  if (!value.is_undefined() && !(bound.truth(1, false) && !truthy(value))) return value;
  return bound.given(0) ? bound[0] : Value::text("");
}
Value dictsort_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("dictsort", arguments, {});
  if (!value.is(Kind::kDict)) throw Fault{"dictsort needs a dict, not '" + std::string(value.type()) + "'"};
  std::vector<std::pair<std::string, const std::pair<std::string, Value>*>> order;
  for (const auto& pair : value.pairs()) order.emplace_back(lower(pair.first), &pair);
  budget.items(order.size() * 16);
  std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  Items out;
  for (const auto& [key, pair] : order)
    out.push_back(Value::list({Value::text(pair->first), pair->second}, Shape::kTuple));
  return Value::list(std::move(out));
}
Value first_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("first", arguments, {});
  const Items items = items_of(value, budget);
  return items.empty() ? Value::undefined("No first item, sequence was empty.") : items.front();
}
Value last_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("last", arguments, {});
  if (value.is_shape(Shape::kGenerator)) throw Fault{"'generator' object is not reversible"};
  const Items items = items_of(value, budget);
  return items.empty() ? Value::undefined("No last item, sequence was empty.") : items.back();
}
Value int_filter(const Value& value, const Arguments& arguments, Budget&) {
  const Bound bound("int", arguments, {"default"});
  const Value fallback = bound.given(0) ? bound[0] : Value::integer(0);
  if (value.is_undefined()) fail_undefined(value);
  if (value.is_whole()) return Value::integer(value.whole());
  if (value.is(Kind::kReal)) {
    if (std::isnan(value.number())) return fallback;
    if (!(std::fabs(value.number()) < 9e18)) throw Fault{"int of a number beyond 64 bits"};
    return Value::integer(static_cast<std::int64_t>(value.number()));
  }
  if (!value.is_text()) return fallback;
  std::string_view text = strip(plain_text(value), true, true);
  const bool minus = text.starts_with('-');
  if (minus || text.starts_with('+')) text.remove_prefix(1);
  if (!text.empty() && text.size() < 19 && text.find_first_not_of("0123456789") == std::string_view::npos)
    return Value::integer((minus ? -1 : 1) * std::stoll(std::string(text)));
  const auto is_plain_word = [](char c) { return c > 0 && (c < '0' || c > '9'); };
  const std::string word = lower(text);
  const bool plain = std::all_of(word.begin(), word.end(), is_plain_word);
  if (plain && !word.starts_with("inf") && word != "nan") return fallback;
  throw Fault{"int of the text " + std::string(text.substr(0, 40)) + " is not supported"};
}
Value items_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("items", arguments, {});
  if (value.is_undefined()) return Value::list({}, Shape::kGenerator);
  if (!value.is(Kind::kDict)) throw Fault{"items needs a dict, not '" + std::string(value.type()) + "'"};
  Arguments none;
  return Value::list(method_of(value, "items", budget)->as_function().call(none).items(), Shape::kGenerator);
}
Value join_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("join", arguments, {"d", "attribute"});
  const std::string between = bound.given(0) ? to_text(bound[0], budget) : "";
  std::string out;
  bool first = true;
  for (const Value& item : items_of(value, budget)) {
    if (!std::exchange(first, false)) out += between;
    out += to_text(bound.has(1) ? attribute_path(item, bound[1], budget) : item, budget);
    if (out.size() > Budget::kMaxText) break;
  }
  budget.text(out.size());
  return Value::text(std::move(out));
}
Value length_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("length", arguments, {});
  const auto length = length_of(value);
  if (!length) throw Fault{"object of type '" + std::string(value.type()) + "' has no len()"};
  if (value.is_text()) budget.text(value.bytes().size());
  return Value::integer(static_cast<std::int64_t>(*length));
}
Value list_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("list", arguments, {});
  return Value::list(items_of(value, budget));
}
// The arguments behind the first `skip`, for the filter or test that is applied to each item.
Arguments behind(const Arguments& arguments, std::size_t skip) {
  Arguments out;
  out.positional.assign(arguments.positional.begin() + static_cast<std::ptrdiff_t>(skip), arguments.positional.end());
  out.named = arguments.named;
  return out;
}
const std::string& named_by(const Value& name, const char* what) {
  if (!name.is_text()) throw Fault{"the name of a " + std::string(what) + " is a text, not '" + name.type() + "'"};
  return name.bytes();
}
Value map_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  Items out;
  if (!truthy(value)) return Value::list({}, Shape::kGenerator);
  if (arguments.positional.empty()) {
    const Bound bound("map", arguments, {"attribute", "default"}, 1);
    for (const Value& item : items_of(value, budget)) {
      out.push_back(attribute_path(item, bound[0], budget));
      if (out.back().is_undefined() && bound.given(1)) out.back() = bound[1];
    }
  } else {
    const std::string& name = named_by(arguments.positional[0], "filter");
    const Filter filter = find_filter(name);
    if (filter == nullptr) throw Fault{"the filter " + name + " is not supported"};
    const Arguments rest = behind(arguments, 1);
    for (const Value& item : items_of(value, budget)) out.push_back(filter(item, rest, budget));
  }
  return Value::list(std::move(out), Shape::kGenerator);
}
template <bool kKeep, bool kByAttribute>
Value select_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  constexpr std::size_t kTestAt = kByAttribute ? 1 : 0;
  if (!truthy(value)) return Value::list({}, Shape::kGenerator);
  if (arguments.positional.size() < kTestAt) throw Fault{"Missing parameter for attribute name"};
  Test test = nullptr;
  if (arguments.positional.size() > kTestAt) {
    const std::string& name = named_by(arguments.positional[kTestAt], "test");
    test = find_test(name);
    if (test == nullptr) throw Fault{"the test " + name + " is not supported"};
  }
  const Arguments rest = test != nullptr ? behind(arguments, kTestAt + 1) : Arguments{};
  Items out;
  for (const Value& item : items_of(value, budget)) {
    const Value looked_at = kByAttribute ? attribute_path(item, arguments.positional[0], budget) : item;
    if ((test != nullptr ? test(looked_at, rest, budget) : truthy(looked_at)) == kKeep) out.push_back(item);
  }
  return Value::list(std::move(out), Shape::kGenerator);
}
Value replace_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("replace", arguments, {"old", "new", "count"}, 2);
  const std::int64_t count = bound.has(2) ? bound.integer(2, -1) : -1;
  return Value::text(
      replace_all(soft_text(value, budget), soft_text(bound[0], budget), soft_text(bound[1], budget), count, budget));
}
Value reverse_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("reverse", arguments, {});
  if (value.is_text()) return slice(value, Value::none(), Value::none(), Value::integer(-1), budget);
  if (value.is_shape(Shape::kGenerator)) throw Fault{"reverse of a generator is not supported", "make a list of it"};
  Items items = items_of(value, budget);
  std::reverse(items.begin(), items.end());
  return Value::list(std::move(items), Shape::kGenerator);
}
Value safe_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("safe", arguments, {});
  return Value::text(to_text(value, budget), true);
}
Value string_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("string", arguments, {});
  return value.is_text() ? value : Value::text(to_text(value, budget));
}
Value tojson_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("tojson", arguments, {"ensure_ascii", "indent", "separators", "sort_keys"});
  JsonStyle style;
  style.ascii = bound.truth(0, false);
  style.sort_keys = bound.truth(3, false);
  if (bound.has(1)) {
    const std::int64_t width = bound[1].is_text() ? 0 : std::max<std::int64_t>(bound.integer(1, 0), 0);
    if (width > 100) throw Fault{"an indent of more than 100"};
    style.indent = bound[1].is_text() ? bound.text(1) : std::string(static_cast<std::size_t>(width), ' ');
    style.item_separator = ",";
  }
  if (bound.has(2)) {
    const bool pair = bound[2].is(Kind::kList) && bound[2].as_list().shape <= Shape::kTuple &&
                      bound[2].items().size() == 2 && bound[2].items()[0].is_text() && bound[2].items()[1].is_text();
    if (!pair) throw Fault{"separators must be two texts"};
    style.item_separator = bound[2].items()[0].bytes();
    style.key_separator = bound[2].items()[1].bytes();
  }
  return Value::text(to_json(value, style, budget));
}
Value trim_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("trim", arguments, {"chars"});
  const std::string text = soft_text(value, budget);
  return Value::text(std::string(bound.has(0) ? strip(text, bound.text(0), true, true) : strip(text, true, true)));
}

constexpr std::pair<const char*, Filter> kFilters[] = {
    {"capitalize", case_filter<capitalize>}, {"count", length_filter}, {"d", default_filter},
    {"default", default_filter}, {"dictsort", dictsort_filter}, {"first", first_filter}, {"int", int_filter},
    {"items", items_filter}, {"join", join_filter}, {"last", last_filter}, {"length", length_filter},
    {"list", list_filter}, {"lower", case_filter<lower>}, {"map", map_filter},
    {"reject", select_filter<false, false>}, {"rejectattr", select_filter<false, true>}, {"replace", replace_filter},
    {"reverse", reverse_filter}, {"safe", safe_filter}, {"select", select_filter<true, false>},
    {"selectattr", select_filter<true, true>}, {"string", string_filter}, {"title", case_filter<title_words>},
    {"tojson", tojson_filter}, {"trim", trim_filter}, {"upper", case_filter<upper>}};

// ---- tests

template <bool (*kIs)(const Value&)>
bool plain_test(const Value& value, const Arguments& arguments, Budget&) {
  const Bound bound("this test", arguments, {});
  return kIs(value);
}
bool is_defined(const Value& v) { return !v.is_undefined(); }
bool is_undefined(const Value& v) { return v.is_undefined(); }
bool is_none(const Value& v) { return v.is(Kind::kNone); }
bool is_boolean(const Value& v) { return v.is(Kind::kBool); }
bool is_false(const Value& v) { return v.is(Kind::kBool) && v.whole() == 0; }
bool is_true(const Value& v) { return v.is(Kind::kBool) && v.whole() != 0; }
bool is_integer(const Value& v) { return v.is(Kind::kInteger); }
bool is_float(const Value& v) { return v.is(Kind::kReal); }
bool is_string(const Value& v) { return v.is_text(); }
bool is_mapping(const Value& v) { return v.is(Kind::kDict); }
bool is_number(const Value& v) { return v.is_number(); }
bool is_iterable(const Value& v) { return v.is(Kind::kLoop) || v.is(Kind::kList) || length_of(v).has_value(); }
bool is_sequence(const Value& v) { return length_of(v).has_value() && !v.is_shape(Shape::kView); }

template <std::int64_t kRest>
bool parity_test(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("this test", arguments, {});
  return equal(calculate(Arithmetic::kModulo, value, Value::integer(2), budget), Value::integer(kRest), budget);
}
bool divisible_test(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("divisibleby", arguments, {"num"}, 1);
  return equal(calculate(Arithmetic::kModulo, value, bound[0], budget), Value::integer(0), budget);
}
bool same_test(const Value& value, const Arguments& arguments, Budget&) {
  const Bound bound("sameas", arguments, {"other"}, 1);
  if (bound[0].kind() != Kind::kBool && bound[0].kind() != Kind::kNone)
    throw Fault{"sameas is supported for true, false and none only", "compare with =="};
  return value.kind() == bound[0].kind() && (value.is(Kind::kNone) || value.whole() == bound[0].whole());
}
bool in_test(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("in", arguments, {"seq"}, 1);
  return contains(bound[0], value, budget);
}
template <bool kEqual>
bool equal_test(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("a comparison", arguments, {""}, 1);
  return equal(value, bound[0], budget) == kEqual;
}
template <bool kLess, bool kSame>
bool order_test(const Value& value, const Arguments& arguments, Budget& budget) {
  const Bound bound("a comparison", arguments, {""}, 1);
  const int found = order(value, bound[0], budget);
  return found == 0 ? kSame : found == (kLess ? -1 : 1);
}

constexpr std::pair<const char*, Test> kTests[] = {
    {"odd", parity_test<1>}, {"even", parity_test<0>}, {"divisibleby", divisible_test},
    {"defined", plain_test<is_defined>}, {"undefined", plain_test<is_undefined>}, {"none", plain_test<is_none>},
    {"boolean", plain_test<is_boolean>}, {"false", plain_test<is_false>}, {"true", plain_test<is_true>},
    {"integer", plain_test<is_integer>}, {"float", plain_test<is_float>}, {"string", plain_test<is_string>},
    {"mapping", plain_test<is_mapping>}, {"number", plain_test<is_number>}, {"sequence", plain_test<is_sequence>},
    {"iterable", plain_test<is_iterable>}, {"sameas", same_test}, {"in", in_test}, {"==", equal_test<true>},
    {"eq", equal_test<true>}, {"equalto", equal_test<true>}, {"!=", equal_test<false>}, {"ne", equal_test<false>},
    {"<", order_test<true, false>}, {"lt", order_test<true, false>}, {"lessthan", order_test<true, false>},
    {"<=", order_test<true, true>}, {"le", order_test<true, true>}, {">", order_test<false, false>},
    {"gt", order_test<false, false>}, {"greaterthan", order_test<false, false>}, {">=", order_test<false, true>},
    {"ge", order_test<false, true>}};

template <class Table>
auto entry_of(const Table& table, std::string_view name) -> decltype(table[0].second) {
  for (const auto& [known, function] : table)
    if (name == known) return function;
  return nullptr;
}
template <class Table>
std::vector<std::string> names_of(const Table& table) {
  std::vector<std::string> out;
  for (const auto& entry : table) out.emplace_back(entry.first);
  return out;
}

}  // namespace

Filter find_filter(std::string_view name) { return entry_of(kFilters, name); }
Test find_test(std::string_view name) { return entry_of(kTests, name); }
std::vector<std::string> filter_names() { return names_of(kFilters); }
std::vector<std::string> test_names() { return names_of(kTests); }

}  // namespace pare::chat
