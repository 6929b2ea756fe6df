// Products with int8 activations on aarch64: the walk over lines and groups, which the NEON sources share. They differ
// in how the products of 8 inputs are formed and added, so each brings an `Isa`:
//   kMostTokens  tokens taken at once: 4, or 8
//   kMixedSigns  bytes without sign are multiplied with bytes that have one: 8-bit codes stay as stored, 128 too large
//   Sums<kKind, kQuads, kTokens>: sums of 4 * kQuads outputs x kTokens tokens, at first 0
//     add(u, x0, x1)  u[input quad][output quad]: codes [4 outputs][4 inputs]; x0, x1: the tokens' inputs of both quads
//     total(t, q)     of 4 outputs
// Whole numbers are exact and the rest is written once, so all three sets give the same bits.
#pragma once

#include "runtime/kernels.h"
#include "runtime/lanes_neon.h"

namespace pare {

// What the sets have in common (kernels_neon.cpp).
namespace neon {
void matmul_float(const PackedMatrix& w, const float* x, std::int64_t ldx, std::int64_t tokens,
                  std::int64_t block_begin, std::int64_t block_end, float* out, std::int64_t ldo, bool add,
                  float* scratch);
void quantize_tile(const float* x, std::int64_t ldx, std::int64_t tile, Int8Activations& to);
void rms_norm(const float* x, const float* weight, float eps, std::int64_t n, float* out);
void silu_mul(float* gate, const float* up, std::int64_t n);
void gelu_mul(float* gate, const float* up, std::int64_t n);
void gelu_tanh(float* x, std::int64_t n);
void gelu(float* x, std::int64_t n);
void soft_cap(float* x, float cap, std::int64_t n);
}  // namespace neon

namespace {

// Zero points of outputs [4 * quad, 4 * quad + 4) as int32.
inline int32x4_t load_zeros(const std::uint8_t* p, int quad) {
  const uint8x8_t raw = vld1_u8(p);
  const uint16x8_t wide = vmovl_u8(quad < 2 ? vand_u8(raw, vdup_n_u8(15)) : vshr_n_u8(raw, 4));
  return vreinterpretq_s32_u32(quad % 2 == 0 ? vmovl_u16(vget_low_u16(wide)) : vmovl_high_u16(wide));
}

// u of quad kJ of the 32 inputs whose lines begin at `line`, for 2 and 3 bits (core/codecs/q2.cpp, q3.cpp).
template <CodecKind kKind, int kJ>
inline uint8x16_t low_codes(const std::uint8_t* line) {
  constexpr int kPair = kJ % 4 * 2;
  uint8x16_t low = vld1q_u8(line + kJ / 4 * 64);
  if constexpr (kPair > 0) low = vshrq_n_u8(low, kPair);
  low = vandq_u8(low, vdupq_n_u8(3));
  if constexpr (kKind == CodecKind::kQ3) {
    uint8x16_t third = vld1q_u8(line + 128);
    if constexpr (kJ < 2) third = vshlq_n_u8(third, 2 - kJ);
    if constexpr (kJ > 2) third = vshrq_n_u8(third, kJ - 2);
    low = vorrq_u8(low, vandq_u8(third, vdupq_n_u8(4)));
  }
  return low;
}

// One or two tokens stream the codes once: asking for them ahead keeps memory busy across the ends of blocks. More
// tokens come back to the same codes in cache.
template <int kTokens>
inline void stream(const std::uint8_t* line) {
  if constexpr (kTokens <= 2) __builtin_prefetch(line + 2048);
}

// Outputs from 16 * block + 4 * first_quad on, tokens of the tile from `first` on.
template <class Isa, CodecKind kKind, int kQuads, int kTokens>
void part_int8(const PackedMatrix& w, std::int64_t block, int first_quad, const Int8Tile& x, std::int64_t first,
               float* out, std::int64_t ldo, bool add) {
  const std::int64_t pitch = x.width * 4;
  const auto* line = reinterpret_cast<const std::uint8_t*>(w.data) + block * w.lines * 64 + first_quad * 16;
  const std::int64_t group_base = block * w.groups;
  const std::int8_t* codes = x.codes + first * 4;
  const int shift = w.groups == 1 ? 62 : w.group_shift;
  float32x4_t sum[kTokens][kQuads];
  PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
    PARE_UNROLL for (int q = 0; q < kQuads; ++q) sum[t][q] = vdupq_n_f32(0);
  }
  for (std::int64_t g = 0; g < x.groups; ++g) {
    typename Isa::template Sums<kKind, kQuads, kTokens> sums;
    uint8x16_t u[2][kQuads];
    if constexpr (kKind == CodecKind::kQ8) {
      const auto load = [&](int quad, std::int64_t at) {
        stream<kTokens>(line + at);
        PARE_UNROLL for (int q = 0; q < kQuads; ++q) {
          u[quad][q] = vld1q_u8(line + at + q * 16);
          if constexpr (!Isa::kMixedSigns) u[quad][q] = veorq_u8(u[quad][q], vdupq_n_u8(0x80));
        }
      };
      const std::int64_t count = std::min(x.quads, w.lines - g * x.quads);
      std::int64_t c = 0;
      for (; c + 2 <= count; c += 2, line += 128) {
        load(0, 0);
        load(1, 64);
        sums.add(u, codes + c * pitch, codes + (c + 1) * pitch);
      }
      if (c < count) {
        load(0, 0);
        PARE_UNROLL for (int q = 0; q < kQuads; ++q) u[1][q] = vdupq_n_u8(0);
        sums.add(u, codes + c * pitch, codes + c * pitch);
        line += 64;
      }
      codes += x.quads * pitch;
    } else if constexpr (kKind == CodecKind::kQ3 || kKind == CodecKind::kQ2) {
      const auto pair = [&]<int kJ>() {
        PARE_UNROLL for (int q = 0; q < kQuads; ++q) {
          u[0][q] = low_codes<kKind, kJ>(line + q * 16);
          u[1][q] = low_codes<kKind, kJ + 1>(line + q * 16);
        }
        sums.add(u, codes + kJ * pitch, codes + (kJ + 1) * pitch);
      };
      constexpr int kLines = kKind == CodecKind::kQ3 ? 3 : 2;
      PARE_UNROLL for (int k = 0; k < kLines; ++k) stream<kTokens>(line + k * 64);
      pair.template operator()<0>();
      pair.template operator()<2>();
      pair.template operator()<4>();
      pair.template operator()<6>();
      line += kLines * 64;
      codes += 8 * pitch;
    } else {
      PARE_UNROLL for (int c = 0; c < 4; ++c, line += 64) {
        stream<kTokens>(line);
        PARE_UNROLL for (int q = 0; q < kQuads; ++q) {
          const uint8x16_t both = vld1q_u8(line + q * 16);
          u[0][q] = vandq_u8(both, vdupq_n_u8(15));
          u[1][q] = vshrq_n_u8(both, 4);
        }
        sums.add(u, codes + 2 * c * pitch, codes + (2 * c + 1) * pitch);
      }
      codes += 8 * pitch;
    }
    const std::int64_t wg = group_base + (g >> shift);
    const std::int64_t at = g * x.width + first;
    PARE_UNROLL for (int q = 0; q < kQuads; ++q) {
      const std::int64_t place = wg * kBlockRows + (first_quad + q) * 4;
      const float32x4_t scale = load_halves(w.scales + place);
      [[maybe_unused]] int32x4_t zero;
      if constexpr (kKind == CodecKind::kQ4a) zero = load_zeros(w.zeros + wg * 8, first_quad + q);
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
        int32x4_t total = sums.total(t, q);
        // What the offset of the stored codes adds too much.
        if constexpr (kKind == CodecKind::kQ8 && Isa::kMixedSigns)
          total = vaddq_s32(total, vdupq_n_s32(x.minus128[at + t]));
        if constexpr (kKind == CodecKind::kQ4) total = vaddq_s32(total, vdupq_n_s32(x.minus8[at + t]));
        if constexpr (kKind == CodecKind::kQ3) total = vaddq_s32(total, vdupq_n_s32(x.minus8[at + t] / 2));
        if constexpr (kKind == CodecKind::kQ2) total = vaddq_s32(total, vdupq_n_s32(x.minus8[at + t] / 4));
        if constexpr (kKind == CodecKind::kQ4a)
          total = vmlaq_n_s32(total, zero, static_cast<std::int16_t>(x.minus1[at + t]));
        sum[t][q] = vfmaq_f32(sum[t][q], vcvtq_f32_s32(total), vmulq_n_f32(scale, x.scale[at + t]));
      }
      if constexpr (kKind == CodecKind::kQ4m) {
        const float32x4_t minimum = load_halves(w.minima + place);
        PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
          sum[t][q] = vfmaq_n_f32(sum[t][q], minimum, x.input_sum(at + t));
        }
      }
    }
  }
  PARE_UNROLL for (int q = 0; q < kQuads; ++q) {
    const std::int64_t row = block * kBlockRows + (first_quad + q) * 4, count = w.rows - row;
    PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
      float* to = out + (first + t) * ldo + row;
      store_first(to, add ? vaddq_f32(load_first(to, count), sum[t][q]) : sum[t][q], count);
    }
  }
}

template <class Isa, CodecKind kKind>
void tile_int8(const PackedMatrix& w, std::int64_t block_begin, std::int64_t block_end, const Int8Tile& x, float* out,
               std::int64_t ldo, bool add) {
  for (std::int64_t block = block_begin; block < block_end; ++block) {
    const int quads = w.rows - block * kBlockRows > 8 ? 4 : 2;
    std::int64_t t = 0;
    // Many tokens need the registers, so they take half a block at a time.
    if constexpr (Isa::kMostTokens == 8) {
      for (; t + 8 <= x.width; t += 8) {
        for (int q = 0; q < quads; q += 2) part_int8<Isa, kKind, 2, 8>(w, block, q, x, t, out, ldo, add);
      }
    }
    for (; t + 4 <= x.width; t += 4) {
      for (int q = 0; q < quads; q += 2) part_int8<Isa, kKind, 2, 4>(w, block, q, x, t, out, ldo, add);
    }
    if (t + 2 <= x.width) {
      part_int8<Isa, kKind, 4, 2>(w, block, 0, x, t, out, ldo, add);
      t += 2;
    }
    if (t < x.width) part_int8<Isa, kKind, 4, 1>(w, block, 0, x, t, out, ldo, add);
  }
}

template <class Isa>
void matmul_int8(const PackedMatrix& w, const Int8Activations& x, std::int64_t tile_begin, std::int64_t tile_end,
                 std::int64_t block_begin, std::int64_t block_end, float* out, std::int64_t ldo, bool add) {
  const auto kernel = w.codec.kind == CodecKind::kQ8    ? tile_int8<Isa, CodecKind::kQ8>
                      : w.codec.kind == CodecKind::kQ4  ? tile_int8<Isa, CodecKind::kQ4>
                      : w.codec.kind == CodecKind::kQ4a ? tile_int8<Isa, CodecKind::kQ4a>
                      : w.codec.kind == CodecKind::kQ4m ? tile_int8<Isa, CodecKind::kQ4m>
                      : w.codec.kind == CodecKind::kQ3  ? tile_int8<Isa, CodecKind::kQ3>
                                                        : tile_int8<Isa, CodecKind::kQ2>;
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    kernel(w, block_begin, block_end, int8_tile(x, tile), out + tile * kActTile * ldo, ldo, add);
  }
}

template <class Isa>
constexpr Kernels kernels_with(const char* name) {
  return {name,          neon::matmul_float, matmul_int8<Isa>, neon::quantize_tile, neon::rms_norm, neon::silu_mul,
          neon::gelu_mul, neon::gelu_tanh,   neon::gelu,       neon::soft_cap,      &kNeonAttention};
}

}  // namespace
}  // namespace pare
