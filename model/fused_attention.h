// Attention of the training path: 8 query rows at a time against tiles of 32 keys. Included by fused_kernels.cpp alone.
#pragma once

#include "model/fused_lanes.h"

namespace pare {
namespace {

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

// Row `first` + r of a tile: what it does not see, before its window or its document, becomes `value`.
INLINE void mask_before_window(const AttentionShape& s, std::int64_t batch, std::int64_t first, std::int64_t tile,
                               float value, float* rows) {
  if (tile * 32 >= s.first_seen(batch, first + 7)) return;
  for (int r = 0; r < 8; ++r) {
    const std::int64_t hidden = s.first_seen(batch, first + r) - tile * 32;
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
  cosine += batch * s.table_rows * (s.rotary / 2);
  sine += batch * s.table_rows * (s.rotary / 2);
  gather_head(s, base + (s.heads + kv) * s.head_dim, width, cosine, sine, 1.0f, rows);
  transpose(rows, pp, pd, keys);
  gather_head(s, base + (s.heads + s.kv_heads + kv) * s.head_dim, width, static_cast<const float*>(nullptr),
              static_cast<const float*>(nullptr), 1.0f, values);
  const float scale = s.scale;
  for (std::int64_t head = kv * group; head < (kv + 1) * group; ++head) {
    gather_head(s, base + head * s.head_dim, width, cosine, sine, scale, rows);
    for (std::int64_t first = 0; first < n; first += 8) {
      interleave(rows + first * pd, pd, interleaved);
      const std::int64_t tiles = (first + 8 + 31) / 32, begin = s.first_seen(batch, first) / 32;
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
        mask_before_window(s, batch, first, tile, kMasked, p + tile * 256);
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
  cosine += batch * s.table_rows * (s.rotary / 2);
  sine += batch * s.table_rows * (s.rotary / 2);
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
      const std::int64_t tiles = (first + 8 + 31) / 32, begin = s.first_seen(batch, first) / 32;
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
        mask_before_window(s, batch, first, tile, 0.0f, p + tile * 256);
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

}  // namespace
}  // namespace pare
