#include "eval/logit_cache_file.h"

#include <algorithm>
#include <cstring>
#include <span>

namespace pare {
namespace {

// A window is read in one piece, in any order: with chunks much larger, most of what is unpacked would be of others.
constexpr hsize_t kChunkBytes = 64 << 10, kChunkRows = 2048;

}  // namespace

Error broken_cache(const fs::path& path, const std::string& found) {
  return input_error(path.string(), "a complete logit cache written by this program", found,
                     "delete it, or give another --cache name, to have it written again");
}

std::string text_attribute(hid_t file, const char* name, const fs::path& path) {
  Hdf5Handle attribute(H5Aopen(file, name, H5P_DEFAULT), H5Aclose);
  if (!attribute.valid()) throw broken_cache(path, std::string("no attribute ") + name);
  Hdf5Handle type(H5Aget_type(attribute), H5Tclose);
  Hdf5Handle space(H5Aget_space(attribute), H5Sclose);
  const std::size_t size = type.valid() ? H5Tget_size(type) : 0;
  if (!space.valid() || H5Sget_simple_extent_npoints(space) != 1 || H5Tget_class(type) != H5T_STRING ||
      H5Tis_variable_str(type) != 0 || size == 0 || size > 4096) {
    throw broken_cache(path, std::string("attribute ") + name + " is not a short text");
  }
  std::string value(size, '\0');
  if (H5Aread(attribute, type, value.data()) < 0) throw broken_cache(path, std::string("unreadable attribute ") + name);
  value.resize(std::strlen(value.c_str()));
  return value;
}

std::int64_t integer_attribute(hid_t file, const char* name, const fs::path& path) {
  Hdf5Handle attribute(H5Aopen(file, name, H5P_DEFAULT), H5Aclose);
  if (!attribute.valid()) throw broken_cache(path, std::string("no attribute ") + name);
  Hdf5Handle type(H5Aget_type(attribute), H5Tclose);
  Hdf5Handle space(H5Aget_space(attribute), H5Sclose);
  std::int64_t value = 0;
  if (!type.valid() || !space.valid() || H5Sget_simple_extent_npoints(space) != 1 ||
      H5Tget_class(type) != H5T_INTEGER || H5Aread(attribute, H5T_NATIVE_INT64, &value) < 0) {
    throw broken_cache(path, std::string("attribute ") + name + " is not a number");
  }
  return value;
}

double number_attribute(hid_t file, const char* name, const fs::path& path) {
  Hdf5Handle attribute(H5Aopen(file, name, H5P_DEFAULT), H5Aclose);
  if (!attribute.valid()) throw broken_cache(path, std::string("no attribute ") + name);
  Hdf5Handle type(H5Aget_type(attribute), H5Tclose);
  Hdf5Handle space(H5Aget_space(attribute), H5Sclose);
  double value = 0;
  if (!type.valid() || !space.valid() || H5Sget_simple_extent_npoints(space) != 1 || H5Tget_class(type) != H5T_FLOAT ||
      H5Aread(attribute, H5T_NATIVE_DOUBLE, &value) < 0) {
    throw broken_cache(path, std::string("attribute ") + name + " is not a number");
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

void put_number(hid_t file, const char* name, double value) {
  Hdf5Handle space(H5Screate(H5S_SCALAR), H5Sclose);
  Hdf5Handle attribute(H5Acreate2(file, name, H5T_IEEE_F64LE, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
  if (H5Awrite(attribute, H5T_NATIVE_DOUBLE, &value) < 0) throw failure(name, "an attribute written", "an HDF5 error");
}

void CacheColumn::create(hid_t file, const char* name, hid_t file_type, hid_t memory, hsize_t columns, bool deflate) {
  memory_type = memory;
  width = columns;
  const int rank = width ? 2 : 1;
  const hsize_t row_bytes = H5Tget_size(file_type) * std::max<hsize_t>(width, 1);
  const hsize_t now[2] = {0, width}, most[2] = {H5S_UNLIMITED, width};
  const hsize_t chunk[2] = {std::clamp<hsize_t>(kChunkBytes / row_bytes, 16, kChunkRows), width};
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

void CacheColumn::open(hid_t file, const char* name, hid_t memory, hsize_t columns, const fs::path& path) {
  memory_type = memory;
  width = columns;
  Hdf5Handle access(H5Pcreate(H5P_DATASET_ACCESS), H5Pclose);
  H5Pset_chunk_cache(access, 101, 4 << 20, 0.75);
  set = Hdf5Handle(H5Dopen2(file, name, access), H5Dclose);
  if (!set.valid()) throw broken_cache(path, std::string("no dataset ") + name);
  Hdf5Handle type(H5Dget_type(set), H5Tclose);
  Hdf5Handle space(H5Dget_space(set), H5Sclose);
  hsize_t size[2] = {0, 0};
  const int rank = width ? 2 : 1;
  if (!type.valid() || !space.valid() || H5Tget_class(type) != H5Tget_class(memory) ||
      H5Sget_simple_extent_ndims(space) != rank || H5Sget_simple_extent_dims(space, size, nullptr) != rank ||
      (width && size[1] != width)) {
    throw broken_cache(path, std::string("dataset ") + name + " has another type or shape");
  }
  rows = size[0];
}

void CacheColumn::append(const void* values, hsize_t count, const fs::path& path) {
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

void CacheColumn::read(hsize_t first, hsize_t count, void* values, const fs::path& path) const {
  if (count == 0) return;
  const int rank = width ? 2 : 1;
  const hsize_t start[2] = {first, 0}, block[2] = {count, width};
  Hdf5Handle file_space(H5Dget_space(set), H5Sclose);
  Hdf5Handle memory_space(H5Screate_simple(rank, block, nullptr), H5Sclose);
  if (!file_space.valid() || H5Sselect_hyperslab(file_space, H5S_SELECT_SET, start, nullptr, block, nullptr) < 0 ||
      H5Dread(set, memory_type, memory_space, file_space, H5P_DEFAULT, values) < 0) {
    throw broken_cache(path, "rows that cannot be read");
  }
}

std::uint64_t window_check(const CachedWindow& w) {
  Hasher hasher;
  const auto add = [&](const auto& values) { hasher.update(std::as_bytes(std::span(values))); };
  add(w.ids);
  add(w.index);
  add(w.log_prob);
  add(w.log_sum_exp);
  add(w.target_log_prob);
  add(w.entropy);
  add(w.argmax);
  add(w.tail);
  add(w.sample_index);
  add(w.sample_count);
  return std::stoull(hasher.hex().substr(0, 16), nullptr, 16);
}

}  // namespace pare
