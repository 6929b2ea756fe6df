#include <yaml-cpp/yaml.h>

#include "compress/recipe.h"

namespace pare {
namespace {

void emit(YAML::Emitter& out, const Json& value) {
  if (value.is_null()) {
    out << YAML::Null;
  } else if (value.is_boolean()) {
    out << value.get<bool>();
  } else if (value.is_number()) {
    out << value.dump();  // shortest spelling that reads back to the same number
  } else if (value.is_string()) {
    out << YAML::DoubleQuoted << value.get<std::string>();
  } else if (value.is_array()) {
    out << YAML::Flow << YAML::BeginSeq;
    for (const auto& item : value) emit(out, item);
    out << YAML::EndSeq;
  } else {
    out << YAML::BeginMap;
    for (const auto& [key, item] : value.items()) {
      out << YAML::Key << key << YAML::Value;
      emit(out, item);
    }
    out << YAML::EndMap;
  }
}

void emit_set(YAML::Emitter& out, const Json& section) {
  for (const auto& [key, item] : section.items()) {
    if (item.is_null()) continue;
    out << YAML::Key << key << YAML::Value;
    emit(out, item);
  }
}

}  // namespace

std::string emit_recipe(const Recipe& recipe, const std::vector<std::string>& header) {
  YAML::Emitter out;
  out << YAML::BeginMap;
  emit_set(out, recipe.run);
  out << YAML::Key << "stages" << YAML::Value << YAML::BeginSeq;
  for (const auto& stage : recipe.stages) {
    out << YAML::BeginMap << YAML::Key << stage.name << YAML::Value << YAML::BeginMap;
    emit_set(out, stage.given);
    out << YAML::EndMap << YAML::EndMap;
  }
  out << YAML::EndSeq;
  for (const auto& [name, section] : {std::pair<const char*, const Json&>{"eval", recipe.evaluation},
                                      {"export", recipe.exporting}, {"require", recipe.require}}) {
    out << YAML::Key << name << YAML::Value << YAML::BeginMap;
    emit_set(out, section);
    out << YAML::EndMap;
  }
  out << YAML::EndMap;
  std::string text;
  for (const auto& line : header) text += "# " + line + "\n";
  return text + out.c_str() + "\n";
}

}  // namespace pare
