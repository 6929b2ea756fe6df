// Peaks with AVX-512 and VNNI: one instruction multiplies and adds 64 pairs of bytes.
#if defined(__AVX512VNNI__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own headers start from undefined registers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <numeric>

#include "runtime/roofline.h"
#include "runtime/stream_x86.h"

namespace pare {
namespace {

#define PARE_UNROLL _Pragma("GCC unroll 16")

constexpr int kSums = 16;

std::uint64_t read(const std::byte* data, std::int64_t lines) {
  __m512i sum[8];
  PARE_UNROLL for (int k = 0; k < 8; ++k) sum[k] = _mm512_setzero_si512();
  std::int64_t i = 0;
  for (; i + 8 <= lines; i += 8) {
    PARE_UNROLL for (int k = 0; k < 8; ++k) {
      ask_ahead(data + (i + k) * 64);
      sum[k] = _mm512_add_epi64(sum[k], _mm512_load_si512(data + (i + k) * 64));
    }
  }
  for (; i < lines; ++i) sum[0] = _mm512_add_epi64(sum[0], _mm512_load_si512(data + i * 64));
  PARE_UNROLL for (int k = 1; k < 8; ++k) sum[0] = _mm512_add_epi64(sum[0], sum[k]);
  alignas(64) std::uint64_t words[8];
  _mm512_store_si512(words, sum[0]);
  return std::accumulate(words, words + 8, std::uint64_t{0});  // unsigned: it may wrap
}

std::int64_t int8(std::int64_t rounds) {
  __m512i sum[kSums], a = _mm512_set1_epi8(3);
  const __m512i b = _mm512_set1_epi8(-2);
  PARE_UNROLL for (int k = 0; k < kSums; ++k) sum[k] = _mm512_setzero_si512();
  for (std::int64_t r = 0; r < rounds; ++r) {
    PARE_UNROLL for (int k = 0; k < kSums; ++k) {
      asm volatile("" : "+v"(a));  // else the products would be made once
      sum[k] = _mm512_dpbusd_epi32(sum[k], a, b);
    }
  }
  PARE_UNROLL for (int k = 1; k < kSums; ++k) sum[0] = _mm512_add_epi32(sum[0], sum[k]);
  return _mm512_reduce_add_epi32(sum[0]);
}

float fma(std::int64_t rounds) {
  __m512 sum[kSums], a = _mm512_set1_ps(0.5f);
  const __m512 b = _mm512_set1_ps(0.25f);
  PARE_UNROLL for (int k = 0; k < kSums; ++k) sum[k] = _mm512_setzero_ps();
  for (std::int64_t r = 0; r < rounds; ++r) {
    PARE_UNROLL for (int k = 0; k < kSums; ++k) {
      asm volatile("" : "+v"(a));
      sum[k] = _mm512_fmadd_ps(a, b, sum[k]);
    }
  }
  PARE_UNROLL for (int k = 1; k < kSums; ++k) sum[0] = _mm512_add_ps(sum[0], sum[k]);
  return _mm512_reduce_add_ps(sum[0]);
}

}  // namespace

const PeakLoops kAvx512VnniPeaks = {"avx512vnni", read, int8, 2 * 64 * kSums, fma, 2 * 16 * kSums};

}  // namespace pare
#endif
