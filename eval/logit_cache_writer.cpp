#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>

#include "core/codec.h"
#include "core/uniform.h"
#include "eval/logit_cache.h"
#include "eval/logit_cache_file.h"
#include "eval/rows.h"
#include "eval/tail_samples.h"

namespace pare {
namespace {

constexpr std::int64_t kFlushIds = 4096;  // lost at most when the process is killed

std::string user_block(std::uint64_t file_bytes) {
  std::string text = std::string(kCacheMagic) + " " + std::to_string(kCacheVersion) + " bytes " +
                     std::to_string(file_bytes) + "\n(HDF5 begins at byte 512)\n";
  text.resize(kCacheUserBlock, '\0');
  return text;
}

bool same_contents(const LogitCacheInfo& a, const LogitCacheInfo& b) {
  return a.vocab_size == b.vocab_size && a.context == b.context && a.top_k == b.top_k &&
         a.corpus_hash == b.corpus_hash && a.model_hash == b.model_hash && a.samples == b.samples &&
         a.temperature == b.temperature && a.seed == b.seed && a.tokenizer_hash == b.tokenizer_hash;
}

Hdf5Handle access_list() {
  Hdf5Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110);
  H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
  return access;
}

// Buffers of one thread for one row.
struct RowScratch {
  std::vector<float> logits;  // over the temperature
  std::vector<double> probability;
  std::vector<std::uint32_t> order;
};

CachedWindow sized_window(const LogitCacheInfo& info, std::span<const std::int32_t> ids) {
  const std::size_t n = ids.size(), k = static_cast<std::size_t>(info.top_k),
                    draws = static_cast<std::size_t>(info.samples);
  CachedWindow window;
  window.ids.assign(ids.begin(), ids.end());
  window.index.resize(n * k);
  window.log_prob.resize(n * k);
  for (std::vector<float>* values : {&window.log_sum_exp, &window.target_log_prob, &window.entropy, &window.tail})
    values->resize(n);
  window.argmax.resize(n);
  window.sample_index.resize(n * draws);
  window.sample_count.resize(n * draws);
  return window;
}

// False for a row without a softmax. place: of the row among all of the cache.
bool fill_row(const LogitCacheInfo& info, const float* logits, std::size_t at, std::uint64_t place,
              RowScratch& scratch, CachedWindow& window) {
  const auto vocab = static_cast<std::size_t>(info.vocab_size), k = static_cast<std::size_t>(info.top_k);
  if (info.temperature != 1) {
    scratch.logits.resize(vocab);
    const auto inverse = static_cast<float>(1 / info.temperature);
    for (std::size_t i = 0; i < vocab; ++i) scratch.logits[i] = logits[i] * inverse;
    logits = scratch.logits.data();
  }
  RowSoftmax softmax;
  if (!row_softmax(logits, info.vocab_size, softmax)) return false;
  scratch.order.resize(vocab);
  if (k > 0) {
    std::vector<std::uint32_t>& order = scratch.order;
    std::iota(order.begin(), order.end(), 0u);
    const auto before = [logits](std::uint32_t a, std::uint32_t b) {
      return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    };
    std::nth_element(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k - 1), order.end(), before);
    std::sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k), before);
    for (std::size_t i = 0; i < k; ++i) {
      window.index[at * k + i] = order[i];
      window.log_prob[at * k + i] = f16_to_f32(f32_to_f16(static_cast<float>(softmax.log_prob(logits, order[i]))));
    }
  }
  window.log_sum_exp[at] = static_cast<float>(softmax.log_sum_exp());
  window.argmax[at] = static_cast<std::uint32_t>(softmax.argmax);
  if (at + 1 < window.ids.size())
    window.target_log_prob[at] = static_cast<float>(softmax.log_prob(logits, window.ids[at + 1]));
  scratch.probability.resize(vocab);
  double entropy = 0;
  for (std::size_t i = 0; i < vocab; ++i) {
    const double log_p = softmax.log_prob(logits, static_cast<std::int64_t>(i)), p = row_exp(std::min(log_p, 0.0));
    scratch.probability[i] = p;
    if (p > 0) entropy -= p * log_p;
  }
  window.entropy[at] = static_cast<float>(std::max(entropy, 0.0));
  const std::span<const std::uint32_t> listed(scratch.order.data(), k);
  const TailSamples drawn = sample_tail(scratch.probability, listed, std::max<std::int64_t>(info.samples, 1),
                                        uniform_at(info.seed, place));
  window.tail[at] = static_cast<float>(drawn.mass);
  const auto n = static_cast<std::size_t>(info.samples);
  for (std::size_t i = 0; n > 0 && i < drawn.index.size(); ++i) {
    window.sample_index[at * n + i] = drawn.index[i];
    window.sample_count[at * n + i] = drawn.count[i];
  }
  return true;
}

// Rows [first, first + count) of the window. Returns the last one without a softmax, or -1.
std::int64_t fill_rows(const LogitCacheInfo& info, const float* logits, std::size_t first, std::int64_t count,
                       std::uint64_t first_id, CachedWindow& window) {
  std::int64_t bad = -1;
#pragma omp parallel reduction(max : bad)
  {
    RowScratch scratch;
#pragma omp for schedule(static)
    for (std::int64_t r = 0; r < count; ++r) {
      const auto at = static_cast<std::size_t>(r);
      if (!fill_row(info, logits + at * static_cast<std::size_t>(info.vocab_size), first + at, first_id + first + at,
                    scratch, window))
        bad = std::max(bad, r);
    }
  }
  return bad < 0 ? bad : static_cast<std::int64_t>(first) + bad;
}

Error not_finite(const std::string& place, std::int64_t row) {
  return input_error(place, "finite logits", "NaN or infinity at position " + std::to_string(row));
}

}  // namespace

struct LogitCacheWriter::State {
  fs::path path, partial;
  LogitCacheInfo info;
  bool resumable = false, finished = false;
  Hdf5Handle file;
  CacheColumns columns;
  CacheColumn window_end, check;
  std::int64_t windows_done = 0, unflushed = 0;
  std::uint64_t total_ids = 0;  // of all whole windows
  CachedWindow window;          // the current one
  std::size_t window_rows = 0;  // rows of it that arrived

  void create(const fs::path& as);
  bool resume();
  void put(const CachedWindow& w);
  void flush();

  void expect_whole_window() const {
    if (window_rows == window.ids.size()) return;
    throw failure(path.string(), std::to_string(window.ids.size()) + " rows of logits in the window",
                  std::to_string(window_rows));
  }
};

void LogitCacheWriter::State::create(const fs::path& as) {
  const QuietHdf5 quiet;
  Hdf5Handle create_list(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  H5Pset_userblock(create_list, kCacheUserBlock);
  const Hdf5Handle access = access_list();
  file = Hdf5Handle(H5Fcreate(as.c_str(), H5F_ACC_TRUNC, create_list, access), H5Fclose);
  if (!file.valid()) throw failure(path.string(), "a cache file created", "not writable");
  put_text(file, "magic", kCacheMagic);
  put_integer(file, "version", kCacheVersion);
  put_integer(file, "vocab_size", info.vocab_size);
  put_integer(file, "context", info.context);
  put_integer(file, "top_k", info.top_k);
  put_text(file, "corpus_hash", info.corpus_hash);
  put_text(file, "model_hash", info.model_hash);
  put_text(file, "log_prob_format", "ieee-f16-bits");
  put_integer(file, "samples", info.samples);
  put_number(file, "temperature", info.temperature);
  put_integer(file, "seed", static_cast<std::int64_t>(info.seed));
  put_text(file, "tokenizer_hash", info.tokenizer_hash);
  columns.each(info, kCacheVersion,
               [&](CacheColumn& column, const char* name, hid_t stored, hid_t memory, hsize_t width, bool deflate) {
                 column.create(file, name, stored, memory, width, deflate);
               });
  window_end.create(file, "window_end", H5T_STD_U64LE, H5T_NATIVE_UINT64, 0, false);
  check.create(file, "check", H5T_STD_U64LE, H5T_NATIVE_UINT64, 0, false);
  // From here on HDF5 writes in an order that never leaves a pointer to what is not there yet.
  if (H5Fstart_swmr_write(file) < 0)
    throw failure(path.string(), "a cache file written to", "an HDF5 error (disk full?)");
}

// Copies what is whole in a partial file into a fresh one, since what stands behind its last flush is unknown.
bool LogitCacheWriter::State::resume() {
  std::optional<LogitCacheReader> found;
  try {
    found.emplace(LogitCacheReader::of_partial(path));
  } catch (const Error&) {
    return false;  // killed before its first flush
  }
  if (!same_contents(found->info(), info))
    throw input_error(partial.string(), "an unfinished cache of this text, teacher and these options", "one of others",
                      "finish the command that began it, delete it, or give another --cache name");
  if (found->windows() == 0) return false;
  const fs::path fresh = partial.string() + ".new";
  create(fresh);
  for (std::int64_t w = 0; w < found->windows(); ++w) put(found->read(w));
  windows_done = found->windows();
  flush();
  std::error_code error;
  fs::rename(fresh, partial, error);
  if (error) throw failure(partial.string(), "the file renamed into place", error.message());
  return true;
}

void LogitCacheWriter::State::put(const CachedWindow& w) {
  const QuietHdf5 quiet;
  const auto n = static_cast<hsize_t>(w.ids.size());
  std::vector<std::uint16_t> half(w.log_prob.size());
  for (std::size_t i = 0; i < half.size(); ++i) half[i] = f32_to_f16(w.log_prob[i]);
  columns.ids.append(w.ids.data(), n, path);
  if (info.top_k > 0) {
    columns.index.append(w.index.data(), n, path);
    columns.log_prob.append(half.data(), n, path);
  }
  columns.log_sum_exp.append(w.log_sum_exp.data(), n, path);
  columns.target.append(w.target_log_prob.data(), n, path);
  columns.entropy.append(w.entropy.data(), n, path);
  columns.argmax.append(w.argmax.data(), n, path);
  columns.tail.append(w.tail.data(), n, path);
  if (info.samples > 0) {
    columns.sample_index.append(w.sample_index.data(), n, path);
    columns.sample_count.append(w.sample_count.data(), n, path);
  }
  total_ids += n;
  const std::uint64_t sum = window_check(w);
  window_end.append(&total_ids, 1, path);
  check.append(&sum, 1, path);
  unflushed += static_cast<std::int64_t>(n);
  if (unflushed >= kFlushIds) flush();
}

void LogitCacheWriter::State::flush() {
  const QuietHdf5 quiet;
  if (H5Fflush(file, H5F_SCOPE_LOCAL) < 0)
    throw failure(path.string(), "cache rows written", "an HDF5 error (disk full?)");
  unflushed = 0;
}

LogitCacheWriter::LogitCacheWriter(const fs::path& path, LogitCacheInfo info, bool resumable)
    : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.path = path;
  s.partial = LogitCacheReader::partial_path(path);
  if (info.vocab_size <= 0 || info.top_k < 0 || info.samples < 0 || info.samples > 255 ||
      info.top_k + info.samples == 0 || !(info.temperature > 0)) {
    throw usage_error(path.string(), "a positive vocabulary, temperature, and top-k or up to 255 samples",
                      std::to_string(info.vocab_size) + ", " + std::to_string(info.temperature) + ", " +
                          std::to_string(info.top_k) + " and " + std::to_string(info.samples));
  }
  info.top_k = std::min(info.top_k, info.vocab_size);
  s.info = std::move(info);
  if (!resumable || !s.resume()) s.create(s.partial);
  s.resumable = resumable;
}

LogitCacheWriter::~LogitCacheWriter() {
  if (!state_ || state_->finished) return;
  const QuietHdf5 quiet;
  const fs::path partial = state_->partial;
  const bool keep = state_->resumable && state_->check.rows > 0;
  state_.reset();  // closes the handles
  std::error_code ignored;
  fs::remove(partial.string() + ".new", ignored);
  if (!keep) fs::remove(partial, ignored);
}

std::int64_t LogitCacheWriter::windows_done() const {
  return state_->windows_done;
}

void LogitCacheWriter::begin(std::span<const std::int32_t> ids) {
  State& s = *state_;
  s.expect_whole_window();
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= s.info.vocab_size) {
      throw input_error(s.path.string(), "ids below " + std::to_string(s.info.vocab_size), std::to_string(id));
    }
  }
  s.window = sized_window(s.info, ids);
  s.window_rows = 0;
  if (ids.empty()) s.put(s.window);
}

void LogitCacheWriter::rows(std::int64_t count, const float* logits) {
  State& s = *state_;
  const auto n = static_cast<std::size_t>(count);
  if (s.window_rows + n > s.window.ids.size()) {
    throw failure(s.path.string(), "at most " + std::to_string(s.window.ids.size()) + " rows in the window",
                  std::to_string(s.window_rows + n));
  }
  const std::int64_t bad = fill_rows(s.info, logits, s.window_rows, count, s.total_ids, s.window);
  if (bad >= 0) throw not_finite(s.path.string(), bad);
  s.window_rows += n;
  if (n > 0 && s.window_rows == s.window.ids.size()) s.put(s.window);
}

void LogitCacheWriter::append(std::span<const std::int32_t> ids, const float* logits) {
  begin(ids);
  rows(static_cast<std::int64_t>(ids.size()), logits);
}

void LogitCacheWriter::append(const CachedWindow& window) {
  state_->expect_whole_window();
  state_->put(window);
}

void LogitCacheWriter::finish() {
  State& s = *state_;
  s.expect_whole_window();
  {
    const QuietHdf5 quiet;
    s.columns.each(s.info, kCacheVersion, [](CacheColumn& column, auto&&...) { column.set.reset(); });
    s.window_end.set.reset();
    s.check.set.reset();
    bool good = s.file.reset() >= 0;
    const Hdf5Handle access = access_list();
    Hdf5Handle again(good ? H5Fopen(s.partial.c_str(), H5F_ACC_RDWR, access) : hid_t{-1}, H5Fclose);
    if (again.valid()) put_integer(again, "complete", 1);
    good = again.valid() && again.reset() >= 0;
    if (!good) throw failure(s.path.string(), "the cache closed", "an HDF5 error (disk full?)");
  }
  std::error_code error;
  const std::uint64_t bytes = fs::file_size(s.partial, error);
  const int fd = error ? -1 : ::open(s.partial.c_str(), O_WRONLY | O_CLOEXEC);
  const std::string head = user_block(bytes);
  const bool written =
      fd >= 0 && ::pwrite(fd, head.data(), head.size(), 0) == static_cast<ssize_t>(head.size()) && ::fsync(fd) == 0;
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

CachedWindow cached_window(const LogitCacheInfo& info, std::span<const std::int32_t> ids, const float* logits,
                           std::uint64_t first_id) {
  CachedWindow window = sized_window(info, ids);
  const std::int64_t bad = fill_rows(info, logits, 0, static_cast<std::int64_t>(ids.size()), first_id, window);
  if (bad >= 0) throw not_finite("the teacher's logits", bad);
  return window;
}

namespace {

template <class Window, class Visit>
void each_column(Window& w, const Visit& visit) {
  visit(w.ids);
  visit(w.index);
  visit(w.log_prob);
  visit(w.log_sum_exp);
  visit(w.target_log_prob);
  visit(w.entropy);
  visit(w.argmax);
  visit(w.tail);
  visit(w.sample_index);
  visit(w.sample_count);
}

}  // namespace

std::string packed(const CachedWindow& window) {
  std::string bytes;
  each_column(window, [&](const auto& column) {
    const auto count = static_cast<std::uint64_t>(column.size());
    bytes.append(reinterpret_cast<const char*>(&count), sizeof count);
    bytes.append(reinterpret_cast<const char*>(column.data()), column.size() * sizeof column[0]);
  });
  return bytes;
}

CachedWindow unpacked_window(const std::string& bytes) {
  CachedWindow window;
  std::size_t at = 0;
  const auto take = [&](void* to, std::size_t size) {
    if (size > bytes.size() - at)
      throw failure("a window of the cache", "all of its bytes", std::to_string(bytes.size()) + " of them");
    if (size > 0) std::memcpy(to, bytes.data() + at, size);
    at += size;
  };
  each_column(window, [&](auto& column) {
    std::uint64_t count = 0;
    take(&count, sizeof count);
    if (count > bytes.size()) throw failure("a window of the cache", "the length of a column", std::to_string(count));
    column.resize(count);
    take(column.data(), count * sizeof column[0]);
  });
  return window;
}

}  // namespace pare
