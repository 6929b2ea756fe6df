#include "runtime/temporary_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <vector>

#include "core/error.h"

namespace pare {
namespace {

constexpr const char* kTemporary = "pare-eval-";

void remove_abandoned(const fs::path& parent) {
  std::error_code problem;
  std::vector<fs::path> found;
  for (fs::directory_iterator it(parent, problem), end; !problem && it != end; it.increment(problem)) {
    if (it->path().filename().string().starts_with(kTemporary)) found.push_back(it->path());
  }
  for (const fs::path& folder : found) {
    struct stat about {};
    if (::lstat(folder.c_str(), &about) != 0 || !S_ISDIR(about.st_mode) || about.st_uid != ::geteuid()) continue;
    // A folder that was made a moment ago may not be locked yet.
    if (std::time(nullptr) - about.st_mtime < 60) continue;
    const int lock = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (lock < 0) continue;
    if (::flock(lock, LOCK_EX | LOCK_NB) == 0) fs::remove_all(folder, problem);
    ::close(lock);
  }
}

}  // namespace

TemporaryFolder::TemporaryFolder() {
  const fs::path parent = fs::temp_directory_path();
  remove_abandoned(parent);
  std::string name = (parent / (std::string(kTemporary) + "XXXXXX")).string();
  if (::mkdtemp(name.data()) == nullptr)
    throw failure(name, "a temporary folder", std::strerror(errno), "set TMPDIR");
  path_ = name;
  lock_ = ::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (lock_ >= 0) ::flock(lock_, LOCK_EX | LOCK_NB);
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
  if (lock_ >= 0) ::close(lock_);
}

}  // namespace pare
