// int8 products with 256-bit registers, for the sources that say what one product is. A 64-byte line of codes is two
// registers of 8 outputs x 4 inputs. `Products` has
//   start(minus128)                  what sums of 8-bit codes begin with
//   add_bytes(sums, codes, inputs)   8-bit codes
//   add_low(sums, u, inputs)         codes of at most 4 bits; add_both(sums, low, x, high, y) two of them
//   widen(sums)                      those sums as 32-bit numbers
// Included by nothing but those sources.
#pragma once

#include <algorithm>
#include <cstring>

#include "runtime/kernels.h"
#include "runtime/lanes_avx2.h"
#include "runtime/stream_x86.h"

namespace pare {
namespace {

inline __m256i load(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

inline __m256 load_scales(const std::uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Zero points of outputs [8 * half, 8 * half + 8) as int32.
inline __m256i load_zeros(const std::uint8_t* p, int half) {
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i nibbles = _mm_and_si128(half == 0 ? raw : _mm_srli_epi16(raw, 4), _mm_set1_epi8(15));
  return _mm256_cvtepu8_epi32(nibbles);
}

inline __m256i quad(const std::int8_t* p) {
  std::int32_t value;
  std::memcpy(&value, p, 4);
  return _mm256_set1_epi32(value);
}

// u of quad j of the 32 inputs whose half lines begin at `line`, for 2 and 3 bits (core/codecs/q2.cpp, q3.cpp).
template <CodecKind kKind>
inline __m256i low_codes(const std::uint8_t* line, int j) {
  const __m256i low = _mm256_and_si256(_mm256_srli_epi16(load(line + j / 4 * 64), j % 4 * 2), _mm256_set1_epi8(3));
  if constexpr (kKind == CodecKind::kQ2) return low;
  const __m256i bits = load(line + 128);
  const __m256i third = j < 2 ? _mm256_slli_epi16(bits, 2 - j) : _mm256_srli_epi16(bits, j - 2);
  return _mm256_or_si256(low, _mm256_and_si256(third, _mm256_set1_epi8(4)));
}

// Few tokens stream the codes once.
template <int kTokens>
inline void stream(const std::uint8_t* line) {
  if constexpr (kTokens <= 2) ask_ahead(line);
}

// kHalves * 8 outputs from 16 * block + 8 * half on, kTokens tokens from token `first` of the tile on. Few tokens take
// both halves at once, so that a line of codes is read once; more tokens need the registers.
template <class Products, CodecKind kKind, int kTokens, int kHalves>
void part_int8(const PackedMatrix& w, std::int64_t block, int half, const Int8Tile& x, std::int64_t first, float* out,
               std::int64_t ldo, bool add) {
  constexpr bool kLow = kKind == CodecKind::kQ3 || kKind == CodecKind::kQ2;
  const std::int64_t width = x.width;
  const auto* line = reinterpret_cast<const std::uint8_t*>(w.data) + block * w.lines * 64 + half * 32;
  const std::uint16_t* scales = w.scales + block * w.groups * kBlockRows + half * 8;
  const std::uint8_t* zeros = kKind == CodecKind::kQ4a ? w.zeros + block * w.groups * 8 : nullptr;
  const std::uint16_t* minima =
      kKind == CodecKind::kQ4m ? w.minima + block * w.groups * kBlockRows + half * 8 : nullptr;
  const std::int8_t* codes = x.codes + first * 4;
  const int shift = w.groups == 1 ? 62 : w.group_shift;
  __m256 sum[kHalves][kTokens];
  PARE_UNROLL for (int h = 0; h < kHalves; ++h) {
    PARE_UNROLL for (int t = 0; t < kTokens; ++t) sum[h][t] = _mm256_setzero_ps();
  }
  for (std::int64_t g = 0; g < x.groups; ++g) {
    const std::int64_t wg = g >> shift;
    const std::int64_t at = g * width + first;
    __m256i acc[kHalves][kTokens];
    PARE_UNROLL for (int h = 0; h < kHalves; ++h) {
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
        acc[h][t] = kKind == CodecKind::kQ8 ? Products::start(x.minus128[at + t]) : _mm256_setzero_si256();
      }
    }
    if constexpr (kKind == CodecKind::kQ8) {
      const std::int64_t count = std::min(x.quads, w.lines - g * x.quads);
      for (std::int64_t c = 0; c < count; ++c, line += 64) {
        stream<kTokens>(line);
        PARE_UNROLL for (int h = 0; h < kHalves; ++h) {
          const __m256i u = load(line + 32 * h);
          PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
            acc[h][t] = Products::add_bytes(acc[h][t], u, quad(codes + (c * width + t) * 4));
          }
        }
      }
    } else {
      if constexpr (kLow) {
        constexpr int kLines = kKind == CodecKind::kQ3 ? 3 : 2;
        PARE_UNROLL for (int k = 0; k < kLines; ++k) stream<kTokens>(line + k * 64);
        PARE_UNROLL for (int j = 0; j < 8; ++j) {
          PARE_UNROLL for (int h = 0; h < kHalves; ++h) {
            const __m256i u = low_codes<kKind>(line + 32 * h, j);
            PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
              acc[h][t] = Products::add_low(acc[h][t], u, quad(codes + (j * width + t) * 4));
            }
          }
        }
        line += kLines * 64;
      } else {
        const __m256i nibble = _mm256_set1_epi8(15);
        PARE_UNROLL for (int c = 0; c < 4; ++c, line += 64) {
          stream<kTokens>(line);
          PARE_UNROLL for (int h = 0; h < kHalves; ++h) {
            const __m256i both = load(line + 32 * h);
            const __m256i low = _mm256_and_si256(both, nibble);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
            PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
              acc[h][t] = Products::add_both(acc[h][t], low, quad(codes + (2 * c * width + t) * 4), high,
                                             quad(codes + ((2 * c + 1) * width + t) * 4));
            }
          }
        }
      }
      PARE_UNROLL for (int h = 0; h < kHalves; ++h) {
        const __m256i zero = kKind == CodecKind::kQ4a ? load_zeros(zeros + wg * 8, half + h) : _mm256_setzero_si256();
        PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
          constexpr int kPart = kKind == CodecKind::kQ3 ? 2 : kKind == CodecKind::kQ2 ? 4 : 1;
          const __m256i offset = kKind == CodecKind::kQ4a ? _mm256_madd_epi16(zero, _mm256_set1_epi32(x.minus1[at + t]))
                                 : kKind == CodecKind::kQ4m ? _mm256_setzero_si256()
                                                            : _mm256_set1_epi32(x.minus8[at + t] / kPart);
          acc[h][t] = _mm256_add_epi32(Products::widen(acc[h][t]), offset);
        }
      }
    }
    codes += (kKind == CodecKind::kQ8 ? x.quads * 4 : kActGroup) * width;
    PARE_UNROLL for (int h = 0; h < kHalves; ++h) {
      const __m256 scale = load_scales(scales + wg * kBlockRows + 8 * h);
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x.scale[at + t]));
        sum[h][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[h][t]), both, sum[h][t]);
      }
      if constexpr (kKind == CodecKind::kQ4m) {
        const __m256 minimum = load_scales(minima + wg * kBlockRows + 8 * h);
        PARE_UNROLL for (int t = 0; t < kTokens; ++t)
          sum[h][t] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(x.input_sum(at + t)), sum[h][t]);
      }
    }
  }
  PARE_UNROLL for (int h = 0; h < kHalves; ++h) {
    const std::int64_t row = block * kBlockRows + (half + h) * 8;
    if (row >= w.rows) return;
    const __m256i mask = tail_mask(w.rows - row);
    PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
      float* to = out + (first + t) * ldo + row;
      _mm256_maskstore_ps(to, mask, add ? _mm256_add_ps(_mm256_maskload_ps(to, mask), sum[h][t]) : sum[h][t]);
    }
  }
}

template <class Products, CodecKind kKind>
void tile_int8(const PackedMatrix& w, std::int64_t block_begin, std::int64_t block_end, const Int8Tile& x, float* out,
               std::int64_t ldo, bool add) {
  for (std::int64_t block = block_begin; block < block_end; ++block) {
    const int halves = w.rows - block * kBlockRows > 8 ? 2 : 1;
    std::int64_t t = 0;
    for (; t + 4 <= x.width; t += 4) {
      for (int half = 0; half < halves; ++half) part_int8<Products, kKind, 4, 1>(w, block, half, x, t, out, ldo, add);
    }
    if (t + 2 <= x.width) {
      part_int8<Products, kKind, 2, 2>(w, block, 0, x, t, out, ldo, add);
      t += 2;
    }
    if (t < x.width) part_int8<Products, kKind, 1, 2>(w, block, 0, x, t, out, ldo, add);
  }
}

template <class Products>
void matmul_int8(const PackedMatrix& w, const Int8Activations& x, std::int64_t tile_begin, std::int64_t tile_end,
                 std::int64_t block_begin, std::int64_t block_end, float* out, std::int64_t ldo, bool add) {
  const auto kernel = w.codec.kind == CodecKind::kQ8    ? tile_int8<Products, CodecKind::kQ8>
                      : w.codec.kind == CodecKind::kQ4  ? tile_int8<Products, CodecKind::kQ4>
                      : w.codec.kind == CodecKind::kQ4a ? tile_int8<Products, CodecKind::kQ4a>
                      : w.codec.kind == CodecKind::kQ4m ? tile_int8<Products, CodecKind::kQ4m>
                      : w.codec.kind == CodecKind::kQ3  ? tile_int8<Products, CodecKind::kQ3>
                                                        : tile_int8<Products, CodecKind::kQ2>;
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    kernel(w, block_begin, block_end, int8_tile(x, tile), out + tile * kActTile * ldo, ldo, add);
  }
}

}  // namespace
}  // namespace pare
