// q2 codes: 2 bits each. One line of 64 bytes holds 16 rows x 16 inputs:
//
//   byte r*4+k             7 6              5 4              3 2              1 0
//   (r < 16, k < 4)   input 16c+12+k | input 16c+8+k  | input 16c+4+k  | input 16c+k of row r
//
// so that `line >> 2j & 3` is a dot-product operand of 4 inputs per 32-bit lane, a lane being a row. u = code + 2.
#include "core/codecs/codecs.h"

namespace pare {
namespace {

constexpr std::int64_t kChunk = 16;  // inputs of one line
constexpr int kOffset = 2;
static_assert(kBlockRows * kChunk * 2 / 8 == kLineBytes);

}  // namespace

std::uint64_t q2_code_bytes(std::int64_t rows, std::int64_t cols) {
  return static_cast<std::uint64_t>(row_blocks(rows) * (cols / kChunk) * kLineBytes);
}

void pack_q2_codes(const QuantizedTensor& tensor, std::span<std::byte> plane) {
  const std::int64_t chunks = tensor.cols / kChunk;
  for (std::int64_t row = 0; row < row_blocks(tensor.rows) * kBlockRows; ++row) {
    std::byte* lines = plane.data() + (row / kBlockRows) * chunks * kLineBytes + (row % kBlockRows) * 4;
    const std::int8_t* codes = row < tensor.rows ? tensor.codes.data() + row * tensor.cols : nullptr;
    for (std::int64_t c = 0; c < chunks; ++c) {
      for (std::int64_t k = 0; k < 4; ++k) {
        int byte = 0;
        for (int j = 0; j < 4; ++j)
          byte |= ((codes == nullptr ? 0 : codes[c * kChunk + 4 * j + k]) + kOffset) << (2 * j);
        lines[c * kLineBytes + k] = static_cast<std::byte>(byte);
      }
    }
  }
}

void unpack_q2_codes(std::span<const std::byte> plane, QuantizedTensor& tensor) {
  const std::int64_t chunks = tensor.cols / kChunk;
  for (std::int64_t row = 0; row < tensor.rows; ++row) {
    const std::byte* lines = plane.data() + (row / kBlockRows) * chunks * kLineBytes + (row % kBlockRows) * 4;
    std::int8_t* codes = tensor.codes.data() + row * tensor.cols;
    for (std::int64_t col = 0; col < tensor.cols; ++col) {
      const int byte = std::to_integer<int>(lines[col / kChunk * kLineBytes + col % 4]);
      codes[col] = static_cast<std::int8_t>((byte >> (col % kChunk / 4 * 2) & 3) - kOffset);
    }
  }
}

}  // namespace pare
