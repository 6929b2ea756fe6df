// Hidden states of calibration windows, one fixed-size piece of floats a window: in memory, or in an HDF5 file where
// memory is short. No LibTorch types here.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/file.h"

namespace pare {

class Activations {
 public:
  Activations();
  // folder: empty for memory; else an HDF5 file is made there, which has no name any more once it is open, so that not
  // even a kill leaves it behind. Error: exit 1 where it cannot be made.
  Activations(std::int64_t windows, std::int64_t window_size, const fs::path& folder);
  ~Activations();
  Activations(Activations&&) noexcept;
  Activations& operator=(Activations&&) noexcept;

  bool empty() const { return windows_ == 0; }
  // Where a window stands in memory; null when it stands in the file.
  float* in_memory(std::int64_t window) { return memory_.empty() ? nullptr : memory_.data() + window * window_size_; }
  // Any thread. Errors: exit 1 when the disk is full or fails.
  void read(std::int64_t window, float* out) const;
  void write(std::int64_t window, const float* values);

 private:
  struct File;
  std::int64_t windows_ = 0, window_size_ = 0;
  std::vector<float> memory_;
  std::unique_ptr<File> file_;
};

}  // namespace pare
