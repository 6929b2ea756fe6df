// Attention with NEON, for all its instruction sets: 16 positions, or 16 dimensions of values, are 4 registers.
#if defined(__aarch64__)
#include <cmath>

#include "runtime/attention_rows.h"
#include "runtime/lanes_neon.h"

namespace pare {
namespace {

// load<place>(p): 16 columns of a row; of rows in pairs, Type is a pair, the one at that place.
struct F32 {
  using Type = float;
  static constexpr bool kPairs = false;
  template <int>
  static void load(const float* p, float32x4_t* to) {
    PARE_UNROLL for (int k = 0; k < 4; ++k) to[k] = vld1q_f32(p + k * 4);
  }
};
struct Bf16 {
  using Type = std::uint32_t;
  static constexpr bool kPairs = true;
  template <int kPlace>
  static void load(const std::uint32_t* p, float32x4_t* to) {
    PARE_UNROLL for (int k = 0; k < 4; ++k) {
      const uint32x4_t pairs = vld1q_u32(p + k * 4);
      to[k] = vreinterpretq_f32_u32(kPlace == 0 ? vshlq_n_u32(pairs, 16) : vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
    }
  }
};
struct F16 {
  using Type = std::uint16_t;
  static constexpr bool kPairs = false;
  template <int>
  static void load(const std::uint16_t* p, float32x4_t* to) {
    PARE_UNROLL for (int k = 0; k < 4; ++k) to[k] = load_halves(p + k * 4);
  }
};
struct Q8 {
  using Type = std::int8_t;
  static constexpr bool kPairs = false;
  template <int>
  static void load(const std::int8_t* p, float32x4_t* to) {
    const int8x16_t bytes = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    to[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
    to[1] = vcvtq_f32_s32(vmovl_high_s16(low));
    to[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
    to[3] = vcvtq_f32_s32(vmovl_high_s16(high));
  }
};

inline float32x4_t nearest_bf16(float32x4_t v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t nearest = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t all = vbslq_u32(vceqq_f32(v, v), nearest, vorrq_u32(bits, vdupq_n_u32(0x400000)));
  return vreinterpretq_f32_u32(vandq_u32(all, vdupq_n_u32(0xffff0000u)));
}

void narrow(const float* x, std::int64_t n, KvType type, std::byte* out, float* scale) {
  if (type == KvType::kF32) {
    std::memcpy(out, x, static_cast<std::size_t>(n) * 4);
    return;
  }
  const auto bytes = [&](std::int64_t i, std::size_t each) {
    return static_cast<std::size_t>(std::min<std::int64_t>(4, n - i)) * each;
  };
  if (type == KvType::kF16) {
    for (std::int64_t i = 0; i < n; i += 4) {
      const float16x4_t halves = vcvt_f16_f32(load_first(x + i, n - i));
      std::memcpy(out + 2 * i, &halves, bytes(i, 2));
    }
    return;
  }
  if (type == KvType::kBf16) {
    for (std::int64_t i = 0; i < n; i += 4) {
      const uint16x4_t words = vshrn_n_u32(vreinterpretq_u32_f32(nearest_bf16(load_first(x + i, n - i))), 16);
      std::memcpy(out + 2 * i, &words, bytes(i, 2));
    }
    return;
  }
  uint32x4_t peaks = vdupq_n_u32(0);
  for (std::int64_t i = 0; i < n; i += 4) peaks = vmaxq_u32(peaks, magnitude(load_first(x + i, n - i)));
  const Int8Scale int8(peaks);
  for (std::int64_t i = 0; i < n; i += 4) {
    const int16x4_t words = vmovn_s32(int8.codes(load_first(x + i, n - i)));
    const int8x8_t codes = vmovn_s16(vcombine_s16(words, words));
    std::memcpy(out + i, &codes, bytes(i, 1));
  }
  *scale = int8.scale;
}

// The place in `ahead` that `at` has in the plane.
template <class T>
inline void ask_next(const KvPlane& plane, const T* at) {
  if (plane.ahead != nullptr) __builtin_prefetch(plane.ahead + (reinterpret_cast<const std::byte*>(at) - plane.data));
}

// kVectors * 4 positions from `first` on.
template <class Kv, int kQueries, int kVectors>
void scores_tile(const float* q, std::int64_t ldq, const KvPlane& plane, std::int64_t first, std::int64_t head_dim,
                 float* out, std::int64_t ldo) {
  const auto* keys = reinterpret_cast<const typename Kv::Type*>(plane.data) + first;
  float32x4_t sum[kQueries][kVectors];
  PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
    PARE_UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] = vdupq_n_f32(0);
  }
  for (std::int64_t d = 0; d < head_dim; ++d) {
    float32x4_t k[kVectors];
    PARE_UNROLL for (int v = 0; v < kVectors; v += 4) {
      ask_next(plane, keys + d * kPage + v * 4);
      Kv::template load<0>(keys + d * kPage + v * 4, k + v);
    }
    PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
      PARE_UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] = vfmaq_n_f32(sum[i][v], k[v], q[i * ldq + d]);
    }
  }
  PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
    PARE_UNROLL for (int v = 0; v < kVectors; ++v) {
      if constexpr (sizeof(typename Kv::Type) == 1)
        sum[i][v] = vmulq_f32(sum[i][v], vld1q_f32(plane.scales + first + v * 4));
      vst1q_f32(out + i * ldo + v * 4, sum[i][v]);
    }
  }
}

template <class Kv, int kQueries>
void scores_rows(const float* q, std::int64_t ldq, const KvPlane& plane, std::int64_t head_dim, std::int64_t positions,
                 float* out, std::int64_t ldo) {
  std::int64_t p = 0;
  if constexpr (kQueries <= 2) {  // else the registers are full
    for (; p + 16 < positions; p += 32) scores_tile<Kv, kQueries, 8>(q, ldq, plane, p, head_dim, out + p, ldo);
  }
  for (; p < positions; p += 16) scores_tile<Kv, kQueries, 4>(q, ldq, plane, p, head_dim, out + p, ldo);
}

inline float32x4_t exp_bf16(float32x4_t x) {
  const float32x4_t y = vmaxq_f32(vdupq_n_f32(kLeastPower), vmulq_n_f32(x, kInverseLn2));
  const float32x4_t n = vrndmq_f32(y), f = vsubq_f32(y, n);
  float32x4_t p = vdupq_n_f32(kPower2[0]);
  for (int i = 1; i < 5; ++i) p = vfmaq_f32(vdupq_n_f32(kPower2[i]), p, f);
  p = vsubq_f32(vfmaq_f32(vdupq_n_f32(kBf16Steps + 1), p, f), vdupq_n_f32(kBf16Steps));
  const int32x4_t power = vshlq_n_s32(vcvtq_s32_f32(n), 23);  // of NaN it is 0
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), power));
}

float softmax(float* s, std::int64_t n, bool bf16, float* peak, float* shrink) {
  float32x4_t peaks = vdupq_n_f32(*peak);
  std::int64_t i = 0;
  for (; i + 4 <= n; i += 4) peaks = vmaxq_f32(peaks, vld1q_f32(s + i));
  for (; i < n; ++i) peaks = vmaxq_f32(peaks, vdupq_n_f32(s[i]));
  const float next = vmaxvq_f32(peaks);
  *shrink = shrink_to(*peak, next);
  *peak = next;
  float32x4_t sum = vdupq_n_f32(0);
  for (i = 0; i < n; i += 4) {
    const float32x4_t x = vsubq_f32(load_first(s + i, n - i), vdupq_n_f32(next));
    store_first(s + i, bf16 ? exp_bf16(x) : exp_ps(x), n - i);
    sum = vaddq_f32(sum, load_first(s + i, n - i));
  }
  return vaddvq_f32(sum);
}

bool scale(const float* x, std::int64_t n, float factor, float* out) {
  uint32x4_t numbers = vdupq_n_u32(~0u);
  for (std::int64_t i = 0; i < n; i += 4) {
    const float32x4_t v = vmulq_n_f32(load_first(x + i, n - i), factor);
    numbers = vandq_u32(numbers, vceqq_f32(v, v));
    store_first(out + i, v, n - i);
  }
  return vminvq_u32(numbers) == 0;
}

void rotate(float* x, const float* cosine, const float* sine, std::int64_t half, std::int64_t n, float factor) {
  for (std::int64_t i = 0; i < half; i += 4) {
    const float32x4_t a = load_first(x + i, half - i), b = load_first(x + half + i, half - i);
    const float32x4_t c = load_first(cosine + i, half - i), s = load_first(sine + i, half - i);
    store_first(x + i, vmulq_n_f32(vfmsq_f32(vmulq_f32(a, c), b, s), factor), half - i);
    store_first(x + half + i, vmulq_n_f32(vfmaq_f32(vmulq_f32(b, c), a, s), factor), half - i);
  }
  scale(x + 2 * half, n - 2 * half, factor, x + 2 * half);
}

// kVectors * 4 dimensions from d on.
template <class Kv, int kQueries, int kVectors>
void weigh_tile(const float* probs, std::int64_t ldp, const KvPlane& plane, std::int64_t d, std::int64_t width,
                std::int64_t positions, float* acc) {
  const auto* values = reinterpret_cast<const typename Kv::Type*>(plane.data) + d;
  acc += d;
  float32x4_t sum[kQueries][kVectors];
  PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
    PARE_UNROLL for (int k = 0; k < kVectors; ++k) sum[i][k] = vld1q_f32(acc + i * width + k * 4);
  }
  each_row<Kv>(positions, [&](std::int64_t p, auto place) __attribute__((always_inline)) {
    float32x4_t v[kVectors];
    const auto* from = values + (Kv::kPairs ? p / 2 : p) * width;
    PARE_UNROLL for (int k = 0; k < kVectors; k += 4) {
      if (place == 0) ask_next(plane, from + k * 4);
      Kv::template load<place>(from + k * 4, v + k);
    }
    PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
      float prob = probs[i * ldp + p];
      if constexpr (sizeof(typename Kv::Type) == 1) prob *= plane.scales[p];
      PARE_UNROLL for (int k = 0; k < kVectors; ++k) sum[i][k] = vfmaq_n_f32(sum[i][k], v[k], prob);
    }
  });
  PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
    PARE_UNROLL for (int k = 0; k < kVectors; ++k) vst1q_f32(acc + i * width + k * 4, sum[i][k]);
  }
}

template <class Kv, int kQueries>
void weigh_rows(const float* probs, std::int64_t ldp, const KvPlane& plane, std::int64_t width, std::int64_t positions,
                float* acc) {
  std::int64_t d = 0;
  if constexpr (kQueries <= 2) {  // else the registers are full
    for (; d + 32 <= width; d += 32) weigh_tile<Kv, kQueries, 8>(probs, ldp, plane, d, width, positions, acc);
  }
  for (; d < width; d += 16) weigh_tile<Kv, kQueries, 4>(probs, ldp, plane, d, width, positions, acc);
}

struct Tiles {
  using Float = F32;
  using Half = F16;
  using Byte = Q8;
  using Pair = Bf16;
  template <class Kv, int kQueries>
  static constexpr auto* scores = scores_rows<Kv, kQueries>;
  template <class Kv, int kQueries>
  static constexpr auto* weigh = weigh_rows<Kv, kQueries>;
};

}  // namespace

const AttentionKernels kNeonAttention = {narrow, scores<Tiles>, softmax, weigh<Tiles>, scale, rotate};

}  // namespace pare
#endif
