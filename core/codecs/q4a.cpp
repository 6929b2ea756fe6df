// q4a zeros: one 4-bit zero per row and group. The 16 rows of a block share 8 bytes per group:
//
//   byte r      7 6 5 4           3 2 1 0
//   (r < 8)   zero of row r+8 | zero of row r
#include "core/codecs/codecs.h"

namespace pare {
namespace {

constexpr std::int64_t kZeroBytes = 8;
static_assert(kZeroBytes * 2 == kBlockRows);

}  // namespace

std::uint64_t q4a_zero_bytes(std::int64_t rows, std::int64_t groups) {
  return padded(static_cast<std::uint64_t>(row_blocks(rows) * groups * kZeroBytes));
}

void pack_q4a_zeros(const QuantizedTensor& tensor, std::span<std::byte> plane) {
  const std::int64_t groups = tensor.codec.groups(tensor.cols);
  for (std::int64_t block = 0; block < row_blocks(tensor.rows); ++block) {
    for (std::int64_t g = 0; g < groups; ++g) {
      for (std::int64_t r = 0; r < kZeroBytes; ++r) {
        const std::int64_t low = block * kBlockRows + r, high = low + kZeroBytes;
        const int a = low < tensor.rows ? tensor.zeros[static_cast<std::size_t>(low * groups + g)] : 0;
        const int b = high < tensor.rows ? tensor.zeros[static_cast<std::size_t>(high * groups + g)] : 0;
        plane[static_cast<std::size_t>((block * groups + g) * kZeroBytes + r)] = static_cast<std::byte>(a | (b << 4));
      }
    }
  }
}

void unpack_q4a_zeros(std::span<const std::byte> plane, QuantizedTensor& tensor) {
  const std::int64_t groups = tensor.codec.groups(tensor.cols);
  for (std::int64_t row = 0; row < tensor.rows; ++row) {
    const std::int64_t block = row / kBlockRows, r = row % kBlockRows;
    for (std::int64_t g = 0; g < groups; ++g) {
      const int byte = std::to_integer<int>(plane[static_cast<std::size_t>((block * groups + g) * kZeroBytes + r % kZeroBytes)]);
      tensor.zeros[static_cast<std::size_t>(row * groups + g)] =
          static_cast<std::uint8_t>(r < kZeroBytes ? byte & 15 : byte >> 4);
    }
  }
}

}  // namespace pare
