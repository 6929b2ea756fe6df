// The one table a run ends with, and the gate on its last line.
#pragma once

#include <string>
#include <vector>

#include "core/json.h"
#include "core/report.h"

namespace pare {

struct TableMetric {
  const char* metric;   // of ReportRow
  const char* heading;
};
// Columns of the table, in order.
const std::vector<TableMetric>& table_metrics();

// A heading, then one line per stage that has measured rows: original, stages in order, compact file. Columns that no
// stage has a figure for are left out.
std::vector<std::vector<std::string>> report_cells(const Report& report);
// The same as aligned text.
std::string report_table(const Report& report);

// `require` section against the rows of `stage`. Each entry: {"name", "required", "measured", "met"}; a figure that
// was required but not measured counts as missed.
Json check_requirements(const Json& require, const Report& report, const std::string& stage);

}  // namespace pare
