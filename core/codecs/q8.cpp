// q8 and q8c codes: 8 bits each. One line of 64 bytes holds 16 rows x 4 inputs:
//
//   byte r*4+k (r < 16, k < 4) = uint8(code of input 4c+k of row r + 128)
//
// Unsigned, because the dot-product instructions take one unsigned operand; a missing input or row has code 0, byte 128.
#include "core/codecs/codecs.h"

namespace pare {
namespace {

constexpr std::int64_t kChunk = 4;
static_assert(kBlockRows * kChunk == kLineBytes);

std::int64_t chunks_of(std::int64_t cols) { return (cols + kChunk - 1) / kChunk; }

}  // namespace

std::uint64_t q8_code_bytes(std::int64_t rows, std::int64_t cols) {
  return static_cast<std::uint64_t>(row_blocks(rows) * chunks_of(cols) * kLineBytes);
}

void pack_q8_codes(const QuantizedTensor& tensor, std::span<std::byte> plane) {
  const std::int64_t chunks = chunks_of(tensor.cols);
  for (std::int64_t block = 0; block < row_blocks(tensor.rows); ++block) {
    std::byte* lines = plane.data() + block * chunks * kLineBytes;
    for (std::int64_t r = 0; r < kBlockRows; ++r) {
      const std::int64_t row = block * kBlockRows + r;
      for (std::int64_t col = 0; col < chunks * kChunk; ++col) {
        const bool inside = row < tensor.rows && col < tensor.cols;
        const int code = inside ? tensor.codes[static_cast<std::size_t>(row * tensor.cols + col)] : 0;
        lines[(col / kChunk) * kLineBytes + r * 4 + col % kChunk] = static_cast<std::byte>(code + 128);
      }
    }
  }
}

void unpack_q8_codes(std::span<const std::byte> plane, QuantizedTensor& tensor) {
  const std::int64_t chunks = chunks_of(tensor.cols);
  for (std::int64_t row = 0; row < tensor.rows; ++row) {
    const std::byte* lines = plane.data() + (row / kBlockRows) * chunks * kLineBytes + (row % kBlockRows) * 4;
    std::int8_t* codes = tensor.codes.data() + row * tensor.cols;
    for (std::int64_t col = 0; col < tensor.cols; ++col)
      codes[col] = static_cast<std::int8_t>(std::to_integer<int>(lines[(col / kChunk) * kLineBytes + col % kChunk]) - 128);
  }
}

}  // namespace pare
