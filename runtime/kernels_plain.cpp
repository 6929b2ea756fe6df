// Reference kernels in plain C++: the meaning of every other instruction set, and the way on machines that have none.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "runtime/kernels.h"

namespace pare {
namespace {

float dot(const float* a, const float* b, std::int64_t n) {
  float sum[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int k = 0; k < 8; ++k) sum[k] += a[i + k] * b[i + k];
  }
  for (int k = 0; i < n; ++i, ++k) sum[k] += a[i] * b[i];
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

void matmul_float(const PackedMatrix& w, const float* x, std::int64_t ldx, std::int64_t tokens,
                  std::int64_t block_begin, std::int64_t block_end, float* out, std::int64_t ldo, bool add,
                  float* scratch) {
  const std::int64_t end = std::min(block_end * kBlockRows, w.rows);
  for (std::int64_t r = block_begin * kBlockRows; r < end; ++r) {
    const float* row = scratch;
    if (w.codec.kind == CodecKind::kF32) {
      row = reinterpret_cast<const float*>(w.data) + r * w.cols;
    } else {
      unpack_matrix_row(w, r, scratch);
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
      const float value = dot(row, x + t * ldx, w.cols);
      float& to = out[t * ldo + r];
      to = add ? to + value : value;
    }
  }
}

// u of one of the 4 inputs of quad j (< 8) of the 32 inputs that begin at `line`; byte: 4 * output + input of the quad.
template <CodecKind kKind>
int low_code(const std::uint8_t* line, int j, std::int64_t byte) {
  if constexpr (kKind == CodecKind::kQ2) return line[j / 4 * 64 + byte] >> (j % 4 * 2) & 3;
  return (line[j / 4 * 64 + byte] >> (j % 4 * 2) & 3) | (line[128 + byte] >> j & 1) << 2;
}

template <CodecKind kKind>
void block_int8(const PackedMatrix& w, std::int64_t block, const Int8Tile& x, std::int64_t t, float* out) {
  const auto* line = reinterpret_cast<const std::uint8_t*>(w.data) + block * w.lines * 64;
  constexpr bool kLow = kKind == CodecKind::kQ3 || kKind == CodecKind::kQ2;
  constexpr std::int64_t kLowLines = kKind == CodecKind::kQ3 ? 3 : 2;  // per activation group
  const std::int64_t lines = kKind == CodecKind::kQ8 ? x.quads : 4;    // per activation group
  const std::uint16_t* scales = w.scales + block * w.groups * kBlockRows;
  float sum[kBlockRows] = {};
  for (std::int64_t g = 0; g < x.groups; ++g) {
    const std::int64_t wg = w.groups == 1 ? 0 : g >> w.group_shift;
    const std::int64_t at = g * x.width + t;
    std::int32_t acc[kBlockRows];
    for (std::int64_t r = 0; r < kBlockRows; ++r) {
      if constexpr (kKind == CodecKind::kQ8) acc[r] = x.minus128[at];
      if constexpr (kKind == CodecKind::kQ4) acc[r] = x.minus8[at];
      if constexpr (kKind == CodecKind::kQ3) acc[r] = x.minus8[at] / 2;
      if constexpr (kKind == CodecKind::kQ2) acc[r] = x.minus8[at] / 4;
      if constexpr (kKind == CodecKind::kQ4a) {
        const std::uint8_t zero = w.zeros[(block * w.groups + wg) * 8 + r % 8];
        acc[r] = (r < 8 ? zero & 15 : zero >> 4) * static_cast<std::int16_t>(x.minus1[at]);
      }
      if constexpr (kKind == CodecKind::kQ4m) acc[r] = 0;
    }
    const std::int8_t* codes = x.codes + (g * x.quads * x.width + t) * 4;
    if constexpr (kLow) {
      for (int j = 0; j < 8; ++j) {
        const std::int8_t* quad = codes + j * x.width * 4;
        for (std::int64_t r = 0; r < kBlockRows; ++r) {
          for (int k = 0; k < 4; ++k) acc[r] += low_code<kKind>(line, j, r * 4 + k) * quad[k];
        }
      }
      line += kLowLines * 64;
    }
    const std::int64_t count = kLow ? 0 : std::min(lines, w.lines - g * lines);
    for (std::int64_t c = 0; c < count; ++c, line += 64) {
      if constexpr (kKind == CodecKind::kQ8) {
        const std::int8_t* quad = codes + c * x.width * 4;
        for (std::int64_t r = 0; r < kBlockRows; ++r) {
          for (int k = 0; k < 4; ++k) acc[r] += line[r * 4 + k] * quad[k];
        }
      } else {
        const std::int8_t* low = codes + 2 * c * x.width * 4;
        const std::int8_t* high = low + x.width * 4;
        for (std::int64_t r = 0; r < kBlockRows; ++r) {
          for (int k = 0; k < 4; ++k) acc[r] += (line[r * 4 + k] & 15) * low[k] + (line[r * 4 + k] >> 4) * high[k];
        }
      }
    }
    for (std::int64_t r = 0; r < kBlockRows; ++r) {
      sum[r] += static_cast<float>(acc[r]) * (f16_to_f32(scales[wg * kBlockRows + r]) * x.scale[at]);
      if constexpr (kKind == CodecKind::kQ4m)
        sum[r] += f16_to_f32(w.minima[(block * w.groups + wg) * kBlockRows + r]) * x.input_sum(at);
    }
  }
  std::copy(sum, sum + kBlockRows, out);
}

void matmul_int8(const PackedMatrix& w, const Int8Activations& x, std::int64_t tile_begin, std::int64_t tile_end,
                 std::int64_t block_begin, std::int64_t block_end, float* out, std::int64_t ldo, bool add) {
  const auto kernel = w.codec.kind == CodecKind::kQ8    ? block_int8<CodecKind::kQ8>
                      : w.codec.kind == CodecKind::kQ4  ? block_int8<CodecKind::kQ4>
                      : w.codec.kind == CodecKind::kQ4a ? block_int8<CodecKind::kQ4a>
                      : w.codec.kind == CodecKind::kQ4m ? block_int8<CodecKind::kQ4m>
                      : w.codec.kind == CodecKind::kQ3  ? block_int8<CodecKind::kQ3>
                                                        : block_int8<CodecKind::kQ2>;
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const Int8Tile view = int8_tile(x, tile);
    for (std::int64_t block = block_begin; block < block_end; ++block) {
      const std::int64_t rows = std::min(kBlockRows, w.rows - block * kBlockRows);
      for (std::int64_t t = 0; t < view.width; ++t) {
        float sum[kBlockRows];
        kernel(w, block, view, t, sum);
        float* to = out + (tile * kActTile + t) * ldo + block * kBlockRows;
        for (std::int64_t r = 0; r < rows; ++r) to[r] = add ? to[r] + sum[r] : sum[r];
      }
    }
  }
}

// Of |x| as bits: NaN above infinity above every number.
std::uint32_t largest_magnitude(const float* x, std::int64_t count) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i)
    largest = std::max(largest, std::bit_cast<std::uint32_t>(x[i]) & 0x7fffffffu);
  return largest;
}

void quantize_tokens(const float* x, std::int64_t ldx, std::int64_t tile, Int8Activations& to) {
  const std::int64_t width = std::min(kActTile, to.tokens - tile * kActTile);
  const std::int64_t base = tile * kActTile * to.groups;
  for (std::int64_t t = 0; t < width; ++t) {
    const float* row = x + (tile * kActTile + t) * ldx;
    const std::uint32_t largest = largest_magnitude(row, to.cols);
    const bool finite = largest < 0x7f800000u;
    const float peak = std::bit_cast<float>(largest);
    const float inverse = finite && peak > 1e-30f ? 127.0f / peak : 0.0f;
    std::int8_t* codes = to.codes.data() + tile * kActTile * to.padded + t * 4;
    for (std::int64_t g = 0; g < to.groups; ++g) {
      std::int32_t sum = 0;
      for (std::int64_t i = g * kRowSpan; i < std::min(to.padded, (g + 1) * kRowSpan); ++i) {
        const float code = i < to.cols && finite ? std::nearbyint(row[i] * inverse) : 0.0f;
        codes[i / 4 * width * 4 + i % 4] = static_cast<std::int8_t>(code);
        sum += static_cast<std::int32_t>(code);
      }
      const auto at = static_cast<std::size_t>(base + g * width + t);
      to.scale[at] = finite ? peak / 127.0f : std::bit_cast<float>(0x7fc00000u);
      to.minus128[at] = -128 * sum;
    }
  }
}

void quantize_tile(const float* x, std::int64_t ldx, std::int64_t tile, Int8Activations& to) {
  if (to.form == Int8Activations::Form::kToken) return quantize_tokens(x, ldx, tile, to);
  const std::int64_t width = std::min(kActTile, to.tokens - tile * kActTile);
  const std::int64_t base = tile * kActTile * to.groups;
  for (std::int64_t t = 0; t < width; ++t) {
    const float* row = x + (tile * kActTile + t) * ldx;
    for (std::int64_t g = 0; g < to.groups; ++g) {
      const std::int64_t count = std::min(kActGroup, to.cols - g * kActGroup);
      const float* in = row + g * kActGroup;
      const std::uint32_t largest = largest_magnitude(in, count);
      const float peak = std::bit_cast<float>(largest);
      const bool finite = largest < 0x7f800000u;
      const float inverse = finite && peak > 1e-30f ? 127.0f / peak : 0.0f;
      std::int8_t* codes = to.codes.data() + base * kActGroup + (g * 8 * width + t) * 4;
      std::int32_t sum = 0;
      for (std::int64_t i = 0; i < kActGroup; ++i) {
        const auto code = static_cast<std::int8_t>(i < count && finite ? std::nearbyint(in[i] * inverse) : 0.0f);
        codes[i / 4 * width * 4 + i % 4] = code;
        sum += code;
      }
      const auto at = static_cast<std::size_t>(base + g * width + t);
      to.scale[at] = finite ? peak / 127.0f : std::bit_cast<float>(0x7fc00000u);
      to.minus8[at] = -8 * sum;
      to.minus128[at] = -128 * sum;
      to.minus1[at] = static_cast<std::int32_t>(static_cast<std::uint16_t>(-sum));
    }
  }
}

void rms_norm(const float* x, const float* weight, float eps, std::int64_t n, float* out) {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  const auto scale = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(n) + eps));
  for (std::int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

void silu_mul(float* gate, const float* up, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

void gelu_mul(float* gate, const float* up, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const float x = gate[i];
    gate[i] = x / (1.0f + std::exp(-kGeluScale * (x + kGeluCubic * x * x * x))) * up[i];
  }
}

void gelu_tanh(float* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i)
    x[i] = x[i] / (1.0f + std::exp(-kGeluScale * (x[i] + kGeluCubic * x[i] * x[i] * x[i])));
}

void gelu(float* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) x[i] = 0.5f * x[i] * std::erfc(x[i] * -0.70710678f);
}

void soft_cap(float* x, float cap, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) x[i] = cap * std::tanh(x[i] / cap);
}

}  // namespace

const Kernels kPlainKernels = {"plain",  matmul_float, matmul_int8, quantize_tile, rms_norm,       silu_mul,
                               gelu_mul, gelu_tanh,    gelu,        soft_cap,      &kPlainAttention};

}  // namespace pare
