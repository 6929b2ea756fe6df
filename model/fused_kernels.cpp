#include "model/fused_kernels.h"

#include <cmath>
#include <cstring>

// 16 floats at a time through GCC's vector extension; each kernel is compiled for AVX-512, AVX2 and the base
// instruction set and picked at start. Products and sums may be contracted into FMA.
#pragma GCC optimize("O3,fp-contract=fast,no-math-errno")
#pragma GCC diagnostic ignored "-Wpsabi"

#define INLINE static inline __attribute__((always_inline))

namespace pare {
namespace {

using F16 = float __attribute__((vector_size(64)));
using F16u = float __attribute__((vector_size(64), aligned(4), may_alias));
using U16 = std::uint32_t __attribute__((vector_size(64)));
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

template <class T>
INLINE void rms_forward(const float* x, const float* w, float eps, std::int64_t rows, std::int64_t width, T* out,
                        float* rstd) {
  for (std::int64_t row = 0; row < rows; ++row, x += width, out += width) {
    F16 total = set(0);
    std::int64_t i = 0;
    for (; i + 16 <= width; i += 16) total += load(x + i) * load(x + i);
    float sum = sum_lanes(total);
    for (; i < width; ++i) sum += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
    rstd[row] = scale;
    for (i = 0; i + 16 <= width; i += 16) store(out + i, load(x + i) * scale * load(w + i));
    for (; i < width; ++i) store1(out + i, x[i] * scale * w[i]);
  }
}

template <class T>
INLINE void rms_backward(const float* x, const float* w, const float* rstd, const T* g, std::int64_t rows,
                         std::int64_t width, float* gx, float* gw) {
  for (std::int64_t row = 0; row < rows; ++row, x += width, g += width, gx += width) {
    const float scale = rstd[row];
    F16 total = set(0);
    std::int64_t i = 0;
    for (; i + 16 <= width; i += 16) total += load(g + i) * load(w + i) * load(x + i);
    float dot = sum_lanes(total);
    for (; i < width; ++i) dot += load1(g + i) * w[i] * x[i];
    const float pull = dot * scale * scale * scale / static_cast<float>(width);
    for (i = 0; i + 16 <= width; i += 16) {
      const F16 gi = load(g + i), xi = load(x + i);
      store(gx + i, gi * load(w + i) * scale - xi * pull);
      store(gw + i, load(gw + i) + gi * xi * scale);
    }
    for (; i < width; ++i) {
      const float gi = load1(g + i);
      gx[i] = gi * w[i] * scale - x[i] * pull;
      gw[i] += gi * x[i] * scale;
    }
  }
}

INLINE float exp1(float x) { return exp16(set(x))[0]; }

template <class T>
INLINE void swiglu_forward(const T* gate_up, std::int64_t rows, std::int64_t width, T* out) {
  for (std::int64_t row = 0; row < rows; ++row, gate_up += 2 * width, out += width) {
    const T* gate = gate_up;
    const T* up = gate_up + width;
    std::int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
      const F16 a = load(gate + i);
      store(out + i, a / (1.0f + exp16(-a)) * load(up + i));
    }
    for (; i < width; ++i) {
      const float a = load1(gate + i);
      store1(out + i, a / (1.0f + exp1(-a)) * load1(up + i));
    }
  }
}

template <class T>
INLINE void swiglu_backward(const T* gate_up, const T* g, std::int64_t rows, std::int64_t width, T* g_gate_up) {
  for (std::int64_t row = 0; row < rows; ++row, gate_up += 2 * width, g += width, g_gate_up += 2 * width) {
    std::int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
      const F16 a = load(gate_up + i), b = load(gate_up + width + i), gi = load(g + i);
      const F16 s = 1.0f / (1.0f + exp16(-a));
      store(g_gate_up + i, gi * b * s * (1.0f + a * (1.0f - s)));
      store(g_gate_up + width + i, gi * a * s);
    }
    for (; i < width; ++i) {
      const float a = load1(gate_up + i), b = load1(gate_up + width + i), gi = load1(g + i);
      const float s = 1.0f / (1.0f + exp1(-a));
      store1(g_gate_up + i, gi * b * s * (1.0f + a * (1.0f - s)));
      store1(g_gate_up + width + i, gi * a * s);
    }
  }
}

template <class T>
INLINE void add_rows(const float* x, const T* delta, std::int64_t count, float* sum) {
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(sum + i, load(x + i) + load(delta + i));
  for (; i < count; ++i) sum[i] = x[i] + load1(delta + i);
}

// ---- attention: 8 query rows at a time against tiles of 32 keys -------------------------------------------------

// One head of the packed rows -> [positions][dim] float, zero-padded to [padded positions][padded dim], rotated by
// the rotary tables unless cosine is null, times `scale`.
template <class T>
INLINE void gather_head(const AttentionShape& s, const T* first, std::int64_t stride, const float* cosine,
                        const float* sine, float scale, float* out) {
  const std::int64_t dim = s.head_dim, half = s.rotary / 2, pd = s.padded_dim();
  for (std::int64_t t = 0; t < s.positions; ++t) {
    const T* in = first + t * stride;
    float* o = out + t * pd;
    if (cosine != nullptr) {
      const float* c = cosine + t * half;
      const float* n = sine + t * half;
      std::int64_t j = 0;
      for (; j + 16 <= half; j += 16) {
        const F16 a = load(in + j), b = load(in + half + j), cj = load(c + j), nj = load(n + j);
        store(o + j, (a * cj - b * nj) * scale);
        store(o + half + j, (b * cj + a * nj) * scale);
      }
      for (; j < half; ++j) {
        const float a = load1(in + j), b = load1(in + half + j);
        o[j] = (a * c[j] - b * n[j]) * scale;
        o[half + j] = (b * c[j] + a * n[j]) * scale;
      }
      for (j = 2 * half; j < dim; ++j) o[j] = load1(in + j) * scale;
    } else {
      std::int64_t j = 0;
      for (; j + 16 <= dim; j += 16) store(o + j, load(in + j) * scale);
      for (; j < dim; ++j) o[j] = load1(in + j) * scale;
    }
    for (std::int64_t j = dim; j < pd; ++j) o[j] = 0;
  }
  std::memset(out + s.positions * pd, 0, static_cast<std::size_t>((s.padded_positions() - s.positions) * pd) * 4);
}

// The adjoint of gather_head: [positions][padded dim] -> packed rows.
template <class T>
INLINE void scatter_head(const AttentionShape& s, const float* in, const float* cosine, const float* sine, float scale,
                         T* first, std::int64_t stride) {
  const std::int64_t dim = s.head_dim, half = s.rotary / 2, pd = s.padded_dim();
  for (std::int64_t t = 0; t < s.positions; ++t) {
    const float* g = in + t * pd;
    T* o = first + t * stride;
    if (cosine != nullptr) {
      const float* c = cosine + t * half;
      const float* n = sine + t * half;
      std::int64_t j = 0;
      for (; j + 16 <= half; j += 16) {
        const F16 a = load(g + j), b = load(g + half + j), cj = load(c + j), nj = load(n + j);
        store(o + j, (a * cj + b * nj) * scale);
        store(o + half + j, (b * cj - a * nj) * scale);
      }
      for (; j < half; ++j) {
        store1(o + j, (g[j] * c[j] + g[half + j] * n[j]) * scale);
        store1(o + half + j, (g[half + j] * c[j] - g[j] * n[j]) * scale);
      }
      for (j = 2 * half; j < dim; ++j) store1(o + j, g[j] * scale);
    } else {
      std::int64_t j = 0;
      for (; j + 16 <= dim; j += 16) store(o + j, load(g + j) * scale);
      for (; j < dim; ++j) store1(o + j, g[j] * scale);
    }
  }
}

// [positions][dim] -> [dim][positions], both padded.
INLINE void transpose(const float* in, std::int64_t positions, std::int64_t dim, float* out) {
  for (std::int64_t t0 = 0; t0 < positions; t0 += 16)
    for (std::int64_t d = 0; d < dim; ++d) {
      float* o = out + d * positions + t0;
      const float* i = in + t0 * dim + d;
      for (std::int64_t t = 0; t < 16; ++t) o[t] = i[t * dim];
    }
}

// rows [8][dim] -> [dim][8], so that the 8 factors of one depth lie together.
INLINE void interleave(const float* rows, std::int64_t dim, float* out) {
  for (std::int64_t d = 0; d < dim; ++d)
    for (int r = 0; r < 8; ++r) out[d * 8 + r] = rows[r * dim + d];
}

// acc[8][2] = rows (interleaved) x columns [dim][positions] at column c.
INLINE void tile_scores(const float* interleaved, const float* columns, std::int64_t stride, std::int64_t dim,
                        F16 (&acc)[8][2]) {
  for (int r = 0; r < 8; ++r) acc[r][0] = acc[r][1] = F16{};
  for (std::int64_t d = 0; d < dim; ++d) {
    const F16 k0 = load(columns + d * stride), k1 = load(columns + d * stride + 16);
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      const F16 q = set(interleaved[d * 8 + r]);
      acc[r][0] += q * k0;
      acc[r][1] += q * k1;
    }
  }
}

// out[8][dim] = p x values, p in tiles [tile][8][32], values [positions][dim].
INLINE void tiles_times_rows(const float* p, std::int64_t tiles, const float* values, std::int64_t dim, float* out) {
  for (std::int64_t c = 0; c < dim; c += 32) {
    F16 acc[8][2];
    for (int r = 0; r < 8; ++r) acc[r][0] = acc[r][1] = F16{};
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      const float* weight = p + tile * 256;
      const float* value = values + tile * 32 * dim + c;
      for (int j = 0; j < 32; ++j) {
        const F16 v0 = load(value + j * dim), v1 = load(value + j * dim + 16);
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) {
          const F16 w = set(weight[r * 32 + j]);
          acc[r][0] += w * v0;
          acc[r][1] += w * v1;
        }
      }
    }
    for (int r = 0; r < 8; ++r) {
      store(out + r * dim + c, acc[r][0]);
      store(out + r * dim + c + 16, acc[r][1]);
    }
  }
}

// sum[positions][dim] += p^T x rows[8][dim].
INLINE void add_tiles_transposed(const float* p, std::int64_t tiles, const float* rows, std::int64_t dim, float* sum) {
  for (std::int64_t c = 0; c < dim; c += 32) {
    F16 x[8][2];
    for (int r = 0; r < 8; ++r) {
      x[r][0] = load(rows + r * dim + c);
      x[r][1] = load(rows + r * dim + c + 16);
    }
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      const float* weight = p + tile * 256;
      float* target = sum + tile * 32 * dim + c;
      for (int j = 0; j < 32; ++j) {
        F16 a0 = load(target + j * dim), a1 = load(target + j * dim + 16), b0{}, b1{};
#pragma GCC unroll 4
        for (int r = 0; r < 8; r += 2) {
          const F16 w = set(weight[r * 32 + j]), u = set(weight[(r + 1) * 32 + j]);
          a0 += w * x[r][0];
          a1 += w * x[r][1];
          b0 += u * x[r + 1][0];
          b1 += u * x[r + 1][1];
        }
        store(target + j * dim, a0 + b0);
        store(target + j * dim + 16, a1 + b1);
      }
    }
  }
}

constexpr float kMasked = -1e30f;

// cap * tanh(x / cap)
INLINE F16 soft_cap(const F16& x, float cap) {
  return cap - 2.0f * cap / (exp16(x * (2.0f / cap)) + 1.0f);
}

// Row `first` + r of a tile: what lies before the window becomes `value`.
INLINE void mask_before_window(const AttentionShape& s, std::int64_t first, std::int64_t tile, float value,
                               float* rows) {
  if (s.window == 0 || tile * 32 > first + 7 - s.window) return;
  for (int r = 0; r < 8; ++r) {
    const std::int64_t hidden = first + r - s.window + 1 - tile * 32;
    for (std::int64_t j = 0; j < (hidden < 32 ? hidden : 32); ++j) rows[r * 32 + j] = value;
  }
}

template <class T>
INLINE void attention_forward(const AttentionShape& s, std::int64_t batch, std::int64_t kv, const T* qkv,
                              const float* cosine, const float* sine, T* mix, float* lse, float* scratch) {
  const std::int64_t pp = s.padded_positions(), pd = s.padded_dim(), width = s.qkv_width(), n = s.positions;
  const std::int64_t group = s.heads / s.kv_heads, mix_width = s.heads * s.head_dim;
  float* rows = scratch;               // K first, then Q of each head [pp][pd]
  float* keys = rows + pp * pd;        // [pd][pp]
  float* values = keys + pp * pd;      // [pp][pd]
  float* p = values + pp * pd;         // [pp / 32][8][32]
  float* interleaved = p + pp * 8;     // [pd][8]; later the 8 output rows
  const T* base = qkv + batch * n * width;
  gather_head(s, base + (s.heads + kv) * s.head_dim, width, cosine, sine, 1.0f, rows);
  transpose(rows, pp, pd, keys);
  gather_head(s, base + (s.heads + s.kv_heads + kv) * s.head_dim, width, static_cast<const float*>(nullptr),
              static_cast<const float*>(nullptr), 1.0f, values);
  const float scale = s.scale;
  for (std::int64_t head = kv * group; head < (kv + 1) * group; ++head) {
    gather_head(s, base + head * s.head_dim, width, cosine, sine, scale, rows);
    for (std::int64_t first = 0; first < n; first += 8) {
      interleave(rows + first * pd, pd, interleaved);
      const std::int64_t tiles = (first + 8 + 31) / 32, begin = s.first_tile(first);
      F16 top[8];
      for (int r = 0; r < 8; ++r) top[r] = set(kMasked);
      for (std::int64_t tile = begin; tile < tiles; ++tile) {
        F16 acc[8][2];
        tile_scores(interleaved, keys + tile * 32, pp, s.head_dim, acc);
        if (s.softcap > 0)
          for (int r = 0; r < 8; ++r)
            for (int half = 0; half < 2; ++half) acc[r][half] = soft_cap(acc[r][half], s.softcap);
        for (int r = 0; r < 8; ++r) {
          float* out = p + tile * 256 + r * 32;
          store(out, acc[r][0]);
          store(out + 16, acc[r][1]);
          if (tile + 1 == tiles)
            for (std::int64_t j = first + r + 1 - tile * 32; j < 32; ++j) out[j] = kMasked;
        }
        mask_before_window(s, first, tile, kMasked, p + tile * 256);
        for (int r = 0; r < 8; ++r) {
          const float* out = p + tile * 256 + r * 32;
          top[r] = maximum(top[r], maximum(load(out), load(out + 16)));
        }
      }
      float inverse[8];
      for (int r = 0; r < 8; ++r) {
        const float peak = max_lanes(top[r]);
        F16 total = set(0);
        for (std::int64_t tile = begin; tile < tiles; ++tile) {
          float* x = p + tile * 256 + r * 32;
          const F16 e0 = exp16(load(x) - peak), e1 = exp16(load(x + 16) - peak);
          store(x, e0);
          store(x + 16, e1);
          total += e0 + e1;
        }
        const float sum = sum_lanes(total);
        inverse[r] = 1.0f / sum;
        if (first + r < n) lse[(batch * s.heads + head) * n + first + r] = peak + std::log(sum);
      }
      tiles_times_rows(p + begin * 256, tiles - begin, values + begin * 32 * pd, pd, interleaved);
      for (int r = 0; r < 8 && first + r < n; ++r) {
        T* out = mix + (batch * n + first + r) * mix_width + head * s.head_dim;
        const float* in = interleaved + r * pd;
        std::int64_t d = 0;
        for (; d + 16 <= s.head_dim; d += 16) store(out + d, load(in + d) * inverse[r]);
        for (; d < s.head_dim; ++d) store1(out + d, in[d] * inverse[r]);
      }
    }
  }
}

template <class T>
INLINE void attention_backward(const AttentionShape& s, std::int64_t batch, std::int64_t kv, const T* qkv,
                               const float* cosine, const float* sine, const T* mix, const float* lse, const T* g_mix,
                               T* g_qkv, float* scratch) {
  const std::int64_t pp = s.padded_positions(), pd = s.padded_dim(), width = s.qkv_width(), n = s.positions;
  const std::int64_t group = s.heads / s.kv_heads, mix_width = s.heads * s.head_dim, block = pp * pd;
  float* key_rows = scratch;             // [pp][pd]
  float* keys = key_rows + block;        // [pd][pp]
  float* values = keys + block;          // [pd][pp]
  float* queries = values + block;       // [pp][pd]
  float* g_out = queries + block;        // [pp][pd]
  float* g_queries = g_out + block;      // [pp][pd]; first the value rows
  float* g_keys = g_queries + block;     // [pp][pd]
  float* g_values = g_keys + block;      // [pp][pd]
  float* p = g_values + block;           // [pp / 32][8][32]
  float* ds = p + pp * 8;                // the same shape
  float* q_interleaved = ds + pp * 8;    // [pd][8]
  float* g_interleaved = q_interleaved + 8 * pd;
  const float* none = nullptr;
  const T* base = qkv + batch * n * width;
  T* g_base = g_qkv + batch * n * width;
  gather_head(s, base + (s.heads + kv) * s.head_dim, width, cosine, sine, 1.0f, key_rows);
  transpose(key_rows, pp, pd, keys);
  gather_head(s, base + (s.heads + s.kv_heads + kv) * s.head_dim, width, none, none, 1.0f, g_queries);
  transpose(g_queries, pp, pd, values);
  std::memset(g_keys, 0, static_cast<std::size_t>(2 * block) * 4);
  const float scale = s.scale;
  for (std::int64_t head = kv * group; head < (kv + 1) * group; ++head) {
    gather_head(s, base + head * s.head_dim, width, cosine, sine, scale, queries);
    gather_head(s, g_mix + batch * n * mix_width + head * s.head_dim, mix_width, none, none, 1.0f, g_out);
    for (std::int64_t first = 0; first < n; first += 8) {
      interleave(queries + first * pd, pd, q_interleaved);
      interleave(g_out + first * pd, pd, g_interleaved);
      const std::int64_t tiles = (first + 8 + 31) / 32, begin = s.first_tile(first);
      float norm[8], dot[8];  // log of the softmax sum; sum over d of dO * O
      for (int r = 0; r < 8; ++r) {
        norm[r] = dot[r] = 0;
        if (first + r >= n) continue;
        norm[r] = lse[(batch * s.heads + head) * n + first + r];
        const T* o = mix + (batch * n + first + r) * mix_width + head * s.head_dim;
        const float* g = g_out + (first + r) * pd;
        F16 total = set(0);
        std::int64_t d = 0;
        for (; d + 16 <= s.head_dim; d += 16) total += load(o + d) * load(g + d);
        dot[r] = sum_lanes(total);
        for (; d < s.head_dim; ++d) dot[r] += load1(o + d) * g[d];
      }
      for (std::int64_t tile = begin; tile < tiles; ++tile) {
        F16 acc[8][2];
        tile_scores(q_interleaved, keys + tile * 32, pp, s.head_dim, acc);
        if (s.softcap > 0) {  // the slope of the cap waits in ds
          for (int r = 0; r < 8; ++r)
            for (int half = 0; half < 2; ++half) {
              acc[r][half] = soft_cap(acc[r][half], s.softcap);
              const F16 share = acc[r][half] / s.softcap;
              store(ds + tile * 256 + r * 32 + half * 16, 1.0f - share * share);
            }
        }
        for (int r = 0; r < 8; ++r) {
          float* out = p + tile * 256 + r * 32;
          store(out, exp16(acc[r][0] - norm[r]));
          store(out + 16, exp16(acc[r][1] - norm[r]));
          if (tile + 1 == tiles) {
            const std::int64_t last = first + r < n ? first + r : -1;
            for (std::int64_t j = last + 1 > tile * 32 ? last + 1 - tile * 32 : 0; j < 32; ++j) out[j] = 0;
          }
        }
        mask_before_window(s, first, tile, 0.0f, p + tile * 256);
        tile_scores(g_interleaved, values + tile * 32, pp, s.head_dim, acc);
        for (int r = 0; r < 8; ++r) {
          const float* prob = p + tile * 256 + r * 32;
          float* out = ds + tile * 256 + r * 32;
          const F16 slope0 = s.softcap > 0 ? load(out) : set(1), slope1 = s.softcap > 0 ? load(out + 16) : set(1);
          store(out, load(prob) * (acc[r][0] - dot[r]) * slope0);
          store(out + 16, load(prob + 16) * (acc[r][1] - dot[r]) * slope1);
        }
      }
      const std::int64_t skip = begin * 256, count = tiles - begin, row = begin * 32 * pd;
      tiles_times_rows(ds + skip, count, key_rows + row, pd, g_queries + first * pd);
      add_tiles_transposed(ds + skip, count, queries + first * pd, pd, g_keys + row);
      add_tiles_transposed(p + skip, count, g_out + first * pd, pd, g_values + row);
    }
    scatter_head(s, g_queries, cosine, sine, scale, g_base + head * s.head_dim, width);
  }
  scatter_head(s, g_keys, cosine, sine, 1.0f, g_base + (s.heads + kv) * s.head_dim, width);
  scatter_head(s, g_values, none, none, 1.0f, g_base + (s.heads + s.kv_heads + kv) * s.head_dim, width);
}

// ---- losses ------------------------------------------------------------------------------------------------------

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

template <class T>
INLINE void cross_entropy(T* logits, const std::int64_t* targets, std::int64_t rows, std::int64_t vocab, float scale,
                          float* losses) {
  for (std::int64_t row = 0; row < rows; ++row, logits += vocab) {
    const std::int64_t target = targets[row];
    losses[row] = 0;
    if (target < 0) {
      clear_row(logits, vocab);
      continue;
    }
    const float peak = row_max(logits, vocab);
    const float sum = row_exp_sum(logits, vocab, peak, 1.0f);
    const float lse = peak + std::log(sum);
    losses[row] = lse - load1(logits + target);
    const float hit = (exp1(load1(logits + target) - lse) - 1.0f) * scale;
    std::int64_t i = 0;
    for (; i + 16 <= vocab; i += 16) store(logits + i, exp16(load(logits + i) - lse) * scale);
    for (; i < vocab; ++i) store1(logits + i, exp1(load1(logits + i) - lse) * scale);
    store1(logits + target, hit);
  }
}

template <class T>
INLINE void distill_rows(T* student, T* teacher, const std::int64_t* targets, std::int64_t rows, std::int64_t vocab,
                         float tau, float kl_weight, float ce_weight, float scale, float* kl, float* ce) {
  const float inverse = 1.0f / tau;
  for (std::int64_t row = 0; row < rows; ++row, student += vocab, teacher += vocab) {
    const std::int64_t target = targets[row];
    kl[row] = ce[row] = 0;
    if (target < 0) {
      clear_row(student, vocab);
      continue;
    }
    const float s_peak = row_max(student, vocab), t_peak = row_max(teacher, vocab);
    const float s_lse = s_peak * inverse + std::log(row_exp_sum(student, vocab, s_peak, inverse));
    const float t_lse = t_peak * inverse + std::log(row_exp_sum(teacher, vocab, t_peak, inverse));
    const float hard_lse = s_peak + std::log(row_exp_sum(student, vocab, s_peak, 1.0f));
    ce[row] = hard_lse - load1(student + target);
    // d(tau^2 KL)/dz = tau (softmax(z / tau) - p_teacher)
    const float soft = scale * kl_weight * tau, hard = scale * ce_weight;
    const float hit = hard;
    F16 total = set(0);
    float tail = 0;
    std::int64_t i = 0;
    const float at_target = load1(student + target);
    for (; i + 16 <= vocab; i += 16) {
      const F16 z = load(student + i), log_q = z * inverse - s_lse, log_p = load(teacher + i) * inverse - t_lse;
      const F16 q = exp16(log_q), prob = exp16(log_p);
      total += prob * (log_p - log_q);
      F16 g = (q - prob) * soft;
      if (hard != 0) g += exp16(z - hard_lse) * hard;
      store(student + i, g);
    }
    for (; i < vocab; ++i) {
      const float z = load1(student + i), log_q = z * inverse - s_lse, log_p = load1(teacher + i) * inverse - t_lse;
      const float q = exp1(log_q), prob = exp1(log_p);
      tail += prob * (log_p - log_q);
      store1(student + i, (q - prob) * soft + (hard != 0 ? exp1(z - hard_lse) * hard : 0.0f));
    }
    kl[row] = sum_lanes(total) + tail;
    if (hard != 0) {
      const float z = at_target;
      const float q = exp1(z * inverse - s_lse), prob = exp1(load1(teacher + target) * inverse - t_lse);
      store1(student + target, (q - prob) * soft + exp1(z - hard_lse) * hard - hit);
    }
  }
}

// ---- optimizer ---------------------------------------------------------------------------------------------------

INLINE void adamw(const AdamStep& a, float decay, const std::uint8_t* keep, std::int64_t count, float* w, float* g,
                  float* m, float* v) {
  const float shrink = 1.0f - a.lr * decay, rate = a.lr / a.correction1, root = 1.0f / std::sqrt(a.correction2);
  for (std::int64_t i = 0; i < count; ++i) {
    const float gi = g[i] * a.clip;
    m[i] = a.beta1 * m[i] + (1.0f - a.beta1) * gi;
    v[i] = a.beta2 * v[i] + (1.0f - a.beta2) * gi * gi;
    w[i] = w[i] * shrink - rate * m[i] / (__builtin_sqrtf(v[i]) * root + a.eps);
  }
  if (keep != nullptr)
    for (std::int64_t i = 0; i < count; ++i)
      if (keep[i] == 0) w[i] = 0;
}

INLINE double sum_of_squares(const float* x, std::int64_t count) {
  double sum[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) sum[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
  double total = 0;
  for (int j = 0; j < 8; ++j) total += sum[j];
  for (; i < count; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return total;
}

// ---- one wrapper per instruction set -----------------------------------------------------------------------------

#define PARE_WRAPPERS(isa, attribute)                                                                                  \
  template <class T>                                                                                                   \
  attribute void rms_forward_##isa(const float* x, const float* w, float eps, std::int64_t rows, std::int64_t width,   \
                                   T* out, float* rstd) {                                                              \
    rms_forward<T>(x, w, eps, rows, width, out, rstd);                                                                 \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void rms_backward_##isa(const float* x, const float* w, const float* rstd, const T* g, std::int64_t rows,  \
                                    std::int64_t width, float* gx, float* gw) {                                        \
    rms_backward<T>(x, w, rstd, g, rows, width, gx, gw);                                                               \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void swiglu_forward_##isa(const T* gate_up, std::int64_t rows, std::int64_t width, T* out) {               \
    swiglu_forward<T>(gate_up, rows, width, out);                                                                      \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void swiglu_backward_##isa(const T* gate_up, const T* g, std::int64_t rows, std::int64_t width, T* out) {  \
    swiglu_backward<T>(gate_up, g, rows, width, out);                                                                  \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void add_##isa(const float* x, const T* delta, std::int64_t count, float* sum) {                           \
    add_rows<T>(x, delta, count, sum);                                                                                 \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void attention_forward_##isa(const AttentionShape& s, std::int64_t batch, std::int64_t kv, const T* qkv,   \
                                         const float* cosine, const float* sine, T* mix, float* lse,                   \
                                         float* scratch) {                                                             \
    attention_forward<T>(s, batch, kv, qkv, cosine, sine, mix, lse, scratch);                                          \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void attention_backward_##isa(const AttentionShape& s, std::int64_t batch, std::int64_t kv, const T* qkv,  \
                                          const float* cosine, const float* sine, const T* mix, const float* lse,      \
                                          const T* g_mix, T* g_qkv, float* scratch) {                                  \
    attention_backward<T>(s, batch, kv, qkv, cosine, sine, mix, lse, g_mix, g_qkv, scratch);                           \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void cross_entropy_##isa(T* logits, const std::int64_t* targets, std::int64_t rows, std::int64_t vocab,    \
                                     float scale, float* losses) {                                                     \
    cross_entropy<T>(logits, targets, rows, vocab, scale, losses);                                                     \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void distill_##isa(T* student, T* teacher, const std::int64_t* targets, std::int64_t rows,                 \
                               std::int64_t vocab, float tau, float kl_weight, float ce_weight, float scale,           \
                               float* kl, float* ce) {                                                                 \
    distill_rows<T>(student, teacher, targets, rows, vocab, tau, kl_weight, ce_weight, scale, kl, ce);                 \
  }                                                                                                                    \
  attribute void adamw_##isa(const AdamStep& step, float decay, const std::uint8_t* keep, std::int64_t count,          \
                             float* w, float* g, float* m, float* v) {                                                 \
    adamw(step, decay, keep, count, w, g, m, v);                                                                       \
  }                                                                                                                    \
  attribute double sum_of_squares_##isa(const float* x, std::int64_t count) { return sum_of_squares(x, count); }       \
  template <class T>                                                                                                   \
  RowKernels<T> rows_##isa() {                                                                                         \
    return {rms_forward_##isa<T>,       rms_backward_##isa<T>,       swiglu_forward_##isa<T>, swiglu_backward_##isa<T>, \
            add_##isa<T>,               attention_forward_##isa<T>,  attention_backward_##isa<T>,                      \
            cross_entropy_##isa<T>,     distill_##isa<T>};                                                             \
  }

PARE_WRAPPERS(plain, )
#if defined(__x86_64__)
PARE_WRAPPERS(avx2, __attribute__((target("avx2,fma"))))
PARE_WRAPPERS(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))))

// 2: AVX-512, 1: AVX2, 0: neither
int instruction_set() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return 2;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
}
#endif

}  // namespace

template <class T>
const RowKernels<T>& row_kernels() {
  static const RowKernels<T> table = [] {
#if defined(__x86_64__)
    if (instruction_set() == 2) return rows_avx512<T>();
    if (instruction_set() == 1) return rows_avx2<T>();
#endif
    return rows_plain<T>();
  }();
  return table;
}
template const RowKernels<float>& row_kernels<float>();
template const RowKernels<Bf16>& row_kernels<Bf16>();

const OptimizerKernels& optimizer_kernels() {
  static const OptimizerKernels table = [] {
#if defined(__x86_64__)
    if (instruction_set() == 2) return OptimizerKernels{adamw_avx512, sum_of_squares_avx512};
    if (instruction_set() == 1) return OptimizerKernels{adamw_avx2, sum_of_squares_avx2};
#endif
    return OptimizerKernels{adamw_plain, sum_of_squares_plain};
  }();
  return table;
}

}  // namespace pare
