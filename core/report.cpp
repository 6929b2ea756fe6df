#include "core/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace pare {
namespace {

Json optional_number(const std::optional<double>& value) {
  if (!value || !std::isfinite(*value)) return nullptr;
  return *value;
}

std::string cell(const std::optional<double>& value) {
  if (!value) return "";
  const double v = *value;
  if (v == std::floor(v) && std::abs(v) < 1e15) return fmt::format("{:.0f}", v);
  const double magnitude = std::abs(v);
  if (magnitude >= 1e5 || magnitude < 1e-4) return fmt::format("{:.3e}", v);
  return fmt::format("{:.5g}", v);
}

}  // namespace

Json Report::to_json(bool deterministic_only) const {
  Json rows = Json::array();
  for (const auto& row : rows_) {
    if (deterministic_only && !row.deterministic) continue;
    rows.push_back({{"stage", row.stage},
                    {"metric", row.metric},
                    {"before", optional_number(row.before)},
                    {"after", optional_number(row.after)},
                    {"unit", row.unit},
                    {"stderr", optional_number(row.standard_error)},
                    {"deterministic", row.deterministic}});
  }
  return rows;
}

Report Report::from_json(const Json& json, const std::string& place) {
  Report report;
  if (!json.is_array()) throw input_error(place, "a list of report rows", json.type_name());
  const auto number = [](const Json& row, const char* key) -> std::optional<double> {
    if (!row.contains(key) || !row[key].is_number()) return std::nullopt;
    return row[key].get<double>();
  };
  for (const auto& row : json) {
    if (!row.is_object() || !row.contains("stage") || !row.contains("metric") || !row["stage"].is_string() ||
        !row["metric"].is_string())
      throw input_error(place, "report rows with stage and metric", row.dump());
    if ((row.contains("unit") && !row["unit"].is_string()) ||
        (row.contains("deterministic") && !row["deterministic"].is_boolean()))
      throw input_error(place, "a text as unit, true or false as deterministic", row.dump());
    report.add({row["stage"].get<std::string>(), row["metric"].get<std::string>(), number(row, "before"),
                number(row, "after"), row.value("unit", ""), number(row, "stderr"), row.value("deterministic", true)});
  }
  return report;
}

std::string Report::table() const {
  std::vector<std::vector<std::string>> lines = {{"stage", "metric", "before", "after", "+-", "unit"}};
  for (const auto& row : rows_)
    lines.push_back({row.stage, row.metric, cell(row.before), cell(row.after), cell(row.standard_error), row.unit});
  std::vector<std::size_t> widths(lines[0].size(), 0);
  for (const auto& line : lines)
    for (std::size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  std::string text;
  for (const auto& line : lines) {
    for (std::size_t i = 0; i < line.size(); ++i) {
      const bool number = i >= 2 && i <= 4;
      text += number ? fmt::format("{:>{}}  ", line[i], widths[i]) : fmt::format("{:<{}}  ", line[i], widths[i]);
    }
    while (!text.empty() && text.back() == ' ') text.pop_back();
    text += '\n';
  }
  return text;
}

}  // namespace pare
