#include "compress/report_html.h"

#include "compress/html.h"
#include "compress/pipeline_steps.h"
#include "compress/report_table.h"

namespace pare {
namespace {

std::string plan_table(const Plan& plan) {
  std::string out =
      "<table>\n" + table_line({"step", "what it does", "estimated to leave", "estimated peak memory"}, "th", 2);
  for (const PlanStep& step : plan.steps) {
    const bool last = &step == &plan.steps.back();  // its size was measured
    std::string what = step.summary;
    if (!step.result.empty()) what += " (" + step.result + ")";
    for (const std::string& note : step.notes) what += "; " + note;
    out += table_line({step.label, what, step.out_bytes > 0 && !last ? bytes_text(step.out_bytes) : "-",
                 step.peak_bytes > 0 && !last ? bytes_text(step.peak_bytes) : "-"}, "td", 2);
  }
  return out + "</table>\n";
}

std::string gates_table(const Json& gates) {
  if (gates.empty()) return "";
  std::string out = "<h2>Required</h2>\n<table>\n" + table_line({"figure", "", "bound", "measured", ""}, "th", 2);
  for (const Json& gate : gates) {
    const bool met = gate["met"].get<bool>();
    out += "<tr" + std::string(met ? ">" : " class=missed>") + "<td>" + escaped(gate["name"].get<std::string>()) +
           "</td><td>" + escaped(gate["bound"].get<std::string>()) + "</td><td class=n>" +
           number_text(gate["required"].get<double>()) + "</td><td class=n>" +
           (gate["measured"].is_null() ? "nothing" : number_text(gate["measured"].get<double>())) + "</td><td>" +
           (met ? "met" : "missed") + "</td></tr>\n";
  }
  return out + "</table>\n";
}

}  // namespace

std::string report_html(const ReportPage& page) {
  std::string out = page_begin(page.title + ", compressed");
  out += "<p>" + escaped(page.plan.original.family) + ", " + std::to_string(page.plan.original.parameters) +
         " parameters, " + bytes_text(page.plan.original.tensor_bytes) +
         " of weights. Calibration text: " + escaped(page.text) + "; held-out text: " + escaped(page.eval_text) +
         ".</p>\n";
  out += "<h2>Original and compressed</h2>\n<table>\n";
  Report lasting;  // without speeds, which differ from run to run
  for (const ReportRow& row : page.report.rows())
    if (row.deterministic) lasting.add(row);
  const std::vector<std::vector<std::string>> cells = report_cells(lasting);
  for (std::size_t i = 0; i < cells.size(); ++i) out += table_line(cells[i], i == 0 ? "th" : "td", 1);
  out += "</table>\n" + gates_table(page.gates);
  out += "<h2>Plan</h2>\n" + plan_table(page.plan) + "<p>Will load the result:</p>\n<ul>\n";
  for (const std::string& loader : page.plan.loaders) out += "<li>" + escaped(loader) + "</li>\n";
  out += "</ul>\n<h2>Every figure</h2>\n" + rows_table(page.report, true);
  out += "<h2>Recipe</h2>\n<pre>" + escaped(page.recipe) + "</pre>\n";
  out += "<p><small>pare " + escaped(page.version) + ", run " + escaped(page.run) + "</small></p>\n";
  out += "<h2>Times and memory of this run</h2>\n" + rows_table(page.report, false) + page_end();
  return out;
}

}  // namespace pare
