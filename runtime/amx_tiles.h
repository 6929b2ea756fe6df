// Shapes of AMX's tiles; included by the sources of that instruction set alone.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pare {
namespace {

// GCC 12 does not know what memory the instructions of tiles read and write.
#define PARE_IN_MEMORY asm volatile("" ::: "memory")

constexpr std::int64_t kTileRows = 16, kLine = 64;  // of a tile; bytes of a row

struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

// Sums in tiles 0 to 3, left factors in 4 and 5, right ones in 6 and 7.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
  // Rows of tiles 0, 1 and 4, of tiles 2, 3 and 5, and bytes that a row of 4 and 5 has to multiply.
  void shape(std::int64_t first, std::int64_t second, std::int64_t depth) {
    if (first == first_ && second == second_ && depth == depth_) return;
    first_ = first;
    second_ = second;
    depth_ = depth;
    TileShapes shapes;
    const auto set = [&](int tile, std::int64_t rows, std::int64_t bytes) {
      shapes.rows[tile] = static_cast<std::uint8_t>(rows);
      shapes.row_bytes[tile] = static_cast<std::uint16_t>(bytes);
    };
    for (const int tile : {0, 1}) set(tile, first, kLine);
    for (const int tile : {2, 3}) set(tile, second, kLine);
    set(4, first, depth);
    set(5, second, depth);
    for (const int tile : {6, 7}) set(tile, depth / 4, kLine);
    PARE_IN_MEMORY;
    _tile_loadconfig(&shapes);
  }

 private:
  std::int64_t first_ = 0, second_ = 0, depth_ = 0;
};

}  // namespace
}  // namespace pare
