#include "compress/report_table.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace pare {
namespace {

struct Gate {
  const char* name;
  const char* metric;
  bool at_most;
};
constexpr Gate kGates[] = {
    {"mean-kl", "mean_kl", true},
    {"p99-kl", "p99_kl", true},
    {"top1", "top1_agreement", false},
    {"perplexity-ratio", "perplexity_ratio", true},
    {"bytes", "file_bytes", true},
    {"bits-per-weight", "bits_per_weight", true},
    {"tokens-per-second", "tokens_per_second", false},
};

const ReportRow* find(const Report& report, const std::string& stage, const std::string& metric) {
  for (const auto& row : report.rows())
    if (row.stage == stage && row.metric == metric && row.after) return &row;
  return nullptr;
}

std::string format(const std::string& metric, double value) {
  char text[64];
  if (metric == "file_bytes" || metric == "tensor_bytes") {
    if (value >= 1e9) std::snprintf(text, sizeof text, "%.2f GB", value / 1e9);
    else if (value >= 1e6) std::snprintf(text, sizeof text, "%.2f MB", value / 1e6);
    else std::snprintf(text, sizeof text, "%.1f kB", value / 1e3);
  } else if (metric == "top1_agreement") {
    std::snprintf(text, sizeof text, "%.2f %%", 100 * value);
  } else if (metric == "bits_per_weight" || metric == "tokens_per_second") {
    std::snprintf(text, sizeof text, value < 100 ? "%.2f" : "%.0f", value);
  } else if (value != 0 && std::abs(value) < 1e-3) {
    std::snprintf(text, sizeof text, "%.2e", value);
  } else {
    std::snprintf(text, sizeof text, "%.4f", value);
  }
  return text;
}

}  // namespace

const std::vector<TableMetric>& table_metrics() {
  static const std::vector<TableMetric> metrics = {
      {"file_bytes", "size"},          {"bits_per_weight", "bits/weight"}, {"mean_kl", "mean KL (nats)"},
      {"p99_kl", "99 % KL"},           {"top1_agreement", "top-1"},                  {"perplexity", "perplexity"},
      {"tokens_per_second", "tokens/s"}};
  return metrics;
}

std::vector<std::vector<std::string>> report_cells(const Report& report) {
  std::vector<std::string> stages;
  std::vector<TableMetric> columns;
  for (const auto& m : table_metrics())
    if (std::any_of(report.rows().begin(), report.rows().end(),
                    [&](const ReportRow& row) { return row.metric == m.metric && row.after; }))
      columns.push_back(m);
  for (const auto& row : report.rows()) {
    const bool column =
        std::any_of(columns.begin(), columns.end(), [&](const TableMetric& m) { return row.metric == m.metric; });
    if (column && row.after && std::find(stages.begin(), stages.end(), row.stage) == stages.end())
      stages.push_back(row.stage);
  }
  std::vector<std::vector<std::string>> lines(1);
  lines[0].push_back("");
  for (const auto& m : columns) lines[0].push_back(m.heading);
  for (const auto& stage : stages) {
    std::vector<std::string> line = {stage};
    for (const auto& m : columns) {
      const ReportRow* row = find(report, stage, m.metric);
      std::string cell = row ? format(m.metric, *row->after) : "-";
      if (row && row->standard_error && (row->metric == "mean_kl" || row->metric == "top1_agreement"))
        cell += " ± " + format(row->metric, *row->standard_error);
      line.push_back(cell);
    }
    lines.push_back(line);
  }
  return lines;
}

std::string report_table(const Report& report) {
  const std::vector<std::vector<std::string>> lines = report_cells(report);
  // Bytes of UTF-8 that continue a character take no column.
  const auto width = [](const std::string& s) {
    return std::count_if(s.begin(), s.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
  };
  std::vector<std::ptrdiff_t> widths(lines[0].size(), 0);
  for (const auto& line : lines)
    for (std::size_t i = 0; i < line.size(); ++i)
      widths[i] = std::max(widths[i], static_cast<std::ptrdiff_t>(width(line[i])));
  std::string text;
  for (const auto& line : lines) {
    for (std::size_t i = 0; i < line.size(); ++i) {
      const std::string fill(static_cast<std::size_t>(widths[i] - static_cast<std::ptrdiff_t>(width(line[i]))), ' ');
      text += i == 0 ? line[i] + fill : "  " + fill + line[i];
    }
    text += "\n";
  }
  return text;
}

Json check_requirements(const Json& require, const Report& report, const std::string& stage) {
  Json results = Json::array();
  for (const auto& gate : kGates) {
    const auto wanted = require.find(gate.name);
    if (wanted == require.end() || wanted->is_null()) continue;
    const ReportRow* row = find(report, stage, gate.metric);
    const double required = wanted->get<double>();
    // Written so that NaN misses.
    const bool met = row && (gate.at_most ? *row->after <= required : *row->after >= required);
    results.push_back({{"name", gate.name},
                       {"bound", gate.at_most ? "at most" : "at least"},
                       {"required", required},
                       {"measured", row ? Json(*row->after) : Json(nullptr)},
                       {"met", met}});
  }
  return results;
}

}  // namespace pare
