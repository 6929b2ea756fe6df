// Options are declared once: command-line flags, recipe keys, help, defaults and the echoed recipe all derive
// from the same OptionDecl table.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.h"
#include "core/stage_plan.h"

namespace pare {

struct Context;

enum class OptionType { kFlag, kInteger, kNumber, kText, kPath, kTextList };

struct OptionDecl {
  std::string name;                          // "group-size": flag --group-size, recipe key group-size
  OptionType type = OptionType::kText;
  std::string help;                          // one line, with the unit
  Json default_value = nullptr;              // null: not set
  std::vector<std::string> choices = {};     // text only
  std::optional<double> minimum = {}, maximum = {};
  bool required = false;
  bool positional = false;                   // command line: taken by position, in table order
  std::string short_name = {};               // "p" for -p
};

// Values checked against a table. get<T> throws std::logic_error for a name that was not declared.
class Options {
 public:
  Options() = default;
  // Validates `given` (a JSON object) against `decls`; all problems are reported together (exit 2), unknown
  // keys with the nearest declared name. `place` prefixes messages, e.g. "recipe.yaml: stages[1] (prune)".
  Options(const std::vector<OptionDecl>& decls, const Json& given, const std::string& place);

  template <class T>
  T get(std::string_view name) const {
    return value(name).template get<T>();
  }
  bool has(std::string_view name) const { return !value(name).is_null(); }
  // The value, or `fallback` where the option was not set and has no default.
  template <class T>
  T get_or(std::string_view name, T fallback) const {
    return has(name) ? get<T>(name) : fallback;
  }
  const Json& resolved() const { return values_; }  // every declared option with its value: the echoed recipe
  // True where the value is not the declared default.
  bool changed(std::string_view name) const;
  OptionType type(std::string_view name) const;

 private:
  const Json& value(std::string_view name) const;
  Json values_ = Json::object(), defaults_ = Json::object();
  std::map<std::string, OptionType, std::less<>> types_;
};

// An option that would do nothing is refused rather than ignored: throws (exit 2) naming those of `names` that were
// changed. `when` completes "have no use ...", e.g. "without --text".
void refuse_unused(const Options& options, const std::vector<std::string>& names, const std::string& when,
                   const std::string& place);

// A verb of the command line. `run` returns the result object that --json prints; human output goes through
// Context::print. A stage is a command that has the options `model` (input folder) and `out` (output folder).
struct Command {
  std::string name;
  std::string summary;
  std::vector<OptionDecl> options;
  std::function<Json(const Options&, Context&)> run;
  std::string example = {};
  bool is_stage = false;
  // Stages only: what the run will need and leave, without touching weights. `input` stands for the folder that the
  // option `model` will name, which need not exist yet. Throws on anything that would fail later.
  std::function<StagePlan(const Options&, const PlannedModel& input)> plan = {};
};

// "4G", "512M", "2.5GiB", "1000000": bytes, units of 1024. Error: exit 2 naming `place`.
std::uint64_t parse_bytes(const std::string& text, const std::string& place);
// "2.5 GiB"
std::string bytes_in_words(std::uint64_t bytes);

// The candidate with the smallest edit distance to `name`, or "" when none is near.
std::string nearest_name(std::string_view name, const std::vector<std::string>& candidates);

}  // namespace pare
