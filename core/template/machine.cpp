// Runs the tree of a chat template: Jinja2's scopes, loops, macros and name lookup.
#include <algorithm>

#include "core/error.h"
#include "core/template/syntax.h"

namespace pare::chat {
namespace {

constexpr int kMaxRecursion = 500;

struct Scope {
  std::shared_ptr<Scope> parent;
  Pairs names;
};
using ScopePtr = std::shared_ptr<Scope>;
ScopePtr inside(const ScopePtr& parent) { return std::make_shared<Scope>(Scope{parent, {}}); }

enum class Flow : std::uint8_t { kNext, kBreak, kContinue };

class Machine {
 public:
  explicit Machine(const std::tm& now) : now_(now) {}
  ~Machine() {
    for (const auto& held : namespaces_) held->pairs.clear();  // they may hold each other
  }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  std::string run(const Body& body, const Pairs& variables) {
    auto top = std::make_shared<Scope>();
    define_globals(*top);
    top = inside(top);
    top->names = variables;
    std::string out;
    out_ = &out;
    execute(body, inside(top));
    return out;
  }
  int line() const { return line_; }

 private:
  struct Deeper {
    explicit Deeper(Machine& machine) : machine_(machine) {
      if (++machine_.depth_ > kMaxRecursion)
        throw Fault{"recursion deeper than " + std::to_string(kMaxRecursion) + " levels"};
    }
    ~Deeper() { --machine_.depth_; }
    Machine& machine_;
  };

  void define(Scope& scope, const char* name, std::function<Value(Arguments&)> call) {
    scope.names.emplace_back(name, Value::function(name, std::move(call)));
  }
  void define_globals(Scope& globals) {
    define(globals, "range", [this](Arguments& arguments) { return range(arguments); });
    define(globals, "namespace", [this](Arguments& arguments) {
      if (!arguments.positional.empty()) throw Fault{"namespace() takes named arguments only"};
      auto out = std::make_shared<Namespace>();
      budget_.items(8 + arguments.named.size());
      for (const auto& [name, value] : arguments.named) check_attribute(name);
      out->pairs = arguments.named;
      namespaces_.push_back(out);
      return Value::of(std::move(out));
    });
    define(globals, "raise_exception", [this](Arguments& arguments) -> Value {
      const Bound bound("raise_exception()", arguments, {"message"}, 1);
      throw Fault{to_text(bound[0], budget_), {}, true};
    });
    define(globals, "strftime_now", [this](Arguments& arguments) {
      const Bound bound("strftime_now()", arguments, {"format"}, 1);
      const std::string& format = bound.text(0);
      if (format.size() > 100) throw Fault{"strftime_now() with a format of more than 100 bytes"};
      for (std::size_t at = format.find('%'); at != std::string::npos; at = format.find('%', at + 1)) {
        if (++at < format.size() && format[at] == '-') ++at;
        if (at >= format.size() || std::string_view("aAbBdeHIjmMpSyY%").find(format[at]) == std::string_view::npos)
          throw Fault{"the date format '" + format + "' is not supported"};
      }
      char text[1024];
      const std::size_t size = format.empty() ? 0 : std::strftime(text, sizeof text, format.c_str(), &now_);
      return Value::text(std::string(text, size));
    });
  }
  Value range(const Arguments& arguments) {
    const Bound bound("range()", arguments, {"", "", ""}, 1);
    const std::int64_t first = bound.integer(0, 0), step = bound.integer(2, 1);
    const std::int64_t begin = bound.given(1) ? first : 0, end = bound.given(1) ? bound.integer(1, 0) : first;
    if (step == 0) throw Fault{"range() arg 3 must not be zero"};
    Items out;
    for (std::int64_t i = begin; step > 0 ? i < end : i > end;) {
      if (out.size() == 100000) throw Fault{"Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000)."};
      out.push_back(Value::integer(i));
      if (__builtin_add_overflow(i, step, &i)) break;
    }
    budget_.items(out.size());
    return Value::list(std::move(out), Shape::kRange);
  }
  static void check_attribute(const std::string& name) {
    if (name.starts_with("_"))
      throw Fault{"Chat templates cannot store underscore-prefixed attributes on a namespace, but got '" + name + "'"};
  }

  // ---- statements

  void emit(std::string_view text) {
    *out_ += text;
    budget_.spend(1 + text.size() / 32);
    if (out_->size() > Budget::kMaxText) budget_.text(out_->size());
  }
  std::string captured(const Body& body, const ScopePtr& scope) {
    std::string text;
    std::string* const outer = std::exchange(out_, &text);
    try {
      execute(body, scope);
    } catch (...) {
      out_ = outer;
      throw;
    }
    out_ = outer;
    return text;
  }

  Flow execute(const Body& body, const ScopePtr& scope) {
    const Deeper deeper(*this);
    for (const auto& stmt : body)
      if (const Flow flow = statement(*stmt, scope); flow != Flow::kNext) return flow;
    return Flow::kNext;
  }

  Flow statement(const Stmt& stmt, const ScopePtr& scope) {
    budget_.spend();
    line_ = stmt.line;
    switch (stmt.type) {
      case StmtType::kData: emit(stmt.text); break;
      case StmtType::kPrint: emit(to_text(evaluate(*stmt.exprs[0], scope), budget_)); break;
      case StmtType::kIf:
        for (std::size_t i = 0; i < stmt.bodies.size(); ++i)
          if (i >= stmt.exprs.size() || truthy(evaluate(*stmt.exprs[i], scope))) return execute(stmt.bodies[i], scope);
        break;
      case StmtType::kFor: return for_loop(stmt, scope);
      case StmtType::kSet: assign(stmt, evaluate(*stmt.exprs[0], scope), scope); break;
      case StmtType::kSetBlock: assign(stmt, Value::text(captured(stmt.bodies[0], inside(scope))), scope); break;
      case StmtType::kMacro: put(scope->names, stmt.text, macro(stmt, scope), budget_); break;
      case StmtType::kScope: return execute(stmt.bodies[0], inside(scope));
      case StmtType::kBreak: return Flow::kBreak;
      case StmtType::kContinue: return Flow::kContinue;
    }
    return Flow::kNext;
  }

  void assign(const Stmt& stmt, Value value, const ScopePtr& scope) {
    if (stmt.attribute.empty()) return put(scope->names, stmt.text, std::move(value), budget_);
    const Value* held = look_up(stmt.text, scope);
    if (held == nullptr || !held->is(Kind::kNamespace)) throw Fault{"cannot assign attribute on non-namespace object"};
    check_attribute(stmt.attribute);
    put(held->as_namespace().pairs, stmt.attribute, std::move(value), budget_);
  }

  void bind_targets(const Stmt& stmt, const Value& item, Scope& scope) {
    if (stmt.names.size() == 1) return put(scope.names, stmt.names[0], item, budget_);
    const Items parts = items_of(item, budget_);
    if (parts.size() != stmt.names.size())
      throw Fault{"expected " + std::to_string(stmt.names.size()) + " values to unpack, got " +
                  std::to_string(parts.size())};
    for (std::size_t i = 0; i < parts.size(); ++i) put(scope.names, stmt.names[i], parts[i], budget_);
  }

  Flow for_loop(const Stmt& stmt, const ScopePtr& scope) {
    auto loop = std::make_shared<Loop>();
    loop->items = items_of(evaluate(*stmt.exprs[0], scope), budget_);
    if (stmt.exprs[1]) filter_items(stmt, loop->items, scope);
    const Value loop_value = Value::of(loop);
    // Jinja's else runs unless one pass reached its end.
    bool completed = false;
    for (; loop->at < loop->items.size(); ++loop->at) {
      budget_.spend(4);
      const ScopePtr body = inside(scope);
      body->names.emplace_back("loop", loop_value);
      bind_targets(stmt, loop->items[loop->at], *body);
      const Flow flow = execute(stmt.bodies[0], body);
      completed = completed || flow == Flow::kNext;
      if (flow == Flow::kBreak) break;
    }
    if (!completed && stmt.bodies.size() > 1) return execute(stmt.bodies[1], inside(scope));
    return Flow::kNext;
  }
  // Jinja filters while it loops; doing so at once gives the same unless the filter sees what the loop changes.
  void filter_items(const Stmt& stmt, Items& items, const ScopePtr& scope) {
    Items kept;
    const std::int64_t before = changeable_reads_;
    for (const Value& item : items) {
      const ScopePtr test = inside(scope);
      bind_targets(stmt, item, *test);
      if (truthy(evaluate(*stmt.exprs[1], test))) kept.push_back(item);
    }
    if (changeable_reads_ != before)
      throw Fault{"a loop whose `if` reads a namespace or calls a macro is not supported"};
    items = std::move(kept);
  }

  Value macro(const Stmt& stmt, const ScopePtr& scope) {
    return Value::function(stmt.text, [this, &stmt, home = std::weak_ptr<Scope>(scope)](Arguments& arguments) {
      const ScopePtr outer = home.lock();
      if (!outer) throw Fault{"the macro " + stmt.text + " is called outside the block that defines it"};
      ++changeable_reads_;
      return Value::text(invoke(stmt, inside(outer), arguments));
    });
  }
  std::string invoke(const Stmt& stmt, const ScopePtr& scope, Arguments& arguments) {
    const Deeper deeper(*this);
    const std::size_t count = stmt.names.size(), given = arguments.positional.size(), plain = count - stmt.exprs.size();
    if (given > count)
      throw Fault{"macro " + stmt.text + " takes not more than " + std::to_string(count) + " argument(s)"};
    for (std::size_t i = 0; i < given; ++i) put(scope->names, stmt.names[i], arguments.positional[i], budget_);
    for (const auto& [name, value] : arguments.named) {
      const auto known = std::find(stmt.names.begin() + static_cast<std::ptrdiff_t>(given), stmt.names.end(), name);
      if (known == stmt.names.end()) throw Fault{"macro " + stmt.text + " takes no keyword argument '" + name + "'"};
      put(scope->names, name, value, budget_);
    }
    for (std::size_t i = given; i < count; ++i) {
      const std::string& name = stmt.names[i];
      if (find(scope->names, name, budget_) != nullptr) continue;
      put(scope->names, name, i >= plain ? evaluate(*stmt.exprs[i - plain], scope)
                                         : Value::undefined("parameter '" + name + "' was not provided"), budget_);
    }
    return captured(stmt.bodies[0], scope);
  }

  // ---- expressions

  const Value* look_up(const std::string& name, const ScopePtr& scope) {
    for (Scope* at = scope.get(); at != nullptr; at = at->parent.get())
      if (const Value* value = find(at->names, name, budget_)) return value;
    return nullptr;
  }
  Value name(const std::string& name, const ScopePtr& scope) {
    if (const Value* value = look_up(name, scope)) return *value;
    for (const char* known : {"cycler", "dict", "joiner", "lipsum", "self", "super"})
      if (name == known) throw Fault{"'" + name + "' is not supported in chat templates"};
    return Value::undefined("'" + name + "' is undefined");
  }

  Items each(const Expr& expr, const ScopePtr& scope, std::size_t from = 0) {
    Items out;
    budget_.items(expr.kids.size());
    for (std::size_t i = from; i < expr.kids.size(); ++i) out.push_back(evaluate(*expr.kids[i], scope));
    return out;
  }
  Arguments arguments(const Expr& expr, const ScopePtr& scope) {
    Arguments out;
    out.positional = each(expr, scope, 1);
    for (const auto& [name, value] : expr.named) out.named.emplace_back(name, evaluate(*value, scope));
    line_ = expr.line;
    return out;
  }

  Value evaluate(const Expr& expr, const ScopePtr& scope) {
    const Deeper deeper(*this);
    budget_.spend();
    const auto kid = [&](std::size_t i) { return evaluate(*expr.kids[i], scope); };
    switch (expr.type) {
      case ExprType::kConstant: return expr.value;
      case ExprType::kName: line_ = expr.line; return name(expr.name, scope);
      case ExprType::kTuple: return Value::list(each(expr, scope), Shape::kTuple);
      case ExprType::kList: return Value::list(each(expr, scope));
      case ExprType::kDict: {
        Pairs pairs;
        for (std::size_t i = 0; i < expr.kids.size(); i += 2) {
          const Value key = kid(i);
          if (!key.is_text()) throw Fault{"keys of a dict that are not texts are not supported"};
          put(pairs, plain_text(key), kid(i + 1), budget_);
        }
        return Value::dict(std::move(pairs));
      }
      case ExprType::kAttribute: {
        const Value object = kid(0);
        line_ = expr.line;
        changeable_reads_ += object.is(Kind::kNamespace) ? 1 : 0;
        return get_attribute(object, expr.name, budget_);
      }
      case ExprType::kItem: {
        const Value object = kid(0), key = kid(1);
        line_ = expr.line;
        changeable_reads_ += object.is(Kind::kNamespace) ? 1 : 0;
        return get_item(object, key, budget_);
      }
      case ExprType::kSlice: {
        Value parts[4];
        for (std::size_t i = 0; i < 4; ++i) parts[i] = expr.kids[i] ? kid(i) : Value::none();
        line_ = expr.line;
        return slice(parts[0], parts[1], parts[2], parts[3], budget_);
      }
      case ExprType::kCall: {
        const Value callee = kid(0);
        Arguments given = arguments(expr, scope);
        if (callee.is_undefined()) fail_undefined(callee);
        if (!callee.is(Kind::kFunction)) throw Fault{"'" + std::string(callee.type()) + "' object is not callable"};
        return callee.as_function().call(given);
      }
      case ExprType::kFilter: {
        const Value value = kid(0);
        return expr.filter(value, arguments(expr, scope), budget_);
      }
      case ExprType::kTest: {
        const Value value = kid(0);
        return Value::boolean(expr.test(value, arguments(expr, scope), budget_));
      }
      case ExprType::kNot: return Value::boolean(!truthy(kid(0)));
      case ExprType::kNegate: return negate(kid(0));
      case ExprType::kAnd: {
        Value left = kid(0);
        return truthy(left) ? kid(1) : left;
      }
      case ExprType::kOr: {
        Value left = kid(0);
        return truthy(left) ? left : kid(1);
      }
      case ExprType::kCompare: {
        Value left = kid(0);
        for (std::size_t i = 0; i < expr.comparisons.size(); ++i) {
          Value right = kid(i + 1);
          line_ = expr.line;
          if (!holds(expr.comparisons[i], left, right)) return Value::boolean(false);
          left = std::move(right);
        }
        return Value::boolean(true);
      }
      case ExprType::kCalculate: {
        const Value left = kid(0), right = kid(1);
        line_ = expr.line;
        return calculate(expr.arithmetic, left, right, budget_);
      }
      case ExprType::kConcat: {
        std::string out;
        for (const Value& part : each(expr, scope)) {
          out += to_text(part, budget_);
          budget_.text(out.size());
        }
        return Value::text(std::move(out));
      }
      case ExprType::kCondition:
        if (truthy(kid(0))) return kid(1);
        return expr.kids[2] ? kid(2) : Value::undefined("the inline if was false and has no else");
    }
    return {};
  }

  bool holds(Comparison comparison, const Value& left, const Value& right) {
    if (comparison == Comparison::kEqual || comparison == Comparison::kNotEqual)
      return equal(left, right, budget_) == (comparison == Comparison::kEqual);
    if (comparison == Comparison::kIn || comparison == Comparison::kNotIn)
      return contains(right, left, budget_) == (comparison == Comparison::kIn);
    const int found = order(left, right, budget_);
    if (comparison == Comparison::kLess) return found == -1;
    if (comparison == Comparison::kGreater) return found == 1;
    return found == 0 || found == (comparison == Comparison::kLessEqual ? -1 : 1);
  }

  const std::tm& now_;
  Budget budget_;
  std::string* out_ = nullptr;
  int depth_ = 0, line_ = 1;
  std::int64_t changeable_reads_ = 0;  // of namespaces and macros
  std::vector<std::shared_ptr<Namespace>> namespaces_;
};

}  // namespace

std::string run(const Body& body, const Pairs& variables, const std::tm& now, const std::string& place) {
  Machine machine(now);
  try {
    return machine.run(body, variables);
  } catch (const Fault& fault) {
    throw input_error(place + ": line " + std::to_string(machine.line()),
                      fault.raised ? "a conversation that the template accepts" : "a template that runs", fault.message,
                      fault.hint);
  }
}

}  // namespace pare::chat
