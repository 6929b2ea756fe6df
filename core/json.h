// JSON with key order kept (config.json and tokenizer files are copied faithfully), parsed strictly.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace pare {

using Json = nlohmann::ordered_json;

// Parses one JSON document. Errors (exit 3, place = `place`): syntax, duplicate keys, nesting deeper than 64,
// invalid UTF-8, trailing text.
Json parse_json(std::string_view text, const std::string& place);
Json read_json(const std::filesystem::path& file);

}  // namespace pare
