// AVX2 with FMA and F16C. Products are formed by vpmaddubsw, whose 16-bit sums cannot saturate here: 4-bit codes give
// at most 8 * 2 * 15 * 127 = 30,480 for a whole group, and 8-bit ones are multiplied as |w| * sign(x, w), at most
// 2 * 128 * 127 = 32,512, and widened at once.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime/int8_products_avx2.h"

namespace pare {
namespace {

struct PairProducts {
  static __m256i start(std::int32_t) { return _mm256_setzero_si256(); }
  static __m256i add_bytes(__m256i sums, __m256i codes, __m256i x) {
    const __m256i w = _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80)));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static __m256i add_low(__m256i sums, __m256i u, __m256i x) {
    return _mm256_add_epi16(sums, _mm256_maddubs_epi16(u, x));
  }
  static __m256i add_both(__m256i sums, __m256i low, __m256i x, __m256i high, __m256i y) {
    return _mm256_add_epi16(sums, _mm256_add_epi16(_mm256_maddubs_epi16(low, x), _mm256_maddubs_epi16(high, y)));
  }
  static __m256i widen(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
};

inline int reduce_max(__m256i v) {
  __m128i top = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1));
  return _mm_cvtsi128_si32(top);
}

inline std::int32_t reduce_add(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

void quantize_tokens(const float* x, std::int64_t ldx, std::int64_t tile, Int8Activations& to) {
  const std::int64_t width = std::min(kActTile, to.tokens - tile * kActTile);
  const std::int64_t base = tile * kActTile * to.groups;
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (std::int64_t t = 0; t < width; ++t) {
    const float* row = x + (tile * kActTile + t) * ldx;
    __m256i peaks = _mm256_setzero_si256();
    for (std::int64_t i = 0; i < to.cols; i += 8) {
      const __m256 v = _mm256_maskload_ps(row + i, tail_mask(to.cols - i));
      peaks = _mm256_max_epi32(peaks, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
    }
    const int largest = reduce_max(peaks);
    float peak;
    std::memcpy(&peak, &largest, 4);
    const bool finite = largest < 0x7f800000;
    const __m256 inverse = _mm256_set1_ps(finite && peak > 1e-30f ? 127.0f / peak : 0.0f);
    std::int8_t* codes = to.codes.data() + tile * kActTile * to.padded + t * 4;
    for (std::int64_t g = 0; g < to.groups; ++g) {
      __m256i total = _mm256_setzero_si256();
      for (std::int64_t i = g * kRowSpan; i < std::min(to.padded, (g + 1) * kRowSpan); i += 8) {
        __m256i q = _mm256_setzero_si256();
        if (i < to.cols && finite)
          q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_maskload_ps(row + i, tail_mask(to.cols - i)), inverse));
        total = _mm256_add_epi32(total, q);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
        std::int32_t quads[2];
        _mm_storel_epi64(reinterpret_cast<__m128i*>(quads), _mm_packs_epi16(words, words));
        for (int k = 0; k < 2; ++k) std::memcpy(codes + (i / 4 + k) * width * 4, quads + k, 4);
      }
      const auto at = static_cast<std::size_t>(base + g * width + t);
      to.scale[at] = finite ? peak / 127.0f : __builtin_nanf("");
      to.minus128[at] = -128 * reduce_add(total);
    }
  }
}

void quantize_tile(const float* x, std::int64_t ldx, std::int64_t tile, Int8Activations& to) {
  if (to.form == Int8Activations::Form::kToken) return quantize_tokens(x, ldx, tile, to);
  const std::int64_t width = std::min(kActTile, to.tokens - tile * kActTile);
  const std::int64_t base = tile * kActTile * to.groups;
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (std::int64_t t = 0; t < width; ++t) {
    const float* row = x + (tile * kActTile + t) * ldx;
    for (std::int64_t g = 0; g < to.groups; ++g) {
      const std::int64_t count = std::min(kActGroup, to.cols - g * kActGroup);
      __m256 v[4];
      __m256i peaks = _mm256_setzero_si256();
      for (int k = 0; k < 4; ++k) {
        v[k] = _mm256_maskload_ps(row + g * kActGroup + std::min<std::int64_t>(8 * k, count), tail_mask(count - 8 * k));
        peaks = _mm256_max_epi32(peaks, _mm256_and_si256(_mm256_castps_si256(v[k]), magnitude));
      }
      const int largest = reduce_max(peaks);
      float peak;
      std::memcpy(&peak, &largest, 4);
      const bool finite = largest < 0x7f800000;
      const __m256 inverse = _mm256_set1_ps(finite && peak > 1e-30f ? 127.0f / peak : 0.0f);
      __m256i total = _mm256_setzero_si256();
      alignas(16) std::int32_t quads[8];
      for (int k = 0; k < 4; ++k) {
        __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(v[k], inverse));
        if (!finite) q = _mm256_setzero_si256();
        total = _mm256_add_epi32(total, q);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(quads + 2 * k), _mm_packs_epi16(words, words));
      }
      const std::int32_t sum = reduce_add(total);
      std::int8_t* codes = to.codes.data() + base * kActGroup + (g * 8 * width + t) * 4;
      for (int k = 0; k < 8; ++k) std::memcpy(codes + k * width * 4, quads + k, 4);
      const auto at = static_cast<std::size_t>(base + g * width + t);
      to.scale[at] = finite ? peak / 127.0f : __builtin_nanf("");
      to.minus8[at] = -8 * sum;
      to.minus128[at] = -128 * sum;
      to.minus1[at] = static_cast<std::int32_t>(static_cast<std::uint16_t>(-sum));
    }
  }
}

// Float activations, quantized codes: a row block is unpacked to panel[input][16 outputs].
template <CodecKind kKind>
void unpack_panel(const PackedMatrix& w, std::int64_t block, float* panel) {
  const std::int64_t per_group = w.groups == 1 ? w.lines : w.lines / w.groups;
  const __m256i low_byte = _mm256_set1_epi32(kKind == CodecKind::kQ8 ? 255 : 15);
  for (int half = 0; half < 2; ++half) {
    const auto* line = reinterpret_cast<const std::uint8_t*>(w.data) + block * w.lines * 64 + half * 32;
    float* to = panel + half * 8;
    for (std::int64_t g = 0; g < w.groups; ++g) {
      const __m256 scale = load_scales(w.scales + (block * w.groups + g) * kBlockRows + half * 8);
      __m256i offset = _mm256_setzero_si256();
      if constexpr (kKind == CodecKind::kQ8) offset = _mm256_set1_epi32(128);
      if constexpr (kKind == CodecKind::kQ4) offset = _mm256_set1_epi32(8);
      if constexpr (kKind == CodecKind::kQ3) offset = _mm256_set1_epi32(4);
      if constexpr (kKind == CodecKind::kQ2) offset = _mm256_set1_epi32(2);
      if constexpr (kKind == CodecKind::kQ4a) offset = load_zeros(w.zeros + (block * w.groups + g) * 8, half);
      const auto put = [&](__m256i codes) {
        codes = _mm256_and_si256(codes, low_byte);
        if constexpr (kKind == CodecKind::kQ4m) {
          const __m256 minimum = load_scales(w.minima + (block * w.groups + g) * kBlockRows + half * 8);
          _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), scale, minimum));
          to += 16;
          return;
        }
        _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(codes, offset)), scale));
        to += 16;
      };
      if constexpr (kKind == CodecKind::kQ3 || kKind == CodecKind::kQ2) {
        constexpr std::int64_t kLines = kKind == CodecKind::kQ3 ? 3 : 2;
        for (std::int64_t c = 0; c < per_group; c += kLines, line += kLines * 64) {
          for (int j = 0; j < 8; ++j) {
            const __m256i codes = low_codes<kKind>(line, j);
            for (int k = 0; k < 4; ++k) put(_mm256_srli_epi32(codes, 8 * k));
          }
        }
        continue;
      }
      for (std::int64_t c = 0; c < per_group; ++c, line += 64) {
        const __m256i codes = load(line);
        put(codes);
        put(_mm256_srli_epi32(codes, 8));
        put(_mm256_srli_epi32(codes, 16));
        put(_mm256_srli_epi32(codes, 24));
        if constexpr (kKind != CodecKind::kQ8) {
          put(_mm256_srli_epi32(codes, 4));
          put(_mm256_srli_epi32(codes, 12));
          put(_mm256_srli_epi32(codes, 20));
          put(_mm256_srli_epi32(codes, 28));
        }
      }
    }
  }
}

// 16 outputs x kTokens; two partial sums an output (inputs k mod 2) keep the chains short.
template <int kTokens>
void panel_tile(const float* panel, std::int64_t cols, const float* x, std::int64_t ldx, float* out, std::int64_t ldo,
                std::int64_t rows, bool add) {
  __m256 sum[kTokens][2][2];
  PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
    PARE_UNROLL for (int k = 0; k < 2; ++k) sum[t][k][0] = sum[t][k][1] = _mm256_setzero_ps();
  }
  const auto step = [&](std::int64_t c, int k) {
    const __m256 w0 = _mm256_loadu_ps(panel + c * 16);
    const __m256 w1 = _mm256_loadu_ps(panel + c * 16 + 8);
    PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
      const __m256 value = _mm256_broadcast_ss(x + t * ldx + c);
      sum[t][k][0] = _mm256_fmadd_ps(w0, value, sum[t][k][0]);
      sum[t][k][1] = _mm256_fmadd_ps(w1, value, sum[t][k][1]);
    }
  };
  std::int64_t c = 0;
  for (; c + 2 <= cols; c += 2) {
    step(c, 0);
    step(c + 1, 1);
  }
  if (c < cols) step(c, 0);
  PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
    for (int half = 0; half < 2; ++half) {
      const __m256i mask = tail_mask(rows - 8 * half);
      const __m256 total = _mm256_add_ps(sum[t][0][half], sum[t][1][half]);
      float* to = out + t * ldo + 8 * half;
      _mm256_maskstore_ps(to, mask, add ? _mm256_add_ps(_mm256_maskload_ps(to, mask), total) : total);
    }
  }
}

// Row-major float weights: kRows x kTokens dot products along the inputs, 8 partial sums each.
inline __m128i partial_u16(const std::byte* p, std::int64_t n) {
  alignas(16) std::uint16_t buffer[8] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(n) * 2);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
struct LoadF32 {
  static constexpr int kBytes = 4;
  static __m256 full(const std::byte* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static __m256 part(const std::byte* p, std::int64_t n) {
    return _mm256_maskload_ps(reinterpret_cast<const float*>(p), tail_mask(n));
  }
};
struct LoadF16 {
  static constexpr int kBytes = 2;
  static __m256 full(const std::byte* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m256 part(const std::byte* p, std::int64_t n) { return _mm256_cvtph_ps(partial_u16(p, n)); }
};
struct LoadBf16 {
  static constexpr int kBytes = 2;
  static __m256 widen(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
  static __m256 full(const std::byte* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static __m256 part(const std::byte* p, std::int64_t n) { return widen(partial_u16(p, n)); }
};

template <class Load, int kRows, int kTokens>
void dot_tile(const std::byte* w, std::int64_t cols, const float* x, std::int64_t ldx, float* out, std::int64_t ldo,
              bool add) {
  const std::int64_t pitch = cols * Load::kBytes;
  __m256 sum[kRows][kTokens];
  PARE_UNROLL for (int r = 0; r < kRows; ++r) {
    PARE_UNROLL for (int t = 0; t < kTokens; ++t) sum[r][t] = _mm256_setzero_ps();
  }
  std::int64_t c = 0;
  for (; c + 8 <= cols; c += 8) {
    __m256 xs[kTokens];
    PARE_UNROLL for (int t = 0; t < kTokens; ++t) xs[t] = _mm256_loadu_ps(x + t * ldx + c);
    PARE_UNROLL for (int r = 0; r < kRows; ++r) {
      const __m256 ws = Load::full(w + r * pitch + c * Load::kBytes);
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) sum[r][t] = _mm256_fmadd_ps(ws, xs[t], sum[r][t]);
    }
  }
  if (c < cols) {
    const __m256i mask = tail_mask(cols - c);
    PARE_UNROLL for (int r = 0; r < kRows; ++r) {
      const __m256 ws = Load::part(w + r * pitch + c * Load::kBytes, cols - c);
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
        sum[r][t] = _mm256_fmadd_ps(ws, _mm256_maskload_ps(x + t * ldx + c, mask), sum[r][t]);
      }
    }
  }
  PARE_UNROLL for (int r = 0; r < kRows; ++r) {
    PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
      const float value = reduce_add(sum[r][t]);
      float& to = out[t * ldo + r];
      to = add ? to + value : value;
    }
  }
}

template <class Load, int kRows>
void dot_rows(const std::byte* w, std::int64_t cols, const float* x, std::int64_t ldx, std::int64_t tokens, float* out,
              std::int64_t ldo, bool add) {
  std::int64_t t = 0;
  for (; t + 3 <= tokens; t += 3) dot_tile<Load, kRows, 3>(w, cols, x + t * ldx, ldx, out + t * ldo, ldo, add);
  for (; t < tokens; ++t) dot_tile<Load, kRows, 1>(w, cols, x + t * ldx, ldx, out + t * ldo, ldo, add);
}

template <class Load>
void matmul_rows(const PackedMatrix& w, const float* x, std::int64_t ldx, std::int64_t tokens, std::int64_t block_begin,
                 std::int64_t block_end, float* out, std::int64_t ldo, bool add) {
  const std::int64_t end = std::min(block_end * kBlockRows, w.rows);
  std::int64_t r = block_begin * kBlockRows;
  const auto row = [&](std::int64_t i) { return w.data + i * w.cols * Load::kBytes; };
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
    const std::int64_t rows = w.rows - block * kBlockRows;
    float* to = out + block * kBlockRows;
    std::int64_t t = 0;
    for (; t + 3 <= tokens; t += 3) panel_tile<3>(scratch, w.cols, x + t * ldx, ldx, to + t * ldo, ldo, rows, add);
    for (; t < tokens; ++t) panel_tile<1>(scratch, w.cols, x + t * ldx, ldx, to + t * ldo, ldo, rows, add);
  }
}

void rms_norm(const float* x, const float* weight, float eps, std::int64_t n, float* out) {
  __m256 sum = _mm256_setzero_ps();
  for (std::int64_t i = 0; i < n; i += 8) {
    const __m256 v = _mm256_maskload_ps(x + i, tail_mask(n - i));
    sum = _mm256_fmadd_ps(v, v, sum);
  }
  const float mean = reduce_add(sum) / static_cast<float>(n);
  const __m256 scale = _mm256_set1_ps(1.0f / std::sqrt(mean + eps));
  for (std::int64_t i = 0; i < n; i += 8) {
    const __m256i m = tail_mask(n - i);
    const __m256 v = _mm256_mul_ps(_mm256_maskload_ps(x + i, m), scale);
    _mm256_maskstore_ps(out + i, m, _mm256_mul_ps(v, _mm256_maskload_ps(weight + i, m)));
  }
}

void silu_mul(float* gate, const float* up, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 8) {
    const __m256i m = tail_mask(n - i);
    const __m256 g = _mm256_maskload_ps(gate + i, m);
    const __m256 e = exp_ps(_mm256_sub_ps(_mm256_setzero_ps(), g));
    const __m256 y = _mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.0f), e));
    _mm256_maskstore_ps(gate + i, m, _mm256_mul_ps(y, _mm256_maskload_ps(up + i, m)));
  }
}

void gelu_mul(float* gate, const float* up, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 8) {
    const __m256i m = tail_mask(n - i);
    const __m256 g = _mm256_maskload_ps(gate + i, m);
    const __m256 cubic = _mm256_fmadd_ps(_mm256_mul_ps(g, g), _mm256_set1_ps(kGeluCubic), _mm256_set1_ps(1.0f));
    const __m256 e = exp_ps(_mm256_mul_ps(_mm256_mul_ps(g, cubic), _mm256_set1_ps(-kGeluScale)));
    const __m256 y = _mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.0f), e));
    _mm256_maskstore_ps(gate + i, m, _mm256_mul_ps(y, _mm256_maskload_ps(up + i, m)));
  }
}

void gelu_tanh(float* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 8) {
    const __m256i m = tail_mask(n - i);
    const __m256 g = _mm256_maskload_ps(x + i, m);
    const __m256 cubic = _mm256_fmadd_ps(_mm256_mul_ps(g, g), _mm256_set1_ps(kGeluCubic), _mm256_set1_ps(1.0f));
    const __m256 e = exp_ps(_mm256_mul_ps(_mm256_mul_ps(g, cubic), _mm256_set1_ps(-kGeluScale)));
    _mm256_maskstore_ps(x + i, m, _mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.0f), e)));
  }
}

void gelu(float* x, std::int64_t n) {
  const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
  for (std::int64_t i = 0; i < n; i += 8) {
    const __m256i m = tail_mask(n - i);
    const __m256 v = _mm256_maskload_ps(x + i, m);
    const __m256 z = _mm256_mul_ps(_mm256_andnot_ps(sign, v), _mm256_set1_ps(0.70710678f));
    const __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(z, _mm256_set1_ps(kErfP), one));
    __m256 p = _mm256_set1_ps(kErfA[4]);
    for (int k = 3; k >= 0; --k) p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(kErfA[k]));
    const __m256 e = exp_ps(_mm256_xor_ps(_mm256_mul_ps(z, z), sign));
    const __m256 half = _mm256_mul_ps(_mm256_mul_ps(_mm256_mul_ps(p, t), e), _mm256_set1_ps(0.5f));  // erfc(z) / 2
    const __m256 share = _mm256_blendv_ps(_mm256_sub_ps(one, half), half, v);  // by the sign of v
    _mm256_maskstore_ps(x + i, m, _mm256_mul_ps(v, share));
  }
}

void soft_cap(float* x, float cap, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 8) {  // c tanh(v / c) = c - 2 c / (exp(2 v / c) + 1)
    const __m256i m = tail_mask(n - i);
    const __m256 e = exp_ps(_mm256_mul_ps(_mm256_maskload_ps(x + i, m), _mm256_set1_ps(2.0f / cap)));
    const __m256 part = _mm256_div_ps(_mm256_set1_ps(2.0f * cap), _mm256_add_ps(e, _mm256_set1_ps(1.0f)));
    _mm256_maskstore_ps(x + i, m, _mm256_sub_ps(_mm256_set1_ps(cap), part));
  }
}

}  // namespace

const Kernels kAvx2Kernels = {"avx2",   matmul_float, matmul_int8<PairProducts>, quantize_tile, rms_norm, silu_mul,
                              gelu_mul, gelu_tanh,    gelu,                      soft_cap,      &kAvx2Attention};

}  // namespace pare
#endif
