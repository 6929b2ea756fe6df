// Where a stage's folder and its record stand.
#pragma once

#include <string>

#include "core/file.h"

namespace pare {

// `path` appears whole (a transaction of the stage); `record` is written after it and holds the stage's rows. Both
// must be there: a folder without its record is made again, as its rows would be missing from the report.
struct StageFolder {
  fs::path path, record;
  bool complete() const {
    std::error_code ignored;
    return fs::is_directory(path, ignored) && fs::is_regular_file(record, ignored);
  }
};

std::string bytes_text(std::uint64_t bytes);

}  // namespace pare
