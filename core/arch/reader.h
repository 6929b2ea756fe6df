// Reads typed values of config.json and collects every problem, so that a user sees all of them at once.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/json.h"

namespace pare {

class ConfigReader {
 public:
  ConfigReader(const Json& config, std::string place) : config_(config), place_(std::move(place)) {}

  // A missing or null key gives `fallback`; without one it is a problem (and the result 1, which never escapes).
  std::int64_t integer(const std::string& key, std::optional<std::int64_t> fallback, std::int64_t minimum,
                       std::int64_t maximum);
  double number(const std::string& key, double fallback, double minimum, double maximum);
  bool flag(const std::string& key, bool fallback);
  std::string text(const std::string& key, const std::string& fallback);
  bool present(const std::string& key) const { return config_.contains(key) && !config_[key].is_null(); }
  bool mentions(const std::string& key) const { return config_.contains(key); }  // null counts
  const Json& operator[](const std::string& key) const { return config_[key]; }

  void problem(const std::string& text) { problems_.push_back(text); }
  bool intact() const { return problems_.empty(); }
  const std::string& place() const { return place_; }
  void finish() const;  // throws exit 3 with all problems

  // The same reader on a nested object, e.g. rope_parameters; problems() are to be taken over by the parent.
  ConfigReader nested(const std::string& key) const { return {config_[key], key + "."}; }
  void take(const ConfigReader& child) {
    for (const auto& text : child.problems_) problems_.push_back(child.place_ + text);
  }

 private:
  const Json& config_;
  std::string place_;
  std::vector<std::string> problems_;
};

}  // namespace pare
