#include "core/options.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <stdexcept>

#include "core/error.h"

namespace pare {
namespace {

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row[b.size()];
}

std::string number_text(double value) {
  Json number = value;
  if (value == static_cast<double>(static_cast<std::int64_t>(value))) number = static_cast<std::int64_t>(value);
  return number.dump();
}

struct Misfit {
  std::string expected, hint;  // expected: empty when the value is fine
};

Misfit check_value(const OptionDecl& decl, Json& value) {
  switch (decl.type) {
    case OptionType::kFlag:
      if (!value.is_boolean()) return {"true or false", ""};
      break;
    case OptionType::kInteger:
      if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX))
        return {"a whole number of 64 bits", ""};
      break;
    case OptionType::kNumber:
      if (!value.is_number() || !std::isfinite(value.get<double>())) return {"a finite number", ""};
      break;
    case OptionType::kText:
    case OptionType::kPath:
      if (!value.is_string()) return {"a text", ""};
      if (!decl.choices.empty()) {
        const auto& text = value.get_ref<const std::string&>();
        if (std::find(decl.choices.begin(), decl.choices.end(), text) == decl.choices.end()) {
          std::string all;
          for (const auto& choice : decl.choices) all += (all.empty() ? "" : ", ") + choice;
          const std::string near = nearest_name(text, decl.choices);
          return {"one of " + all, near.empty() ? "" : "did you mean " + near + "?"};
        }
      }
      break;
    case OptionType::kTextList:
      if (value.is_string()) value = Json::array({value});
      if (!value.is_array() ||
          !std::all_of(value.begin(), value.end(), [](const Json& item) { return item.is_string(); }))
        return {"a list of texts", ""};
      break;
  }
  if (value.is_number()) {
    const auto number = value.get<double>();
    if ((decl.minimum && number < *decl.minimum) || (decl.maximum && number > *decl.maximum)) {
      if (!decl.maximum) return {"at least " + number_text(*decl.minimum), ""};
      if (!decl.minimum) return {"at most " + number_text(*decl.maximum), ""};
      return {"at least " + number_text(*decl.minimum) + " and at most " + number_text(*decl.maximum), ""};
    }
  }
  return {};
}

}  // namespace

std::string nearest_name(std::string_view name, const std::vector<std::string>& candidates) {
  std::string best;
  std::size_t distance = std::max<std::size_t>(2, name.size() / 2) + 1;
  for (const auto& candidate : candidates) {
    const std::size_t d = edit_distance(name, candidate);
    if (d < distance) {
      distance = d;
      best = candidate;
    }
  }
  return best;
}

Options::Options(const std::vector<OptionDecl>& decls, const Json& given, const std::string& place) {
  const bool flags = place.empty();  // the command line: messages begin with the flag
  std::vector<std::string> problems, names;
  std::vector<Error> misfits;
  const auto named = [&](const OptionDecl& decl) {
    if (flags) return decl.positional ? decl.name : "--" + decl.name;
    return "option \"" + decl.name + "\"";
  };
  for (const auto& decl : decls) names.push_back(decl.name);
  if (!given.is_object() && !given.is_null())
    throw usage_error(place, "a mapping of options", given.dump(), "write `name: value` pairs");
  for (const auto& [key, value] : given.items()) {
    if (std::find(names.begin(), names.end(), key) != names.end()) continue;
    const std::string near = nearest_name(key, names);
    problems.push_back("unknown option \"" + key + "\"" + (near.empty() ? "" : ", did you mean \"" + near + "\"?"));
  }
  for (const auto& decl : decls) {
    Json value = given.is_object() && given.contains(decl.name) ? given[decl.name] : Json(nullptr);
    if (value.is_null()) {
      if (decl.required) problems.push_back(named(decl) + " is required (" + decl.help + ")");
      value = decl.default_value;
    } else if (const Misfit misfit = check_value(decl, value); !misfit.expected.empty()) {
      // Arguments are bytes and need not be UTF-8.
      const std::string found = value.dump(-1, ' ', false, Json::error_handler_t::replace);
      misfits.push_back(usage_error(flags ? named(decl) : place + ": " + named(decl), misfit.expected, found, misfit.hint));
      problems.push_back(named(decl) + ": expected " + misfit.expected + ", found " + found +
                         (misfit.hint.empty() ? "" : "; " + misfit.hint));
    }
    values_[decl.name] = std::move(value);
    defaults_[decl.name] = decl.default_value;
    types_[decl.name] = decl.type;
  }
  if (problems.empty()) return;
  if (problems.size() == 1 && misfits.size() == 1) throw misfits[0];
  std::string all;
  for (const auto& problem : problems) all += (all.empty() ? "" : "\n  ") + problem;
  throw usage_error(flags ? "command line" : place, "", all, "see --help for the options");
}

bool Options::changed(std::string_view name) const {
  return value(name) != defaults_.at(std::string(name));
}

OptionType Options::type(std::string_view name) const {
  const auto found = types_.find(name);
  if (found == types_.end()) throw std::logic_error("option not declared: " + std::string(name));
  return found->second;
}

void refuse_unused(const Options& options, const std::vector<std::string>& names, const std::string& when,
                   const std::string& place) {
  std::string all;
  int count = 0;
  for (const std::string& name : names) {
    if (!options.changed(name)) continue;
    all += (all.empty() ? "--" : ", --") + name;
    ++count;
  }
  if (count > 0)
    throw usage_error(place, "options that do something", all + (count == 1 ? " has no use " : " have no use ") + when,
                      count == 1 ? "leave it out" : "leave them out");
}

const Json& Options::value(std::string_view name) const {
  const auto found = values_.find(std::string(name));
  if (found == values_.end()) throw std::logic_error("option not declared: " + std::string(name));
  return *found;
}

std::uint64_t parse_bytes(const std::string& text, const std::string& place) {
  char* end = nullptr;
  const double number =
      text.empty() || std::isdigit(static_cast<unsigned char>(text[0])) == 0 ? -1.0 : std::strtod(text.c_str(), &end);
  std::string unit = end ? std::string(end) : "";
  if (unit.ends_with("iB")) unit.resize(unit.size() - 2);
  static constexpr std::string_view kUnits = "KMGT";
  const std::size_t power =
      unit.size() == 1 ? kUnits.find(static_cast<char>(std::toupper(unit[0]))) : std::string::npos;
  const double bytes = unit.empty()                      ? number
                       : power == std::string_view::npos ? -1.0
                                                         : std::ldexp(number, 10 * (static_cast<int>(power) + 1));
  if (!(bytes >= 0 && bytes < 1e18)) throw usage_error(place, "a size such as 4G or 512M", "\"" + text + "\"");
  return static_cast<std::uint64_t>(bytes);
}

std::string bytes_in_words(std::uint64_t bytes) {
  char text[32];
  const double value = static_cast<double>(bytes);
  if (bytes >= std::uint64_t{1} << 30)
    std::snprintf(text, sizeof text, "%.2f GiB", std::ldexp(value, -30));
  else
    std::snprintf(text, sizeof text, "%.0f MiB", std::ldexp(value, -20));
  return text;
}

}  // namespace pare
