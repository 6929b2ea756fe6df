#include "core/template/value.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/tokenizer_text.h"

namespace pare::chat {

void Budget::spend(std::size_t steps) {
  left_ -= static_cast<std::int64_t>(steps);
  if (left_ < 0)
    throw Fault{"more than " + std::to_string(kMaxSteps) + " steps", "the template may loop without end"};
}
void Budget::text(std::size_t bytes) {
  if (bytes > kMaxText) throw Fault{"a text of more than " + std::to_string(kMaxText >> 20) + " MiB"};
  spend(1 + bytes / 32);
}
void Budget::items(std::size_t count) {
  if (count > kMaxItems) throw Fault{"a list of more than " + std::to_string(kMaxItems) + " items"};
  spend(1 + count);
}

namespace {

// Bounds the recursion of everything that walks or frees a value.
constexpr int kMaxDepth = 100;

int one_above(int depth) {
  if (depth >= kMaxDepth) throw Fault{"lists nested more than " + std::to_string(kMaxDepth) + " deep"};
  return depth + 1;
}

std::string quoted_type(const Value& value) { return "'" + std::string(value.type()) + "'"; }

}  // namespace

// ---- making and looking into

Value Value::undefined(std::string story) {
  return Value(Undefined{std::make_shared<const std::string>(std::move(story))});
}
Value Value::text(std::string bytes, bool safe) { return Value(std::make_shared<Text>(Text{std::move(bytes), safe})); }
Value Value::list(Items items, Shape shape) {
  int depth = 0;
  for (const Value& item : items) depth = std::max(depth, item.depth());
  return Value(std::make_shared<List>(List{std::move(items), shape, one_above(depth)}));
}
Value Value::dict(Pairs pairs) {
  int depth = 0;
  for (const auto& [key, value] : pairs) depth = std::max(depth, value.depth());
  return Value(std::make_shared<Dict>(Dict{std::move(pairs), one_above(depth)}));
}
Value Value::function(std::string name, std::function<Value(Arguments&)> call) {
  return Value(std::make_shared<Function>(Function{std::move(name), std::move(call)}));
}
bool Value::is_shape(Shape shape) const { return is(Kind::kList) && as_list().shape == shape; }
const std::string& Value::bytes() const { return std::get<std::shared_ptr<Text>>(held_)->bytes; }
bool Value::is_safe() const { return is_text() && std::get<std::shared_ptr<Text>>(held_)->safe; }
const Items& Value::items() const { return as_list().items; }
const Pairs& Value::pairs() const { return std::get<std::shared_ptr<Dict>>(held_)->pairs; }
int Value::depth() const {
  if (is(Kind::kList)) return as_list().depth;
  return is(Kind::kDict) ? std::get<std::shared_ptr<Dict>>(held_)->depth : 0;
}
bool Value::shares(const Value& other) const {
  if (kind() != other.kind()) return false;
  return std::visit(
      [&other](const auto& held) {
        if constexpr (requires { held.get(); }) return held == std::get<std::decay_t<decltype(held)>>(other.held_);
        else return false;
      },
      held_);
}
const char* Value::type() const {
  switch (kind()) {
    case Kind::kUndefined: return "Undefined";
    case Kind::kNone: return "NoneType";
    case Kind::kBool: return "bool";
    case Kind::kInteger: return "int";
    case Kind::kReal: return "float";
    case Kind::kText: return "str";
    case Kind::kList: {
      static constexpr const char* kShapes[] = {"list", "tuple", "range", "dict view", "generator"};
      return kShapes[static_cast<int>(as_list().shape)];
    }
    case Kind::kDict: return "dict";
    case Kind::kNamespace: return "Namespace";
    case Kind::kFunction: return "function";
    case Kind::kLoop: return "LoopContext";
  }
  return "object";
}

void fail_undefined(const Value& value) {
  const auto& story = std::get<Value::Undefined>(value.held_).story;
  throw Fault{story ? *story : "a value is undefined"};
}

bool truthy(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
    case Kind::kNone: return false;
    case Kind::kBool:
    case Kind::kInteger: return value.whole() != 0;
    case Kind::kReal: return value.number() != 0;
    case Kind::kText: return !value.bytes().empty();
    case Kind::kList: return value.is_shape(Shape::kGenerator) || !value.items().empty();
    case Kind::kDict: return !value.pairs().empty();
    default: return true;
  }
}

std::optional<std::size_t> length_of(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined: return 0;
    case Kind::kText: return count_points(value.bytes());
    case Kind::kDict: return value.pairs().size();
    case Kind::kList:
      if (!value.is_shape(Shape::kGenerator)) return value.items().size();
      [[fallthrough]];
    default: return {};
  }
}

Items items_of(const Value& value, Budget& budget) {
  Items out;
  switch (value.kind()) {
    case Kind::kUndefined: break;
    case Kind::kText:
      plain_text(value);
      for (std::size_t at = 0; at < value.bytes().size();) {
        const std::size_t begin = at;
        at += tok::char_length(value.bytes()[at]);
        out.push_back(Value::text(value.bytes().substr(begin, at - begin)));
        budget.items(out.size() % 64 == 0 ? out.size() : 0);
      }
      break;
    case Kind::kDict:
      for (const auto& pair : value.pairs()) out.push_back(Value::text(pair.first));
      break;
    case Kind::kList: {
      List& list = value.as_list();
      if (list.passed) throw Fault{"a generator is used twice", "make a list of it: x|list"};
      list.passed = list.shape == Shape::kGenerator;
      out = list.items;
      break;
    }
    default: throw Fault{quoted_type(value) + " object is not iterable"};
  }
  budget.items(out.size());
  return out;
}

// ---- comparing

bool equal(const Value& a, const Value& b, Budget& budget) {
  budget.spend();
  if (a.is_number() && b.is_number()) {
    if (a.is_whole() && b.is_whole()) return a.whole() == b.whole();
    return order(a, b, budget) == 0;
  }
  if (a.kind() != b.kind()) return false;
  switch (a.kind()) {
    case Kind::kUndefined:
    case Kind::kNone: return true;
    case Kind::kText: budget.text(std::min(a.bytes().size(), b.bytes().size())); return a.bytes() == b.bytes();
    case Kind::kList: {
      for (const Value* value : {&a, &b})
        if (!value->is_shape(Shape::kList) && !value->is_shape(Shape::kTuple))
          throw Fault{"comparing a " + std::string(value->type()) + " is not supported", "make a list of it: x|list"};
      if (a.as_list().shape != b.as_list().shape || a.items().size() != b.items().size()) return false;
      for (std::size_t i = 0; i < a.items().size(); ++i)
        if (!equal(a.items()[i], b.items()[i], budget)) return false;
      return true;
    }
    case Kind::kDict: {
      if (a.pairs().size() != b.pairs().size()) return false;
      for (const auto& [key, value] : a.pairs()) {
        const Value* other = find(b.pairs(), key, budget);
        if (other == nullptr || !equal(value, *other, budget)) return false;
      }
      return true;
    }
    default: return a.shares(b);
  }
}

int order(const Value& a, const Value& b, Budget& budget) {
  budget.spend();
  if (a.is_undefined()) fail_undefined(a);
  if (b.is_undefined()) fail_undefined(b);
  const auto decide = [](const auto& x, const auto& y) { return x < y ? -1 : x > y ? 1 : x == y ? 0 : 2; };
  if (a.is_whole() && b.is_whole()) return decide(a.whole(), b.whole());
  if (a.is_number() && b.is_number()) {
    const auto exact = [](const Value& v) -> long double {
      return v.is_whole() ? static_cast<long double>(v.whole()) : static_cast<long double>(v.number());
    };
    return decide(exact(a), exact(b));
  }
  if (a.is_text() && b.is_text()) {
    budget.text(std::min(a.bytes().size(), b.bytes().size()));
    return decide(a.bytes().compare(b.bytes()), 0);  // UTF-8 sorts as its code points do
  }
  throw Fault{"ordering " + quoted_type(a) + " and " + quoted_type(b) + " is not supported"};
}

bool contains(const Value& container, const Value& item, Budget& budget) {
  if (container.is_text()) {
    if (!item.is_text()) throw Fault{"'in <string>' requires a string on its left, not " + quoted_type(item)};
    budget.text(container.bytes().size());
    return container.bytes().find(item.bytes()) != std::string::npos;
  }
  if (container.is(Kind::kDict)) {
    if (item.depth() > 0) throw Fault{"unhashable type: " + quoted_type(item)};
    return item.is_text() && find(container.pairs(), item.bytes(), budget) != nullptr;
  }
  for (const Value& other : items_of(container, budget))
    if (item.shares(other) || equal(item, other, budget)) return true;
  return false;
}

// ---- dicts

const Value* find(const Pairs& pairs, std::string_view key, Budget& budget) {
  budget.spend(1 + pairs.size() / 8);
  for (const auto& [name, value] : pairs)
    if (name == key) return &value;
  return nullptr;
}
void put(Pairs& pairs, std::string_view key, Value value, Budget& budget) {
  if (const Value* held = find(pairs, key, budget)) *const_cast<Value*>(held) = std::move(value);
  else pairs.emplace_back(key, std::move(value));
}

Value from_json(const Json& json) {
  switch (json.type()) {
    case Json::value_t::null: return Value::none();
    case Json::value_t::boolean: return Value::boolean(json.get<bool>());
    case Json::value_t::number_integer: return Value::integer(json.get<std::int64_t>());
    case Json::value_t::number_unsigned:
      if (json.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX))
        throw Fault{"the number " + json.dump() + " has more than 64 bits"};
      return Value::integer(json.get<std::int64_t>());
    case Json::value_t::number_float: return Value::real(json.get<double>());
    case Json::value_t::string: return Value::text(tok::replace_invalid_utf8(json.get_ref<const std::string&>()));
    case Json::value_t::array: {
      Items items;
      for (const Json& item : json) items.push_back(from_json(item));
      return Value::list(std::move(items));
    }
    case Json::value_t::object: {
      Pairs pairs;
      for (const auto& [key, value] : json.items())
        pairs.emplace_back(tok::replace_invalid_utf8(key), from_json(value));
      return Value::dict(std::move(pairs));
    }
    default: throw Fault{"a value that JSON does not have"};
  }
}

// ---- arithmetic

namespace {

Value calculate_whole(Arithmetic operation, std::int64_t a, std::int64_t b) {
  std::int64_t out = 0;
  bool over = false;
  switch (operation) {
    case Arithmetic::kAdd: over = __builtin_add_overflow(a, b, &out); break;
    case Arithmetic::kSubtract: over = __builtin_sub_overflow(a, b, &out); break;
    case Arithmetic::kMultiply: over = __builtin_mul_overflow(a, b, &out); break;
    default: {
      if (b == 0) throw Fault{"division by zero"};
      if (operation == Arithmetic::kDivide) {
        constexpr std::int64_t kExact = std::int64_t{1} << 53;
        if (std::max(a, b) > kExact || std::min(a, b) < -kExact) throw Fault{"division of numbers beyond 2^53"};
        return Value::real(static_cast<double>(a) / static_cast<double>(b));
      }
      if (b == -1) {  // INT64_MIN / -1 traps
        if (operation == Arithmetic::kFloorDivide) over = __builtin_sub_overflow(std::int64_t{0}, a, &out);
        break;
      }
      const std::int64_t rest = a % b;
      const bool below = rest != 0 && (rest < 0) != (b < 0);  // Python rounds down
      out = operation == Arithmetic::kModulo ? rest + (below ? b : 0) : a / b - (below ? 1 : 0);
    }
  }
  if (over) throw Fault{"a whole number of more than 64 bits"};
  return Value::integer(out);
}

Value repeat(const Value& value, std::int64_t times, Budget& budget) {
  const std::string& unit = plain_text(value);
  if (unit.empty() || times <= 0) return Value::text("");
  if (static_cast<std::size_t>(times) > Budget::kMaxText / unit.size()) budget.text(Budget::kMaxText + 1);
  std::string out;
  for (std::int64_t i = 0; i < times; ++i) out += unit;
  budget.text(out.size());
  return Value::text(std::move(out));
}

}  // namespace

Value calculate(Arithmetic operation, const Value& a, const Value& b, Budget& budget) {
  static constexpr const char* kSymbols[] = {"+", "-", "*", "/", "//", "%"};
  if (a.is_undefined()) fail_undefined(a);
  if (b.is_undefined()) fail_undefined(b);
  if (a.is_whole() && b.is_whole()) return calculate_whole(operation, a.whole(), b.whole());
  if (a.is_number() && b.is_number()) {
    const double x = a.number(), y = b.number();
    switch (operation) {
      case Arithmetic::kAdd: return Value::real(x + y);
      case Arithmetic::kSubtract: return Value::real(x - y);
      case Arithmetic::kMultiply: return Value::real(x * y);
      case Arithmetic::kDivide:
        if (y == 0) throw Fault{"division by zero"};
        return Value::real(x / y);
      default: throw Fault{std::string(kSymbols[static_cast<int>(operation)]) + " of fractions is not supported"};
    }
  }
  if (operation == Arithmetic::kAdd && a.is_text() && b.is_text()) {
    budget.text(a.bytes().size() + b.bytes().size());
    return Value::text(plain_text(a) + plain_text(b));
  }
  if (operation == Arithmetic::kAdd && a.is(Kind::kList) && b.is(Kind::kList) &&
      a.as_list().shape == b.as_list().shape && a.as_list().shape <= Shape::kTuple) {
    budget.items(a.items().size() + b.items().size());
    Items out = a.items();
    out.insert(out.end(), b.items().begin(), b.items().end());
    return Value::list(std::move(out), a.as_list().shape);
  }
  if (operation == Arithmetic::kMultiply && a.is_text() && b.is_whole()) return repeat(a, b.whole(), budget);
  if (operation == Arithmetic::kMultiply && b.is_text() && a.is_whole()) return repeat(b, a.whole(), budget);
  const std::string symbol = kSymbols[static_cast<int>(operation)];
  throw Fault{quoted_type(a) + " " + symbol + " " + quoted_type(b) + " is not supported"};
}

Value negate(const Value& value) {
  if (value.is_undefined()) fail_undefined(value);
  if (value.is_whole()) return calculate_whole(Arithmetic::kSubtract, 0, value.whole());
  if (value.is(Kind::kReal)) return Value::real(-value.number());
  throw Fault{"bad operand type for unary -: " + quoted_type(value)};
}

// ---- parts

Value slice(const Value& value, const Value& start, const Value& stop, const Value& step, Budget& budget) {
  if (value.is_undefined()) fail_undefined(value);
  if (!value.is_text() && !value.is_shape(Shape::kList) && !value.is_shape(Shape::kTuple))
    throw Fault{"slices of a " + std::string(value.type()) + " are not supported"};
  const auto index = [](const Value& part, std::int64_t fallback) {
    if (part.is(Kind::kNone)) return fallback;
    if (part.is_undefined()) fail_undefined(part);
    if (!part.is_whole()) throw Fault{"slice indices must be integers or None, not " + quoted_type(part)};
    return part.whole();
  };
  const std::int64_t stride = index(step, 1);
  if (stride == 0) throw Fault{"slice step cannot be zero"};
  if (value.is_text()) plain_text(value);
  const auto length = static_cast<std::int64_t>(*length_of(value));
  const std::int64_t low = stride < 0 ? -1 : 0, high = stride < 0 ? length - 1 : length;
  const auto clipped = [&](const Value& part, std::int64_t fallback) {
    if (part.is(Kind::kNone)) return fallback;
    std::int64_t at = index(part, 0);
    if (at < 0) at = at < -length ? low : at + length;
    return std::clamp(at, low, high);
  };
  const std::int64_t begin = clipped(start, stride < 0 ? high : low), end = clipped(stop, stride < 0 ? low : high);
  if (value.is_text() && stride == 1) {
    const std::string& bytes = value.bytes();
    budget.text(bytes.size());
    if (begin >= end) return Value::text("");
    const std::size_t first = byte_of_point(bytes, static_cast<std::size_t>(begin));
    const std::string_view rest = std::string_view(bytes).substr(first);
    return Value::text(std::string(rest.substr(0, byte_of_point(rest, static_cast<std::size_t>(end - begin)))));
  }
  const Items all = items_of(value, budget);
  Items chosen;
  for (std::int64_t i = begin; stride > 0 ? i < end : i > end;) {
    chosen.push_back(all[static_cast<std::size_t>(i)]);
    if (__builtin_add_overflow(i, stride, &i)) break;
  }
  if (!value.is_text()) return Value::list(std::move(chosen), value.as_list().shape);
  std::string out;
  for (const Value& letter : chosen) out += letter.bytes();
  return Value::text(std::move(out));
}

namespace {

Value missing(const Value& object, const std::string& name) {
  return Value::undefined(quoted_type(object) + " object has no attribute '" + name + "'");
}

Value of_loop(const Loop& loop, const std::string& name) {
  const std::size_t count = loop.items.size(), at = loop.at;
  const auto whole = [](std::size_t value) { return Value::integer(static_cast<std::int64_t>(value)); };
  if (name == "index") return whole(at + 1);
  if (name == "index0") return whole(at);
  if (name == "first") return Value::boolean(at == 0);
  if (name == "last") return Value::boolean(at + 1 == count);
  if (name == "length") return whole(count);
  if (name == "revindex") return whole(count - at);
  if (name == "revindex0") return whole(count - at - 1);
  if (name == "previtem") return at > 0 ? loop.items[at - 1] : Value::undefined("there is no previous item");
  if (name == "nextitem") return at + 1 < count ? loop.items[at + 1] : Value::undefined("there is no next item");
  throw Fault{"loop." + name + " is not supported"};
}

}  // namespace

Value get_attribute(const Value& object, const std::string& name, Budget& budget) {
  budget.spend();
  if (object.is_undefined()) fail_undefined(object);
  if (object.is(Kind::kLoop)) return of_loop(object.as_loop(), name);
  if (object.is(Kind::kNamespace)) {
    const Value* held = find(object.as_namespace().pairs, name, budget);
    return held != nullptr ? *held : missing(object, name);
  }
  if (auto method = method_of(object, name, budget)) return std::move(*method);
  if (object.is(Kind::kDict))
    if (const Value* held = find(object.pairs(), name, budget)) return *held;
  return missing(object, name);
}

Value get_item(const Value& object, const Value& key, Budget& budget) {
  budget.spend();
  if (object.is_undefined()) fail_undefined(object);
  if (object.is(Kind::kDict) && key.is_text())
    if (const Value* held = find(object.pairs(), key.bytes(), budget)) return *held;
  if (key.is_text()) {  // Jinja then tries the attribute of that name
    if (object.is(Kind::kNamespace)) return get_attribute(object, key.bytes(), budget);
    if (auto method = method_of(object, key.bytes(), budget)) return std::move(*method);
    return missing(object, key.bytes());
  }
  const bool indexed = object.is_text() || (object.is(Kind::kList) && object.as_list().shape <= Shape::kRange);
  if (key.is_whole() && indexed) {
    const auto length = static_cast<std::int64_t>(*length_of(object));
    const std::int64_t at = key.whole() < 0 ? key.whole() + length : key.whole();
    if (object.is_text()) budget.text(object.bytes().size());
    if (at >= 0 && at < length) {
      if (!object.is_text()) return object.items()[static_cast<std::size_t>(at)];
      const std::string& bytes = plain_text(object);
      const std::size_t begin = byte_of_point(bytes, static_cast<std::size_t>(at));
      return Value::text(bytes.substr(begin, tok::char_length(bytes[begin])));
    }
  }
  return Value::undefined(std::string(object.type()) + " object has no element of that " +
                          (key.is_whole() ? "index" : "kind"));
}

// ---- arguments

Bound::Bound(const std::string& function, const Arguments& given, std::initializer_list<const char*> names,
             std::size_t required)
    : function_(function), values_(names.size()) {
  if (given.positional.size() > names.size())
    throw Fault{function + " takes at most " + std::to_string(names.size()) + " arguments, not " +
                std::to_string(given.positional.size())};
  std::copy(given.positional.begin(), given.positional.end(), values_.begin());
  for (const auto& [name, value] : given.named) {
    const auto found = std::find_if(names.begin(), names.end(), [&n = name](const char* known) { return n == known; });
    if (found == names.end()) throw Fault{function + " has no argument named '" + name + "'"};
    auto& slot = values_[static_cast<std::size_t>(found - names.begin())];
    if (slot) throw Fault{function + " got two values for its argument '" + name + "'"};
    slot = value;
  }
  for (std::size_t i = 0; i < required; ++i)
    if (!values_[i]) throw Fault{function + " needs " + std::to_string(required) + " arguments"};
}
const std::string& Bound::text(std::size_t i) const {
  const Value& value = *values_[i];
  if (value.is_undefined()) fail_undefined(value);
  if (!value.is_text()) throw Fault{function_ + " needs a text, not " + quoted_type(value)};
  return plain_text(value);
}
std::int64_t Bound::integer(std::size_t i, std::int64_t fallback) const {
  if (!given(i)) return fallback;
  if (values_[i]->is_undefined()) fail_undefined(*values_[i]);
  if (!values_[i]->is_whole()) throw Fault{function_ + " needs a whole number, not " + quoted_type(*values_[i])};
  return values_[i]->whole();
}
bool Bound::truth(std::size_t i, bool fallback) const { return given(i) ? truthy(*values_[i]) : fallback; }

}  // namespace pare::chat
