// 256-bit registers with VNNI: the AVX2 kernels with products by vpdpbusd, whose sums are 32 bits wide at once. Compiled
// with the instruction's short coding (AVX-VNNI, processors without AVX-512) here, and with the long one (AVX-512VL) by
// kernels_avxvnni_long.cpp; both give the bits of the AVX2 kernels.
#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#include "runtime/int8_products_avx2.h"

#ifndef PARE_VNNI_CODING
#define PARE_VNNI_CODING kAvxVnniShort
#endif

namespace pare {
namespace {

struct QuadProducts {
  static __m256i start(std::int32_t minus128) { return _mm256_set1_epi32(minus128); }
  static __m256i add_bytes(__m256i sums, __m256i codes, __m256i x) { return _mm256_dpbusd_epi32(sums, codes, x); }
  static __m256i add_low(__m256i sums, __m256i u, __m256i x) { return _mm256_dpbusd_epi32(sums, u, x); }
  static __m256i add_both(__m256i sums, __m256i low, __m256i x, __m256i high, __m256i y) {
    return _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(sums, low, x), high, y);
  }
  static __m256i widen(__m256i sums) { return sums; }
};

constexpr int kSums = 12;  // as in roofline_avx2.cpp

std::int64_t int8(std::int64_t rounds) {
  __m256i sum[kSums], a = _mm256_set1_epi8(3);
  const __m256i b = _mm256_set1_epi8(-2);
  PARE_UNROLL for (int k = 0; k < kSums; ++k) sum[k] = _mm256_setzero_si256();
  for (std::int64_t r = 0; r < rounds; ++r) {
    PARE_UNROLL for (int k = 0; k < kSums; ++k) {
      asm volatile("" : "+x"(a));  // else the products would be made once
      sum[k] = _mm256_dpbusd_epi32(sum[k], a, b);
    }
  }
  PARE_UNROLL for (int k = 1; k < kSums; ++k) sum[0] = _mm256_add_epi32(sum[0], sum[k]);
  alignas(32) std::uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum[0]);
  std::uint32_t all = 0;
  for (const std::uint32_t lane : lanes) all += lane;
  return static_cast<std::int32_t>(all);
}

}  // namespace

const Int8Products PARE_VNNI_CODING = {matmul_int8<QuadProducts>, nullptr, int8, 2 * 32 * kSums};

}  // namespace pare
#endif
