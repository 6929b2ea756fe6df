#include "core/json_limits.h"

#include <cstdint>
#include <set>
#include <vector>

#include "core/error.h"
#include "core/file.h"

namespace pare {
namespace {

constexpr int kMaxDepth = 64;

// nlohmann keeps the last of duplicate keys silently; the callback sees each one.
class StrictCallback {
 public:
  StrictCallback(const std::string& place, std::size_t most_keys) : place_(place), most_keys_(most_keys) {}
  bool operator()(int depth, Json::parse_event_t event, Json& parsed) {
    switch (event) {
      case Json::parse_event_t::object_start:
        check_depth(depth);
        keys_.emplace_back();
        break;
      case Json::parse_event_t::array_start:
        check_depth(depth);
        break;
      case Json::parse_event_t::object_end:
        keys_.pop_back();
        break;
      case Json::parse_event_t::key:
        if (!keys_.back().insert(parsed.get_ref<const std::string&>()).second)
          throw input_error(place_, "every key once", "key \"" + parsed.get<std::string>() + "\" twice",
                            "the file is ambiguous; write it again with its own tool");
        if (keys_.back().size() > most_keys_)
          throw input_error(place_, "at most " + std::to_string(most_keys_) + " keys in an object", "more");
        break;
      default:
        break;
    }
    return true;
  }

 private:
  void check_depth(int depth) const {
    if (depth > kMaxDepth) throw input_error(place_, "nesting of at most 64 levels", "deeper nesting");
  }
  const std::string& place_;
  std::size_t most_keys_;
  std::vector<std::set<std::string>> keys_;
};

// The parser recurses on values; depth is bounded before it sees them.
void check_nesting(std::string_view text, const std::string& place) {
  int depth = 0;
  bool quoted = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '\\') ++i;
      else if (c == '"') quoted = false;
    } else if (c == '"') {
      quoted = true;
    } else if (c == '{' || c == '[') {
      if (++depth > kMaxDepth) throw input_error(place, "nesting of at most 64 levels", "deeper nesting");
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
}

}  // namespace

Json parse_json(std::string_view text, const std::string& place) {
  return parse_json(text, place, SIZE_MAX);
}

Json parse_json(std::string_view text, const std::string& place, std::size_t most_keys) {
  check_nesting(text, place);
  try {
    return Json::parse(text.begin(), text.end(), StrictCallback(place, most_keys));
  } catch (const Json::exception& problem) {
    throw input_error(place, "valid JSON", problem.what());
  }
}

Json read_json(const std::filesystem::path& file) { return parse_json(read_text(file), file.string()); }

}  // namespace pare
