// The products of split_products.h on matrix tiles.
#include "model/split_products.h"

#if defined(__AMX_BF16__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own headers start from undefined registers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>

namespace pare {
namespace {

// A step: 32 values of depth for 32 rows or columns. [half of the value][16 of the 32][16 lines of 64 bytes]. On the
// left a line holds the 32 values of one row, on the right those of depth 2 k and 2 k + 1 of 16 columns.
constexpr std::int64_t kStep = 32, kLine = 64, kTile = 16 * kLine, kStepBytes = 4 * kTile;
constexpr std::int64_t kStripBytes = 1 << 20, kChunkBytes = 1 << 19;  // packed weights and inputs in the second cache

// GCC 12 does not know what memory the instructions below read and write.
#define PARE_IN_MEMORY asm volatile("" ::: "memory")

struct alignas(64) Line {
  std::byte bytes[kLine];
};

struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);

class Tiles {
 public:
  Tiles() {
    const TileShapes shapes;
    PARE_IN_MEMORY;
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// 16 values as their upper halves in dwords; what is left of them.
inline __m512i upper(__m512 x, __m512* rest) {
  const __m512i half = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  *rest = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(half, 16)));
  return half;
}

// Pairs of even and odd values in dwords: both halves.
struct Split {
  __m512i high, low;
};
inline Split split(__m512 even, __m512 odd) {
  __m512 even_rest, odd_rest, none;
  const __m512i e = upper(even, &even_rest), o = upper(odd, &odd_rest);
  const __m512i el = upper(even_rest, &none), ol = upper(odd_rest, &none);
  return {_mm512_or_si512(e, _mm512_slli_epi32(o, 16)), _mm512_or_si512(el, _mm512_slli_epi32(ol, 16))};
}

inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    for (int h = 0; h < 2; ++h) {
      t[i + 8 * h] = _mm512_shuffle_i32x4(r[i + 8 * h], r[i + 4 + 8 * h], 0x88);
      t[i + 4 + 8 * h] = _mm512_shuffle_i32x4(r[i + 8 * h], r[i + 4 + 8 * h], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// A tile of upper halves and one of lower halves in a step.
inline void put(const __m512i* high, const __m512i* low, std::byte* out) {
  for (std::int64_t i = 0; i < 16; ++i) {
    _mm512_store_si512(out + i * kLine, high[i]);
    _mm512_store_si512(out + 2 * kTile + i * kLine, low[i]);
  }
}

// 32 values along a line of memory, `count` of them there, as 16 pairs.
inline Split split_line(const float* x, std::int64_t count) {
  const auto mask = [&](std::int64_t from) {
    return static_cast<__mmask16>((1u << std::clamp<std::int64_t>(count - from, 0, 16)) - 1);
  };
  const __m512 a = _mm512_maskz_loadu_ps(mask(0), x), b = _mm512_maskz_loadu_ps(mask(16), x + 16);
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return split(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
}

// Steps of 32 rows of x [rows][depth] from `first` on, with lines along the depth: the left form, or transposed into
// the right one.
template <bool kRight>
void pack_rows(const float* x, std::int64_t rows, std::int64_t depth, std::int64_t first, std::byte* out) {
  for (std::int64_t k = 0; k < depth; k += kStep, out += kStepBytes) {
    for (std::int64_t half = 0; half < 2; ++half) {
      __m512i high[16], low[16];
      for (std::int64_t i = 0; i < 16; ++i) {
        const std::int64_t row = first + 16 * half + i;
        const Split both = split_line(x + std::min(row, rows - 1) * depth + k, row < rows ? depth - k : 0);
        high[i] = both.high;
        low[i] = both.low;
      }
      if (kRight) {
        transpose(high);
        transpose(low);
      }
      put(high, low, out + half * kTile);
    }
  }
}

#define PARE_PRODUCTS          \
  do {                         \
    _tile_dpbf16ps(0, 4, 6);   \
    _tile_dpbf16ps(1, 4, 7);   \
    _tile_dpbf16ps(2, 5, 6);   \
    _tile_dpbf16ps(3, 5, 7);   \
  } while (false)

// out[32][32] = left right, lines `stride` floats apart.
inline void multiply(const std::byte* left, const std::byte* right, std::int64_t steps, float* out,
                     std::int64_t stride) {
  PARE_IN_MEMORY;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t k = 0; k < steps; ++k, left += kStepBytes, right += kStepBytes) {
    _tile_loadd(4, left + 2 * kTile, kLine);
    _tile_loadd(6, right, kLine);
    _tile_loadd(7, right + kTile, kLine);
    _tile_loadd(5, left + 3 * kTile, kLine);
    PARE_PRODUCTS;
    _tile_loadd(4, left, kLine);
    _tile_loadd(5, left + kTile, kLine);
    PARE_PRODUCTS;
    _tile_loadd(6, right + 2 * kTile, kLine);
    _tile_loadd(7, right + 3 * kTile, kLine);
    PARE_PRODUCTS;
  }
  _tile_stored(0, out, stride * 4);
  _tile_stored(1, out + 16, stride * 4);
  _tile_stored(2, out + 16 * stride, stride * 4);
  _tile_stored(3, out + 16 * stride + 16, stride * 4);
  PARE_IN_MEMORY;
}
#undef PARE_PRODUCTS

std::int64_t steps_of(std::int64_t depth) { return (depth + kStep - 1) / kStep; }

std::int64_t strips_at_once(std::int64_t bytes, std::int64_t strips) {
  return std::clamp<std::int64_t>(kStripBytes / bytes, 1, strips);
}

}  // namespace

std::uint64_t split_product_bytes(std::int64_t rows, std::int64_t depth, std::int64_t outputs) {
  const std::int64_t bytes = steps_of(depth) * kStepBytes;
  return static_cast<std::uint64_t>(((rows + 31) / 32 + strips_at_once(bytes, (outputs + 31) / 32)) * bytes);
}

void split_product(const float* x, std::int64_t rows, std::int64_t depth, const float* w, std::int64_t outputs,
                   float* out, std::int64_t stride) {
  if (rows == 0 || outputs == 0) return;
  const std::int64_t steps = steps_of(depth), bytes = steps * kStepBytes;
  const std::int64_t blocks = (rows + 31) / 32, strips = (outputs + 31) / 32, group = strips_at_once(bytes, strips);
  const std::int64_t chunk = std::clamp<std::int64_t>(kChunkBytes / bytes, 1, blocks);
  const auto space = std::make_unique_for_overwrite<Line[]>(split_product_bytes(rows, depth, outputs) / kLine);
  std::byte* inputs = space[0].bytes;
  std::byte* weights = inputs + blocks * bytes;
  alignas(64) float corner[32 * 32];
  const Tiles tiles;
  for (std::int64_t b = 0; b < blocks; ++b) pack_rows<false>(x, rows, depth, 32 * b, inputs + b * bytes);
  for (std::int64_t begin = 0; begin < strips; begin += group) {
    const std::int64_t end = std::min(begin + group, strips);
    for (std::int64_t s = begin; s < end; ++s)
      pack_rows<true>(w, outputs, depth, 32 * s, weights + (s - begin) * bytes);
    for (std::int64_t first = 0; first < blocks; first += chunk) {
      for (std::int64_t s = begin; s < end; ++s) {
        for (std::int64_t b = first; b < std::min(first + chunk, blocks); ++b) {
          const std::int64_t height = std::min<std::int64_t>(32, rows - 32 * b);
          const std::int64_t width = std::min<std::int64_t>(32, outputs - 32 * s);
          float* place = out + 32 * b * stride + 32 * s;
          const bool whole = height == 32 && width == 32;
          multiply(inputs + b * bytes, weights + (s - begin) * bytes, steps, whole ? place : corner,
                   whole ? stride : 32);
          for (std::int64_t i = 0; !whole && i < height; ++i)
            std::memcpy(place + i * stride, corner + 32 * i, static_cast<std::size_t>(width) * sizeof(float));
        }
      }
    }
  }
}

std::int64_t split_panel_bytes(std::int64_t rows) { return steps_of(rows) * kStepBytes; }

void split_panel(const float* x, std::int64_t rows, std::int64_t columns, std::int64_t first, void* left, void* right) {
  auto* to_left = static_cast<std::byte*>(left);
  auto* to_right = static_cast<std::byte*>(right);
  for (std::int64_t top = 0; top < rows; top += kStep) {
    for (std::int64_t half = 0; half < 2; ++half) {
      const std::int64_t column = first + 16 * half;
      const auto mask = static_cast<__mmask16>((1u << std::clamp<std::int64_t>(columns - column, 0, 16)) - 1);
      const auto load = [&](std::int64_t row) {
        return row < rows && mask != 0 ? _mm512_maskz_loadu_ps(mask, x + row * columns + column) : _mm512_setzero_ps();
      };
      __m512i high[16], low[16];
      for (std::int64_t i = 0; i < 16; ++i) {
        const Split both = split(load(top + 2 * i), load(top + 2 * i + 1));
        high[i] = both.high;
        low[i] = both.low;
      }
      if (right) put(high, low, to_right + half * kTile);
      if (!left) continue;
      transpose(high);
      transpose(low);
      put(high, low, to_left + half * kTile);
    }
    if (left) to_left += kStepBytes;
    if (right) to_right += kStepBytes;
  }
}

void split_panel_product(const void* left, const void* right, std::int64_t rows, float* out) {
  const Tiles tiles;
  multiply(static_cast<const std::byte*>(left), static_cast<const std::byte*>(right), steps_of(rows), out, kSplitPanel);
}

}  // namespace pare
#else
#include <stdexcept>

namespace pare {
namespace {

[[noreturn]] void missing() { throw std::logic_error("split products where has_split_products() is false"); }

}  // namespace

void split_product(const float*, std::int64_t, std::int64_t, const float*, std::int64_t, float*, std::int64_t) {
  missing();
}
std::uint64_t split_product_bytes(std::int64_t, std::int64_t, std::int64_t) { missing(); }
std::int64_t split_panel_bytes(std::int64_t) { missing(); }
void split_panel(const float*, std::int64_t, std::int64_t, std::int64_t, void*, void*) { missing(); }
void split_panel_product(const void*, const void*, std::int64_t, float*) { missing(); }

}  // namespace pare
#endif
