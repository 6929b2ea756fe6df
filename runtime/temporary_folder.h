// A folder for one file in the temporary directory.
#pragma once

#include "core/file.h"

namespace pare {

// Its lock goes with the process, however that ends: folders that nobody holds are what killed processes left, and are
// removed.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
  int lock_ = -1;
};

}  // namespace pare
