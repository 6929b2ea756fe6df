// Peaks on aarch64, but for how bytes are multiplied; included by the sources of its instruction sets alone.
#pragma once

#include "runtime/lanes_neon.h"
#include "runtime/roofline.h"

namespace pare {
namespace {

// As many sums as hide the latency of one instruction.
constexpr int kSums = 16;

inline std::uint64_t peak_read(const std::byte* data, std::int64_t lines) {
  const auto* at = reinterpret_cast<const std::uint64_t*>(data);
  uint64x2_t sum[8];
  PARE_UNROLL for (int k = 0; k < 8; ++k) sum[k] = vdupq_n_u64(0);
  std::int64_t i = 0;
  for (; i + 2 <= lines; i += 2, at += 16) {
    PARE_UNROLL for (int k = 0; k < 2; ++k) __builtin_prefetch(at + 128 + k * 8);
    PARE_UNROLL for (int k = 0; k < 8; ++k) sum[k] = vaddq_u64(sum[k], vld1q_u64(at + k * 2));
  }
  if (i < lines) {
    PARE_UNROLL for (int k = 0; k < 4; ++k) sum[k] = vaddq_u64(sum[k], vld1q_u64(at + k * 2));
  }
  PARE_UNROLL for (int k = 1; k < 8; ++k) sum[0] = vaddq_u64(sum[0], sum[k]);
  return vaddvq_u64(sum[0]);
}

// step(sum, a, b) adds products of bytes to a sum of int32.
template <class Step>
std::int64_t peak_int8(std::int64_t rounds, Step step) {
  int32x4_t sum[kSums];
  int8x16_t a = vdupq_n_s8(3);
  const int8x16_t b = vdupq_n_s8(-2);
  PARE_UNROLL for (int k = 0; k < kSums; ++k) sum[k] = vdupq_n_s32(0);
  for (std::int64_t r = 0; r < rounds; ++r) {
    PARE_UNROLL for (int k = 0; k < kSums; ++k) {
      asm volatile("" : "+w"(a));  // else the products would be made once
      sum[k] = step(sum[k], a, b);
    }
  }
  PARE_UNROLL for (int k = 1; k < kSums; ++k) sum[0] = vaddq_s32(sum[0], sum[k]);
  return vaddvq_s32(sum[0]);
}

inline float peak_fma(std::int64_t rounds) {
  float32x4_t sum[kSums], a = vdupq_n_f32(0.5f);
  const float32x4_t b = vdupq_n_f32(0.25f);
  PARE_UNROLL for (int k = 0; k < kSums; ++k) sum[k] = vdupq_n_f32(0);
  for (std::int64_t r = 0; r < rounds; ++r) {
    PARE_UNROLL for (int k = 0; k < kSums; ++k) {
      asm volatile("" : "+w"(a));
      sum[k] = vfmaq_f32(sum[k], a, b);
    }
  }
  PARE_UNROLL for (int k = 1; k < kSums; ++k) sum[0] = vaddq_f32(sum[0], sum[k]);
  return vaddvq_f32(sum[0]);
}
constexpr int kFmaOperations = 2 * 4 * kSums;

}  // namespace
}  // namespace pare
