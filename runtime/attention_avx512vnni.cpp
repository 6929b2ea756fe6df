// Attention with AVX-512: 16 positions, or 16 dimensions of values, are one register.
#if defined(__AVX512VNNI__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own headers start from undefined registers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <cmath>
#include <cstring>

#include "runtime/attention_rows.h"
#include "runtime/lanes_avx512vnni.h"
#include "runtime/stream_x86.h"

namespace pare {
namespace {

// load<place>(p): 16 columns of a row; of rows in pairs, Type is a pair, the one at that place.
struct F32 {
  using Type = float;
  static constexpr bool kPairs = false;
  template <int>
  static __m512 load(const float* p) {
    return _mm512_loadu_ps(p);
  }
};
struct Bf16 {
  using Type = std::uint32_t;
  static constexpr bool kPairs = true;
  template <int kPlace>
  static __m512 load(const std::uint32_t* p) {
    const __m512i pairs = _mm512_loadu_si512(p);
    return _mm512_castsi512_ps(kPlace == 0 ? _mm512_slli_epi32(pairs, 16)
                                           : _mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
  }
};
struct F16 {
  using Type = std::uint16_t;
  static constexpr bool kPairs = false;
  template <int>
  static __m512 load(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
};
struct Q8 {
  using Type = std::int8_t;
  static constexpr bool kPairs = false;
  template <int>
  static __m512 load(const std::int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
};

inline __m512 nearest_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i all = _mm512_mask_or_epi32(nearest, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_castsi512_ps(_mm512_and_si512(all, _mm512_set1_epi32(-65536)));
}

void narrow(const float* x, std::int64_t n, KvType type, std::byte* out, float* scale) {
  if (type == KvType::kF32) {
    std::memcpy(out, x, static_cast<std::size_t>(n) * 4);
    return;
  }
  if (type == KvType::kF16) {
    for (std::int64_t i = 0; i < n; i += 16) {
      const __mmask16 m = tail_mask(n - i);
      _mm256_mask_storeu_epi16(out + 2 * i, m,
                               _mm512_cvtps_ph(_mm512_maskz_loadu_ps(m, x + i), _MM_FROUND_TO_NEAREST_INT));
    }
    return;
  }
  if (type == KvType::kBf16) {
    for (std::int64_t i = 0; i < n; i += 16) {
      const __mmask16 m = tail_mask(n - i);
      const __m512i nearest = _mm512_castps_si512(nearest_bf16(_mm512_maskz_loadu_ps(m, x + i)));
      _mm256_mask_storeu_epi16(out + 2 * i, m, _mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest, 16)));
    }
    return;
  }
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i peaks = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < n; i += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(tail_mask(n - i), x + i);
    peaks = _mm512_max_epi32(peaks, _mm512_and_si512(_mm512_castps_si512(v), magnitude));
  }
  const int largest = _mm512_reduce_max_epi32(peaks);
  float peak;
  std::memcpy(&peak, &largest, 4);
  const bool finite = largest < 0x7f800000;
  const __m512 inverse = _mm512_set1_ps(finite && peak > 1e-30f ? 127.0f / peak : 0.0f);
  for (std::int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = tail_mask(n - i);
    __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), inverse));
    if (!finite) code = _mm512_setzero_si512();
    _mm_mask_storeu_epi8(out + i, m, _mm512_cvtsepi32_epi8(code));
  }
  *scale = finite ? peak / 127.0f : __builtin_nanf("");
}

template <class Kv, int kQueries, int kVectors>
void scores_tile(const float* q, std::int64_t ldq, const KvPlane& plane, std::int64_t first, std::int64_t head_dim,
                 float* out, std::int64_t ldo) {
  const auto* keys = reinterpret_cast<const typename Kv::Type*>(plane.data) + first;
  const float* scales = plane.scales + first;
  constexpr std::int64_t kSize = sizeof(typename Kv::Type), kStepBytes = kVectors * 16 * kSize;
  __m512 sum[kQueries][kVectors];
  PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
    PARE_UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_setzero_ps();
  }
  for (std::int64_t d = 0; d < head_dim; ++d) {
    __m512 k[kVectors];
    ask_next<kStepBytes>(plane, first * head_dim * kSize + d * kStepBytes);
    PARE_UNROLL for (int v = 0; v < kVectors; ++v) k[v] = Kv::template load<0>(keys + d * kPage + v * 16);
    PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
      const __m512 value = _mm512_set1_ps(q[i * ldq + d]);
      PARE_UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_fmadd_ps(value, k[v], sum[i][v]);
    }
  }
  PARE_UNROLL for (int v = 0; v < kVectors; ++v) {
    const __m512 scale = sizeof(typename Kv::Type) == 1 ? _mm512_loadu_ps(scales + v * 16) : _mm512_setzero_ps();
    PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
      if constexpr (sizeof(typename Kv::Type) == 1) sum[i][v] = _mm512_mul_ps(sum[i][v], scale);
      _mm512_storeu_ps(out + i * ldo + v * 16, sum[i][v]);
    }
  }
}

template <class Kv, int kQueries>
void scores_rows(const float* q, std::int64_t ldq, const KvPlane& plane, std::int64_t head_dim, std::int64_t positions,
                 float* out, std::int64_t ldo) {
  std::int64_t p = 0;
  for (; p + 48 < positions; p += 64) scores_tile<Kv, kQueries, 4>(q, ldq, plane, p, head_dim, out + p, ldo);
  for (; p < positions; p += 16) scores_tile<Kv, kQueries, 1>(q, ldq, plane, p, head_dim, out + p, ldo);
}

inline __m512 exp_bf16(__m512 x) {
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(kLeastPower), _mm512_mul_ps(x, _mm512_set1_ps(kInverseLn2)));
  const __m512 f = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(kPower2[0]);
  PARE_UNROLL for (int i = 1; i < 5; ++i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kPower2[i]));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kBf16Steps + 1));
  return _mm512_scalef_ps(_mm512_sub_ps(p, _mm512_set1_ps(kBf16Steps)), y);  // times 2^floor(y)
}

float largest_of(const float* s, std::int64_t n, float least) {
  __m512 even = _mm512_set1_ps(least), odd = even;
  std::int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    even = _mm512_max_ps(even, _mm512_loadu_ps(s + i));
    odd = _mm512_max_ps(odd, _mm512_loadu_ps(s + i + 16));
  }
  for (; i < n; i += 16) {
    const __mmask16 m = tail_mask(n - i);
    even = _mm512_mask_max_ps(even, m, even, _mm512_maskz_loadu_ps(m, s + i));
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(even, odd));
}

template <bool kBf16>
float exponentials(float* s, std::int64_t n, float peak) {
  const __m512 top = _mm512_set1_ps(peak);
  __m512 sum = _mm512_setzero_ps();
  const auto at = [&](__m512 score) {
    const __m512 x = _mm512_sub_ps(score, top);
    return kBf16 ? exp_bf16(x) : exp_ps(x);
  };
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 e = at(_mm512_loadu_ps(s + i));
    _mm512_storeu_ps(s + i, e);
    sum = _mm512_add_ps(sum, e);
  }
  if (i < n) {
    const __mmask16 m = tail_mask(n - i);
    const __m512 e = at(_mm512_maskz_loadu_ps(m, s + i));
    _mm512_mask_storeu_ps(s + i, m, e);
    sum = _mm512_mask_add_ps(sum, m, sum, e);
  }
  return _mm512_reduce_add_ps(sum);
}

float softmax(float* s, std::int64_t n, bool bf16, float* peak, float* shrink) {
  const float next = largest_of(s, n, *peak);
  *shrink = shrink_to(*peak, next);
  *peak = next;
  return bf16 ? exponentials<true>(s, n, next) : exponentials<false>(s, n, next);
}

bool scale(const float* x, std::int64_t n, float factor, float* out) {
  const __m512 by = _mm512_set1_ps(factor);
  __mmask16 nan = 0;
  for (std::int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = tail_mask(n - i);
    const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), by);
    nan |= _mm512_mask_cmp_ps_mask(m, v, v, _CMP_UNORD_Q);
    _mm512_mask_storeu_ps(out + i, m, v);
  }
  return nan != 0;
}

void rotate(float* x, const float* cosine, const float* sine, std::int64_t half, std::int64_t n, float factor) {
  const __m512 by = _mm512_set1_ps(factor);
  for (std::int64_t i = 0; i < half; i += 16) {
    const __mmask16 m = tail_mask(half - i);
    const __m512 a = _mm512_maskz_loadu_ps(m, x + i), b = _mm512_maskz_loadu_ps(m, x + half + i);
    const __m512 c = _mm512_maskz_loadu_ps(m, cosine + i), s = _mm512_maskz_loadu_ps(m, sine + i);
    _mm512_mask_storeu_ps(x + i, m, _mm512_mul_ps(_mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), by));
    _mm512_mask_storeu_ps(x + half + i, m, _mm512_mul_ps(_mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), by));
  }
  scale(x + 2 * half, n - 2 * half, factor, x + 2 * half);
}

template <class Kv, int kQueries, int kVectors>
void weigh_tile(const float* probs, std::int64_t ldp, const KvPlane& plane, std::int64_t first, std::int64_t width,
                std::int64_t positions, float* acc) {
  const auto* values = reinterpret_cast<const typename Kv::Type*>(plane.data) + first;
  constexpr std::int64_t kSize = sizeof(typename Kv::Type), kStepBytes = kVectors * 16 * kSize;
  __m512 sum[kQueries][kVectors];
  PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
    PARE_UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_loadu_ps(acc + i * width + v * 16);
  }
  each_row<Kv>(positions, [&](std::int64_t p, auto place) __attribute__((always_inline)) {
    __m512 row[kVectors];
    const std::int64_t at = Kv::kPairs ? p / 2 : p;
    if (place == 0) ask_next<kStepBytes>(plane, first * kPage * kSize / (Kv::kPairs ? 2 : 1) + at * kStepBytes);
    PARE_UNROLL for (int v = 0; v < kVectors; ++v) row[v] = Kv::template load<place>(values + at * width + v * 16);
    PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
      float prob = probs[i * ldp + p];
      if constexpr (sizeof(typename Kv::Type) == 1) prob *= plane.scales[p];
      const __m512 weight = _mm512_set1_ps(prob);
      PARE_UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_fmadd_ps(weight, row[v], sum[i][v]);
    }
  });
  PARE_UNROLL for (int i = 0; i < kQueries; ++i) {
    PARE_UNROLL for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(acc + i * width + v * 16, sum[i][v]);
  }
}

template <class Kv, int kQueries>
void weigh_rows(const float* probs, std::int64_t ldp, const KvPlane& plane, std::int64_t width, std::int64_t positions,
                float* acc) {
  std::int64_t d = 0;
  for (; d + 64 <= width; d += 64) weigh_tile<Kv, kQueries, 4>(probs, ldp, plane, d, width, positions, acc + d);
  for (; d < width; d += 16) weigh_tile<Kv, kQueries, 1>(probs, ldp, plane, d, width, positions, acc + d);
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

const AttentionKernels kAvx512VnniAttention = {narrow, scores<Tiles>, softmax, weigh<Tiles>, scale, rotate};

}  // namespace pare
#endif
