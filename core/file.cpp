#include "core/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>
#include <vector>

#include "core/error.h"

namespace pare {
namespace {

std::string system_text(int code) { return std::strerror(code); }

// Closes on scope exit; reading and copying only (writers check close through fsync first).
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

void sync_folder(const fs::path& folder) {
  const Descriptor fd(::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.get() < 0 || ::fsync(fd.get()) != 0)
    throw failure(folder.string(), "folder entry on disk", system_text(errno));
}

void sync_file(const fs::path& file) {
  const Descriptor fd(::open(file.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.get() < 0 || ::fsync(fd.get()) != 0) throw failure(file.string(), "file on disk", system_text(errno));
}

// Front to back in pieces, each dropped from memory when it was used: gigabytes pass without becoming resident.
template <class Work>
void each_chunk(const MappedFile& file, const Work& work) {
  constexpr std::size_t kChunk = std::size_t{8} << 20;
  const std::span<const std::byte> bytes = file.bytes();
  for (std::size_t at = 0; at < bytes.size(); at += kChunk) {
    work(bytes.subspan(at, std::min(kChunk, bytes.size() - at)));
    file.release(at, kChunk);
  }
}

void write_all(int fd, const fs::path& path, std::span<const std::byte> bytes, std::int64_t offset) {
  while (!bytes.empty()) {
    const std::size_t chunk = std::min<std::size_t>(bytes.size(), std::size_t{1} << 30);
    const ssize_t written = offset < 0 ? ::write(fd, bytes.data(), chunk) : ::pwrite(fd, bytes.data(), chunk, offset);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) {
      const int code = written == 0 ? ENOSPC : errno;
      throw failure(path.string(), "room to write " + std::to_string(bytes.size()) + " more bytes", system_text(code),
                    "nothing was left under the final name; free space or choose another --out");
    }
    bytes = bytes.subspan(static_cast<std::size_t>(written));
    if (offset >= 0) offset += written;
  }
}

}  // namespace

MappedFile::MappedFile(const fs::path& path) : path_(path) {
  // Not blocking: a pipe in a model folder would be waited for without end.
  const Descriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (fd.get() < 0) throw input_error(path.string(), "a readable file", system_text(errno));
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) throw input_error(path.string(), "a readable file", system_text(errno));
  if (!S_ISREG(status.st_mode)) throw input_error(path.string(), "a regular file", "something else (folder, pipe or device)");
  size_ = static_cast<std::size_t>(status.st_size);
  if (size_ == 0) return;
  void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (mapped == MAP_FAILED) throw failure(path.string(), "memory mapping", system_text(errno));
  data_ = static_cast<const std::byte*>(mapped);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)), data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::release(std::size_t offset, std::size_t length) const {
  if (data_ == nullptr || offset >= size_) return;
  // Outward to 64 KiB, which the kernel maps around a fault. Neighbours still in use come back from the page cache.
  constexpr std::size_t kAround = std::size_t{64} << 10;
  const std::size_t begin = offset / kAround * kAround;
  const std::size_t end = std::min((offset + std::min(length, size_ - offset) + kAround - 1) / kAround * kAround, size_);
  if (end > begin) ::madvise(const_cast<std::byte*>(data_) + begin, end - begin, MADV_DONTNEED);
}

AtomicFile::AtomicFile(fs::path path) : path_(std::move(path)) {
  if (fs::is_directory(path_)) throw usage_error(path_.string(), "a file name", "a folder");
  temporary_ = path_;
  temporary_ += ".tmp-" + std::to_string(::getpid());
  fd_ = ::open(temporary_.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd_ < 0)
    throw failure(path_.string(), "a place that can be written", system_text(errno),
                  "check that the folder exists and is writable");
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!committed_) ::unlink(temporary_.c_str());
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  write_all(fd_, path_, bytes, -1);
  size_ += bytes.size();
}

void AtomicFile::write(std::string_view text) { write(as_bytes(text)); }

void AtomicFile::write_at(std::uint64_t offset, std::span<const std::byte> bytes) {
  if (offset + bytes.size() > size_) throw std::logic_error("AtomicFile::write_at beyond the end");
  write_all(fd_, path_, bytes, static_cast<std::int64_t>(offset));
}

void AtomicFile::flush() {
  if (::fsync(fd_) != 0) throw failure(path_.string(), "file on disk", system_text(errno));
}

void AtomicFile::commit() {
  flush();
  const int closed = ::close(std::exchange(fd_, -1));
  if (closed != 0) throw failure(path_.string(), "file closed", system_text(errno));
  if (::rename(temporary_.c_str(), path_.c_str()) != 0)
    throw failure(path_.string(), "rename into place", system_text(errno));
  committed_ = true;
  sync_folder(path_.parent_path());
}

FolderTransaction::FolderTransaction(fs::path final) : final_(std::move(final)) {
  if (!final_.has_filename()) final_ = final_.parent_path();  // "out/" means "out"
  const auto refuse_existing = [&] { this->refuse_existing("an existing one", "remove it or choose another --out"); };
  refuse_existing();
  work_ = final_;
  work_ += ".partial";
  std::error_code problem;
  fs::create_directories(work_, problem);
  if (!problem) {
    lock_ = ::open(work_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (lock_ < 0) problem = {errno, std::generic_category()};
  }
  if (problem) {
    refuse_existing();  // another process may have finished it this moment
    throw failure(work_.string(), "a folder that can be written", problem.message(), "choose another --out");
  }
  struct stat mine {}, now {};
  const bool taken = ::flock(lock_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;  // some file systems have no locks
  const bool same = ::fstat(lock_, &mine) == 0 && ::stat(work_.c_str(), &now) == 0 && mine.st_ino == now.st_ino;
  if (!taken && same) return;
  ::close(std::exchange(lock_, -1));
  if (!taken) refuse_existing();
  throw Error(ExitCode::kResources, work_.string(), "one command at a time", "another one working there",
              "wait for it, or choose another --out");
}

FolderTransaction::~FolderTransaction() {
  if (lock_ >= 0) ::close(lock_);
}

void FolderTransaction::refuse_existing(const char* found, const std::string& advice) const {
  if (fs::exists(fs::symlink_status(final_)))
    throw usage_error(final_.string(), "an output that does not exist yet", found, advice);
}

void FolderTransaction::commit() {
  for (const auto& entry : fs::recursive_directory_iterator(work_)) {
    if (entry.is_regular_file()) sync_file(entry.path());
    else if (entry.is_directory()) sync_folder(entry.path());
  }
  sync_folder(work_);
  refuse_existing("one that appeared meanwhile", "the result is complete in " + work_.string());
  if (::rename(work_.c_str(), final_.c_str()) != 0)
    throw failure(final_.string(), "rename into place", system_text(errno), "the result is complete in " + work_.string());
  sync_folder(final_.parent_path());
}

void FolderTransaction::discard() {
  std::error_code ignored;
  fs::remove_all(work_, ignored);
}

std::string read_text(const fs::path& file) {
  const MappedFile mapped(file);
  const auto bytes = mapped.bytes();
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void write_text(const fs::path& file, std::string_view text) {
  AtomicFile out(file);
  out.write(text);
  out.commit();
}

void copy_file_durably(const fs::path& from, const fs::path& to) {
  const MappedFile mapped(from);
  AtomicFile out(to);
  each_chunk(mapped, [&](std::span<const std::byte> bytes) { out.write(bytes); });
  out.commit();
}

Hasher::Hasher() : state_(XXH3_createState()) {
  if (state_ == nullptr) throw std::bad_alloc();
  XXH3_128bits_reset(static_cast<XXH3_state_t*>(state_));
}

Hasher::~Hasher() { XXH3_freeState(static_cast<XXH3_state_t*>(state_)); }

void Hasher::update(std::span<const std::byte> bytes) {
  if (!bytes.empty()) XXH3_128bits_update(static_cast<XXH3_state_t*>(state_), bytes.data(), bytes.size());
}

void Hasher::update(std::string_view text) { update(as_bytes(text)); }

std::string Hasher::hex() const {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(static_cast<const XXH3_state_t*>(state_)));
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const unsigned char byte : canonical.digest) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

std::string hash_bytes(std::span<const std::byte> bytes) {
  Hasher hasher;
  hasher.update(bytes);
  return hasher.hex();
}

std::string hash_file(const fs::path& file) {
  const MappedFile mapped(file);
  Hasher hasher;
  each_chunk(mapped, [&](std::span<const std::byte> bytes) { hasher.update(bytes); });
  return hasher.hex();
}

}  // namespace pare
