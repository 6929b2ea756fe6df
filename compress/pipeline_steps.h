// Where a stage's folder and its record stand.
#pragma once

#include <string>

#include "core/file.h"

namespace pare {

// `path` appears whole (a transaction of the stage); `record`, written just before, holds the stage's rows. Both must
// be there: a folder without its record is made again, as its rows would be missing from the report.
struct StageFolder {
  fs::path path, record;
  bool complete() const {
    std::error_code ignored;
    return fs::is_directory(path, ignored) && fs::is_regular_file(record, ignored);
  }
};

inline constexpr const char* kLockFile = "lock";  // in a work folder of ours from its first moment

// Empty or ours: anybody else's files are not to be removed with the work folder at the end.
inline bool is_work_folder(const fs::path& work) {
  std::error_code ignored;
  return fs::is_directory(work, ignored) &&
         (fs::is_empty(work, ignored) || fs::is_regular_file(work / kLockFile, ignored));
}

std::string bytes_text(std::uint64_t bytes);

}  // namespace pare
