// Values of the chat-template interpreter: Python's objects as a template sees them. Internal to core/template.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "core/json.h"

namespace pare::chat {

// What went wrong while a template ran; the machine adds place and line.
struct Fault {
  std::string message;
  std::string hint = {};
  bool raised = false;  // by the template itself: raise_exception()
};

// Everything a template does is paid from one account, so that none runs or grows without bound.
class Budget {
 public:
  static constexpr std::int64_t kMaxSteps = 10'000'000;
  static constexpr std::size_t kMaxText = 16u << 20;  // bytes of any one text
  static constexpr std::size_t kMaxItems = 1u << 20;  // of any one list
  void spend(std::size_t steps = 1);
  void text(std::size_t bytes);  // a text of this size is made or searched
  void items(std::size_t count);

 private:
  std::int64_t left_ = kMaxSteps;
};

class Value;
[[noreturn]] void fail_undefined(const Value& value);
using Items = std::vector<Value>;
using Pairs = std::vector<std::pair<std::string, Value>>;

// What Python would call a list; only the first two can be printed and compared, a generator passes once.
enum class Shape : std::uint8_t { kList, kTuple, kRange, kView, kGenerator };
struct Text;
struct List;
struct Dict;
struct Namespace;
struct Function;
struct Loop;

enum class Kind : std::uint8_t {
  kUndefined, kNone, kBool, kInteger, kReal, kText, kList, kDict, kNamespace, kFunction, kLoop
};

// Immutable but for namespaces; copies share.
class Value {
 public:
  Value() = default;
  static Value undefined(std::string story);  // the story is told when the value is used
  static Value none() { return Value(None{}); }
  static Value boolean(bool value) { return Value(value); }
  static Value integer(std::int64_t value) { return Value(value); }
  static Value real(double value) { return Value(value); }
  static Value text(std::string bytes, bool safe = false);
  static Value list(Items items, Shape shape = Shape::kList);  // Fault: nested too deep
  static Value dict(Pairs pairs);                              // keys unique already
  static Value of(std::shared_ptr<Namespace> held) { return Value(std::move(held)); }
  static Value of(std::shared_ptr<Loop> held) { return Value(std::move(held)); }
  static Value function(std::string name, std::function<Value(struct Arguments&)> call);

  Kind kind() const { return static_cast<Kind>(held_.index()); }
  bool is(Kind kind) const { return this->kind() == kind; }
  bool is_undefined() const { return is(Kind::kUndefined); }
  bool is_text() const { return is(Kind::kText); }
  bool is_shape(Shape shape) const;
  bool is_whole() const { return is(Kind::kInteger) || is(Kind::kBool); }  // True is 1, as in Python
  bool is_number() const { return is_whole() || is(Kind::kReal); }
  std::int64_t whole() const { return is(Kind::kBool) ? std::get<bool>(held_) : std::get<std::int64_t>(held_); }
  double number() const { return is_whole() ? static_cast<double>(whole()) : std::get<double>(held_); }
  const std::string& bytes() const;
  // A text that `safe` marked would escape what is joined to it: everything but printing refuses it.
  bool is_safe() const;
  const Items& items() const;
  const Pairs& pairs() const;
  List& as_list() const { return *std::get<std::shared_ptr<List>>(held_); }
  Namespace& as_namespace() const { return *std::get<std::shared_ptr<Namespace>>(held_); }
  const Function& as_function() const { return *std::get<std::shared_ptr<Function>>(held_); }
  const Loop& as_loop() const { return *std::get<std::shared_ptr<Loop>>(held_); }
  const char* type() const;   // Python's name of the type
  int depth() const;          // levels of containers
  bool shares(const Value& other) const;  // the same object

 private:
  struct Undefined {
    std::shared_ptr<const std::string> story;
  };
  struct None {};
  template <class T>
  explicit Value(T held) : held_(std::move(held)) {}
  friend void fail_undefined(const Value&);
  std::variant<Undefined, None, bool, std::int64_t, double, std::shared_ptr<Text>, std::shared_ptr<List>,
               std::shared_ptr<Dict>, std::shared_ptr<Namespace>, std::shared_ptr<Function>, std::shared_ptr<Loop>>
      held_;
};

struct Text {
  std::string bytes;  // valid UTF-8
  bool safe = false;
};
struct List {
  Items items;
  Shape shape = Shape::kList;
  int depth = 1;
  bool passed = false;  // a generator that was iterated
};
struct Dict {
  Pairs pairs;
  int depth = 1;
};
struct Namespace {
  Pairs pairs;
};
struct Loop {
  Items items;
  std::size_t at = 0;
};
struct Arguments {
  Items positional;
  Pairs named;
};
struct Function {
  std::string name;
  std::function<Value(Arguments&)> call;
};

// Arguments matched to parameter names; "" cannot be named. Faults: too many, unknown, twice, missing.
class Bound {
 public:
  Bound(const std::string& function, const Arguments& given, std::initializer_list<const char*> names,
        std::size_t required = 0);
  bool has(std::size_t i) const { return values_[i].has_value() && !values_[i]->is(Kind::kNone); }
  bool given(std::size_t i) const { return values_[i].has_value(); }
  const Value& operator[](std::size_t i) const { return *values_[i]; }
  const std::string& text(std::size_t i) const;                      // Fault: not a text
  std::int64_t integer(std::size_t i, std::int64_t fallback) const;  // Fault: not a whole number
  bool truth(std::size_t i, bool fallback) const;

 private:
  std::string function_;
  std::vector<std::optional<Value>> values_;
};

bool truthy(const Value& value);
Items items_of(const Value& value, Budget& budget);            // what iterating gives
std::optional<std::size_t> length_of(const Value& value);      // none: Python's len() raises
bool equal(const Value& a, const Value& b, Budget& budget);
int order(const Value& a, const Value& b, Budget& budget);     // < 0, 0, > 0; 2: neither (NaN)
bool contains(const Value& container, const Value& item, Budget& budget);
enum class Arithmetic : std::uint8_t { kAdd, kSubtract, kMultiply, kDivide, kFloorDivide, kModulo };
Value calculate(Arithmetic operation, const Value& a, const Value& b, Budget& budget);
Value negate(const Value& value);
Value slice(const Value& value, const Value& start, const Value& stop, const Value& step, Budget& budget);
// a.name and a[key]: undefined where nothing is found; Fault where Python has something that is not supported.
Value get_attribute(const Value& object, const std::string& name, Budget& budget);
Value get_item(const Value& object, const Value& key, Budget& budget);
const Value* find(const Pairs& pairs, std::string_view key, Budget& budget);
void put(Pairs& pairs, std::string_view key, Value value, Budget& budget);  // insert or replace
Value from_json(const Json& json);

// How values are printed (print.cpp).
std::string to_text(const Value& value, Budget& budget);  // str()
const std::string& plain_text(const Value& value);        // a text that is not marked safe; Fault otherwise
struct JsonStyle {
  bool ascii = false, sort_keys = false;
  std::optional<std::string> indent = {};
  std::string item_separator = ", ", key_separator = ": ";
};
std::string to_json(const Value& value, const JsonStyle& style, Budget& budget);  // json.dumps

// Methods of texts and dicts (methods.cpp): nothing where Python has none of that name.
std::optional<Value> method_of(const Value& object, const std::string& name, Budget& budget);

using Filter = Value (*)(const Value& value, const Arguments& arguments, Budget& budget);
using Test = bool (*)(const Value& value, const Arguments& arguments, Budget& budget);
Filter find_filter(std::string_view name);  // null: not known
Test find_test(std::string_view name);
std::vector<std::string> filter_names();
std::vector<std::string> test_names();

// Text by code points (text.cpp).
std::size_t count_points(std::string_view text);
std::size_t byte_of_point(std::string_view text, std::size_t point);  // point <= count
bool is_space(char32_t point);                                        // Python's str.isspace
std::string_view strip(std::string_view text, bool left, bool right);
std::string_view strip(std::string_view text, std::string_view points, bool left, bool right);
// Python's case mappings; Fault for the few letters whose case is several letters or depends on their neighbours.
std::string upper(std::string_view text);
std::string lower(std::string_view text);
std::string capitalize(std::string_view text);
std::string title_words(std::string_view text);  // the filter `title`
std::string replace_all(std::string_view text, std::string_view from, std::string_view to, std::int64_t count,
                        Budget& budget);

}  // namespace pare::chat
