// A folder that appears whole or not at all.
#include "core/file.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <optional>

#include "core/error.h"
#include "tests/scratch.h"

namespace pare {
namespace {

using testing::Scratch;

ExitCode code_of(const fs::path& out) {
  try {
    FolderTransaction folder(out);
    return ExitCode::kOk;
  } catch (const Error& error) {
    return error.code();
  }
}

TEST(FolderTransactionTest, AppearsWhenCommitted) {
  const Scratch scratch;
  const fs::path out = scratch.path() / "out";
  {
    FolderTransaction folder(out / "");
    write_text(folder.work() / "a", "1");
  }
  EXPECT_FALSE(fs::exists(out));
  EXPECT_EQ(read_text(scratch.path() / "out.partial/a"), "1") << "what a killed command leaves can be taken up";
  FolderTransaction folder(out);
  folder.commit();
  EXPECT_EQ(read_text(out / "a"), "1");
  EXPECT_FALSE(fs::exists(scratch.path() / "out.partial"));
  EXPECT_EQ(code_of(out), ExitCode::kUsage);
  EXPECT_FALSE(fs::exists(scratch.path() / "out.partial"));
}

TEST(FolderTransactionTest, OneCommandAtATime) {
  const Scratch scratch;
  const fs::path out = scratch.path() / "out";
  std::optional<FolderTransaction> folder(out);
  write_text(folder->work() / "a", "1");
  EXPECT_EQ(code_of(out), ExitCode::kResources);
  EXPECT_EQ(read_text(folder->work() / "a"), "1");
  folder.reset();
  EXPECT_EQ(code_of(out), ExitCode::kOk);

  int ready[2], stop[2];
  ASSERT_EQ(::pipe(ready), 0);
  ASSERT_EQ(::pipe(stop), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const FolderTransaction theirs(out);
    char byte = 0;
    if (::write(ready[1], &byte, 1) == 1) (void)!::read(stop[0], &byte, 1);
    ::_exit(0);  // as if it were killed
  }
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  EXPECT_EQ(code_of(out), ExitCode::kResources);
  ASSERT_EQ(::write(stop[1], &byte, 1), 1);
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(code_of(out), ExitCode::kOk) << "the system lets go of a dead process's folder";
  for (const int fd : {ready[0], ready[1], stop[0], stop[1]}) ::close(fd);
}

}  // namespace
}  // namespace pare
