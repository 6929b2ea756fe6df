// GGUF version 3, the container of llama.cpp (ggml docs/gguf.md), little endian, written as its reader demands.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "core/codec.h"
#include "core/file.h"

namespace pare {

// Values that a header carries here; vectors become arrays.
using GgufValue = std::variant<std::uint32_t, std::int32_t, float, bool, std::string, std::vector<std::string>,
                               std::vector<std::int32_t>, std::vector<float>>;

enum class GgmlType : std::uint32_t { kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ8_0 = 8, kBF16 = 30 };
const char* ggml_type_name(GgmlType type);      // "Q4_0"
std::int64_t ggml_block_values(GgmlType type);  // values of a block: 1 or 32
std::uint64_t ggml_bytes(GgmlType type, std::int64_t values);

struct GgufTensor {
  std::string name;  // at most 63 bytes
  GgmlType type;
  std::vector<std::int64_t> shape;  // row-major as everywhere here: [rows, columns]; the file holds it reversed
  std::uint64_t bytes() const;
};

// Streaming writer: the header first, then the bytes of each tensor in order, each aligned to 32. finish() checks that
// all came and commits. Errors: std::logic_error for duplicate or overlong names and rows that are no whole blocks.
class GgufWriter {
 public:
  GgufWriter(fs::path path, const std::vector<std::pair<std::string, GgufValue>>& metadata,
             std::vector<GgufTensor> tensors);
  void write(std::span<const std::byte> bytes);
  void finish();

 private:
  void pad();
  AtomicFile file_;
  std::vector<GgufTensor> tensors_;
  std::size_t current_ = 0;
  std::uint64_t in_tensor_ = 0;
};

// One row of codes as blocks of 32. Q4: values [-8, 7] become q = value + 8; Q8: as they are; Q4_1: minimum m
// of q4m, or -zero * scale of q4a, which must be exact in half precision (std::logic_error otherwise). A scale of a
// longer group is repeated. scales: halves of the row's groups; out: ggml_bytes(type, columns) bytes.
void pack_ggml_row(GgmlType type, const QuantizedTensor& tensor, std::int64_t row, std::byte* out);
// Whether -zero * scale of every group is a half: what Q4_1 needs.
bool minima_are_halves(const QuantizedTensor& tensor);

}  // namespace pare
