#include "compress/report_html.h"

#include <algorithm>
#include <cstdio>

#include "compress/pipeline_steps.h"
#include "compress/report_table.h"

namespace pare {
namespace {

constexpr const char* kStyle =
    "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:.5em 0 1.5em}th,td{padding:.2em .7em;border-bottom:1px solid #ddd;"
    "text-align:left;vertical-align:top}td.n,th.n{text-align:right;white-space:nowrap}"
    "pre{background:#f5f5f5;padding:1em;overflow:auto}.missed{color:#a00;font-weight:bold}small{color:#666}";

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      case '\'': out += "&#39;"; break;
      default: out += c;
    }
  }
  return out;
}

std::string number(const std::optional<double>& value) {
  if (!value) return "";
  char text[48];
  const bool whole =
      *value > -1e15 && *value < 1e15 && *value == static_cast<double>(static_cast<std::int64_t>(*value));
  std::snprintf(text, sizeof text, whole ? "%.0f" : "%.6g", *value);
  return text;
}

// Cells of one line; those from `numbers_from` on stand to the right.
std::string line(const std::vector<std::string>& cells, const char* tag, std::size_t numbers_from) {
  std::string out = "<tr>";
  for (std::size_t i = 0; i < cells.size(); ++i)
    out += std::string("<") + tag + (i >= numbers_from ? " class=n>" : ">") + escaped(cells[i]) + "</" + tag + ">";
  return out + "</tr>\n";
}

std::string rows_table(const Report& report, bool deterministic) {
  std::string out = "<table>\n" + line({"stage", "figure", "unit", "before", "after", "±"}, "th", 3);
  for (const ReportRow& row : report.rows()) {
    if (row.deterministic != deterministic) continue;
    out += line({row.stage, row.metric, row.unit, number(row.before), number(row.after), number(row.standard_error)},
                "td", 3);
  }
  return out + "</table>\n";
}

std::string plan_table(const Plan& plan) {
  std::string out =
      "<table>\n" + line({"step", "what it does", "estimated to leave", "estimated peak memory"}, "th", 2);
  for (const PlanStep& step : plan.steps) {
    const bool last = &step == &plan.steps.back();  // its size was measured
    std::string what = step.summary;
    if (!step.result.empty()) what += " (" + step.result + ")";
    for (const std::string& note : step.notes) what += "; " + note;
    out += line({step.label, what, step.out_bytes > 0 && !last ? bytes_text(step.out_bytes) : "-",
                 step.peak_bytes > 0 && !last ? bytes_text(step.peak_bytes) : "-"}, "td", 2);
  }
  return out + "</table>\n";
}

std::string gates_table(const Json& gates) {
  if (gates.empty()) return "";
  std::string out = "<h2>Required</h2>\n<table>\n" + line({"figure", "", "bound", "measured", ""}, "th", 2);
  for (const Json& gate : gates) {
    const bool met = gate["met"].get<bool>();
    out += "<tr" + std::string(met ? ">" : " class=missed>") + "<td>" + escaped(gate["name"].get<std::string>()) +
           "</td><td>" + escaped(gate["bound"].get<std::string>()) + "</td><td class=n>" +
           number(gate["required"].get<double>()) + "</td><td class=n>" +
           (gate["measured"].is_null() ? "nothing" : number(gate["measured"].get<double>())) + "</td><td>" +
           (met ? "met" : "missed") + "</td></tr>\n";
  }
  return out + "</table>\n";
}

}  // namespace

std::string report_html(const ReportPage& page) {
  std::string out =
      "<!DOCTYPE html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
      "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">\n<title>" +
      escaped(page.title) + ", compressed</title>\n<style>" + kStyle + "</style>\n</head>\n<body>\n<h1>" +
      escaped(page.title) + ", compressed</h1>\n";
  out += "<p>" + escaped(page.plan.original.family) + ", " + std::to_string(page.plan.original.parameters) +
         " parameters, " + bytes_text(page.plan.original.tensor_bytes) +
         " of weights. Calibration text: " + escaped(page.text) + "; held-out text: " + escaped(page.eval_text) +
         ".</p>\n";
  out += "<h2>Original and compressed</h2>\n<table>\n";
  Report lasting;  // without speeds, which differ from run to run
  for (const ReportRow& row : page.report.rows())
    if (row.deterministic) lasting.add(row);
  const std::vector<std::vector<std::string>> cells = report_cells(lasting);
  for (std::size_t i = 0; i < cells.size(); ++i) out += line(cells[i], i == 0 ? "th" : "td", 1);
  out += "</table>\n" + gates_table(page.gates);
  out += "<h2>Plan</h2>\n" + plan_table(page.plan) + "<p>Will load the result:</p>\n<ul>\n";
  for (const std::string& loader : page.plan.loaders) out += "<li>" + escaped(loader) + "</li>\n";
  out += "</ul>\n<h2>Every figure</h2>\n" + rows_table(page.report, true);
  out += "<h2>Recipe</h2>\n<pre>" + escaped(page.recipe) + "</pre>\n";
  out += "<p><small>pare " + escaped(page.version) + ", run " + escaped(page.run) + "</small></p>\n";
  out += "<h2>Times and memory of this run</h2>\n" + rows_table(page.report, false) + "</body>\n</html>\n";
  return out;
}

}  // namespace pare
