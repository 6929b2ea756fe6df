// Tokens -> tree, after Jinja2's parser: the same precedences, the same quirks (`~` binds tighter than `+`).
#include <algorithm>

#include "core/error.h"
#include "core/options.h"
#include "core/template/syntax.h"

namespace pare::chat {
namespace {

constexpr int kMaxNesting = 100;   // of the parser's own recursion
constexpr int kMaxExprDepth = 200;

using Words = std::initializer_list<std::string_view>;
bool is_one_of(std::string_view word, Words words) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

std::string spelled(const Token& token) {
  switch (token.type) {
    case TokenType::kData: return "text";
    case TokenType::kBlockBegin: return "{%";
    case TokenType::kBlockEnd: return "%}";
    case TokenType::kPrintBegin: return "{{";
    case TokenType::kPrintEnd: return "}}";
    case TokenType::kText: return "a quoted text";
    case TokenType::kInteger:
    case TokenType::kReal: return "a number";
    case TokenType::kEnd: return "the end of the template";
    default: return token.text;
  }
}

class Parser {
 public:
  Parser(std::vector<Token> tokens, const std::string& place) : tokens_(std::move(tokens)), place_(place) {}
  Body run() { return body({}); }

 private:
  const Token& now() const { return tokens_[at_]; }
  const Token& ahead() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  const Token& take() { return tokens_[at_ + 1 < tokens_.size() ? at_++ : at_]; }
  static bool is(const Token& token, TokenType type, std::string_view text) {
    return token.type == type && token.text == text;
  }
  bool is_name(std::string_view word) const { return is(now(), TokenType::kName, word); }
  bool is_op(std::string_view op) const { return is(now(), TokenType::kOperator, op); }
  bool take_name(std::string_view word) { return is_name(word) && (take(), true); }
  bool take_op(std::string_view op) { return is_op(op) && (take(), true); }
  [[noreturn]] void fail(const std::string& expected, const std::string& found, const std::string& hint = {}) const {
    throw input_error(place_ + ": line " + std::to_string(now().line), expected, found, hint);
  }
  void expect_op(std::string_view op) {
    if (!take_op(op)) fail(std::string(op), spelled(now()));
  }
  void expect(TokenType type) {
    if (now().type != type) fail(spelled({type, 0}), spelled(now()));
    take();
  }
  std::string expect_name(const char* what) {
    if (now().type != TokenType::kName) fail(what, spelled(now()));
    return take().text;
  }
  std::string expect_variable(const char* what) {
    std::string name = expect_name(what);
    if (is_one_of(name, {"true", "false", "none", "True", "False", "None", "loop"})) fail(what, name);
    return name;
  }

  struct Nested {
    explicit Nested(Parser& parser) : parser_(parser) {
      if (++parser_.nesting_ > kMaxNesting) parser_.fail("nesting of at most " + std::to_string(kMaxNesting), "more");
    }
    ~Nested() { --parser_.nesting_; }
    Parser& parser_;
  };

  template <class... Kids>
  ExprPtr make(ExprType type, int line, Kids... kids) {
    auto expr = std::make_unique<Expr>();
    expr->type = type;
    expr->line = line;
    (add_kid(*expr, std::move(kids)), ...);
    return expr;
  }
  void add_kid(Expr& expr, ExprPtr kid) {
    deepen(expr, kid);
    expr.kids.push_back(std::move(kid));
  }
  void deepen(Expr& expr, const ExprPtr& kid) {
    if (kid) expr.depth = std::max(expr.depth, kid->depth + 1);
    if (expr.depth > kMaxExprDepth) fail("expressions of at most " + std::to_string(kMaxExprDepth) + " levels", "more");
  }
  ExprPtr constant(Value value, int line) {
    ExprPtr expr = make(ExprType::kConstant, line);
    expr->value = std::move(value);
    return expr;
  }

  // ---- statements

  // Until one of the `ends` stands behind {% (which is consumed), or, with no ends, the end of the template.
  Body body(Words ends) {
    const Nested nested(*this);
    Body out;
    for (;;) {
      const Token& token = now();
      if (token.type == TokenType::kEnd) {
        if (ends.size() == 0) return out;
        fail("{% " + std::string(*(ends.end() - 1)) + " %}", "the end of the template");
      }
      auto stmt = std::make_unique<Stmt>();
      stmt->line = token.line;
      if (token.type == TokenType::kData) {
        stmt->type = StmtType::kData;
        stmt->text = take().text;
      } else if (token.type == TokenType::kPrintBegin) {
        take();
        stmt->type = StmtType::kPrint;
        stmt->exprs.push_back(tuple(true));
        expect(TokenType::kPrintEnd);
      } else {
        expect(TokenType::kBlockBegin);
        if (now().type == TokenType::kName && is_one_of(now().text, ends)) return out;
        statement(*stmt);
        expect(TokenType::kBlockEnd);
      }
      out.push_back(std::move(stmt));
    }
  }
  // The body of a tag: `%}` first; the name of the end tag is consumed where only one can stand.
  Body block(Words ends) {
    expect(TokenType::kBlockEnd);
    Body out = body(ends);
    if (ends.size() == 1) take();
    return out;
  }
  // Break and continue do not reach out of it.
  Body closed_block(std::string_view end) {
    const int outer = std::exchange(loops_, 0);
    Body out = block({end});
    loops_ = outer;
    return out;
  }

  void statement(Stmt& out) {
    const std::string tag = expect_name("the name of a tag");
    if (tag == "if") return if_statement(out);
    if (tag == "for") return for_statement(out);
    if (tag == "set") return set_statement(out);
    if (tag == "macro") return macro_statement(out);
    if (tag == "break" || tag == "continue") {
      if (loops_ == 0) fail("{% " + tag + " %} inside a loop", "one outside");
      out.type = tag == "break" ? StmtType::kBreak : StmtType::kContinue;
    } else if (tag == "generation") {  // marks the assistant's part for training; the text is the same
      out.type = StmtType::kScope;
      out.bodies.push_back(closed_block("endgeneration"));
    } else {
      fail("one of the tags if, for, set, macro, break, continue, generation, raw", "{% " + tag + " %}",
           "a chat template that needs another tag is not supported");
    }
  }

  void if_statement(Stmt& out) {
    out.type = StmtType::kIf;
    for (;;) {
      out.exprs.push_back(tuple(false));
      out.bodies.push_back(block({"elif", "else", "endif"}));
      const std::string next = take().text;
      if (next == "elif") continue;
      if (next == "else") out.bodies.push_back(block({"endif"}));
      return;
    }
  }

  void for_statement(Stmt& out) {
    out.type = StmtType::kFor;
    const bool parenthesised = take_op("(");
    do out.names.push_back(expect_variable("a name to assign to"));
    while (take_op(","));
    if (parenthesised) expect_op(")");
    if (!take_name("in")) fail("in", spelled(now()));
    out.exprs.push_back(tuple(false));
    out.exprs.push_back(take_name("if") ? expression() : nullptr);
    if (is_name("recursive")) fail("a loop", "recursive", "recursive loops are not supported");
    ++loops_;
    out.bodies.push_back(block({"else", "endfor"}));
    --loops_;
    if (take().text == "else") out.bodies.push_back(block({"endfor"}));
  }

  void set_statement(Stmt& out) {
    const std::string name = expect_name("a name to assign to");
    --at_;
    out.text = is(ahead(), TokenType::kOperator, ".") ? expect_name("a name") : expect_variable("a name to assign to");
    if (take_op(".")) out.attribute = expect_name("an attribute");
    if (is_op(",")) fail("one name to assign to", "several", "assign to " + name + " and the others one by one");
    if (take_op("=")) {
      out.type = StmtType::kSet;
      out.exprs.push_back(tuple(true));
      return;
    }
    out.type = StmtType::kSetBlock;
    if (is_op("|")) fail("%} or =", "|", "filters of a {% set %} block are not supported");
    out.bodies.push_back(block({"endset"}));
  }

  void macro_statement(Stmt& out) {
    out.type = StmtType::kMacro;
    out.text = expect_variable("the name of the macro");
    expect_op("(");
    while (!is_op(")")) {
      if (!out.names.empty()) expect_op(",");
      out.names.push_back(expect_variable("a parameter"));
      if (take_op("=")) out.exprs.push_back(expression());
      else if (!out.exprs.empty()) fail("a default", "a parameter without one behind one with");
    }
    expect_op(")");
    const std::size_t begin = at_;
    out.bodies.push_back(closed_block("endmacro"));
    for (std::size_t i = begin; i < at_; ++i)
      if (tokens_[i].type == TokenType::kName && is_one_of(tokens_[i].text, {"caller", "kwargs", "varargs"}) &&
          !is(tokens_[i - 1], TokenType::kOperator, "."))
        fail("macros with named parameters only", tokens_[i].text, "it is not supported in chat templates");
  }

  // ---- expressions

  ExprPtr tuple(bool conditions, bool may_be_empty = false) {
    const int line = now().line;
    if (may_be_empty && is_op(")")) return make(ExprType::kTuple, line);
    ExprPtr first = conditions ? expression() : or_expression();
    if (!is_op(",")) return first;
    ExprPtr out = make(ExprType::kTuple, line, std::move(first));
    while (take_op(",")) {
      if (is_op(")") || now().type == TokenType::kBlockEnd || now().type == TokenType::kPrintEnd) break;
      add_kid(*out, conditions ? expression() : or_expression());
    }
    return out;
  }

  ExprPtr expression() {
    const Nested nested(*this);
    ExprPtr left = or_expression();
    while (is_name("if")) {
      const int line = take().line;
      ExprPtr test = or_expression();
      ExprPtr other = take_name("else") ? expression() : nullptr;
      left = make(ExprType::kCondition, line, std::move(test), std::move(left), std::move(other));
    }
    return left;
  }
  ExprPtr or_expression() {
    ExprPtr left = and_expression();
    while (is_name("or")) {
      const int line = take().line;
      left = make(ExprType::kOr, line, std::move(left), and_expression());
    }
    return left;
  }
  ExprPtr and_expression() {
    ExprPtr left = not_expression();
    while (is_name("and")) {
      const int line = take().line;
      left = make(ExprType::kAnd, line, std::move(left), not_expression());
    }
    return left;
  }
  ExprPtr not_expression() {
    if (!is_name("not")) return compare();
    const Nested nested(*this);
    const int line = take().line;
    return make(ExprType::kNot, line, not_expression());
  }
  ExprPtr compare() {
    static constexpr std::pair<std::string_view, Comparison> kOperators[] = {
        {"==", Comparison::kEqual}, {"!=", Comparison::kNotEqual},   {"<", Comparison::kLess},
        {">", Comparison::kGreater}, {"<=", Comparison::kLessEqual}, {">=", Comparison::kGreaterEqual}};
    const int line = now().line;
    ExprPtr first = sum(), out;
    for (;;) {
      Comparison comparison = Comparison::kIn;
      const auto found = std::find_if(std::begin(kOperators), std::end(kOperators),
                                      [&](const auto& entry) { return is_op(entry.first); });
      if (found != std::end(kOperators)) {
        comparison = found->second;
      } else if (is_name("not") && is(ahead(), TokenType::kName, "in")) {
        take();
        comparison = Comparison::kNotIn;
      } else if (!is_name("in")) {
        return out ? std::move(out) : std::move(first);
      }
      take();
      if (!out) out = make(ExprType::kCompare, line, std::move(first));
      out->comparisons.push_back(comparison);
      add_kid(*out, sum());
    }
  }
  ExprPtr calculation(Arithmetic arithmetic, ExprPtr left, ExprPtr (Parser::*right)()) {
    const int line = take().line;
    ExprPtr out = make(ExprType::kCalculate, line, std::move(left), (this->*right)());
    out->arithmetic = arithmetic;
    return out;
  }
  ExprPtr sum() {
    ExprPtr left = concat();
    while (is_op("+") || is_op("-"))
      left = calculation(is_op("+") ? Arithmetic::kAdd : Arithmetic::kSubtract, std::move(left), &Parser::concat);
    return left;
  }
  ExprPtr concat() {
    ExprPtr first = product();
    if (!is_op("~")) return first;
    ExprPtr out = make(ExprType::kConcat, now().line, std::move(first));
    while (take_op("~")) add_kid(*out, product());
    return out;
  }
  ExprPtr product() {
    ExprPtr left = unary(true);
    for (;;) {
      if (is_op("*")) left = calculation(Arithmetic::kMultiply, std::move(left), &Parser::operand);
      else if (is_op("/")) left = calculation(Arithmetic::kDivide, std::move(left), &Parser::operand);
      else if (is_op("//")) left = calculation(Arithmetic::kFloorDivide, std::move(left), &Parser::operand);
      else if (is_op("%")) left = calculation(Arithmetic::kModulo, std::move(left), &Parser::operand);
      else if (is_op("**")) fail("an operator that chat templates use", "**", "it is not supported");
      else return left;
    }
  }
  ExprPtr operand() { return unary(true); }
  ExprPtr unary(bool with_filters) {
    const Nested nested(*this);
    const int line = now().line;
    ExprPtr out = take_op("-") ? make(ExprType::kNegate, line, unary(false)) : primary();
    while (is_op(".") || is_op("[") || is_op("(")) out = is_op("(") ? call(std::move(out)) : subscript(std::move(out));
    if (!with_filters) return out;
    for (;;) {
      if (take_op("|")) out = filter(std::move(out));
      else if (is_name("is")) out = test(std::move(out));
      else if (is_op("(")) out = call(std::move(out));
      else return out;
    }
  }

  ExprPtr primary() {
    const Token& token = now();
    const int line = token.line;
    switch (token.type) {
      case TokenType::kName: {
        const std::string name = take().text;
        if (is_one_of(name, {"true", "True"})) return constant(Value::boolean(true), line);
        if (is_one_of(name, {"false", "False"})) return constant(Value::boolean(false), line);
        if (is_one_of(name, {"none", "None"})) return constant(Value::none(), line);
        if (name == "loop" && !is_op(".")) fail("one of the facts of a loop, such as loop.index", "loop alone");
        ExprPtr out = make(ExprType::kName, line);
        out->name = name;
        return out;
      }
      case TokenType::kText: {
        std::string text;
        while (now().type == TokenType::kText) text += take().text;
        return constant(Value::text(std::move(text)), line);
      }
      case TokenType::kInteger:
      case TokenType::kReal: return constant(take().number, line);
      default: break;
    }
    if (take_op("(")) {
      ExprPtr out = tuple(true, true);
      expect_op(")");
      return out;
    }
    const bool dict = is_op("{");
    if (!dict && !is_op("[")) fail("an expression", spelled(token));
    take();
    const std::string_view close = dict ? "}" : "]";
    ExprPtr out = make(dict ? ExprType::kDict : ExprType::kList, line);
    while (!is_op(close)) {
      add_kid(*out, expression());
      if (dict) {
        expect_op(":");
        add_kid(*out, expression());
      }
      if (!take_op(",")) break;
    }
    expect_op(close);
    return out;
  }

  ExprPtr subscript(ExprPtr left) {
    const int line = now().line;
    if (take_op(".")) {
      if (now().type == TokenType::kInteger)
        return make(ExprType::kItem, line, std::move(left), constant(take().number, line));
      ExprPtr out = make(ExprType::kAttribute, line, std::move(left));
      out->name = expect_name("a name or a number");
      return out;
    }
    expect_op("[");
    ExprPtr parts[3];
    if (!is_op(":")) parts[0] = expression();
    if (take_op("]")) return make(ExprType::kItem, line, std::move(left), std::move(parts[0]));
    for (int i = 1; i < 3 && take_op(":"); ++i)
      if (!is_op(":") && !is_op("]")) parts[i] = expression();
    expect_op("]");
    return make(ExprType::kSlice, line, std::move(left), std::move(parts[0]), std::move(parts[1]), std::move(parts[2]));
  }

  void arguments(Expr& out) {
    expect_op("(");
    while (!is_op(")")) {
      if (is_op("*") || is_op("**")) fail("plain arguments", now().text, "unpacking is not supported");
      if (now().type == TokenType::kName && is(ahead(), TokenType::kOperator, "=")) {
        std::string name = take().text;
        take();
        ExprPtr value = expression();
        deepen(out, value);
        out.named.emplace_back(std::move(name), std::move(value));
      } else if (out.named.empty()) {
        add_kid(out, expression());
      } else {
        fail("arguments without a name first", spelled(now()));
      }
      if (!take_op(",")) break;
    }
    expect_op(")");
  }
  ExprPtr call(ExprPtr callee) {
    ExprPtr out = make(ExprType::kCall, now().line, std::move(callee));
    arguments(*out);
    return out;
  }

  [[noreturn]] void unknown(const char* what, const std::string& name, const std::vector<std::string>& known) const {
    const std::string near = nearest_name(name, known);
    fail(std::string("a ") + what + " that chat templates use", "the " + std::string(what) + " " + name,
         "it is not supported" + (near.empty() ? "" : "; the nearest known one is " + near));
  }
  ExprPtr filter(ExprPtr left) {
    ExprPtr out = make(ExprType::kFilter, now().line, std::move(left));
    out->name = expect_name("a filter");
    out->filter = find_filter(out->name);
    if (out->filter == nullptr) unknown("filter", out->name, filter_names());
    if (is_op("(")) arguments(*out);
    return out;
  }
  ExprPtr test(ExprPtr left) {
    const int line = take().line;
    const bool negated = take_name("not");
    ExprPtr out = make(ExprType::kTest, line, std::move(left));
    out->name = expect_name("a test");
    out->test = find_test(out->name);
    if (out->test == nullptr) unknown("test", out->name, test_names());
    const TokenType type = now().type;
    if (is_op("(")) {
      arguments(*out);
    } else if (type == TokenType::kText || type == TokenType::kInteger || type == TokenType::kReal || is_op("[") ||
               is_op("{") || (type == TokenType::kName && !is_one_of(now().text, {"else", "or", "and"}))) {
      // Jinja would take these words for the argument of the test, which nobody means.
      if (is_one_of(now().text, {"if", "is", "in", "not"})) fail("the end of the test", now().text, "use parentheses");
      ExprPtr operand = primary();  // `is divisibleby 3`
      while (is_op(".") || is_op("[") || is_op("("))
        operand = is_op("(") ? call(std::move(operand)) : subscript(std::move(operand));
      add_kid(*out, std::move(operand));
    }
    return negated ? make(ExprType::kNot, line, std::move(out)) : std::move(out);
  }

  std::vector<Token> tokens_;
  const std::string& place_;
  std::size_t at_ = 0;
  int nesting_ = 0, loops_ = 0;
};

}  // namespace

Body parse(std::string_view source, const std::string& place) { return Parser(tokenize(source, place), place).run(); }

}  // namespace pare::chat
