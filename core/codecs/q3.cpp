// q3 codes: 3 bits each. Three lines of 64 bytes hold 16 rows x 32 inputs, the low two bits first:
//
//   lines 0, 1: byte r*4+k           7 6             5 4             3 2             1 0
//   (n = line; r < 16, k < 4)   input 16n+12+k | input 16n+8+k | input 16n+4+k | input 16n+k of row r
//
//   line 2: byte r*4+k               7              6              ...             0
//   (the third bit)             input 28+k | input 24+k | ...                 | input k of row r
//
// so that `(low >> 2j & 3) | (high >> j & 1) << 2` is a dot-product operand of 4 inputs per 32-bit lane, a lane being a
// row. u = code + 4.
#include "core/codecs/codecs.h"

namespace pare {
namespace {

constexpr std::int64_t kChunk = 32;  // inputs of three lines
constexpr std::int64_t kLines = 3;
constexpr int kOffset = 4;
static_assert(kBlockRows * kChunk * 3 / 8 == kLines * kLineBytes);

}  // namespace

std::uint64_t q3_code_bytes(std::int64_t rows, std::int64_t cols) {
  return static_cast<std::uint64_t>(row_blocks(rows) * (cols / kChunk) * kLines * kLineBytes);
}

void pack_q3_codes(const QuantizedTensor& tensor, std::span<std::byte> plane) {
  const std::int64_t chunks = tensor.cols / kChunk;
  for (std::int64_t row = 0; row < row_blocks(tensor.rows) * kBlockRows; ++row) {
    std::byte* own = plane.data() + (row / kBlockRows) * chunks * kLines * kLineBytes + (row % kBlockRows) * 4;
    const std::int8_t* codes = row < tensor.rows ? tensor.codes.data() + row * tensor.cols : nullptr;
    for (std::int64_t c = 0; c < chunks; ++c) {
      std::byte* lines = own + c * kLines * kLineBytes;
      for (std::int64_t k = 0; k < 4; ++k) {
        int low[2] = {}, high = 0;
        for (int j = 0; j < 8; ++j) {
          const int u = (codes == nullptr ? 0 : codes[c * kChunk + 4 * j + k]) + kOffset;
          low[j / 4] |= (u & 3) << (j % 4 * 2);
          high |= (u >> 2) << j;
        }
        lines[k] = static_cast<std::byte>(low[0]);
        lines[kLineBytes + k] = static_cast<std::byte>(low[1]);
        lines[2 * kLineBytes + k] = static_cast<std::byte>(high);
      }
    }
  }
}

void unpack_q3_codes(std::span<const std::byte> plane, QuantizedTensor& tensor) {
  const std::int64_t chunks = tensor.cols / kChunk;
  for (std::int64_t row = 0; row < tensor.rows; ++row) {
    const std::byte* own = plane.data() + (row / kBlockRows) * chunks * kLines * kLineBytes + (row % kBlockRows) * 4;
    std::int8_t* codes = tensor.codes.data() + row * tensor.cols;
    for (std::int64_t col = 0; col < tensor.cols; ++col) {
      const std::byte* lines = own + col / kChunk * kLines * kLineBytes;
      const std::int64_t j = col % kChunk / 4, k = col % 4;
      const int low = std::to_integer<int>(lines[j / 4 * kLineBytes + k]) >> (j % 4 * 2) & 3;
      const int high = std::to_integer<int>(lines[2 * kLineBytes + k]) >> j & 1;
      codes[col] = static_cast<std::int8_t>((low | high << 2) - kOffset);
    }
  }
}

}  // namespace pare
