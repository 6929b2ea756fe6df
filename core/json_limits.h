// JSON of strangers: the same parser, and what it costs is bounded by the size of the text.
#pragma once

#include "core/json.h"

namespace pare {

// As parse_json(text, place); one more error: an object with more than `most_keys` keys. Objects keep the order of
// their keys, and each new key is compared with all before it.
Json parse_json(std::string_view text, const std::string& place, std::size_t most_keys);

}  // namespace pare
