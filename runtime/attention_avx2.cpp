// Attention with AVX2: two registers of 8 positions, or of 8 dimensions of values, side by side.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <cmath>
#include <cstring>

#include "runtime/attention_rows.h"
#include "runtime/lanes_avx2.h"
#include "runtime/stream_x86.h"

namespace pare {
namespace {

// load<place>(p): 8 columns of a row; of rows in pairs, Type is a pair, the one at that place.
struct F32 {
  using Type = float;
  static constexpr bool kPairs = false;
  template <int>
  static __m256 load(const float* p) {
    return _mm256_loadu_ps(p);
  }
};
struct Bf16 {
  using Type = std::uint32_t;
  static constexpr bool kPairs = true;
  template <int kPlace>
  static __m256 load(const std::uint32_t* p) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(kPlace == 0 ? _mm256_slli_epi32(pairs, 16)
                                           : _mm256_and_si256(pairs, _mm256_set1_epi32(-65536)));
  }
};
struct F16 {
  using Type = std::uint16_t;
  static constexpr bool kPairs = false;
  template <int>
  static __m256 load(const std::uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};
struct Q8 {
  using Type = std::int8_t;
  static constexpr bool kPairs = false;
  template <int>
  static __m256 load(const std::int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
};

float top_of(__m256 v) {
  __m128 top = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  top = _mm_max_ps(top, _mm_movehl_ps(top, top));
  return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}

inline __m256 nearest_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  const __m256 all = _mm256_blendv_ps(_mm256_castsi256_ps(nearest), _mm256_castsi256_ps(quiet), nan);
  return _mm256_and_ps(all, _mm256_castsi256_ps(_mm256_set1_epi32(-65536)));
}

void narrow(const float* x, std::int64_t n, KvType type, std::byte* out, float* scale) {
  if (type == KvType::kF32) {
    std::memcpy(out, x, static_cast<std::size_t>(n) * 4);
    return;
  }
  if (type == KvType::kF16) {
    for (std::int64_t i = 0; i < n; i += 8) {
      alignas(16) std::uint16_t halves[8];
      _mm_store_si128(reinterpret_cast<__m128i*>(halves),
                      _mm256_cvtps_ph(_mm256_maskload_ps(x + i, tail_mask(n - i)), _MM_FROUND_TO_NEAREST_INT));
      std::memcpy(out + 2 * i, halves, static_cast<std::size_t>(std::min<std::int64_t>(8, n - i)) * 2);
    }
    return;
  }
  if (type == KvType::kBf16) {
    for (std::int64_t i = 0; i < n; i += 8) {
      const __m256 nearest = nearest_bf16(_mm256_maskload_ps(x + i, tail_mask(n - i)));
      alignas(32) std::uint16_t words[16];
      _mm256_store_si256(reinterpret_cast<__m256i*>(words), _mm256_castps_si256(nearest));
      for (std::int64_t k = 0; k < std::min<std::int64_t>(8, n - i); ++k)
        std::memcpy(out + 2 * (i + k), words + 2 * k + 1, 2);
    }
    return;
  }
  __m256i peaks = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < n; i += 8) {
    const __m256i v = _mm256_castps_si256(_mm256_maskload_ps(x + i, tail_mask(n - i)));
    peaks = _mm256_max_epi32(peaks, _mm256_and_si256(v, _mm256_set1_epi32(0x7fffffff)));
  }
  alignas(32) std::int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), peaks);
  const std::int32_t largest = *std::max_element(lanes, lanes + 8);
  float peak;
  std::memcpy(&peak, &largest, 4);
  const bool finite = largest < 0x7f800000;
  const __m256 inverse = _mm256_set1_ps(finite && peak > 1e-30f ? 127.0f / peak : 0.0f);
  for (std::int64_t i = 0; i < n; i += 8) {
    const __m256 v = _mm256_maskload_ps(x + i, tail_mask(n - i));
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse)));
    for (std::int64_t k = 0; k < std::min<std::int64_t>(8, n - i); ++k)
      out[i + k] = static_cast<std::byte>(finite ? lanes[k] : 0);
  }
  *scale = finite ? peak / 127.0f : __builtin_nanf("");
}

template <class Kv, int kQueries>
void scores_rows(const float* q, std::int64_t ldq, const KvPlane& plane, std::int64_t head_dim, std::int64_t positions,
                 float* out, std::int64_t ldo) {
  const auto* keys = reinterpret_cast<const typename Kv::Type*>(plane.data);
  constexpr std::int64_t kSize = sizeof(typename Kv::Type), kStepBytes = 16 * kSize;
  for (std::int64_t p = 0; p < positions; p += 16) {
    __m256 sum[kQueries][2];
    PARE_UNROLL for (int i = 0; i < kQueries; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    for (std::int64_t d = 0; d < head_dim; ++d) {
      ask_next<kStepBytes>(plane, p * head_dim * kSize + d * kStepBytes);
      const __m256 k0 = Kv::template load<0>(keys + d * kPage + p);
      const __m256 k1 = Kv::template load<0>(keys + d * kPage + p + 8);
      PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
        const __m256 value = _mm256_broadcast_ss(q + i * ldq + d);
        sum[i][0] = _mm256_fmadd_ps(value, k0, sum[i][0]);
        sum[i][1] = _mm256_fmadd_ps(value, k1, sum[i][1]);
      }
    }
    PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
      if constexpr (sizeof(typename Kv::Type) == 1) {
        sum[i][0] = _mm256_mul_ps(sum[i][0], _mm256_loadu_ps(plane.scales + p));
        sum[i][1] = _mm256_mul_ps(sum[i][1], _mm256_loadu_ps(plane.scales + p + 8));
      }
      _mm256_storeu_ps(out + i * ldo + p, sum[i][0]);
      _mm256_storeu_ps(out + i * ldo + p + 8, sum[i][1]);
    }
  }
}

inline __m256 exp_bf16(__m256 x) {
  const __m256 y = _mm256_max_ps(_mm256_set1_ps(kLeastPower), _mm256_mul_ps(x, _mm256_set1_ps(kInverseLn2)));
  const __m256 n = _mm256_round_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC), f = _mm256_sub_ps(y, n);
  __m256 p = _mm256_set1_ps(kPower2[0]);
  for (int i = 1; i < 5; ++i) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kPower2[i]));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kBf16Steps + 1));
  p = _mm256_sub_ps(p, _mm256_set1_ps(kBf16Steps));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);  // of NaN it is 0
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}

float largest_of(const float* s, std::int64_t n, float least) {
  __m256 peaks = _mm256_set1_ps(least);
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) peaks = _mm256_max_ps(peaks, _mm256_loadu_ps(s + i));
  if (i < n) {
    const __m256i m = tail_mask(n - i);
    const __m256 last = _mm256_maskload_ps(s + i, m);
    peaks = _mm256_max_ps(peaks, _mm256_blendv_ps(_mm256_set1_ps(least), last, _mm256_castsi256_ps(m)));
  }
  return top_of(peaks);
}

template <bool kBf16>
float exponentials(float* s, std::int64_t n, float peak) {
  const __m256 top = _mm256_set1_ps(peak);
  __m256 sum = _mm256_setzero_ps();
  const auto at = [&](__m256 score) {
    const __m256 x = _mm256_sub_ps(score, top);
    return kBf16 ? exp_bf16(x) : exp_ps(x);
  };
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 e = at(_mm256_loadu_ps(s + i));
    _mm256_storeu_ps(s + i, e);
    sum = _mm256_add_ps(sum, e);
  }
  if (i < n) {
    const __m256i m = tail_mask(n - i);
    const __m256 e = _mm256_and_ps(at(_mm256_maskload_ps(s + i, m)), _mm256_castsi256_ps(m));
    _mm256_maskstore_ps(s + i, m, e);
    sum = _mm256_add_ps(sum, e);
  }
  return reduce_add(sum);
}

float softmax(float* s, std::int64_t n, bool bf16, float* peak, float* shrink) {
  const float next = largest_of(s, n, *peak);
  *shrink = shrink_to(*peak, next);
  *peak = next;
  return bf16 ? exponentials<true>(s, n, next) : exponentials<false>(s, n, next);
}

bool scale(const float* x, std::int64_t n, float factor, float* out) {
  const __m256 by = _mm256_set1_ps(factor);
  __m256 nan = _mm256_setzero_ps();
  for (std::int64_t i = 0; i < n; i += 8) {
    const __m256i m = tail_mask(n - i);
    const __m256 v = _mm256_mul_ps(_mm256_maskload_ps(x + i, m), by);
    nan = _mm256_or_ps(nan, _mm256_and_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q), _mm256_castsi256_ps(m)));
    _mm256_maskstore_ps(out + i, m, v);
  }
  return _mm256_movemask_ps(nan) != 0;
}

void rotate(float* x, const float* cosine, const float* sine, std::int64_t half, std::int64_t n, float factor) {
  const __m256 by = _mm256_set1_ps(factor);
  for (std::int64_t i = 0; i < half; i += 8) {
    const __m256i m = tail_mask(half - i);
    const __m256 a = _mm256_maskload_ps(x + i, m), b = _mm256_maskload_ps(x + half + i, m);
    const __m256 c = _mm256_maskload_ps(cosine + i, m), s = _mm256_maskload_ps(sine + i, m);
    _mm256_maskstore_ps(x + i, m, _mm256_mul_ps(_mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)), by));
    _mm256_maskstore_ps(x + half + i, m, _mm256_mul_ps(_mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s)), by));
  }
  scale(x + 2 * half, n - 2 * half, factor, x + 2 * half);
}

template <class Kv, int kQueries>
void weigh_rows(const float* probs, std::int64_t ldp, const KvPlane& plane, std::int64_t width, std::int64_t positions,
                float* acc) {
  const auto* values = reinterpret_cast<const typename Kv::Type*>(plane.data);
  constexpr std::int64_t kSize = sizeof(typename Kv::Type), kStepBytes = 16 * kSize;
  for (std::int64_t d = 0; d < width; d += 16) {
    __m256 sum[kQueries][2];
    PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
      sum[i][0] = _mm256_loadu_ps(acc + i * width + d);
      sum[i][1] = _mm256_loadu_ps(acc + i * width + d + 8);
    }
    each_row<Kv>(positions, [&](std::int64_t p, auto place) __attribute__((always_inline)) {
      const std::int64_t at = Kv::kPairs ? p / 2 : p;
      if (place == 0) ask_next<kStepBytes>(plane, d * (kPage / (Kv::kPairs ? 2 : 1)) * kSize + at * kStepBytes);
      const auto* row = values + at * width + d;
      const __m256 v0 = Kv::template load<place>(row), v1 = Kv::template load<place>(row + 8);
      PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
        float prob = probs[i * ldp + p];
        if constexpr (sizeof(typename Kv::Type) == 1) prob *= plane.scales[p];
        const __m256 weight = _mm256_set1_ps(prob);
        sum[i][0] = _mm256_fmadd_ps(weight, v0, sum[i][0]);
        sum[i][1] = _mm256_fmadd_ps(weight, v1, sum[i][1]);
      }
    });
    PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
      _mm256_storeu_ps(acc + i * width + d, sum[i][0]);
      _mm256_storeu_ps(acc + i * width + d + 8, sum[i][1]);
    }
  }
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

const AttentionKernels kAvx2Attention = {narrow, scores<Tiles>, softmax, weigh<Tiles>, scale, rotate};

}  // namespace pare
#endif
