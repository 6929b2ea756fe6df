#include "eval/logit_cache.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>

#include <fmt/format.h>

#include "core/codec.h"
#include "eval/logit_cache_file.h"

namespace pare {

struct LogitCacheReader::State {
  fs::path path;
  LogitCacheInfo info;
  Hdf5Handle file;
  std::int64_t version = 0;
  CacheColumns columns;
  CacheColumn window_end, check;
  std::vector<std::uint64_t> ends, checks;  // checks: empty in version 1

  void open(unsigned flags);
  void read_windows(bool partial);
  CachedWindow window(std::size_t w) const;
};

namespace {

// Before HDF5 sees a byte: our magic and the exact size.
void check_user_block(const fs::path& path) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) throw broken_cache(path, "no such file");
  std::string head(kCacheUserBlock, '\0');
  std::ifstream in(path, std::ios::binary);
  in.read(head.data(), static_cast<std::streamsize>(head.size()));
  if (in.gcount() != static_cast<std::streamsize>(head.size()))
    throw broken_cache(path, "a file shorter than 512 bytes");
  if (head.compare(0, std::strlen(kCacheMagic), kCacheMagic) != 0)
    throw broken_cache(path, "another kind of file (no magic)");
  const std::uint64_t bytes = fs::file_size(path, error);
  long long version = 0;
  unsigned long long stated = 0;
  head.back() = '\0';
  if (std::sscanf(head.c_str() + std::strlen(kCacheMagic), " %lld bytes %llu", &version, &stated) != 2) {
    throw broken_cache(path, "a damaged first block");
  }
  if (version < 1 || version > kCacheVersion) throw broken_cache(path, "version " + std::to_string(version));
  if (stated != bytes) {
    throw broken_cache(path, "a truncated file: " + std::to_string(bytes) + " of " + std::to_string(stated) + " bytes");
  }
}

}  // namespace

bool LogitCacheReader::is_cache(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::string head(std::strlen(kCacheMagic), '\0');
  return in.read(head.data(), static_cast<std::streamsize>(head.size())) && head == kCacheMagic;
}

void LogitCacheReader::State::open(unsigned flags) {
  const QuietHdf5 quiet;
  Hdf5Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
  file = Hdf5Handle(H5Fopen(path.c_str(), flags, access), H5Fclose);
  if (!file.valid()) throw broken_cache(path, "not readable as HDF5");
  if (text_attribute(file, "magic", path) != kCacheMagic) throw broken_cache(path, "another magic attribute");
  version = integer_attribute(file, "version", path);
  if (version < 1 || version > kCacheVersion) throw broken_cache(path, "another version");
  if (text_attribute(file, "log_prob_format", path) != "ieee-f16-bits")
    throw broken_cache(path, "another number format");
  info.vocab_size = integer_attribute(file, "vocab_size", path);
  info.context = integer_attribute(file, "context", path);
  info.top_k = integer_attribute(file, "top_k", path);
  info.corpus_hash = text_attribute(file, "corpus_hash", path);
  info.model_hash = text_attribute(file, "model_hash", path);
  if (version >= 2) {
    info.samples = integer_attribute(file, "samples", path);
    info.temperature = number_attribute(file, "temperature", path);
    info.seed = static_cast<std::uint64_t>(integer_attribute(file, "seed", path));
    info.tokenizer_hash = text_attribute(file, "tokenizer_hash", path);
  }
  if (info.vocab_size <= 0 || info.vocab_size > (std::int64_t{1} << 31) || info.top_k < 0 ||
      info.top_k > info.vocab_size || info.samples < 0 || info.samples > 255 || info.top_k + info.samples == 0 ||
      !(info.temperature > 0)) {
    throw broken_cache(path, "absurd sizes");
  }
  columns.each(info, version, [&](CacheColumn& column, const char* name, hid_t, hid_t memory, hsize_t width, bool) {
    column.open(file, name, memory, width, path);
  });
  window_end.open(file, "window_end", H5T_NATIVE_UINT64, 0, path);
  if (version >= 2) check.open(file, "check", H5T_NATIVE_UINT64, 0, path);
}

// partial: windows end where the first dataset ends or a check fails, and what follows is left out.
void LogitCacheReader::State::read_windows(bool partial) {
  hsize_t rows = columns.ids.rows, windows = window_end.rows;
  columns.each(info, version, [&](CacheColumn& column, auto&&...) {
    if (!partial && column.rows != rows) throw broken_cache(path, "datasets of different lengths");
    rows = std::min(rows, column.rows);
  });
  if (version >= 2) {
    if (!partial && check.rows != windows) throw broken_cache(path, "datasets of different lengths");
    windows = std::min(windows, check.rows);
  }
  if (windows > rows + 1) {
    if (!partial) throw broken_cache(path, "more windows than ids");
    windows = rows;
  }
  const QuietHdf5 quiet;
  ends.resize(windows);
  window_end.read(0, ends.size(), ends.data(), path);
  if (version >= 2) {
    checks.resize(windows);
    check.read(0, checks.size(), checks.data(), path);
  }
  std::uint64_t previous = 0;
  for (std::size_t w = 0; w < ends.size(); ++w) {
    const bool good = ends[w] >= previous && ends[w] <= rows;
    if (!good && !partial) throw broken_cache(path, "window ends out of order");
    if (good) previous = ends[w];
    if (!good) ends.resize(w);
  }
  if (!partial && previous != rows) throw broken_cache(path, "ids outside all windows");
  if (!partial) return;
  std::size_t whole = 0;
  try {
    for (; whole < ends.size(); ++whole) window(whole);
  } catch (const Error&) {
    ends.resize(whole);
  }
}

LogitCacheReader::LogitCacheReader(std::unique_ptr<State> state) : state_(std::move(state)) {}
LogitCacheReader::LogitCacheReader(LogitCacheReader&&) noexcept = default;

LogitCacheReader::LogitCacheReader(const fs::path& path) : state_(std::make_unique<State>()) {
  state_->path = path;
  check_user_block(path);
  state_->open(H5F_ACC_RDONLY);
  if (integer_attribute(state_->file, "complete", path) != 1) throw broken_cache(path, "an unfinished cache");
  state_->read_windows(false);
}

LogitCacheReader LogitCacheReader::of_partial(const fs::path& path) {
  auto state = std::make_unique<State>();
  state->path = partial_path(path);
  std::error_code error;
  if (!fs::is_regular_file(state->path, error)) throw broken_cache(state->path, "no such file");
  state->open(H5F_ACC_RDONLY | H5F_ACC_SWMR_READ);
  state->read_windows(true);
  return LogitCacheReader(std::move(state));
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
  if (!expected.tokenizer_hash.empty() && !have.tokenizer_hash.empty() &&
      expected.tokenizer_hash != have.tokenizer_hash) {
    differ("tokenizer", expected.tokenizer_hash, have.tokenizer_hash);
  }
  const auto number = [](double x) { return fmt::format("{}", x); };
  if (expected.temperature != have.temperature) {
    differ("temperature", number(expected.temperature), number(have.temperature));
  }
  if (expected.samples && expected.samples != have.samples) {
    differ("samples per id", std::to_string(expected.samples), std::to_string(have.samples));
  }
  if (expected.top_k && !have.top_k) differ("the most likely ids", "listed", "samples alone");
  if (!expected.corpus_hash.empty() && expected.corpus_hash != have.corpus_hash) {
    differ("corpus", expected.corpus_hash, have.corpus_hash);
  }
}

LogitCacheReader::~LogitCacheReader() = default;
const LogitCacheInfo& LogitCacheReader::info() const {
  return state_->info;
}
std::int64_t LogitCacheReader::windows() const {
  return static_cast<std::int64_t>(state_->ends.size());
}

CachedWindow LogitCacheReader::read(std::int64_t window) {
  if (window < 0 || window >= windows()) {
    throw input_error(state_->path.string(), "a window below " + std::to_string(windows()), std::to_string(window));
  }
  return state_->window(static_cast<std::size_t>(window));
}

CachedWindow LogitCacheReader::State::window(std::size_t w) const {
  const QuietHdf5 quiet;
  const std::uint64_t first = w ? ends[w - 1] : 0, count = ends[w] - first;
  const auto k = static_cast<std::size_t>(info.top_k), n = static_cast<std::size_t>(info.samples);
  CachedWindow result;
  result.top_k = info.top_k;
  result.samples = info.samples;
  const auto fill = [&](const CacheColumn& column, auto& values, std::size_t width) {
    values.resize(count * width);
    column.read(first, count, values.data(), path);
  };
  std::vector<std::uint16_t> half;
  fill(columns.ids, result.ids, 1);
  if (k > 0) {
    fill(columns.index, result.index, k);
    fill(columns.log_prob, half, k);
  }
  fill(columns.log_sum_exp, result.log_sum_exp, 1);
  fill(columns.target, result.target_log_prob, 1);
  if (version >= 2) {
    fill(columns.entropy, result.entropy, 1);
    fill(columns.argmax, result.argmax, 1);
    fill(columns.tail, result.tail, 1);
  }
  if (n > 0) {
    fill(columns.sample_index, result.sample_index, n);
    fill(columns.sample_count, result.sample_count, n);
  }
  result.log_prob.resize(half.size());
  for (std::size_t i = 0; i < half.size(); ++i) {
    result.log_prob[i] = f16_to_f32(half[i]);
    if (!(result.log_prob[i] <= 0)) throw broken_cache(path, "a log-probability above zero");
  }
  for (const std::vector<std::uint32_t>* ids : {&result.index, &result.argmax, &result.sample_index}) {
    for (const std::uint32_t id : *ids) {
      if (id >= static_cast<std::uint64_t>(info.vocab_size)) throw broken_cache(path, "an id out of range");
    }
  }
  for (const std::int32_t id : result.ids) {
    if (id < 0 || id >= info.vocab_size) throw broken_cache(path, "an id out of range");
  }
  if (version >= 2 && window_check(result) != checks[w]) {
    throw broken_cache(path, "window " + std::to_string(w) + " that its check contradicts");
  }
  return result;
}

}  // namespace pare
