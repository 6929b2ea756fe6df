// AVX-512 with VNNI. One 64-byte line of codes is one register: 16 outputs x 4 inputs (x 2 for 4-bit codes), and one
// vpdpbusd adds its products with 4 int8 inputs broadcast to all outputs.
#if defined(__AVX512VNNI__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own intrinsics headers start from undefined registers and warn about it.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime/int8_avx512vnni.h"
#include "runtime/kernels.h"
#include "runtime/lanes_avx512vnni.h"
#include "runtime/stream_x86.h"

namespace pare {
namespace {

inline __m512i quad(const std::int8_t* p) {
  std::int32_t value;
  std::memcpy(&value, p, 4);
  return _mm512_set1_epi32(value);
}

// Few tokens stream the codes once; where full tiles pass by, the codes stay in cache.
template <int kTokens>
inline void stream(const std::uint8_t* line) {
  if constexpr (kTokens < kActTile) ask_ahead(line);
}

template <CodecKind kKind, int kTokens>
void tile_int8(const PackedMatrix& w, std::int64_t block, const Int8Tile& x, float* out, std::int64_t ldo, bool add) {
  constexpr bool kLow = kKind == CodecKind::kQ3 || kKind == CodecKind::kQ2;
  const auto* line = reinterpret_cast<const std::uint8_t*>(w.data) + block * w.lines * 64;
  const std::uint16_t* scales = w.scales + block * w.groups * kBlockRows;
  const std::uint8_t* zeros = kKind == CodecKind::kQ4a ? w.zeros + block * w.groups * 8 : nullptr;
  const std::uint16_t* minima = kKind == CodecKind::kQ4m ? w.minima + block * w.groups * kBlockRows : nullptr;
  const std::int8_t* codes = x.codes;
  const int shift = w.groups == 1 ? 62 : w.group_shift;
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512 sum[kTokens];
  PARE_UNROLL for (int t = 0; t < kTokens; ++t) sum[t] = _mm512_setzero_ps();
  for (std::int64_t g = 0; g < x.groups; ++g) {
    const std::int64_t wg = g >> shift;
    __m512i acc[kTokens];
    if constexpr (kKind == CodecKind::kQ8) {
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) acc[t] = _mm512_set1_epi32(x.minus128[g * kTokens + t]);
    } else if constexpr (kKind == CodecKind::kQ4) {
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) acc[t] = _mm512_set1_epi32(x.minus8[g * kTokens + t]);
    } else if constexpr (kLow) {
      constexpr int kPart = kKind == CodecKind::kQ3 ? 2 : 4;
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) acc[t] = _mm512_set1_epi32(x.minus8[g * kTokens + t] / kPart);
    } else if constexpr (kKind == CodecKind::kQ4m) {
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) acc[t] = _mm512_setzero_si512();
    } else {
      const __m512i zero = load_zeros(zeros + wg * 8);
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
        acc[t] = _mm512_madd_epi16(zero, _mm512_set1_epi32(x.minus1[g * kTokens + t]));
      }
    }
    if constexpr (kKind == CodecKind::kQ8) {
      const std::int64_t count = std::min(x.quads, w.lines - g * x.quads);
      for (std::int64_t c = 0; c < count; ++c, line += 64) {
        stream<kTokens>(line);
        const __m512i u = _mm512_load_si512(line);
        PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
          acc[t] = _mm512_dpbusd_epi32(acc[t], u, quad(codes + (c * kTokens + t) * 4));
        }
      }
    } else if constexpr (kLow) {
      constexpr int kLines = kKind == CodecKind::kQ3 ? 3 : 2;
      PARE_UNROLL for (int k = 0; k < kLines; ++k) stream<kTokens>(line + k * 64);
      PARE_UNROLL for (int j = 0; j < 8; ++j) {
        const __m512i u = low_codes<kKind>(line, j);
        PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
          acc[t] = _mm512_dpbusd_epi32(acc[t], u, quad(codes + (j * kTokens + t) * 4));
        }
      }
      line += kLines * 64;
    } else {
      PARE_UNROLL for (int c = 0; c < 4; ++c, line += 64) {
        stream<kTokens>(line);
        const __m512i both = _mm512_load_si512(line);
        const __m512i low = _mm512_and_si512(both, nibble);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
        PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
          acc[t] = _mm512_dpbusd_epi32(acc[t], low, quad(codes + (2 * c * kTokens + t) * 4));
        }
        PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
          acc[t] = _mm512_dpbusd_epi32(acc[t], high, quad(codes + ((2 * c + 1) * kTokens + t) * 4));
        }
      }
    }
    codes += (kKind == CodecKind::kQ8 ? x.quads * 4 : kActGroup) * kTokens;
    const __m512 scale = load_scales(scales + wg * kBlockRows);
    PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scale[g * kTokens + t]));
      sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[t]), both, sum[t]);
    }
    if constexpr (kKind == CodecKind::kQ4m) {
      const __m512 minimum = load_scales(minima + wg * kBlockRows);
      PARE_UNROLL for (int t = 0; t < kTokens; ++t)
        sum[t] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(x.input_sum(g * kTokens + t)), sum[t]);
    }
  }
  const __mmask16 mask = tail_mask(w.rows - block * kBlockRows);
  out += block * kBlockRows;
  PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
    float* to = out + t * ldo;
    _mm512_mask_storeu_ps(to, mask, add ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum[t]) : sum[t]);
  }
}

using TileInt8 = void (*)(const PackedMatrix&, std::int64_t, const Int8Tile&, float*, std::int64_t, bool);
template <CodecKind kKind>
TileInt8 tile_for(std::int64_t width) {
  static constexpr TileInt8 kTable[kActTile] = {tile_int8<kKind, 1>,  tile_int8<kKind, 2>,  tile_int8<kKind, 3>,
                                                tile_int8<kKind, 4>,  tile_int8<kKind, 5>,  tile_int8<kKind, 6>,
                                                tile_int8<kKind, 7>,  tile_int8<kKind, 8>,  tile_int8<kKind, 9>,
                                                tile_int8<kKind, 10>, tile_int8<kKind, 11>, tile_int8<kKind, 12>};
  return kTable[width - 1];
}

void matmul_int8(const PackedMatrix& w, const Int8Activations& x, std::int64_t tile_begin, std::int64_t tile_end,
                 std::int64_t block_begin, std::int64_t block_end, float* out, std::int64_t ldo, bool add) {
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const Int8Tile view = int8_tile(x, tile);
    const TileInt8 kernel = w.codec.kind == CodecKind::kQ8    ? tile_for<CodecKind::kQ8>(view.width)
                            : w.codec.kind == CodecKind::kQ4  ? tile_for<CodecKind::kQ4>(view.width)
                            : w.codec.kind == CodecKind::kQ4a ? tile_for<CodecKind::kQ4a>(view.width)
                            : w.codec.kind == CodecKind::kQ4m ? tile_for<CodecKind::kQ4m>(view.width)
                            : w.codec.kind == CodecKind::kQ3  ? tile_for<CodecKind::kQ3>(view.width)
                                                              : tile_for<CodecKind::kQ2>(view.width);
    float* to = out + tile * kActTile * ldo;
    for (std::int64_t block = block_begin; block < block_end; ++block) kernel(w, block, view, to, ldo, add);
  }
}

void quantize_tokens(const float* x, std::int64_t ldx, std::int64_t tile, Int8Activations& to) {
  const std::int64_t width = std::min(kActTile, to.tokens - tile * kActTile);
  const std::int64_t base = tile * kActTile * to.groups;
  for (std::int64_t t = 0; t < width; ++t) {
    const float* row = x + (tile * kActTile + t) * ldx;
    const TokenScale scale = token_scale(row, to.cols);
    std::int8_t* codes = to.codes.data() + tile * kActTile * to.padded + t * 4;
    for (std::int64_t g = 0; g < to.groups; ++g) {
      __m512i total = _mm512_setzero_si512();
      for (std::int64_t i = g * kRowSpan; i < std::min(to.padded, (g + 1) * kRowSpan); i += 16) {
        const __m512i q = scale.codes(row, i, to.cols);
        total = _mm512_add_epi32(total, q);
        alignas(16) std::int32_t quads[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(quads), _mm512_cvtsepi32_epi8(q));
        for (int k = 0; k < 4; ++k) std::memcpy(codes + (i / 4 + k) * width * 4, quads + k, 4);
      }
      const auto at = static_cast<std::size_t>(base + g * width + t);
      to.scale[at] = scale.scale;
      to.minus128[at] = -128 * _mm512_reduce_add_epi32(total);
    }
  }
}

void quantize_tile(const float* x, std::int64_t ldx, std::int64_t tile, Int8Activations& to) {
  if (to.form == Int8Activations::Form::kToken) return quantize_tokens(x, ldx, tile, to);
  const std::int64_t width = std::min(kActTile, to.tokens - tile * kActTile);
  const std::int64_t base = tile * kActTile * to.groups;
  for (std::int64_t t = 0; t < width; ++t) {
    const float* row = x + (tile * kActTile + t) * ldx;
    for (std::int64_t g = 0; g < to.groups; ++g) {
      const QuantizedGroup group = quantize_group(row + g * kActGroup, std::min(kActGroup, to.cols - g * kActGroup));
      alignas(32) std::int32_t quads[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(quads), group.codes);
      std::int8_t* codes = to.codes.data() + base * kActGroup + (g * 8 * width + t) * 4;
      for (int k = 0; k < 8; ++k) std::memcpy(codes + k * width * 4, quads + k, 4);
      const auto at = static_cast<std::size_t>(base + g * width + t);
      to.scale[at] = group.scale;
      to.minus8[at] = -8 * group.sum;
      to.minus128[at] = -128 * group.sum;
      to.minus1[at] = static_cast<std::int32_t>(static_cast<std::uint16_t>(-group.sum));
    }
  }
}

// Float activations, quantized codes: a row block is unpacked to panel[input][16 outputs].
template <CodecKind kKind>
void unpack_panel(const PackedMatrix& w, std::int64_t block, float* panel) {
  const auto* line = reinterpret_cast<const std::uint8_t*>(w.data) + block * w.lines * 64;
  const std::int64_t per_group = w.groups == 1 ? w.lines : w.lines / w.groups;
  const __m512i low_byte = _mm512_set1_epi32(kKind == CodecKind::kQ8 ? 255 : 15);
  for (std::int64_t g = 0; g < w.groups; ++g) {
    const __m512 scale = load_scales(w.scales + (block * w.groups + g) * kBlockRows);
    __m512i offset = _mm512_setzero_si512();
    if constexpr (kKind == CodecKind::kQ8) offset = _mm512_set1_epi32(128);
    if constexpr (kKind == CodecKind::kQ4) offset = _mm512_set1_epi32(8);
    if constexpr (kKind == CodecKind::kQ3) offset = _mm512_set1_epi32(4);
    if constexpr (kKind == CodecKind::kQ2) offset = _mm512_set1_epi32(2);
    if constexpr (kKind == CodecKind::kQ4a) offset = load_zeros(w.zeros + (block * w.groups + g) * 8);
    const auto put = [&](__m512i codes) {
      if constexpr (kKind == CodecKind::kQ4m) {
        const __m512 minimum = load_scales(w.minima + (block * w.groups + g) * kBlockRows);
        _mm512_store_ps(panel, _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), scale, minimum));
        panel += 16;
        return;
      }
      _mm512_store_ps(panel, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(codes, offset)), scale));
      panel += 16;
    };
    if constexpr (kKind == CodecKind::kQ3 || kKind == CodecKind::kQ2) {
      constexpr std::int64_t kLines = kKind == CodecKind::kQ3 ? 3 : 2;
      for (std::int64_t c = 0; c < per_group; c += kLines, line += kLines * 64) {
        for (int j = 0; j < 8; ++j) {
          const __m512i codes = low_codes<kKind>(line, j);
          for (unsigned k = 0; k < 4; ++k) put(_mm512_and_si512(_mm512_srli_epi32(codes, 8 * k), _mm512_set1_epi32(7)));
        }
      }
      continue;
    }
    for (std::int64_t c = 0; c < per_group; ++c, line += 64) {
      const __m512i codes = _mm512_load_si512(line);
      put(_mm512_and_si512(codes, low_byte));
      put(_mm512_and_si512(_mm512_srli_epi32(codes, 8), low_byte));
      put(_mm512_and_si512(_mm512_srli_epi32(codes, 16), low_byte));
      put(_mm512_and_si512(_mm512_srli_epi32(codes, 24), low_byte));
      if constexpr (kKind != CodecKind::kQ8) {
        put(_mm512_and_si512(_mm512_srli_epi32(codes, 4), low_byte));
        put(_mm512_and_si512(_mm512_srli_epi32(codes, 12), low_byte));
        put(_mm512_and_si512(_mm512_srli_epi32(codes, 20), low_byte));
        put(_mm512_srli_epi32(codes, 28));
      }
    }
  }
}

// 16 outputs x kTokens; four partial sums an output (inputs k mod 4) keep the chains short.
template <int kTokens>
void panel_tile(const float* panel, std::int64_t cols, const float* x, std::int64_t ldx, float* out, std::int64_t ldo,
                __mmask16 mask, bool add) {
  __m512 sum[kTokens][4];
  PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
    PARE_UNROLL for (int k = 0; k < 4; ++k) sum[t][k] = _mm512_setzero_ps();
  }
  for (std::int64_t c = 0; c + 4 <= cols; c += 4) {
    PARE_UNROLL for (int k = 0; k < 4; ++k) {
      const __m512 w = _mm512_load_ps(panel + (c + k) * 16);
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
        sum[t][k] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[t * ldx + c + k]), sum[t][k]);
      }
    }
  }
  for (std::int64_t c = cols & ~std::int64_t{3}; c < cols; ++c) {
    const __m512 w = _mm512_load_ps(panel + c * 16);
    PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
      sum[t][0] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[t * ldx + c]), sum[t][0]);
    }
  }
  PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
    const __m512 total = _mm512_add_ps(_mm512_add_ps(sum[t][0], sum[t][1]), _mm512_add_ps(sum[t][2], sum[t][3]));
    float* to = out + t * ldo;
    _mm512_mask_storeu_ps(to, mask, add ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), total) : total);
  }
}

// Row-major float weights: kRows x kTokens dot products along the inputs, 16 partial sums each.
struct LoadF32 {
  static constexpr int kBytes = 4;
  static __m512 full(const std::byte* p) { return _mm512_loadu_ps(p); }
  static __m512 part(const std::byte* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
};
struct LoadF16 {
  static constexpr int kBytes = 2;
  static __m512 full(const std::byte* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static __m512 part(const std::byte* p, __mmask16 m) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
};
struct LoadBf16 {
  static constexpr int kBytes = 2;
  static __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
  static __m512 full(const std::byte* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static __m512 part(const std::byte* p, __mmask16 m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
};

template <class Load, int kRows, int kTokens>
void dot_tile(const std::byte* w, std::int64_t cols, const float* x, std::int64_t ldx, float* out, std::int64_t ldo,
              bool add) {
  const std::int64_t pitch = cols * Load::kBytes;
  __m512 sum[kRows][kTokens];
  PARE_UNROLL for (int r = 0; r < kRows; ++r) {
    PARE_UNROLL for (int t = 0; t < kTokens; ++t) sum[r][t] = _mm512_setzero_ps();
  }
  std::int64_t c = 0;
  for (; c + 16 <= cols; c += 16) {
    __m512 xs[kTokens];
    PARE_UNROLL for (int t = 0; t < kTokens; ++t) xs[t] = _mm512_loadu_ps(x + t * ldx + c);
    PARE_UNROLL for (int r = 0; r < kRows; ++r) {
      const __m512 ws = Load::full(w + r * pitch + c * Load::kBytes);
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) sum[r][t] = _mm512_fmadd_ps(ws, xs[t], sum[r][t]);
    }
  }
  if (c < cols) {
    const __mmask16 mask = tail_mask(cols - c);
    PARE_UNROLL for (int r = 0; r < kRows; ++r) {
      const __m512 ws = Load::part(w + r * pitch + c * Load::kBytes, mask);
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
        sum[r][t] = _mm512_fmadd_ps(ws, _mm512_maskz_loadu_ps(mask, x + t * ldx + c), sum[r][t]);
      }
    }
  }
  PARE_UNROLL for (int r = 0; r < kRows; ++r) {
    PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
      const float value = _mm512_reduce_add_ps(sum[r][t]);
      float& to = out[t * ldo + r];
      to = add ? to + value : value;
    }
  }
}

template <class Load, int kRows>
void dot_rows(const std::byte* w, std::int64_t cols, const float* x, std::int64_t ldx, std::int64_t tokens, float* out,
              std::int64_t ldo, bool add) {
  std::int64_t t = 0;
  constexpr int kWide = kRows >= 8 ? 3 : 6;
  for (; t + kWide <= tokens; t += kWide) {
    dot_tile<Load, kRows, kWide>(w, cols, x + t * ldx, ldx, out + t * ldo, ldo, add);
  }
  if (tokens - t >= 3) {
    dot_tile<Load, kRows, 3>(w, cols, x + t * ldx, ldx, out + t * ldo, ldo, add);
    t += 3;
  }
  if (tokens - t == 2) dot_tile<Load, kRows, 2>(w, cols, x + t * ldx, ldx, out + t * ldo, ldo, add);
  if (tokens - t == 1) dot_tile<Load, kRows, 1>(w, cols, x + t * ldx, ldx, out + t * ldo, ldo, add);
}

template <class Load>
void matmul_rows(const PackedMatrix& w, const float* x, std::int64_t ldx, std::int64_t tokens, std::int64_t block_begin,
                 std::int64_t block_end, float* out, std::int64_t ldo, bool add) {
  const std::int64_t end = std::min(block_end * kBlockRows, w.rows);
  std::int64_t r = block_begin * kBlockRows;
  const auto row = [&](std::int64_t i) { return w.data + i * w.cols * Load::kBytes; };
  if (tokens < 6) {
    for (; r + 8 <= end; r += 8) dot_rows<Load, 8>(row(r), w.cols, x, ldx, tokens, out + r, ldo, add);
  }
  for (; r + 4 <= end; r += 4) dot_rows<Load, 4>(row(r), w.cols, x, ldx, tokens, out + r, ldo, add);
  for (; r < end; ++r) dot_rows<Load, 1>(row(r), w.cols, x, ldx, tokens, out + r, ldo, add);
}

void matmul_float(const PackedMatrix& w, const float* x, std::int64_t ldx, std::int64_t tokens,
                  std::int64_t block_begin, std::int64_t block_end, float* out, std::int64_t ldo, bool add,
                  float* scratch) {
  switch (w.codec.kind) {
    case CodecKind::kF32:
      return matmul_rows<LoadF32>(w, x, ldx, tokens, block_begin, block_end, out, ldo, add);
    case CodecKind::kF16:
      return matmul_rows<LoadF16>(w, x, ldx, tokens, block_begin, block_end, out, ldo, add);
    case CodecKind::kBf16:
      return matmul_rows<LoadBf16>(w, x, ldx, tokens, block_begin, block_end, out, ldo, add);
    default:
      break;
  }
  for (std::int64_t block = block_begin; block < block_end; ++block) {
    if (w.codec.kind == CodecKind::kQ8) unpack_panel<CodecKind::kQ8>(w, block, scratch);
    if (w.codec.kind == CodecKind::kQ4) unpack_panel<CodecKind::kQ4>(w, block, scratch);
    if (w.codec.kind == CodecKind::kQ4a) unpack_panel<CodecKind::kQ4a>(w, block, scratch);
    if (w.codec.kind == CodecKind::kQ4m) unpack_panel<CodecKind::kQ4m>(w, block, scratch);
    if (w.codec.kind == CodecKind::kQ3) unpack_panel<CodecKind::kQ3>(w, block, scratch);
    if (w.codec.kind == CodecKind::kQ2) unpack_panel<CodecKind::kQ2>(w, block, scratch);
    const __mmask16 mask = tail_mask(w.rows - block * kBlockRows);
    float* to = out + block * kBlockRows;
    std::int64_t t = 0;
    for (; t + 6 <= tokens; t += 6) panel_tile<6>(scratch, w.cols, x + t * ldx, ldx, to + t * ldo, ldo, mask, add);
    for (; t + 2 <= tokens; t += 2) panel_tile<2>(scratch, w.cols, x + t * ldx, ldx, to + t * ldo, ldo, mask, add);
    if (t < tokens) panel_tile<1>(scratch, w.cols, x + t * ldx, ldx, to + t * ldo, ldo, mask, add);
  }
}

void rms_norm(const float* x, const float* weight, float eps, std::int64_t n, float* out) {
  __m512 sum = _mm512_setzero_ps();
  for (std::int64_t i = 0; i < n; i += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(tail_mask(n - i), x + i);
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  const float mean = _mm512_reduce_add_ps(sum) / static_cast<float>(n);
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
  for (std::int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = tail_mask(n - i);
    const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), scale);
    _mm512_mask_storeu_ps(out + i, m, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(m, weight + i)));
  }
}

void silu_mul(float* gate, const float* up, std::int64_t n) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (std::int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = tail_mask(n - i);
    const __m512 g = _mm512_maskz_loadu_ps(m, gate + i);
    const __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), g));
    const __m512 y = _mm512_div_ps(g, _mm512_add_ps(one, e));
    _mm512_mask_storeu_ps(gate + i, m, _mm512_mul_ps(y, _mm512_maskz_loadu_ps(m, up + i)));
  }
}

void gelu_mul(float* gate, const float* up, std::int64_t n) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (std::int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = tail_mask(n - i);
    const __m512 g = _mm512_maskz_loadu_ps(m, gate + i);
    const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(g, g), _mm512_set1_ps(kGeluCubic), one);
    const __m512 e = exp_ps(_mm512_mul_ps(_mm512_mul_ps(g, cubic), _mm512_set1_ps(-kGeluScale)));
    const __m512 y = _mm512_div_ps(g, _mm512_add_ps(one, e));
    _mm512_mask_storeu_ps(gate + i, m, _mm512_mul_ps(y, _mm512_maskz_loadu_ps(m, up + i)));
  }
}

void gelu_tanh(float* x, std::int64_t n) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (std::int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = tail_mask(n - i);
    const __m512 g = _mm512_maskz_loadu_ps(m, x + i);
    const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(g, g), _mm512_set1_ps(kGeluCubic), one);
    const __m512 e = exp_ps(_mm512_mul_ps(_mm512_mul_ps(g, cubic), _mm512_set1_ps(-kGeluScale)));
    _mm512_mask_storeu_ps(x + i, m, _mm512_div_ps(g, _mm512_add_ps(one, e)));
  }
}

void gelu(float* x, std::int64_t n) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (std::int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = tail_mask(n - i);
    const __m512 v = _mm512_maskz_loadu_ps(m, x + i);
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(v), _mm512_set1_ps(0.70710678f));
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(kErfP), one));
    __m512 p = _mm512_set1_ps(kErfA[4]);
    for (int k = 3; k >= 0; --k) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(kErfA[k]));
    const __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z)));
    const __m512 half = _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(p, t), e), _mm512_set1_ps(0.5f));  // erfc(z) / 2
    const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(v));
    const __m512 share = _mm512_mask_mov_ps(_mm512_sub_ps(one, half), negative, half);
    _mm512_mask_storeu_ps(x + i, m, _mm512_mul_ps(v, share));
  }
}

void soft_cap(float* x, float cap, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 16) {  // c tanh(v / c) = c - 2 c / (exp(2 v / c) + 1)
    const __mmask16 m = tail_mask(n - i);
    const __m512 e = exp_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), _mm512_set1_ps(2.0f / cap)));
    const __m512 part = _mm512_div_ps(_mm512_set1_ps(2.0f * cap), _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
    _mm512_mask_storeu_ps(x + i, m, _mm512_sub_ps(_mm512_set1_ps(cap), part));
  }
}

}  // namespace

const Kernels kAvx512VnniKernels = {"avx512vnni", matmul_float, matmul_int8, quantize_tile, rms_norm,
                                    silu_mul,     gelu_mul,     gelu_tanh,   gelu,          soft_cap,
                                    &kAvx512VnniAttention};

}  // namespace pare
#endif
