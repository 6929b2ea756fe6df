// What the byte products of AVX-512 and of AMX share; included by nothing else.
#pragma once

#include <algorithm>
#include <cstring>

#include "runtime/kernels.h"
#include "runtime/lanes_avx512vnni.h"

namespace pare {
namespace {

inline __m512 load_scales(const std::uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// 8 bytes of nibbles -> 16 int32 zero points.
inline __m512i load_zeros(const std::uint8_t* p) {
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i both = _mm_unpacklo_epi64(_mm_and_si128(raw, mask), _mm_and_si128(_mm_srli_epi16(raw, 4), mask));
  return _mm512_cvtepu8_epi32(both);
}

// u of quad j of the 32 inputs that begin at `line`, for 2 and 3 bits (core/codecs/q2.cpp, q3.cpp).
template <CodecKind kKind>
inline __m512i low_codes(const std::uint8_t* line, int j) {
  const __m512i pairs = _mm512_load_si512(line + j / 4 * 64);
  const __m512i low = _mm512_and_si512(_mm512_srli_epi16(pairs, static_cast<unsigned>(j % 4 * 2)), _mm512_set1_epi8(3));
  if constexpr (kKind == CodecKind::kQ2) return low;
  const __m512i bits = _mm512_load_si512(line + 128);
  const __m512i third = j < 2 ? _mm512_slli_epi16(bits, static_cast<unsigned>(2 - j))
                              : _mm512_srli_epi16(bits, static_cast<unsigned>(j - 2));
  return _mm512_or_si512(low, _mm512_and_si512(third, _mm512_set1_epi8(4)));
}

// Codes and scale of up to 32 inputs (Int8Activations).
struct QuantizedGroup {
  __m256i codes;
  float scale;
  std::int32_t sum;  // of the codes
};
inline QuantizedGroup quantize_group(const float* in, std::int64_t count) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const __m512 a = _mm512_maskz_loadu_ps(tail_mask(count), in);
  const __m512 b = count > 16 ? _mm512_maskz_loadu_ps(tail_mask(count - 16), in + 16) : _mm512_setzero_ps();
  const int largest = _mm512_reduce_max_epi32(_mm512_max_epi32(
      _mm512_and_si512(_mm512_castps_si512(a), magnitude), _mm512_and_si512(_mm512_castps_si512(b), magnitude)));
  float peak;
  std::memcpy(&peak, &largest, 4);
  const bool finite = largest < 0x7f800000;
  const __m512 inverse = _mm512_set1_ps(finite && peak > 1e-30f ? 127.0f / peak : 0.0f);
  __m512i ia = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
  __m512i ib = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
  if (!finite) ia = ib = _mm512_setzero_si512();
  return {_mm256_set_m128i(_mm512_cvtsepi32_epi8(ib), _mm512_cvtsepi32_epi8(ia)),
          finite ? peak / 127.0f : __builtin_nanf(""), _mm512_reduce_add_epi32(_mm512_add_epi32(ia, ib))};
}

// The one scale of a token's inputs, and 16 codes from input i on; beyond the last of them 0.
struct TokenScale {
  float scale, inverse;
  bool finite;
  __m512i codes(const float* row, std::int64_t i, std::int64_t cols) const {
    if (i >= cols || !finite) return _mm512_setzero_si512();
    return _mm512_cvtps_epi32(
        _mm512_mul_ps(_mm512_maskz_loadu_ps(tail_mask(cols - i), row + i), _mm512_set1_ps(inverse)));
  }
};
inline TokenScale token_scale(const float* row, std::int64_t cols) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i peaks = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < cols; i += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(tail_mask(cols - i), row + i);
    peaks = _mm512_max_epi32(peaks, _mm512_and_si512(_mm512_castps_si512(v), magnitude));
  }
  const int largest = _mm512_reduce_max_epi32(peaks);
  float peak;
  std::memcpy(&peak, &largest, 4);
  const bool finite = largest < 0x7f800000;
  return {finite ? peak / 127.0f : __builtin_nanf(""), finite && peak > 1e-30f ? 127.0f / peak : 0.0f, finite};
}

}  // namespace
}  // namespace pare
