// Syntax of chat templates: the Jinja2 subset of published templates as a tree. Internal to core/template.
#pragma once

#include <ctime>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/template/value.h"

namespace pare::chat {

enum class TokenType : std::uint8_t {
  kData, kBlockBegin, kBlockEnd, kPrintBegin, kPrintEnd, kName, kText, kInteger, kReal, kOperator, kEnd
};
struct Token {
  TokenType type;
  int line;
  std::string text = {};  // data, name, operator, text with its escapes resolved
  Value number = {};
};
// Jinja2's lexer with trim_blocks and lstrip_blocks. Errors: exit 3 with place and line.
std::vector<Token> tokenize(std::string_view source, const std::string& place);

enum class ExprType : std::uint8_t {
  kConstant, kName, kTuple, kList, kDict, kAttribute, kItem, kSlice, kCall, kFilter, kTest, kNot, kNegate, kAnd, kOr,
  kCompare, kCalculate, kConcat, kCondition
};
enum class Comparison : std::uint8_t { kEqual, kNotEqual, kLess, kLessEqual, kGreater, kGreaterEqual, kIn, kNotIn };
struct Expr;
using ExprPtr = std::unique_ptr<Expr>;
struct Expr {
  ExprType type;
  int line = 0;
  int depth = 1;     // levels, bounded: evaluation recurses
  Value value;       // constant
  std::string name;  // name, attribute, filter, test
  // Operands in order. Dict: key, value, ...; slice: value, start, stop, step (null: absent); call, filter, test: the
  // callee or operand, then positional arguments; condition: test, then, else (null: absent).
  std::vector<ExprPtr> kids;
  std::vector<std::pair<std::string, ExprPtr>> named;
  std::vector<Comparison> comparisons;
  Arithmetic arithmetic = Arithmetic::kAdd;
  Filter filter = nullptr;
  Test test = nullptr;
};

enum class StmtType : std::uint8_t { kData, kPrint, kIf, kFor, kSet, kSetBlock, kMacro, kScope, kBreak, kContinue };
struct Stmt;
using Body = std::vector<std::unique_ptr<Stmt>>;
struct Stmt {
  StmtType type;
  int line = 0;
  std::string text;                 // data; name of the macro; the one name that `set` gives a value
  std::string attribute;            // set: of the namespace `text`
  std::vector<std::string> names;   // for: targets; macro: parameters
  std::vector<ExprPtr> exprs;       // if: tests; for: iterable, filter or null; macro: defaults of the last parameters
  std::vector<Body> bodies;         // if: one each test, then else; for: body, else; others: body
};

// Errors: exit 3 naming place, line and the construct that is broken or not supported.
Body parse(std::string_view source, const std::string& place);

// Runs a parsed template. `now` is what strftime_now() prints. Errors: exit 3 with place, line and cause.
std::string run(const Body& body, const Pairs& variables, const std::tm& now, const std::string& place);

}  // namespace pare::chat
