// What writer and reader of the logit cache share: HDF5 attributes, growing datasets, the check of a window.
#pragma once

#include <string>

#include "core/error.h"
#include "core/file.h"
#include "eval/cached_logits.h"
#include "eval/hdf5_handle.h"

namespace pare {

constexpr const char* kCacheMagic = "pare-logit-cache";
constexpr std::int64_t kCacheVersion = 2;  // version 1 is still read
constexpr hsize_t kCacheUserBlock = 512;

Error broken_cache(const fs::path& path, const std::string& found);

std::string text_attribute(hid_t file, const char* name, const fs::path& path);
std::int64_t integer_attribute(hid_t file, const char* name, const fs::path& path);
double number_attribute(hid_t file, const char* name, const fs::path& path);
void put_text(hid_t file, const char* name, const std::string& value);
void put_integer(hid_t file, const char* name, std::int64_t value);
void put_number(hid_t file, const char* name, double value);

// One-dimensional (width 0) or [rows, width] dataset that grows by rows.
struct CacheColumn {
  Hdf5Handle set;
  hid_t memory_type = -1;
  hsize_t width = 0, rows = 0;

  void create(hid_t file, const char* name, hid_t file_type, hid_t memory, hsize_t columns, bool deflate);
  void open(hid_t file, const char* name, hid_t memory, hsize_t columns, const fs::path& path);
  void append(const void* values, hsize_t count, const fs::path& path);
  void read(hsize_t first, hsize_t count, void* values, const fs::path& path) const;
};

// The datasets with one row for each id, in the order of the file's description.
struct CacheColumns {
  CacheColumn ids, index, log_prob, log_sum_exp, target, entropy, argmax, tail, sample_index, sample_count;
  // f(column, name, file type, memory type, width, deflate) for every one that a file of this kind has.
  template <class F>
  void each(const LogitCacheInfo& info, std::int64_t version, F&& f) {
    const hid_t id = info.vocab_size <= 65536 ? H5T_STD_U16LE : H5T_STD_U32LE;
    const auto k = static_cast<hsize_t>(info.top_k), n = static_cast<hsize_t>(info.samples);
    f(ids, "ids", H5T_STD_U32LE, H5T_NATIVE_INT32, hsize_t{0}, false);
    if (k > 0) {
      f(index, "topk_idx", id, H5T_NATIVE_UINT32, k, true);
      f(log_prob, "topk_lp", H5T_STD_U16LE, H5T_NATIVE_UINT16, k, false);
    }
    f(log_sum_exp, "lse", H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, hsize_t{0}, false);
    f(target, "target_lp", H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, hsize_t{0}, false);
    if (version < 2) return;
    f(entropy, "entropy", H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, hsize_t{0}, false);
    f(argmax, "argmax", id, H5T_NATIVE_UINT32, hsize_t{0}, true);
    f(tail, "tail", H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, hsize_t{0}, false);
    if (n == 0) return;
    f(sample_index, "sample_idx", id, H5T_NATIVE_UINT32, n, true);
    f(sample_count, "sample_n", H5T_STD_U8LE, H5T_NATIVE_UINT8, n, true);
  }
};

// Hash of everything that the file says of one window.
std::uint64_t window_check(const CachedWindow& window);

}  // namespace pare
