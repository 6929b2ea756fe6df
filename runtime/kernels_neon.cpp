// NEON as every aarch64 has it (Raspberry Pi 4: no dot product), and what the sets with more share with it: float
// products, rounding of activations, element-wise functions.
#if defined(__aarch64__)
#include <cmath>

#include "runtime/int8_neon.h"

namespace pare {
namespace {

// Codes of up to 4 bits: an int16 lane adds the products of one input of all 8 quads of a group, at most
// 8 * 15 * 127 = 15,240. 8 bits: two products, at most 2 * 128 * 127 = 32,512, are widened at once.
struct Neon {
  static constexpr int kMostTokens = 4;
  static constexpr bool kMixedSigns = false;

  template <CodecKind kKind, int kQuads, int kTokens>
  class Sums {
   public:
    Sums() {
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
        PARE_UNROLL for (int q = 0; q < kQuads; ++q) {
          for (int half = 0; half < 2; ++half) sum_[t][q][half] = Lanes{};
        }
      }
    }
    void add(const uint8x16_t (&u)[2][kQuads], const std::int8_t* x0, const std::int8_t* x1) {
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
        const int8x16_t a = repeated_quad(x0 + t * 4), b = repeated_quad(x1 + t * 4);
        PARE_UNROLL for (int q = 0; q < kQuads; ++q) {
          const int8x16_t v = vreinterpretq_s8_u8(u[0][q]), w = vreinterpretq_s8_u8(u[1][q]);
          if constexpr (kWide) {
            const int16x8_t first = vmull_s8(vget_low_s8(v), vget_low_s8(a));
            const int16x8_t second = vmull_high_s8(v, a);
            sum_[t][q][0] = vpadalq_s16(sum_[t][q][0], vmlal_s8(first, vget_low_s8(w), vget_low_s8(b)));
            sum_[t][q][1] = vpadalq_s16(sum_[t][q][1], vmlal_high_s8(second, w, b));
          } else {
            sum_[t][q][0] = vmlal_s8(sum_[t][q][0], vget_low_s8(v), vget_low_s8(a));
            sum_[t][q][1] = vmlal_high_s8(sum_[t][q][1], v, a);
            sum_[t][q][0] = vmlal_s8(sum_[t][q][0], vget_low_s8(w), vget_low_s8(b));
            sum_[t][q][1] = vmlal_high_s8(sum_[t][q][1], w, b);
          }
        }
      }
    }
    int32x4_t total(int t, int q) const {
      if constexpr (kWide) {
        return vpaddq_s32(sum_[t][q][0], sum_[t][q][1]);
      } else {
        return vpaddq_s32(vpaddlq_s16(sum_[t][q][0]), vpaddlq_s16(sum_[t][q][1]));
      }
    }

   private:
    static constexpr bool kWide = kKind == CodecKind::kQ8;
    using Lanes = std::conditional_t<kWide, int32x4_t, int16x8_t>;
    Lanes sum_[kTokens][kQuads][2];  // outputs 0 and 1 of the quad, 2 and 3
  };
};

// Writes the int8 codes of 4 * kCount numbers as quads that lie `pitch` bytes apart. Returns their sum.
template <int kCount>
inline std::int32_t store_quads(const int32x4_t (&q)[kCount], std::int8_t* to, std::int64_t pitch) {
  int32x4_t total = q[0];
  for (int k = 1; k < kCount; ++k) total = vaddq_s32(total, q[k]);
  for (int k = 0; k < kCount; k += 2) {
    const int8x8_t bytes = vmovn_s16(vcombine_s16(vmovn_s32(q[k]), vmovn_s32(q[k + 1])));
    std::int8_t quads[8];
    vst1_s8(quads, bytes);
    std::memcpy(to + k * pitch, quads, 4);
    std::memcpy(to + (k + 1) * pitch, quads + 4, 4);
  }
  return vaddvq_s32(total);
}

void quantize_tokens(const float* x, std::int64_t ldx, std::int64_t tile, Int8Activations& to) {
  const std::int64_t width = std::min(kActTile, to.tokens - tile * kActTile);
  const std::int64_t base = tile * kActTile * to.groups;
  for (std::int64_t t = 0; t < width; ++t) {
    const float* row = x + (tile * kActTile + t) * ldx;
    uint32x4_t peaks = vdupq_n_u32(0);
    for (std::int64_t i = 0; i < to.cols; i += 4)
      peaks = vmaxq_u32(peaks, magnitude(load_first(row + i, to.cols - i)));
    const Int8Scale scale(peaks);
    std::int8_t* codes = to.codes.data() + tile * kActTile * to.padded + t * 4;
    for (std::int64_t g = 0; g < to.groups; ++g) {
      std::int32_t sum = 0;
      for (std::int64_t i = g * kRowSpan; i < std::min(to.padded, (g + 1) * kRowSpan); i += 8) {
        int32x4_t q[2];
        for (int k = 0; k < 2; ++k) {
          const std::int64_t at = std::min(i + 4 * k, to.cols);
          q[k] = scale.codes(load_first(row + at, to.cols - at));
        }
        sum += store_quads(q, codes + i * width, width * 4);
      }
      const auto at = static_cast<std::size_t>(base + g * width + t);
      to.scale[at] = scale.scale;
      to.minus128[at] = -128 * sum;
    }
  }
}

// Float activations, quantized codes: a row block is unpacked to panel[input][16 outputs].
template <CodecKind kKind>
void unpack_panel(const PackedMatrix& w, std::int64_t block, float* panel) {
  const std::int64_t per_group = w.groups == 1 ? w.lines : w.lines / w.groups;
  for (int quad = 0; quad < 4; ++quad) {
    const auto* line = reinterpret_cast<const std::uint8_t*>(w.data) + block * w.lines * 64 + quad * 16;
    float* to = panel + quad * 4;
    for (std::int64_t g = 0; g < w.groups; ++g) {
      const std::int64_t place = (block * w.groups + g) * kBlockRows + quad * 4;
      const float32x4_t scale = load_halves(w.scales + place);
      int32x4_t offset = vdupq_n_s32(0);
      if constexpr (kKind == CodecKind::kQ8) offset = vdupq_n_s32(128);
      if constexpr (kKind == CodecKind::kQ4) offset = vdupq_n_s32(8);
      if constexpr (kKind == CodecKind::kQ3) offset = vdupq_n_s32(4);
      if constexpr (kKind == CodecKind::kQ2) offset = vdupq_n_s32(2);
      if constexpr (kKind == CodecKind::kQ4a) offset = load_zeros(w.zeros + (block * w.groups + g) * 8, quad);
      // The inputs of 4 outputs x 4 bytes, one code a byte.
      const auto put = [&](uint8x16_t bytes) {
        const uint32x4_t codes = vreinterpretq_u32_u8(bytes);
        const uint32x4_t input[4] = {vandq_u32(codes, vdupq_n_u32(255)),
                                     vandq_u32(vshrq_n_u32(codes, 8), vdupq_n_u32(255)),
                                     vandq_u32(vshrq_n_u32(codes, 16), vdupq_n_u32(255)), vshrq_n_u32(codes, 24)};
        for (int k = 0; k < 4; ++k, to += 16) {
          const float32x4_t code = vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(input[k]), offset));
          if constexpr (kKind == CodecKind::kQ4m) {
            vst1q_f32(to, vfmaq_f32(load_halves(w.minima + place), code, scale));
          } else {
            vst1q_f32(to, vmulq_f32(code, scale));
          }
        }
      };
      constexpr std::int64_t kLines = kKind == CodecKind::kQ3 ? 3 : kKind == CodecKind::kQ2 ? 2 : 1;
      for (std::int64_t c = 0; c < per_group; c += kLines, line += kLines * 64) {
        if constexpr (kKind == CodecKind::kQ3 || kKind == CodecKind::kQ2) {
          put(low_codes<kKind, 0>(line));
          put(low_codes<kKind, 1>(line));
          put(low_codes<kKind, 2>(line));
          put(low_codes<kKind, 3>(line));
          put(low_codes<kKind, 4>(line));
          put(low_codes<kKind, 5>(line));
          put(low_codes<kKind, 6>(line));
          put(low_codes<kKind, 7>(line));
        } else if constexpr (kKind == CodecKind::kQ8) {
          put(vld1q_u8(line));
        } else {
          put(vandq_u8(vld1q_u8(line), vdupq_n_u8(15)));
          put(vshrq_n_u8(vld1q_u8(line), 4));
        }
      }
    }
  }
}

// 16 outputs x kTokens; two partial sums an output (inputs k mod 2) keep the chains short.
template <int kTokens>
void panel_tile(const float* panel, std::int64_t cols, const float* x, std::int64_t ldx, float* out, std::int64_t ldo,
                std::int64_t rows, bool add) {
  float32x4_t sum[kTokens][2][4];
  PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
    PARE_UNROLL for (int q = 0; q < 4; ++q) sum[t][0][q] = sum[t][1][q] = vdupq_n_f32(0);
  }
  const auto step = [&](std::int64_t c, int k) {
    float32x4_t w[4];
    PARE_UNROLL for (int q = 0; q < 4; ++q) w[q] = vld1q_f32(panel + c * 16 + q * 4);
    PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
      PARE_UNROLL for (int q = 0; q < 4; ++q) sum[t][k][q] = vfmaq_n_f32(sum[t][k][q], w[q], x[t * ldx + c]);
    }
  };
  std::int64_t c = 0;
  for (; c + 2 <= cols; c += 2) {
    step(c, 0);
    step(c + 1, 1);
  }
  if (c < cols) step(c, 0);
  PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
    PARE_UNROLL for (int q = 0; q < 4; ++q) {
      const float32x4_t total = vaddq_f32(sum[t][0][q], sum[t][1][q]);
      float* to = out + t * ldo + q * 4;
      store_first(to, add ? vaddq_f32(load_first(to, rows - q * 4), total) : total, rows - q * 4);
    }
  }
}

// Row-major float weights: kRows x kTokens dot products along the inputs, 8 partial sums each.
inline uint16x4_t first_u16(const std::byte* p, std::int64_t n) {
  std::uint16_t lanes[4] = {};
  if (n > 0) std::memcpy(lanes, p, static_cast<std::size_t>(std::min<std::int64_t>(n, 4)) * 2);
  return vld1_u16(lanes);
}
struct LoadF32 {
  static constexpr int kBytes = 4;
  static float32x4_t full(const std::byte* p) { return vld1q_f32(reinterpret_cast<const float*>(p)); }
  static float32x4_t part(const std::byte* p, std::int64_t n) {
    return load_first(reinterpret_cast<const float*>(p), n);
  }
};
struct LoadF16 {
  static constexpr int kBytes = 2;
  static float32x4_t full(const std::byte* p) { return load_halves(reinterpret_cast<const std::uint16_t*>(p)); }
  static float32x4_t part(const std::byte* p, std::int64_t n) {
    return vcvt_f32_f16(vreinterpret_f16_u16(first_u16(p, n)));
  }
};
struct LoadBf16 {
  static constexpr int kBytes = 2;
  static float32x4_t widen(uint16x4_t v) { return vreinterpretq_f32_u32(vshll_n_u16(v, 16)); }
  static float32x4_t full(const std::byte* p) { return widen(vld1_u16(reinterpret_cast<const std::uint16_t*>(p))); }
  static float32x4_t part(const std::byte* p, std::int64_t n) { return widen(first_u16(p, n)); }
};

template <class Load, int kRows, int kTokens>
void dot_tile(const std::byte* w, std::int64_t cols, const float* x, std::int64_t ldx, float* out, std::int64_t ldo,
              bool add) {
  const std::int64_t pitch = cols * Load::kBytes;
  float32x4_t sum[kRows][kTokens][2];
  PARE_UNROLL for (int r = 0; r < kRows; ++r) {
    PARE_UNROLL for (int t = 0; t < kTokens; ++t) sum[r][t][0] = sum[r][t][1] = vdupq_n_f32(0);
  }
  std::int64_t c = 0;
  for (; c + 8 <= cols; c += 8) {
    PARE_UNROLL for (int half = 0; half < 2; ++half) {
      float32x4_t xs[kTokens];
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) xs[t] = vld1q_f32(x + t * ldx + c + half * 4);
      PARE_UNROLL for (int r = 0; r < kRows; ++r) {
        const float32x4_t ws = Load::full(w + r * pitch + (c + half * 4) * Load::kBytes);
        PARE_UNROLL for (int t = 0; t < kTokens; ++t) sum[r][t][half] = vfmaq_f32(sum[r][t][half], ws, xs[t]);
      }
    }
  }
  for (int half = 0; c < cols; ++half, c += 4) {
    PARE_UNROLL for (int r = 0; r < kRows; ++r) {
      const float32x4_t ws = Load::part(w + r * pitch + c * Load::kBytes, cols - c);
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
        const float32x4_t xs = load_first(x + t * ldx + c, cols - c);
        if (half == 0) sum[r][t][0] = vfmaq_f32(sum[r][t][0], ws, xs);
        if (half == 1) sum[r][t][1] = vfmaq_f32(sum[r][t][1], ws, xs);
      }
    }
  }
  PARE_UNROLL for (int r = 0; r < kRows; ++r) {
    PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
      const float value = vaddvq_f32(vaddq_f32(sum[r][t][0], sum[r][t][1]));
      float& to = out[t * ldo + r];
      to = add ? to + value : value;
    }
  }
}

template <class Load, int kRows>
void dot_rows(const std::byte* w, std::int64_t cols, const float* x, std::int64_t ldx, std::int64_t tokens, float* out,
              std::int64_t ldo, bool add) {
  std::int64_t t = 0;
  for (; t + 3 <= tokens; t += 3) dot_tile<Load, kRows, 3>(w, cols, x + t * ldx, ldx, out + t * ldo, ldo, add);
  for (; t < tokens; ++t) dot_tile<Load, kRows, 1>(w, cols, x + t * ldx, ldx, out + t * ldo, ldo, add);
}

template <class Load>
void matmul_rows(const PackedMatrix& w, const float* x, std::int64_t ldx, std::int64_t tokens, std::int64_t block_begin,
                 std::int64_t block_end, float* out, std::int64_t ldo, bool add) {
  const std::int64_t end = std::min(block_end * kBlockRows, w.rows);
  std::int64_t r = block_begin * kBlockRows;
  const auto row = [&](std::int64_t i) { return w.data + i * w.cols * Load::kBytes; };
  for (; r + 4 <= end; r += 4) dot_rows<Load, 4>(row(r), w.cols, x, ldx, tokens, out + r, ldo, add);
  for (; r < end; ++r) dot_rows<Load, 1>(row(r), w.cols, x, ldx, tokens, out + r, ldo, add);
}

// y / (1 + exp(e)), 4 at a time.
inline float32x4_t logistic(float32x4_t y, float32x4_t e) {
  return vdivq_f32(y, vaddq_f32(vdupq_n_f32(1.0f), exp_ps(e)));
}

inline float32x4_t gelu_tanh_of(float32x4_t g) {
  const float32x4_t cubic = vfmaq_n_f32(vdupq_n_f32(1.0f), vmulq_f32(g, g), kGeluCubic);
  return logistic(g, vmulq_n_f32(vmulq_f32(g, cubic), -kGeluScale));
}

}  // namespace

namespace neon {

void quantize_tile(const float* x, std::int64_t ldx, std::int64_t tile, Int8Activations& to) {
  if (to.form == Int8Activations::Form::kToken) return quantize_tokens(x, ldx, tile, to);
  const std::int64_t width = std::min(kActTile, to.tokens - tile * kActTile);
  const std::int64_t base = tile * kActTile * to.groups;
  for (std::int64_t t = 0; t < width; ++t) {
    const float* row = x + (tile * kActTile + t) * ldx;
    for (std::int64_t g = 0; g < to.groups; ++g) {
      const std::int64_t count = std::min(kActGroup, to.cols - g * kActGroup);
      float32x4_t v[8];
      uint32x4_t peaks = vdupq_n_u32(0);
      for (std::int64_t k = 0; k < 8; ++k) {
        v[k] = load_first(row + g * kActGroup + std::min(4 * k, count), count - 4 * k);
        peaks = vmaxq_u32(peaks, magnitude(v[k]));
      }
      const Int8Scale scale(peaks);
      int32x4_t q[8];
      for (int k = 0; k < 8; ++k) q[k] = scale.codes(v[k]);
      const std::int32_t sum =
          store_quads(q, to.codes.data() + base * kActGroup + (g * 8 * width + t) * 4, width * 4);
      const auto at = static_cast<std::size_t>(base + g * width + t);
      to.scale[at] = scale.scale;
      to.minus8[at] = -8 * sum;
      to.minus128[at] = -128 * sum;
      to.minus1[at] = static_cast<std::int32_t>(static_cast<std::uint16_t>(-sum));
    }
  }
}

void matmul_float(const PackedMatrix& w, const float* x, std::int64_t ldx, std::int64_t tokens,
                  std::int64_t block_begin, std::int64_t block_end, float* out, std::int64_t ldo, bool add,
                  float* scratch) {
  switch (w.codec.kind) {
    case CodecKind::kF32:
      return matmul_rows<LoadF32>(w, x, ldx, tokens, block_begin, block_end, out, ldo, add);
    case CodecKind::kF16:
      return matmul_rows<LoadF16>(w, x, ldx, tokens, block_begin, block_end, out, ldo, add);
    case CodecKind::kBf16:
      return matmul_rows<LoadBf16>(w, x, ldx, tokens, block_begin, block_end, out, ldo, add);
    default:
      break;
  }
  const auto unpack = w.codec.kind == CodecKind::kQ8    ? unpack_panel<CodecKind::kQ8>
                      : w.codec.kind == CodecKind::kQ4  ? unpack_panel<CodecKind::kQ4>
                      : w.codec.kind == CodecKind::kQ4a ? unpack_panel<CodecKind::kQ4a>
                      : w.codec.kind == CodecKind::kQ4m ? unpack_panel<CodecKind::kQ4m>
                      : w.codec.kind == CodecKind::kQ3  ? unpack_panel<CodecKind::kQ3>
                                                        : unpack_panel<CodecKind::kQ2>;
  for (std::int64_t block = block_begin; block < block_end; ++block) {
    unpack(w, block, scratch);
    const std::int64_t rows = w.rows - block * kBlockRows;
    float* to = out + block * kBlockRows;
    std::int64_t t = 0;
    for (; t + 3 <= tokens; t += 3) panel_tile<3>(scratch, w.cols, x + t * ldx, ldx, to + t * ldo, ldo, rows, add);
    for (; t < tokens; ++t) panel_tile<1>(scratch, w.cols, x + t * ldx, ldx, to + t * ldo, ldo, rows, add);
  }
}

void rms_norm(const float* x, const float* weight, float eps, std::int64_t n, float* out) {
  float32x4_t sum[4] = {};
  for (std::int64_t i = 0; i < n; i += 16) {
    for (std::int64_t k = 0; k < 4; ++k) {
      const float32x4_t v = load_first(x + std::min(i + 4 * k, n), n - i - 4 * k);
      sum[k] = vfmaq_f32(sum[k], v, v);
    }
  }
  const float mean =
      vaddvq_f32(vaddq_f32(vaddq_f32(sum[0], sum[1]), vaddq_f32(sum[2], sum[3]))) / static_cast<float>(n);
  const float scale = 1.0f / std::sqrt(mean + eps);
  for (std::int64_t i = 0; i < n; i += 4) {
    const float32x4_t v = vmulq_n_f32(load_first(x + i, n - i), scale);
    store_first(out + i, vmulq_f32(v, load_first(weight + i, n - i)), n - i);
  }
}

void silu_mul(float* gate, const float* up, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 4) {
    const float32x4_t g = load_first(gate + i, n - i);
    store_first(gate + i, vmulq_f32(logistic(g, vnegq_f32(g)), load_first(up + i, n - i)), n - i);
  }
}

void gelu_mul(float* gate, const float* up, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 4) {
    const float32x4_t y = gelu_tanh_of(load_first(gate + i, n - i));
    store_first(gate + i, vmulq_f32(y, load_first(up + i, n - i)), n - i);
  }
}

void gelu_tanh(float* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 4) store_first(x + i, gelu_tanh_of(load_first(x + i, n - i)), n - i);
}

void gelu(float* x, std::int64_t n) {
  const float32x4_t one = vdupq_n_f32(1.0f);
  for (std::int64_t i = 0; i < n; i += 4) {
    const float32x4_t v = load_first(x + i, n - i);
    const float32x4_t z = vmulq_n_f32(vabsq_f32(v), 0.70710678f);
    const float32x4_t t = vdivq_f32(one, vfmaq_n_f32(one, z, kErfP));
    float32x4_t p = vdupq_n_f32(kErfA[4]);
    for (int k = 3; k >= 0; --k) p = vfmaq_f32(vdupq_n_f32(kErfA[k]), p, t);
    const float32x4_t e = exp_ps(vnegq_f32(vmulq_f32(z, z)));
    const float32x4_t half = vmulq_n_f32(vmulq_f32(vmulq_f32(p, t), e), 0.5f);  // erfc(z) / 2
    const uint32x4_t negative = vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_f32(v), 31));
    store_first(x + i, vmulq_f32(v, vbslq_f32(negative, half, vsubq_f32(one, half))), n - i);
  }
}

void soft_cap(float* x, float cap, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 4) {  // c tanh(v / c) = c - 2 c / (exp(2 v / c) + 1)
    const float32x4_t part =
        logistic(vdupq_n_f32(2.0f * cap), vmulq_n_f32(load_first(x + i, n - i), 2.0f / cap));
    store_first(x + i, vsubq_f32(vdupq_n_f32(cap), part), n - i);
  }
}

}  // namespace neon

const Kernels kNeonKernels = kernels_with<Neon>("neon");

}  // namespace pare
#endif
