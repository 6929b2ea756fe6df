#include "core/arch/reader.h"

#include <cmath>

#include "core/error.h"

namespace pare {
namespace {

std::string shown(const Json& value) {
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  return text.size() > 60 ? text.substr(0, 57) + "..." : text;
}

}  // namespace

std::int64_t ConfigReader::integer(const std::string& key, std::optional<std::int64_t> fallback, std::int64_t minimum,
                                   std::int64_t maximum) {
  if (!present(key)) {
    if (fallback) return *fallback;
    problem(key + " is missing");
    return 1;
  }
  const Json& value = config_[key];
  const bool fits =
      value.is_number_integer() && !(value.is_number_unsigned() && value.get<std::uint64_t>() > (1ull << 62));
  if (!fits || value.get<std::int64_t>() < minimum || value.get<std::int64_t>() > maximum) {
    problem(key + " is " + shown(value) + ", not a whole number from " + std::to_string(minimum) + " to " +
            std::to_string(maximum));
    return 1;
  }
  return value.get<std::int64_t>();
}

double ConfigReader::number(const std::string& key, double fallback, double minimum, double maximum) {
  if (!present(key)) return fallback;
  const Json& value = config_[key];
  const double number = value.is_number() ? value.get<double>() : std::nan("");
  if (!(number >= minimum && number <= maximum)) {
    problem(key + " is " + shown(value) + ", not a number in its range");
    return fallback;
  }
  return number;
}

bool ConfigReader::flag(const std::string& key, bool fallback) {
  if (!present(key)) return fallback;
  if (!config_[key].is_boolean()) {
    problem(key + " is " + shown(config_[key]) + ", not true or false");
    return fallback;
  }
  return config_[key].get<bool>();
}

std::string ConfigReader::text(const std::string& key, const std::string& fallback) {
  if (!present(key)) return fallback;
  if (!config_[key].is_string()) {
    problem(key + " is " + shown(config_[key]) + ", not a text");
    return fallback;
  }
  return config_[key].get<std::string>();
}

void ConfigReader::finish() const {
  if (problems_.empty()) return;
  std::string text;
  for (const auto& problem : problems_) text += (text.empty() ? "" : "; ") + problem;
  throw input_error(place_, "a configuration that pare supports", text);
}

}  // namespace pare
