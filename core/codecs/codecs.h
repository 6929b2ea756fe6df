// The kernel-order layouts, one file each; core/codec.cpp dispatches. Common shape (runtime/FORMAT.md section 3):
// rows are taken in blocks of 16 (missing rows have code 0 and scale 0), a plane starts on 64 bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/codec.h"

namespace pare {

inline constexpr std::int64_t kBlockRows = 16;  // rows of one block: one 16-lane int32 register
inline constexpr std::int64_t kLineBytes = 64;  // one cache line, one 512-bit register

constexpr std::uint64_t padded(std::uint64_t bytes) { return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes; }
constexpr std::int64_t row_blocks(std::int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// `plane` has exactly *_code_bytes(rows, cols) bytes.
std::uint64_t q4_code_bytes(std::int64_t rows, std::int64_t cols);
void pack_q4_codes(const QuantizedTensor& tensor, std::span<std::byte> plane);
void unpack_q4_codes(std::span<const std::byte> plane, QuantizedTensor& tensor);

// Zeros of q4a: [row block][group] 8 bytes.
std::uint64_t q4a_zero_bytes(std::int64_t rows, std::int64_t groups);
void pack_q4a_zeros(const QuantizedTensor& tensor, std::span<std::byte> plane);
void unpack_q4a_zeros(std::span<const std::byte> plane, QuantizedTensor& tensor);

std::uint64_t q3_code_bytes(std::int64_t rows, std::int64_t cols);
void pack_q3_codes(const QuantizedTensor& tensor, std::span<std::byte> plane);
void unpack_q3_codes(std::span<const std::byte> plane, QuantizedTensor& tensor);

std::uint64_t q2_code_bytes(std::int64_t rows, std::int64_t cols);
void pack_q2_codes(const QuantizedTensor& tensor, std::span<std::byte> plane);
void unpack_q2_codes(std::span<const std::byte> plane, QuantizedTensor& tensor);

std::uint64_t q8_code_bytes(std::int64_t rows, std::int64_t cols);
void pack_q8_codes(const QuantizedTensor& tensor, std::span<std::byte> plane);
void unpack_q8_codes(std::span<const std::byte> plane, QuantizedTensor& tensor);

}  // namespace pare
