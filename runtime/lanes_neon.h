// Pieces that the NEON sources share; included by nothing else. All of it is in every aarch64.
#pragma once

#include <arm_neon.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace pare {
namespace {

#define PARE_UNROLL _Pragma("GCC unroll 16")

// The first n of 4 numbers, zeros behind them; n may be beyond 4 or below 1.
inline float32x4_t load_first(const float* p, std::int64_t n) {
  if (n >= 4) return vld1q_f32(p);
  float lanes[4] = {};
  if (n > 0) std::memcpy(lanes, p, static_cast<std::size_t>(n) * 4);
  return vld1q_f32(lanes);
}

inline void store_first(float* p, float32x4_t v, std::int64_t n) {
  if (n >= 4) return vst1q_f32(p, v);
  float lanes[4];
  vst1q_f32(lanes, v);
  if (n > 0) std::memcpy(p, lanes, static_cast<std::size_t>(n) * 4);
}

inline float32x4_t load_halves(const std::uint16_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

// 4 bytes, four times.
[[maybe_unused]] inline int8x16_t repeated_quad(const std::int8_t* p) {
  std::int32_t quad;
  std::memcpy(&quad, p, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}

// |x| as bits: NaN above infinity above every number.
inline uint32x4_t magnitude(float32x4_t v) {
  return vreinterpretq_u32_f32(vabsq_f32(v));
}

// What int8 codes with a largest magnitude of these bits are made with: codes are x * inverse.
struct Int8Scale {
  explicit Int8Scale(uint32x4_t peaks) {
    const std::uint32_t largest = vmaxvq_u32(peaks);
    float peak;
    std::memcpy(&peak, &largest, 4);
    finite = largest < 0x7f800000u;
    inverse = finite && peak > 1e-30f ? 127.0f / peak : 0.0f;
    scale = finite ? peak / 127.0f : __builtin_nanf("");
  }
  int32x4_t codes(float32x4_t v) const { return finite ? vcvtnq_s32_f32(vmulq_n_f32(v, inverse)) : vdupq_n_s32(0); }
  bool finite;
  float inverse, scale;
};

// exp(x) = 2^n * e^r, |r| <= ln(2)/2; degree-6 Taylor polynomial of e^r, relative error below 3e-7. x is clamped to
// where the result neither overflows nor needs subnormals. NaN stays.
[[maybe_unused]] inline float32x4_t exp_ps(float32x4_t x) {
  x = vminq_f32(vdupq_n_f32(88.0f), vmaxq_f32(vdupq_n_f32(-87.0f), x));
  const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269504f));
  float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(0.693145752f));
  r = vfmsq_f32(r, n, vdupq_n_f32(1.42860677e-6f));
  float32x4_t p = vdupq_n_f32(1.0f / 720);
  p = vfmaq_f32(vdupq_n_f32(1.0f / 120), p, r);
  p = vfmaq_f32(vdupq_n_f32(1.0f / 24), p, r);
  p = vfmaq_f32(vdupq_n_f32(1.0f / 6), p, r);
  p = vfmaq_f32(vdupq_n_f32(0.5f), p, r);
  p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
  p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
  const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
  return vmulq_f32(p, vreinterpretq_f32_s32(power));
}

}  // namespace
}  // namespace pare
