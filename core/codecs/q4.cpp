// q4, q4a and q4m codes: 4 bits each. One line of 64 bytes holds 16 rows x 8 inputs:
//
//   byte r*4+k          7 6 5 4               3 2 1 0
//   (r < 16, k < 4)   input 8c+4+k of row r | input 8c+k of row r
//
// so that `line & 0x0f` and `line >> 4` are two dot-product operands of 4 inputs per 32-bit lane, a lane being a row.
// u = code + 8 for q4 (codes -8..7), u = code for q4a and q4m (codes 0..15).
#include "core/codecs/codecs.h"

namespace pare {
namespace {

constexpr std::int64_t kChunk = 8;  // inputs of one line
static_assert(kBlockRows * kChunk / 2 == kLineBytes);

int offset_of(const QuantizedTensor& tensor) { return tensor.codec.kind == CodecKind::kQ4 ? 8 : 0; }

}  // namespace

std::uint64_t q4_code_bytes(std::int64_t rows, std::int64_t cols) {
  return static_cast<std::uint64_t>(row_blocks(rows) * (cols / kChunk) * kLineBytes);
}

void pack_q4_codes(const QuantizedTensor& tensor, std::span<std::byte> plane) {
  const int offset = offset_of(tensor);
  const std::int64_t chunks = tensor.cols / kChunk;
  for (std::int64_t block = 0; block < row_blocks(tensor.rows); ++block) {
    std::byte* lines = plane.data() + block * chunks * kLineBytes;
    for (std::int64_t r = 0; r < kBlockRows; ++r) {
      const std::int64_t row = block * kBlockRows + r;
      const std::int8_t* codes = row < tensor.rows ? tensor.codes.data() + row * tensor.cols : nullptr;
      for (std::int64_t c = 0; c < chunks; ++c) {
        for (std::int64_t k = 0; k < 4; ++k) {
          const int low = codes == nullptr ? offset : codes[c * kChunk + k] + offset;
          const int high = codes == nullptr ? offset : codes[c * kChunk + 4 + k] + offset;
          lines[c * kLineBytes + r * 4 + k] = static_cast<std::byte>((low & 15) | ((high & 15) << 4));
        }
      }
    }
  }
}

void unpack_q4_codes(std::span<const std::byte> plane, QuantizedTensor& tensor) {
  const int offset = offset_of(tensor);
  const std::int64_t chunks = tensor.cols / kChunk;
  for (std::int64_t row = 0; row < tensor.rows; ++row) {
    const std::byte* lines = plane.data() + (row / kBlockRows) * chunks * kLineBytes + (row % kBlockRows) * 4;
    std::int8_t* codes = tensor.codes.data() + row * tensor.cols;
    for (std::int64_t c = 0; c < chunks; ++c) {
      for (std::int64_t k = 0; k < 4; ++k) {
        const int byte = std::to_integer<int>(lines[c * kLineBytes + k]);
        codes[c * kChunk + k] = static_cast<std::int8_t>((byte & 15) - offset);
        codes[c * kChunk + 4 + k] = static_cast<std::int8_t>((byte >> 4) - offset);
      }
    }
  }
}

}  // namespace pare
