// A codec is how numbers are laid out in bits. Choosing the numbers is the business of `quantize`.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace pare {

// IEEE half and bfloat16, round to nearest even; NaN stays NaN, with the payload that both types have room for.
float f16_to_f32(std::uint16_t bits);
std::uint16_t f32_to_f16(float value);
float bf16_to_f32(std::uint16_t bits);
std::uint16_t f32_to_bf16(float value);

enum class CodecKind : std::uint8_t {
  kF32, kF16, kBf16,
  kQ8,   // int8 symmetric, code in [-127, 127], w = code * scale
  kQ4,   // int4 symmetric, code in [-8, 7],     w = code * scale
  kQ4a,  // int4 asymmetric, code in [0, 15], zero in [0, 15], w = (code - zero) * scale
  kQ3,   // int3 symmetric, code in [-4, 3],     w = code * scale
  kQ2,   // int2 symmetric, code in [-2, 1],     w = code * scale
  kQ4m,  // int4 with a minimum, code in [0, 15], w = code * scale + minimum: a zero point that is no whole number
};

struct CodeRange {
  int low = 0, high = 0;
};
// Smallest and largest code; 0 and 0 for floats.
CodeRange code_range(CodecKind kind);

// Names: f32 f16 bf16 | q8 (groups of 32) q8c (one scale per row) w8a8 (q8c that wants int8 inputs)
// | q4 = q4g32, q4g64, q4g128 | q4a = q4ag32, ... | q4m = q4mg32, ... | q3 = q3g32, ... | q2 = q2g32, ...
struct Codec {
  CodecKind kind = CodecKind::kF32;
  std::int64_t group = 0;  // inputs per scale; 0 for floats; kPerRow: one scale per row
  // What the linear multiplies with is part of the model too: its inputs rounded to int8, one scale per token
  // (runtime/FORMAT.md section 4). Only with kQ8 and kPerRow.
  bool int8_inputs = false;
  static constexpr std::int64_t kPerRow = -1;

  static Codec parse(std::string_view name, const std::string& place);  // exit 2 with the nearest name
  std::string name() const;
  bool is_float() const { return kind <= CodecKind::kBf16; }
  // The same layout for a tensor that has no inputs to round, such as an embedding.
  Codec layout() const { return {kind, group}; }
  int bits() const;
  int group_bits() const;                                // of a group beside its codes; 0 for floats
  std::int64_t groups(std::int64_t cols) const;          // scales per row; 0 for floats
  bool fits(std::int64_t cols) const;                    // the group divides the row
  // This codec where it fits; else the next smaller group of the kind that does, at last one scale per row at 8 bits.
  Codec fitting(std::int64_t cols) const;
  std::uint64_t payload_bytes(std::int64_t rows, std::int64_t cols) const;  // in the compact file, with padding
  bool operator==(const Codec&) const = default;
};

// A matrix as codes and scales: the truth that every later stage and evaluation unpacks.
struct QuantizedTensor {
  Codec codec;
  std::int64_t rows = 0, cols = 0;
  std::vector<std::int8_t> codes;     // [rows * cols], one code per element
  std::vector<std::uint16_t> scales;  // [rows * groups], IEEE half bits, finite; >= 0, kQ4, kQ3, kQ2: either sign, not -0
  std::vector<std::uint8_t> zeros;    // [rows * groups], kQ4a only
  std::vector<std::uint16_t> minima;  // [rows * groups], IEEE half bits, finite, of either sign; kQ4m only

  // w = float(code - zero) * float(scale), kQ4m: float(code) * float(scale) + float(minimum), where the product is
  // exact: one rounding, the same bits everywhere. out: cols floats.
  void unpack_row(std::int64_t row, float* out) const;
  void unpack(float* out) const;      // rows * cols
  // Throws (exit 3) on code, zero, scale or minimum out of range or sizes that do not agree.
  void validate(const std::string& place) const;
};

// Kernel-order payload of the compact file (runtime/FORMAT.md section 3) <-> QuantizedTensor.
std::vector<std::byte> pack_payload(const QuantizedTensor& tensor);
QuantizedTensor unpack_payload(const Codec& codec, std::int64_t rows, std::int64_t cols,
                               std::span<const std::byte> payload, const std::string& place);

}  // namespace pare
