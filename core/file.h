// Files as pare uses them: read-only mappings, and writes that are transactions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace pare {

namespace fs = std::filesystem;

// Read-only private mapping of a whole regular file. Errors: exit 3 when it is missing or not a regular file.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const fs::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const fs::path& path() const { return path_; }
  // Tells the kernel that these bytes are not needed soon (keeps resident memory bounded when streaming).
  void release(std::size_t offset, std::size_t length) const;

 private:
  fs::path path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// Writes `path` through a temporary sibling: nothing stands under the final name before commit(), which
// fsyncs, renames and fsyncs the folder. Destroyed without commit() it removes the temporary. Short writes and
// ENOSPC raise exit 1 with the path and the bytes missing.
class AtomicFile {
 public:
  explicit AtomicFile(fs::path path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  void write_at(std::uint64_t offset, std::span<const std::byte> bytes);  // patches bytes already written
  std::uint64_t size() const { return size_; }
  const fs::path& temporary() const { return temporary_; }
  void flush();   // fsync without rename: the temporary may then be opened for reading
  void commit();  // fsync, rename, fsync of the folder

 private:
  fs::path path_, temporary_;
  int fd_ = -1;
  std::uint64_t size_ = 0;
  bool committed_ = false;
};

// A folder that appears whole or not at all. Work happens in the sibling `<name>.partial`, which survives a
// crash so that a stage can resume; commit() fsyncs every file and renames it to the final name.
// Errors: exit 2 when `final` already exists; exit 5 while another one, of this process or not, works there.
class FolderTransaction {
 public:
  explicit FolderTransaction(fs::path final);
  FolderTransaction(const FolderTransaction&) = delete;
  FolderTransaction& operator=(const FolderTransaction&) = delete;
  ~FolderTransaction();
  const fs::path& work() const { return work_; }
  void commit();
  void discard();  // removes the partial folder

 private:
  void refuse_existing(const char* found, const std::string& advice) const;

  fs::path final_, work_;
  int lock_ = -1;  // the partial folder, open: the system lets go of it with the process
};

std::string read_text(const fs::path& file);
void write_text(const fs::path& file, std::string_view text);  // through AtomicFile
void copy_file_durably(const fs::path& from, const fs::path& to);

// XXH3-128 as 32 lower-case hex digits.
std::string hash_bytes(std::span<const std::byte> bytes);
std::string hash_file(const fs::path& file);

// Incremental XXH3-128.
class Hasher {
 public:
  Hasher();
  ~Hasher();
  Hasher(const Hasher&) = delete;
  Hasher& operator=(const Hasher&) = delete;
  void update(std::span<const std::byte> bytes);
  void update(std::string_view text);
  std::string hex() const;

 private:
  void* state_;
};

inline std::span<const std::byte> as_bytes(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

}  // namespace pare
