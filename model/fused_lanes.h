// What the kernels of fused_kernels.cpp and divergence_kernels.cpp compute with: 16 floats at a time through GCC's vector
// extension. Included by those files alone, which compile every kernel for AVX-512, AVX2 and the base instruction set
// and pick at start.
// Products and sums may be contracted into FMA.
#pragma once

#include <cmath>
#include <cstring>

#include "model/fused_kernels.h"

#pragma GCC optimize("O3,fp-contract=fast,no-math-errno")
#pragma GCC diagnostic ignored "-Wpsabi"

#define INLINE static inline __attribute__((always_inline))

namespace pare {
namespace {

using F16 = float __attribute__((vector_size(64)));
using F16u = float __attribute__((vector_size(64), aligned(4), may_alias));
using U16 = std::uint32_t __attribute__((vector_size(64)));
using H16 = std::uint16_t __attribute__((vector_size(32)));
using H16u = std::uint16_t __attribute__((vector_size(32), aligned(2), may_alias));

INLINE F16 set(float value) { return F16{} + value; }
INLINE F16 load(const float* p) { return *reinterpret_cast<const F16u*>(p); }
INLINE F16 load(const Bf16* p) {
  const H16 half = *reinterpret_cast<const H16u*>(p);
  return reinterpret_cast<F16>(__builtin_convertvector(half, U16) << 16);
}
INLINE void store(float* p, const F16& x) { *reinterpret_cast<F16u*>(p) = x; }
INLINE void store(Bf16* p, const F16& x) {
  const U16 u = reinterpret_cast<U16>(x);
  *reinterpret_cast<H16u*>(p) = __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, H16);
}
INLINE float load1(const float* p) { return *p; }
INLINE float load1(const Bf16* p) {
  const std::uint32_t u = std::uint32_t{p->bits} << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
INLINE void store1(float* p, float x) { *p = x; }
INLINE void store1(Bf16* p, float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, 4);
  p->bits = static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

INLINE float sum_lanes(const F16& x) {
  float a[16];
  std::memcpy(a, &x, 64);
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) a[i] += a[i + step];
  return a[0];
}
INLINE float max_lanes(const F16& x) {
  float a[16];
  std::memcpy(a, &x, 64);
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) a[i] = a[i] > a[i + step] ? a[i] : a[i + step];
  return a[0];
}
INLINE F16 maximum(const F16& a, const F16& b) { return a > b ? a : b; }

// e^x to 2 ulp, 0 below -87; the argument is clamped at 88. NaN stays NaN.
INLINE F16 exp16(const F16& x) {
  const F16 magic = set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const F16 y = x > set(88.0f) ? set(88.0f) : x;
  const F16 t = y * 1.44269504f + magic;
  const F16 n = t - magic;
  const F16 r = (y - n * 0.693145752f) - n * 1.42860677e-6f;
  F16 p = set(1.98756915e-4f);
  p = p * r + 1.39819994e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  // Unsigned: with NaN the difference wraps.
  const U16 power = (reinterpret_cast<U16>(t) - reinterpret_cast<U16>(magic) + 127u) << 23;
  const F16 e = p * reinterpret_cast<F16>(power);
  return x < set(-87.0f) ? set(0.0f) : e;
}

// ln x to 2 ulp for normal x > 0. NaN stays NaN. (The polynomial of Cephes' logf, S. Moshier.)
INLINE F16 log16(const F16& x) {
  using I16 = std::int32_t __attribute__((vector_size(64)));
  const U16 shifted = reinterpret_cast<U16>(x) - 0x3f3504f3u;  // the bits of sqrt(1/2)
  const F16 e = __builtin_convertvector(reinterpret_cast<I16>(shifted) >> 23, F16);
  const F16 f = reinterpret_cast<F16>((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;  // in [sqrt(1/2), sqrt(2)) - 1
  F16 p = set(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const F16 z = f * f;
  const F16 y = (f * z * p - e * 2.12194440e-4f) - z * 0.5f + f + e * 0.693359375f;
  return x == x ? y : x;
}

INLINE float exp1(float x) { return exp16(set(x))[0]; }

// ---- rows of logits ----------------------------------------------------------------------------------------------

template <class T>
INLINE float row_max(const T* x, std::int64_t count) {
  F16 top = set(-3.0e38f);
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) top = maximum(load(x + i), top);
  float peak = max_lanes(top);
  for (; i < count; ++i) peak = load1(x + i) > peak ? load1(x + i) : peak;
  return peak;
}

// Sum over the row of exp((x - peak) * inverse_tau). NaN in the row makes the sum NaN.
template <class T>
INLINE float row_exp_sum(const T* x, std::int64_t count, float peak, float inverse_tau) {
  F16 total = set(0);
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) total += exp16((load(x + i) - peak) * inverse_tau);
  float sum = sum_lanes(total);
  for (; i < count; ++i) sum += exp1((load1(x + i) - peak) * inverse_tau);
  return sum;
}

template <class T>
INLINE void clear_row(T* x, std::int64_t count) {
  std::memset(static_cast<void*>(x), 0, static_cast<std::size_t>(count) * sizeof(T));
}

#if defined(__x86_64__)
// 2: AVX-512, 1: AVX2, 0: neither
inline int instruction_set() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return 2;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
}
#endif

}  // namespace
}  // namespace pare
