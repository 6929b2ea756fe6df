// safetensors, strictly: https://github.com/huggingface/safetensors (format section of its README).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/file.h"
#include "core/json.h"

namespace pare {

enum class DType : std::uint8_t {
  kBool, kU8, kI8, kF8E5M2, kF8E4M3, kF8E8M0, kF8E4M3Fnuz, kF8E5M2Fnuz, kI16, kU16, kF16, kBF16, kI32, kU32, kF32,
  kF64, kI64, kU64, kC64, kF4, kF6E2M3, kF6E3M2
};
int dtype_bits(DType dtype);
const char* dtype_name(DType dtype);                              // "BF16"
DType parse_dtype(std::string_view name, const std::string& place);

// A view into a mapping: never owns. `data` has no alignment guarantee: read elements with memcpy.
struct TensorView {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;
  std::int64_t elements() const;
};

std::string shape_text(const std::vector<std::int64_t>& shape);  // "[4, 64]"

// F32/F16/BF16/F64 elements [first, first + count) to float, whatever the alignment. Other dtypes: exit 3.
void to_f32(const TensorView& view, std::int64_t first, std::int64_t count, float* out);

// One mapped file. Opening applies every rule of the reference reader and refuses duplicate keys.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const fs::path& path);
  const std::vector<TensorView>& tensors() const { return tensors_; }  // in data order
  const TensorView* find(std::string_view name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  std::uint64_t data_begin() const { return data_begin_; }
  const MappedFile& file() const { return file_; }

 private:
  MappedFile file_;
  std::vector<TensorView> tensors_;
  std::map<std::string, std::size_t, std::less<>> by_name_;
  std::map<std::string, std::string> metadata_;
  std::uint64_t data_begin_ = 0;
};

struct TensorDecl {
  std::string name;
  DType dtype;
  std::vector<std::int64_t> shape;
  std::uint64_t bytes() const;
};

// The 8-byte length and the JSON header, padded with spaces so that the data starts on 64 bytes and the header takes
// at least `reserve` bytes. Tensors follow each other in the order given.
std::string safetensors_header(const std::vector<TensorDecl>& tensors, const std::map<std::string, std::string>& metadata,
                               std::size_t reserve = 0);

// Streaming writer: the header is written first from the declarations, then the data of each tensor in the order
// given here, in as many write() calls as wanted. finish() checks that every byte arrived and commits.
class SafetensorsWriter {
 public:
  SafetensorsWriter(fs::path path, std::vector<TensorDecl> tensors, const std::map<std::string, std::string>& metadata);
  void write(std::span<const std::byte> bytes);
  void finish();

 private:
  AtomicFile file_;
  fs::path path_;
  std::uint64_t expected_ = 0;  // size of the complete file
};

// The tensors of a model folder: model.safetensors, or model.safetensors.index.json with its shards. Validates the
// index (file exists, every mapped name is in its file, no path separators or ..; total_size is advisory).
class ShardedTensors {
 public:
  explicit ShardedTensors(const fs::path& folder);
  const TensorView* find(std::string_view name) const;
  std::vector<std::string> names() const;
  const std::vector<std::shared_ptr<SafetensorsFile>>& files() const { return files_; }

 private:
  std::vector<std::shared_ptr<SafetensorsFile>> files_;
  std::map<std::string, const TensorView*, std::less<>> by_name_;
};

}  // namespace pare
