// Peaks with AVX2: without a dot product of bytes, three instructions multiply and add 32 pairs.
#if defined(__AVX2__)
#include <immintrin.h>

#include "runtime/roofline.h"
#include "runtime/stream_x86.h"

namespace pare {
namespace {

#define PARE_UNROLL _Pragma("GCC unroll 16")

// As many sums as hide the latency of one instruction and leave registers for the operands.
constexpr int kSums = 12;

std::uint64_t read(const std::byte* data, std::int64_t lines) {
  __m256i sum[8];
  PARE_UNROLL for (int k = 0; k < 8; ++k) sum[k] = _mm256_setzero_si256();
  const auto* at = reinterpret_cast<const __m256i*>(data);
  std::int64_t i = 0;
  for (; i + 4 <= lines; i += 4, at += 8) {
    PARE_UNROLL for (int k = 0; k < 4; ++k) ask_ahead(at + 2 * k);
    PARE_UNROLL for (int k = 0; k < 8; ++k) sum[k] = _mm256_add_epi64(sum[k], _mm256_load_si256(at + k));
  }
  for (; i < lines; ++i, at += 2) {
    PARE_UNROLL for (int k = 0; k < 2; ++k) sum[k] = _mm256_add_epi64(sum[k], _mm256_load_si256(at + k));
  }
  PARE_UNROLL for (int k = 1; k < 8; ++k) sum[0] = _mm256_add_epi64(sum[0], sum[k]);
  alignas(32) std::uint64_t words[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), sum[0]);
  return words[0] + words[1] + words[2] + words[3];
}

std::int64_t int8(std::int64_t rounds) {
  __m256i sum[kSums], a = _mm256_set1_epi8(3);
  const __m256i b = _mm256_set1_epi8(-2), ones = _mm256_set1_epi16(1);
  PARE_UNROLL for (int k = 0; k < kSums; ++k) sum[k] = _mm256_setzero_si256();
  for (std::int64_t r = 0; r < rounds; ++r) {
    PARE_UNROLL for (int k = 0; k < kSums; ++k) {
      asm volatile("" : "+x"(a));  // else the products would be made once
      sum[k] = _mm256_add_epi32(sum[k], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
    }
  }
  PARE_UNROLL for (int k = 1; k < kSums; ++k) sum[0] = _mm256_add_epi32(sum[0], sum[k]);
  alignas(32) std::uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum[0]);
  std::uint32_t all = 0;
  for (const std::uint32_t lane : lanes) all += lane;
  return static_cast<std::int32_t>(all);
}

float fma(std::int64_t rounds) {
  __m256 sum[kSums], a = _mm256_set1_ps(0.5f);
  const __m256 b = _mm256_set1_ps(0.25f);
  PARE_UNROLL for (int k = 0; k < kSums; ++k) sum[k] = _mm256_setzero_ps();
  for (std::int64_t r = 0; r < rounds; ++r) {
    PARE_UNROLL for (int k = 0; k < kSums; ++k) {
      asm volatile("" : "+x"(a));
      sum[k] = _mm256_fmadd_ps(a, b, sum[k]);
    }
  }
  PARE_UNROLL for (int k = 1; k < kSums; ++k) sum[0] = _mm256_add_ps(sum[0], sum[k]);
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, sum[0]);
  float all = 0;
  for (const float lane : lanes) all += lane;
  return all;
}

}  // namespace

const PeakLoops kAvx2Peaks = {"avx2", read, int8, 2 * 32 * kSums, fma, 2 * 8 * kSums};

}  // namespace pare
#endif
