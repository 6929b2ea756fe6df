#include "compress/yaml.h"

#include <yaml-cpp/yaml.h>

#include <set>

#include "core/error.h"

namespace pare {
namespace {

constexpr std::size_t kMaxBytes = 1u << 20;
constexpr int kMaxDepth = 32;
constexpr int kMaxNodes = 20'000;

std::string at(const std::string& place, int line) { return place + ":" + std::to_string(line); }

class Converter {
 public:
  explicit Converter(const std::string& place) : place_(place) {}

  // Aliases are followed, so the count bounds what they unfold to and the depth ends a cycle.
  YamlValue convert(const YAML::Node& node, int depth) {
    YamlValue value;
    value.line = node.Mark().line + 1;
    if (depth > kMaxDepth) throw usage_error(at(place_, value.line), "nesting of at most 32 levels", "deeper nesting");
    if (++nodes_ > kMaxNodes)
      throw usage_error(at(place_, value.line), "at most 20,000 values with aliases followed", "more",
                        "write the values out instead of nesting aliases");
    switch (node.Type()) {
      case YAML::NodeType::Scalar:
        value.kind = YamlValue::Kind::kScalar;
        value.quoted = node.Tag() == "!";
        value.scalar = node.Scalar();
        check_tag(node, value.line);
        break;
      case YAML::NodeType::Sequence:
        value.kind = YamlValue::Kind::kList;
        check_tag(node, value.line);
        for (const auto& item : node) value.items.push_back(convert(item, depth + 1));
        break;
      case YAML::NodeType::Map:
        value.kind = YamlValue::Kind::kMap;
        check_tag(node, value.line);
        convert_map(node, depth, value);
        break;
      default:
        break;
    }
    return value;
  }

 private:
  void convert_map(const YAML::Node& node, int depth, YamlValue& value) {
    std::set<std::string> seen;
    for (const auto& entry : node) {
      const int line = entry.first.Mark().line + 1;
      if (!entry.first.IsScalar())
        throw usage_error(at(place_, line), "a key that is a word", "a list or mapping as key");
      const std::string key = entry.first.Scalar();
      if (!seen.insert(key).second) throw usage_error(at(place_, line), "every key once", "key '" + key + "' twice");
      value.key_lines.push_back(line);
      value.entries.emplace_back(key, convert(entry.second, depth + 1));
    }
  }
  void check_tag(const YAML::Node& node, int line) const {
    const std::string& tag = node.Tag();
    if (tag.empty() || tag == "?" || tag == "!") return;
    throw usage_error(at(place_, line), "plain YAML without tags", "tag " + tag);
  }

  const std::string& place_;
  int nodes_ = 0;
};

}  // namespace

YamlValue parse_yaml(std::string_view text, const std::string& place) {
  if (text.size() > kMaxBytes)
    throw usage_error(place, "a recipe of at most 1 MiB", std::to_string(text.size()) + " bytes");
  if (text.find('\0') != std::string_view::npos) throw usage_error(place, "a YAML text file", "a zero byte");
  try {
    const std::vector<YAML::Node> documents = YAML::LoadAll(std::string(text));
    if (documents.size() > 1)
      throw usage_error(place, "one YAML document", std::to_string(documents.size()) + " documents");
    if (documents.empty()) return {};
    return Converter(place).convert(documents.front(), 0);
  } catch (const YAML::Exception& problem) {
    throw usage_error(at(place, problem.mark.line + 1), "valid YAML", problem.msg);
  }
}

}  // namespace pare
