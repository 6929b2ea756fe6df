// YAML as an untrusted input: bounded, one document, duplicate keys refused, every value with its line.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace pare {

// A value as written. Scalars keep their spelling: which type they have is for the option table to say.
struct YamlValue {
  enum class Kind { kNull, kScalar, kList, kMap };
  Kind kind = Kind::kNull;
  int line = 0;          // 1-based
  bool quoted = false;   // a quoted scalar is text, never a number
  std::string scalar;
  std::vector<YamlValue> items;
  std::vector<std::pair<std::string, YamlValue>> entries;  // in file order
  std::vector<int> key_lines;                              // parallel to entries
};

// Errors: exit 2 with `place`:line.
YamlValue parse_yaml(std::string_view text, const std::string& place);

}  // namespace pare
