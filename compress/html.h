// Pieces of the pages that pare writes: self-contained, nothing fetched, no scripts, readable in light and dark.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/report.h"

namespace pare {

std::string escaped(const std::string& text);                // for text and for attribute values in quotes
std::string number_text(const std::optional<double>& value); // "" for none
// Cells of one line of a table; those from `numbers_from` on stand to the right. tag: "th" or "td".
std::string table_line(const std::vector<std::string>& cells, const char* tag, std::size_t numbers_from);
// Every row of the report that is deterministic, or that is not: times and memory.
std::string rows_table(const Report& report, bool deterministic);
// From <!DOCTYPE> to the heading; the page ends with page_end().
std::string page_begin(const std::string& title);
std::string page_end();

struct Series {
  std::string name;
  std::vector<double> x, y;  // points that are not finite are left out
  bool marks = false;        // a mark on every point, with its values to read
};
// An <svg> with axes, grid and legend, as wide as the page; colours follow the page's. `logarithmic`: y, where all of
// it is > 0 and it spans more than a factor of 10. Empty where there are not two different x or no point.
std::string line_chart(const std::string& title, const std::string& x_name, const std::string& y_name,
                       const std::vector<Series>& series, bool logarithmic = false);

}  // namespace pare
