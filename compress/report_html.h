// The page that a run leaves beside report.json: one self-contained file, no scripts, nothing fetched.
#pragma once

#include <string>

#include "compress/pipeline.h"
#include "core/report.h"

namespace pare {

struct ReportPage {
  std::string title;       // of the model
  std::string version, run;
  const Plan& plan;
  const Report& report;
  const Json& gates;       // of check_requirements
  std::string text, eval_text;  // where they came from
  std::string recipe;      // YAML
};

// The same run gives the same bytes but for the last table, which holds times and memory.
std::string report_html(const ReportPage& page);

}  // namespace pare
