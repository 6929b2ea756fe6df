// GGUF version 3, the container of llama.cpp (ggml docs/gguf.md), little endian, written as its reader demands.
#pragma once

#include <array>
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

// The numbers of ggml.h. Written are all but Q5_0 and IQ4_NL; read are all.
enum class GgmlType : std::uint32_t {
  kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kQ2_K = 10, kQ3_K = 11, kQ4_K = 12,
  kQ5_K = 13, kQ6_K = 14, kIQ4_NL = 20, kBF16 = 30
};
bool is_ggml_type(std::uint32_t number);        // one of these
std::string ggml_type_names();                  // "F32, F16, ..."
const char* ggml_type_name(GgmlType type);      // "Q4_0"
std::int64_t ggml_block_values(GgmlType type);  // values of a block: 1, 32 or 256
std::uint64_t ggml_bytes(GgmlType type, std::int64_t values);
// Values of whole blocks, by the formulas of ggml-quants.c, in single precision.
void ggml_to_f32(GgmlType type, const std::byte* blocks, std::int64_t values, float* out);

// A block of 256 as numbers. Sub-blocks of 16 (Q2_K, Q3_K, Q6_K) or 32: value = d * scale * code - m * minimum, d and m
// halves. Ranges of scale, minimum, code: Q2_K 0-15, 0-15, 0-3; Q3_K -32-31, -, -4-3; Q4_K 0-63, 0-63, 0-15;
// Q5_K 0-63, 0-63, 0-31; Q6_K -128-127, -, -32-31.
struct KBlock {
  std::uint16_t d = 0, m = 0;
  std::array<std::int8_t, 16> scales{}, minima{};  // of the sub-blocks
  std::array<std::int8_t, 256> codes{};
};
void pack_k_block(GgmlType type, const KBlock& block, std::byte* out);
// 32 codes of Q4_1 (0-15) or Q5_1 (0-31): value = code * scale + minimum.
void pack_pair_block(GgmlType type, std::uint16_t scale, std::uint16_t minimum, const std::int8_t* codes, std::byte* out);

struct GgufTensor {
  std::string name;  // at most 63 bytes
  GgmlType type;
  std::vector<std::int64_t> shape;  // row-major as everywhere here: [rows, columns]; the file holds it reversed
  std::uint64_t bytes() const;
};

// Streaming writer: the header first, then the bytes of each tensor in order, each aligned to 32. finish() checks that
// all came and commits. Errors: exit 2 from finish() where a file appeared meanwhile; std::logic_error for duplicate or
// overlong names and rows that are no whole blocks.
class GgufWriter {
 public:
  GgufWriter(fs::path path, const std::vector<std::pair<std::string, GgufValue>>& metadata,
             std::vector<GgufTensor> tensors);
  void write(std::span<const std::byte> bytes);
  void finish();

 private:
  void pad();
  fs::path path_;
  AtomicFile file_;
  std::vector<GgufTensor> tensors_;
  std::size_t current_ = 0;
  std::uint64_t in_tensor_ = 0;
};

// One row of codes as blocks of 32. Q4: values [-8, 7] become q = value + 8; Q8: as they are; Q4_1: minimum m of q4m,
// or -zero * scale of q4a, rounded to half precision. A scale of a longer group is repeated.
// scales: halves of the row's groups; out: ggml_bytes(type, columns) bytes.
void pack_ggml_row(GgmlType type, const QuantizedTensor& tensor, std::int64_t row, std::byte* out);
// Whether -zero * scale of every group is a half: what Q4_1 needs to hold the same weights.
bool minima_are_halves(const QuantizedTensor& tensor);
// The other way: blocks of Q8_0, Q4_0 or Q4_1 as a row of `out`, whose codec (q8, q4, q4a or q4m in groups of 32) and
// sizes are set. false where it cannot hold the same weights, bit for bit but for the signs of zeros in Q8_0 and Q4_0:
// scales or minima that are not finite, Q8_0 with a code of -128, q4a where a minimum is no -0 to -15 scales, q4m where
// a scale is below 0 and minimum + 15 scales, the minimum of the codes the other way round, is no half.
bool unpack_ggml_row(GgmlType type, const std::byte* blocks, QuantizedTensor& out, std::int64_t row);
// Whether all scales and minima of whole blocks of these three types are finite.
bool ggml_scales_are_finite(GgmlType type, const std::byte* blocks, std::int64_t values);

}  // namespace pare
