#include "eval/logit_cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <numeric>

#include "core/codec.h"
#include "core/error.h"
#include "eval/hdf5_handle.h"
#include "eval/rows.h"

namespace pare {
namespace {

constexpr const char* kMagic = "pare-logit-cache";
constexpr std::int64_t kVersion = 1;
constexpr hsize_t kUserBlock = 512;
constexpr hsize_t kChunkBytes = 256 << 10;
constexpr std::int64_t kFlushRows = 4096;  // rows buffered before they go to the file

// The text in the user block; `file_bytes` 0 while the file is being written.
std::string user_block(std::uint64_t file_bytes) {
  std::string text = std::string(kMagic) + " " + std::to_string(kVersion) + " bytes " + std::to_string(file_bytes) +
                     "\n(HDF5 begins at byte 512)\n";
  text.resize(kUserBlock, '\0');
  return text;
}

Error broken(const fs::path& path, const std::string& found) {
  return input_error(path.string(), "a complete logit cache written by this program", found,
                     "delete it, or give another --cache name, to have it written again");
}

std::string text_attribute(hid_t file, const char* name, const fs::path& path) {
  Hdf5Handle attribute(H5Aopen(file, name, H5P_DEFAULT), H5Aclose);
  if (!attribute.valid()) throw broken(path, std::string("no attribute ") + name);
  Hdf5Handle type(H5Aget_type(attribute), H5Tclose);
  Hdf5Handle space(H5Aget_space(attribute), H5Sclose);
  const std::size_t size = type.valid() ? H5Tget_size(type) : 0;
  if (!space.valid() || H5Sget_simple_extent_npoints(space) != 1 || H5Tget_class(type) != H5T_STRING ||
      H5Tis_variable_str(type) != 0 || size == 0 || size > 4096) {
    throw broken(path, std::string("attribute ") + name + " is not a short text");
  }
  std::string value(size, '\0');
  if (H5Aread(attribute, type, value.data()) < 0) throw broken(path, std::string("unreadable attribute ") + name);
  value.resize(std::strlen(value.c_str()));
  return value;
}

std::int64_t integer_attribute(hid_t file, const char* name, const fs::path& path) {
  Hdf5Handle attribute(H5Aopen(file, name, H5P_DEFAULT), H5Aclose);
  if (!attribute.valid()) throw broken(path, std::string("no attribute ") + name);
  Hdf5Handle type(H5Aget_type(attribute), H5Tclose);
  Hdf5Handle space(H5Aget_space(attribute), H5Sclose);
  std::int64_t value = 0;
  if (!type.valid() || !space.valid() || H5Sget_simple_extent_npoints(space) != 1 ||
      H5Tget_class(type) != H5T_INTEGER || H5Aread(attribute, H5T_NATIVE_INT64, &value) < 0) {
    throw broken(path, std::string("attribute ") + name + " is not a number");
  }
  return value;
}

void put_text(hid_t file, const char* name, const std::string& value) {
  Hdf5Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  H5Tset_size(type, std::max<std::size_t>(value.size(), 1));
  H5Tset_strpad(type, H5T_STR_NULLPAD);
  Hdf5Handle space(H5Screate(H5S_SCALAR), H5Sclose);
  Hdf5Handle attribute(H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
  std::string padded = value;
  padded.resize(std::max<std::size_t>(value.size(), 1));
  if (H5Awrite(attribute, type, padded.data()) < 0) throw failure(name, "an attribute written", "an HDF5 error");
}

void put_integer(hid_t file, const char* name, std::int64_t value) {
  Hdf5Handle space(H5Screate(H5S_SCALAR), H5Sclose);
  Hdf5Handle attribute(H5Acreate2(file, name, H5T_STD_I64LE, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
  if (H5Awrite(attribute, H5T_NATIVE_INT64, &value) < 0) throw failure(name, "an attribute written", "an HDF5 error");
}

// One-dimensional (width 0) or [rows, width] dataset that grows by rows.
struct Column {
  Hdf5Handle set;
  hid_t memory_type = -1;
  hsize_t width = 0, rows = 0;

  void create(hid_t file, const char* name, hid_t file_type, hid_t memory, hsize_t columns, bool deflate) {
    memory_type = memory;
    width = columns;
    const int rank = width ? 2 : 1;
    const hsize_t row_bytes = H5Tget_size(file_type) * std::max<hsize_t>(width, 1);
    const hsize_t now[2] = {0, width}, most[2] = {H5S_UNLIMITED, width};
    const hsize_t chunk[2] = {std::max<hsize_t>(kChunkBytes / row_bytes, 16), width};
    Hdf5Handle space(H5Screate_simple(rank, now, most), H5Sclose);
    Hdf5Handle create_list(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
    H5Pset_chunk(create_list, rank, chunk);
    H5Pset_fill_time(create_list, H5D_FILL_TIME_NEVER);
    if (deflate) {
      H5Pset_shuffle(create_list);
      H5Pset_deflate(create_list, 1);
    }
    Hdf5Handle access(H5Pcreate(H5P_DATASET_ACCESS), H5Pclose);
    H5Pset_chunk_cache(access, 101, std::max<hsize_t>(4 * chunk[0] * row_bytes, 1 << 20), 1.0);
    set = Hdf5Handle(H5Dcreate2(file, name, file_type, space, H5P_DEFAULT, create_list, access), H5Dclose);
    if (!set.valid()) throw failure(name, "a dataset created", "an HDF5 error");
  }

  void open(hid_t file, const char* name, hid_t memory, hsize_t columns, const fs::path& path) {
    memory_type = memory;
    width = columns;
    Hdf5Handle access(H5Pcreate(H5P_DATASET_ACCESS), H5Pclose);
    H5Pset_chunk_cache(access, 101, 4 << 20, 0.75);
    set = Hdf5Handle(H5Dopen2(file, name, access), H5Dclose);
    if (!set.valid()) throw broken(path, std::string("no dataset ") + name);
    Hdf5Handle type(H5Dget_type(set), H5Tclose);
    Hdf5Handle space(H5Dget_space(set), H5Sclose);
    hsize_t size[2] = {0, 0};
    const int rank = width ? 2 : 1;
    if (!type.valid() || !space.valid() || H5Tget_class(type) != H5Tget_class(memory) ||
        H5Sget_simple_extent_ndims(space) != rank || H5Sget_simple_extent_dims(space, size, nullptr) != rank ||
        (width && size[1] != width)) {
      throw broken(path, std::string("dataset ") + name + " has another type or shape");
    }
    rows = size[0];
  }

  void append(const void* values, hsize_t count, const fs::path& path) {
    if (count == 0) return;
    const int rank = width ? 2 : 1;
    const hsize_t size[2] = {rows + count, width}, start[2] = {rows, 0}, block[2] = {count, width};
    bool good = H5Dset_extent(set, size) >= 0;
    Hdf5Handle file_space(H5Dget_space(set), H5Sclose);
    Hdf5Handle memory_space(H5Screate_simple(rank, block, nullptr), H5Sclose);
    good = good && H5Sselect_hyperslab(file_space, H5S_SELECT_SET, start, nullptr, block, nullptr) >= 0 &&
           H5Dwrite(set, memory_type, memory_space, file_space, H5P_DEFAULT, values) >= 0;
    if (!good) throw failure(path.string(), "cache rows written", "an HDF5 error (disk full?)");
    rows += count;
  }

  void read(hsize_t first, hsize_t count, void* values, const fs::path& path) const {
    if (count == 0) return;
    const int rank = width ? 2 : 1;
    const hsize_t start[2] = {first, 0}, block[2] = {count, width};
    Hdf5Handle file_space(H5Dget_space(set), H5Sclose);
    Hdf5Handle memory_space(H5Screate_simple(rank, block, nullptr), H5Sclose);
    if (!file_space.valid() || H5Sselect_hyperslab(file_space, H5S_SELECT_SET, start, nullptr, block, nullptr) < 0 ||
        H5Dread(set, memory_type, memory_space, file_space, H5P_DEFAULT, values) < 0) {
      throw broken(path, "rows that cannot be read");
    }
  }
};

}  // namespace

struct LogitCacheWriter::State {
  fs::path path, partial;
  LogitCacheInfo info;
  Hdf5Handle file;
  Column ids, window_end, index, log_prob, log_sum_exp, target;
  // Buffered rows of the current and earlier windows.
  std::vector<std::int32_t> pending_ids;
  std::vector<std::uint64_t> pending_ends;
  std::vector<std::uint32_t> index_rows;
  std::vector<std::uint16_t> log_prob_rows;
  std::vector<float> lse_rows, target_rows;
  std::uint64_t total_ids = 0;      // of all windows begun
  std::vector<std::int32_t> window; // the current one
  std::size_t window_rows = 0;      // rows of it that arrived
  bool finished = false;

  void flush() {
    const QuietHdf5 quiet;
    const auto k = static_cast<std::size_t>(info.top_k);
    ids.append(pending_ids.data(), pending_ids.size(), path);
    window_end.append(pending_ends.data(), pending_ends.size(), path);
    index.append(index_rows.data(), index_rows.size() / k, path);
    log_prob.append(log_prob_rows.data(), log_prob_rows.size() / k, path);
    log_sum_exp.append(lse_rows.data(), lse_rows.size(), path);
    target.append(target_rows.data(), target_rows.size(), path);
    pending_ids.clear();
    pending_ends.clear();
    index_rows.clear();
    log_prob_rows.clear();
    lse_rows.clear();
    target_rows.clear();
  }

  void expect_whole_window() const {
    if (window_rows == window.size()) return;
    throw failure(path.string(), std::to_string(window.size()) + " rows of logits in the window",
                  std::to_string(window_rows));
  }
};

LogitCacheWriter::LogitCacheWriter(const fs::path& path, LogitCacheInfo info) : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.path = path;
  s.partial = path.string() + ".partial";
  if (info.vocab_size <= 0 || info.top_k <= 0) {
    throw usage_error(path.string(), "a positive vocabulary and top-k",
                      std::to_string(info.vocab_size) + " and " + std::to_string(info.top_k));
  }
  info.top_k = std::min(info.top_k, info.vocab_size);
  s.info = std::move(info);
  const QuietHdf5 quiet;
  Hdf5Handle create_list(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  H5Pset_userblock(create_list, kUserBlock);
  Hdf5Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  H5Pset_libver_bounds(access, H5F_LIBVER_V18, H5F_LIBVER_V110);
  H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
  s.file = Hdf5Handle(H5Fcreate(s.partial.c_str(), H5F_ACC_TRUNC, create_list, access), H5Fclose);
  if (!s.file.valid()) throw failure(path.string(), "a cache file created", "not writable");
  put_text(s.file, "magic", kMagic);
  put_integer(s.file, "version", kVersion);
  put_integer(s.file, "vocab_size", s.info.vocab_size);
  put_integer(s.file, "context", s.info.context);
  put_integer(s.file, "top_k", s.info.top_k);
  put_text(s.file, "corpus_hash", s.info.corpus_hash);
  put_text(s.file, "model_hash", s.info.model_hash);
  put_text(s.file, "log_prob_format", "ieee-f16-bits");
  const auto k = static_cast<hsize_t>(s.info.top_k);
  const hid_t index_type = s.info.vocab_size <= 65536 ? H5T_STD_U16LE : H5T_STD_U32LE;
  s.ids.create(s.file, "ids", H5T_STD_U32LE, H5T_NATIVE_INT32, 0, false);
  s.window_end.create(s.file, "window_end", H5T_STD_U64LE, H5T_NATIVE_UINT64, 0, false);
  s.index.create(s.file, "topk_idx", index_type, H5T_NATIVE_UINT32, k, true);
  s.log_prob.create(s.file, "topk_lp", H5T_STD_U16LE, H5T_NATIVE_UINT16, k, false);
  s.log_sum_exp.create(s.file, "lse", H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, 0, false);
  s.target.create(s.file, "target_lp", H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, 0, false);
}

LogitCacheWriter::~LogitCacheWriter() {
  if (!state_ || state_->finished) return;
  const QuietHdf5 quiet;
  const fs::path partial = state_->partial;
  state_.reset();  // closes the handles
  std::error_code ignored;
  fs::remove(partial, ignored);
}

void LogitCacheWriter::begin(std::span<const std::int32_t> ids) {
  State& s = *state_;
  s.expect_whole_window();
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= s.info.vocab_size) {
      throw input_error(s.path.string(), "ids below " + std::to_string(s.info.vocab_size), std::to_string(id));
    }
  }
  s.window.assign(ids.begin(), ids.end());
  s.window_rows = 0;
  s.total_ids += ids.size();
  s.pending_ids.insert(s.pending_ids.end(), ids.begin(), ids.end());
  s.pending_ends.push_back(s.total_ids);
}

void LogitCacheWriter::rows(std::int64_t count, const float* logits) {
  State& s = *state_;
  const auto vocab = static_cast<std::size_t>(s.info.vocab_size), k = static_cast<std::size_t>(s.info.top_k);
  const auto n = static_cast<std::size_t>(count);
  if (s.window_rows + n > s.window.size()) {
    throw failure(s.path.string(), "at most " + std::to_string(s.window.size()) + " rows in the window",
                  std::to_string(s.window_rows + n));
  }
  const std::size_t base = s.lse_rows.size();
  s.index_rows.resize((base + n) * k);
  s.log_prob_rows.resize((base + n) * k);
  s.lse_rows.resize(base + n);
  s.target_rows.resize(base + n);
  std::int64_t bad = -1;
#pragma omp parallel reduction(max : bad)
  {
    std::vector<std::uint32_t> order(vocab);
#pragma omp for schedule(static)
    for (std::int64_t r = 0; r < count; ++r) {
      const float* row = logits + static_cast<std::size_t>(r) * vocab;
      const std::size_t at = base + static_cast<std::size_t>(r);
      RowSoftmax softmax;
      if (!row_softmax(row, s.info.vocab_size, softmax)) {
        bad = std::max(bad, r);
        continue;
      }
      std::iota(order.begin(), order.end(), 0u);
      const auto before = [row](std::uint32_t a, std::uint32_t b) { return row[a] != row[b] ? row[a] > row[b] : a < b; };
      std::nth_element(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k - 1), order.end(), before);
      std::sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k), before);
      for (std::size_t i = 0; i < k; ++i) {
        s.index_rows[at * k + i] = order[i];
        s.log_prob_rows[at * k + i] = f32_to_f16(static_cast<float>(softmax.log_prob(row, order[i])));
      }
      s.lse_rows[at] = static_cast<float>(softmax.log_sum_exp());
      const std::size_t position = s.window_rows + static_cast<std::size_t>(r);
      s.target_rows[at] = position + 1 < s.window.size()
                              ? static_cast<float>(softmax.log_prob(row, s.window[position + 1]))
                              : 0.0f;
    }
  }
  if (bad >= 0) {
    throw input_error(s.path.string(), "finite logits",
                      "NaN or infinity at position " + std::to_string(s.window_rows + static_cast<std::size_t>(bad)));
  }
  s.window_rows += n;
  if (s.lse_rows.size() >= static_cast<std::size_t>(kFlushRows)) s.flush();
}

void LogitCacheWriter::append(std::span<const std::int32_t> ids, const float* logits) {
  begin(ids);
  rows(static_cast<std::int64_t>(ids.size()), logits);
}

void LogitCacheWriter::finish() {
  State& s = *state_;
  s.expect_whole_window();
  s.flush();
  {
    const QuietHdf5 quiet;
    put_integer(s.file, "complete", 1);
    for (Column* column : {&s.ids, &s.window_end, &s.index, &s.log_prob, &s.log_sum_exp, &s.target}) column->set.reset();
    if (s.file.reset() < 0) throw failure(s.path.string(), "the cache closed", "an HDF5 error (disk full?)");
  }
  std::error_code error;
  const std::uint64_t bytes = fs::file_size(s.partial, error);
  const int fd = error ? -1 : ::open(s.partial.c_str(), O_WRONLY | O_CLOEXEC);
  const std::string head = user_block(bytes);
  const bool written = fd >= 0 && ::pwrite(fd, head.data(), head.size(), 0) == static_cast<ssize_t>(head.size()) &&
                       ::fsync(fd) == 0;
  if (fd >= 0) ::close(fd);
  if (!written) throw failure(s.path.string(), "the cache made durable", std::strerror(errno));
  fs::rename(s.partial, s.path, error);
  if (error) throw failure(s.path.string(), "the cache renamed into place", error.message());
  s.finished = true;
  const fs::path folder = s.path.parent_path().empty() ? fs::path(".") : s.path.parent_path();
  const int folder_fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder_fd >= 0) {
    ::fsync(folder_fd);
    ::close(folder_fd);
  }
}

struct LogitCacheReader::State {
  fs::path path;
  LogitCacheInfo info;
  Hdf5Handle file;
  Column ids, window_end, index, log_prob, log_sum_exp, target;
  std::vector<std::uint64_t> ends;
};

namespace {

// Before HDF5 sees a byte: our magic and the exact size.
void check_user_block(const fs::path& path) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) throw broken(path, "no such file");
  std::string head(kUserBlock, '\0');
  std::ifstream in(path, std::ios::binary);
  in.read(head.data(), static_cast<std::streamsize>(head.size()));
  if (in.gcount() != static_cast<std::streamsize>(head.size())) throw broken(path, "a file shorter than 512 bytes");
  if (head.compare(0, std::strlen(kMagic), kMagic) != 0) throw broken(path, "another kind of file (no magic)");
  const std::uint64_t bytes = fs::file_size(path, error);
  long long version = 0;
  unsigned long long stated = 0;
  head.back() = '\0';
  if (std::sscanf(head.c_str() + std::strlen(kMagic), " %lld bytes %llu", &version, &stated) != 2) {
    throw broken(path, "a damaged first block");
  }
  if (version != kVersion) throw broken(path, "version " + std::to_string(version));
  if (stated != bytes) {
    throw broken(path, "a truncated file: " + std::to_string(bytes) + " of " + std::to_string(stated) + " bytes");
  }
}

}  // namespace

bool LogitCacheReader::is_cache(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::string head(std::strlen(kMagic), '\0');
  return in.read(head.data(), static_cast<std::streamsize>(head.size())) && head == kMagic;
}

LogitCacheReader::LogitCacheReader(const fs::path& path) : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.path = path;
  check_user_block(path);
  const QuietHdf5 quiet;
  Hdf5Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
  s.file = Hdf5Handle(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access), H5Fclose);
  if (!s.file.valid()) throw broken(path, "not readable as HDF5");
  if (text_attribute(s.file, "magic", path) != kMagic) throw broken(path, "another magic attribute");
  if (integer_attribute(s.file, "version", path) != kVersion) throw broken(path, "another version");
  if (integer_attribute(s.file, "complete", path) != 1) throw broken(path, "an unfinished cache");
  if (text_attribute(s.file, "log_prob_format", path) != "ieee-f16-bits") throw broken(path, "another number format");
  s.info.vocab_size = integer_attribute(s.file, "vocab_size", path);
  s.info.context = integer_attribute(s.file, "context", path);
  s.info.top_k = integer_attribute(s.file, "top_k", path);
  s.info.corpus_hash = text_attribute(s.file, "corpus_hash", path);
  s.info.model_hash = text_attribute(s.file, "model_hash", path);
  if (s.info.vocab_size <= 0 || s.info.vocab_size > (std::int64_t{1} << 31) || s.info.top_k <= 0 ||
      s.info.top_k > s.info.vocab_size) {
    throw broken(path, "absurd sizes");
  }
  const auto k = static_cast<hsize_t>(s.info.top_k);
  s.ids.open(s.file, "ids", H5T_NATIVE_INT32, 0, path);
  s.window_end.open(s.file, "window_end", H5T_NATIVE_UINT64, 0, path);
  s.index.open(s.file, "topk_idx", H5T_NATIVE_UINT32, k, path);
  s.log_prob.open(s.file, "topk_lp", H5T_NATIVE_UINT16, k, path);
  s.log_sum_exp.open(s.file, "lse", H5T_NATIVE_FLOAT, 0, path);
  s.target.open(s.file, "target_lp", H5T_NATIVE_FLOAT, 0, path);
  for (const Column* column : {&s.index, &s.log_prob, &s.log_sum_exp, &s.target}) {
    if (column->rows != s.ids.rows) throw broken(path, "datasets of different lengths");
  }
  if (s.window_end.rows > s.ids.rows + 1) throw broken(path, "more windows than ids");
  s.ends.resize(s.window_end.rows);
  s.window_end.read(0, s.ends.size(), s.ends.data(), path);
  std::uint64_t previous = 0;
  for (const std::uint64_t end : s.ends) {
    if (end < previous || end > s.ids.rows) throw broken(path, "window ends out of order");
    previous = end;
  }
  if (previous != s.ids.rows) throw broken(path, "ids outside all windows");
}

LogitCacheReader::LogitCacheReader(const fs::path& path, const LogitCacheInfo& expected) : LogitCacheReader(path) {
  const LogitCacheInfo& have = state_->info;
  const auto differ = [&](const std::string& what, const std::string& want, const std::string& found) {
    throw input_error(path.string(), "a cache made with " + what + " " + want, found,
                      "give another --cache name, or delete this file to have it written again");
  };
  if (expected.vocab_size && expected.vocab_size != have.vocab_size) {
    differ("vocabulary", std::to_string(expected.vocab_size), std::to_string(have.vocab_size));
  }
  if (expected.context && expected.context != have.context) {
    differ("context", std::to_string(expected.context), std::to_string(have.context));
  }
  if (!expected.model_hash.empty() && expected.model_hash != have.model_hash) {
    differ("model", expected.model_hash, have.model_hash);
  }
  if (!expected.corpus_hash.empty() && expected.corpus_hash != have.corpus_hash) {
    differ("corpus", expected.corpus_hash, have.corpus_hash);
  }
}

LogitCacheReader::~LogitCacheReader() = default;
const LogitCacheInfo& LogitCacheReader::info() const { return state_->info; }
std::int64_t LogitCacheReader::windows() const { return static_cast<std::int64_t>(state_->ends.size()); }

CachedWindow LogitCacheReader::read(std::int64_t window) {
  const State& s = *state_;
  if (window < 0 || window >= windows()) {
    throw input_error(s.path.string(), "a window below " + std::to_string(windows()), std::to_string(window));
  }
  const QuietHdf5 quiet;
  const auto w = static_cast<std::size_t>(window);
  const std::uint64_t first = w ? s.ends[w - 1] : 0, count = s.ends[w] - first;
  const std::size_t cells = count * static_cast<std::size_t>(s.info.top_k);
  CachedWindow result;
  result.top_k = s.info.top_k;
  result.ids.resize(count);
  result.index.resize(cells);
  result.log_prob.resize(cells);
  result.log_sum_exp.resize(count);
  result.target_log_prob.resize(count);
  std::vector<std::uint16_t> half(cells);
  s.ids.read(first, count, result.ids.data(), s.path);
  s.index.read(first, count, result.index.data(), s.path);
  s.log_prob.read(first, count, half.data(), s.path);
  s.log_sum_exp.read(first, count, result.log_sum_exp.data(), s.path);
  s.target.read(first, count, result.target_log_prob.data(), s.path);
  for (std::size_t i = 0; i < cells; ++i) {
    if (result.index[i] >= static_cast<std::uint64_t>(s.info.vocab_size)) throw broken(s.path, "an id out of range");
    result.log_prob[i] = f16_to_f32(half[i]);
    if (!(result.log_prob[i] <= 0)) throw broken(s.path, "a log-probability above zero");
  }
  for (const std::int32_t id : result.ids) {
    if (id < 0 || id >= s.info.vocab_size) throw broken(s.path, "an id out of range");
  }
  return result;
}

}  // namespace pare
