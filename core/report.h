// Everything pare prints about a result is a row.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/json.h"

namespace pare {

struct ReportRow {
  std::string stage;    // "original", "distill", "quantize", "compact", ...
  std::string metric;   // "mean_kl", "perplexity", "file_bytes", "tokens_per_second", ...
  std::optional<double> before, after;
  std::string unit;     // "nats", "bytes", "tokens/s", ...
  std::optional<double> standard_error;
  bool deterministic = true;  // false for times and memory: those stay out of the compact file
};

class Report {
 public:
  void add(ReportRow row) { rows_.push_back(std::move(row)); }
  const std::vector<ReportRow>& rows() const { return rows_; }
  Json to_json(bool deterministic_only = false) const;
  static Report from_json(const Json& json, const std::string& place);
  std::string table() const;  // aligned plain text, one line per row

 private:
  std::vector<ReportRow> rows_;
};

}  // namespace pare
