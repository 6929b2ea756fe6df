#include "model/activations.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>

#include "core/error.h"
#include "eval/hdf5_handle.h"

namespace pare {

struct Activations::File {
  fs::path path;
  Hdf5Handle file, set;
  std::mutex one_at_a_time;  // the library keeps global state

  template <class Transfer>
  void transfer(std::int64_t window, std::int64_t window_size, const char* what, const Transfer& call) {
    const std::lock_guard lock(one_at_a_time);
    const QuietHdf5 quiet;
    const hsize_t start[2] = {static_cast<hsize_t>(window), 0}, count[2] = {1, static_cast<hsize_t>(window_size)};
    const Hdf5Handle there(H5Dget_space(set), H5Sclose), here(H5Screate_simple(2, count, nullptr), H5Sclose);
    if (H5Sselect_hyperslab(there, H5S_SELECT_SET, start, nullptr, count, nullptr) < 0 || call(here, there) < 0) {
      throw failure(path.string(), std::string("calibration activations that can be ") + what, "an error of HDF5",
                    "free disk space there, or raise --max-ram so that they stay in memory");
    }
  }
};

Activations::Activations() = default;
Activations::~Activations() = default;
Activations::Activations(Activations&&) noexcept = default;
Activations& Activations::operator=(Activations&&) noexcept = default;

Activations::Activations(std::int64_t windows, std::int64_t window_size, const fs::path& folder)
    : windows_(windows), window_size_(window_size) {
  if (folder.empty()) {
    memory_.resize(static_cast<std::size_t>(windows * window_size));
    return;
  }
  static std::atomic<int> made = 0;
  const QuietHdf5 quiet;
  file_ = std::make_unique<File>();
  file_->path = folder / ("activations.tmp-" + std::to_string(::getpid()) + "-" + std::to_string(made++) + ".h5");
  file_->file = Hdf5Handle(H5Fcreate(file_->path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT), H5Fclose);
  const hsize_t shape[2] = {static_cast<hsize_t>(windows), static_cast<hsize_t>(window_size)};
  const Hdf5Handle space(H5Screate_simple(2, shape, nullptr), H5Sclose),
      options(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  H5Pset_fill_time(options, H5D_FILL_TIME_NEVER);
  if (file_->file.valid()) {
    file_->set = Hdf5Handle(
        H5Dcreate2(file_->file, "hidden", H5T_NATIVE_FLOAT, space, H5P_DEFAULT, options, H5P_DEFAULT), H5Dclose);
  }
  std::error_code ignored;
  fs::remove(file_->path, ignored);
  if (!file_->set.valid()) throw failure(folder.string(), "a folder that takes an HDF5 file", "none could be made");
}

void Activations::read(std::int64_t window, float* out) const {
  if (!file_) {
    std::copy_n(memory_.data() + window * window_size_, window_size_, out);
    return;
  }
  file_->transfer(window, window_size_, "read", [&](hid_t here, hid_t there) {
    return H5Dread(file_->set, H5T_NATIVE_FLOAT, here, there, H5P_DEFAULT, out);
  });
}

void Activations::write(std::int64_t window, const float* values) {
  if (!file_) {
    std::copy_n(values, window_size_, memory_.data() + window * window_size_);
    return;
  }
  file_->transfer(window, window_size_, "written", [&](hid_t here, hid_t there) {
    return H5Dwrite(file_->set, H5T_NATIVE_FLOAT, here, there, H5P_DEFAULT, values);
  });
}

}  // namespace pare
