// The blocks of ggml as numbers (ggml-common.h, ggml-quants.c): layouts in bytes, values by formula.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "core/gguf.h"

namespace pare {
namespace {

using Bytes = const std::uint8_t*;

std::uint16_t half_bits(Bytes at) {
  std::uint16_t bits;
  std::memcpy(&bits, at, 2);
  return bits;
}

bool finite(std::uint16_t half) {
  return (half & 0x7c00u) != 0x7c00u;
}

float half(Bytes at) {
  return f16_to_f32(half_bits(at));
}

float integer(int value) {
  return static_cast<float>(value);
}

// Element i of a block of 32 with 4 bits each: the first 16 in low halves, the others in high halves.
int nibble(Bytes codes, int i) {
  return i < 16 ? codes[i] & 15 : codes[i - 16] >> 4;
}

// d | 16 bytes of codes
void q4_0(Bytes block, float* out) {
  for (int i = 0; i < 32; ++i) out[i] = integer(nibble(block + 2, i) - 8) * half(block);
}

// d, m | 16 bytes of codes
void q4_1(Bytes block, float* out) {
  for (int i = 0; i < 32; ++i) out[i] = integer(nibble(block + 4, i)) * half(block) + half(block + 2);
}

int fifth_bit(Bytes bits, int i) {
  return (bits[i / 8] >> (i % 8) & 1) << 4;
}

// d | 4 bytes of fifth bits | 16 bytes of codes
void q5_0(Bytes block, float* out) {
  for (int i = 0; i < 32; ++i) out[i] = integer((nibble(block + 6, i) | fifth_bit(block + 2, i)) - 16) * half(block);
}

// d, m | 4 bytes of fifth bits | 16 bytes of codes
void q5_1(Bytes block, float* out) {
  for (int i = 0; i < 32; ++i)
    out[i] = integer(nibble(block + 8, i) | fifth_bit(block + 4, i)) * half(block) + half(block + 2);
}

// d | 32 codes
void q8_0(Bytes block, float* out) {
  for (int i = 0; i < 32; ++i) out[i] = integer(static_cast<std::int8_t>(block[2 + i])) * half(block);
}

// d | 16 bytes of indices into a table
void iq4_nl(Bytes block, float* out) {
  static constexpr std::array<std::int8_t, 16> kValues = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                          1,    13,   25,  38,  53,  69,  89,  113};
  for (int i = 0; i < 32; ++i) out[i] = half(block) * integer(kValues[static_cast<std::size_t>(nibble(block + 2, i))]);
}

// 16 bytes: scale and minimum of each 16 values | 64 bytes of codes, 4 to a byte | d, dmin
void q2_k(Bytes block, float* out) {
  const float d = half(block + 80), dmin = half(block + 82);
  for (int i = 0; i < 256; ++i) {
    const int pair = block[i / 16], code = block[16 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
    out[i] = d * integer(pair & 15) * integer(code) - dmin * integer(pair >> 4);
  }
}

// 32 bytes of third bits | 64 bytes of codes, 4 to a byte | 12 bytes: 16 scales of 6 bits | d
void q3_k(Bytes block, float* out) {
  const Bytes third = block, codes = block + 32, packed = block + 96;
  const float d = half(block + 108);
  for (int i = 0; i < 256; ++i) {
    const int group = i / 16, low = group < 8 ? packed[group] & 15 : packed[group - 8] >> 4;
    const int scale = low | (packed[8 + group % 4] >> (group / 4 * 2) & 3) << 4;
    const int code = codes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
    const int high = third[i % 32] >> (i / 32) & 1;
    out[i] = d * integer(scale - 32) * integer(code - (high ? 0 : 4));
  }
}

struct ScaleAndMinimum {
  int scale, minimum;
};

// Eight pairs of 6 bits in 12 bytes.
ScaleAndMinimum pair_of(Bytes packed, int group) {
  if (group < 4) return {packed[group] & 63, packed[group + 4] & 63};
  return {(packed[group + 4] & 15) | packed[group - 4] >> 6 << 4, packed[group + 4] >> 4 | packed[group] >> 6 << 4};
}

// d, dmin | 12 bytes of scales and minima | Q5_K: 32 bytes of fifth bits | 128 bytes of codes
template <bool kFive>
void q45_k(Bytes block, float* out) {
  const Bytes fifth = block + 16, codes = block + (kFive ? 48 : 16);
  const float d = half(block), dmin = half(block + 2);
  for (int i = 0; i < 256; ++i) {
    const int group = i / 32, byte = codes[i / 64 * 32 + i % 32];
    const int high = kFive ? (fifth[i % 32] >> group & 1) << 4 : 0;
    const auto [scale, minimum] = pair_of(block + 4, group);
    out[i] = d * integer(scale) * integer((group % 2 ? byte >> 4 : byte & 15) | high) - dmin * integer(minimum);
  }
}

// 128 bytes of low halves | 64 bytes of high quarters | 16 scales | d
void q6_k(Bytes block, float* out) {
  const Bytes low = block, high = block + 128, scales = block + 192;
  const float d = half(block + 208);
  for (int i = 0; i < 256; ++i) {
    const int part = i % 128 / 32, byte = low[i / 128 * 64 + part % 2 * 32 + i % 32];
    const int code = (part < 2 ? byte & 15 : byte >> 4) | (high[i / 128 * 32 + i % 32] >> (2 * part) & 3) << 4;
    out[i] = d * integer(static_cast<std::int8_t>(scales[i / 16])) * integer(code - 32);
  }
}

void f32(Bytes at, float* out) {
  std::memcpy(out, at, 4);
}
void f16(Bytes at, float* out) {
  *out = half(at);
}
void bf16(Bytes at, float* out) {
  *out = bf16_to_f32(half_bits(at));
}

struct Row {
  GgmlType type;
  const char* name;
  std::int64_t values;  // of a block
  std::uint64_t bytes;
  void (*read)(Bytes block, float* out);
};

constexpr Row kRows[] = {{GgmlType::kF32, "F32", 1, 4, f32},
                         {GgmlType::kF16, "F16", 1, 2, f16},
                         {GgmlType::kBF16, "BF16", 1, 2, bf16},
                         {GgmlType::kQ8_0, "Q8_0", 32, 34, q8_0},
                         {GgmlType::kQ4_0, "Q4_0", 32, 18, q4_0},
                         {GgmlType::kQ4_1, "Q4_1", 32, 20, q4_1},
                         {GgmlType::kQ5_0, "Q5_0", 32, 22, q5_0},
                         {GgmlType::kQ5_1, "Q5_1", 32, 24, q5_1},
                         {GgmlType::kIQ4_NL, "IQ4_NL", 32, 18, iq4_nl},
                         {GgmlType::kQ2_K, "Q2_K", 256, 84, q2_k},
                         {GgmlType::kQ3_K, "Q3_K", 256, 110, q3_k},
                         {GgmlType::kQ4_K, "Q4_K", 256, 144, q45_k<false>},
                         {GgmlType::kQ5_K, "Q5_K", 256, 176, q45_k<true>},
                         {GgmlType::kQ6_K, "Q6_K", 256, 210, q6_k}};

const Row* find(std::uint32_t number) {
  for (const Row& row : kRows)
    if (static_cast<std::uint32_t>(row.type) == number) return &row;
  return nullptr;
}

const Row& row_of(GgmlType type) {
  const Row* row = find(static_cast<std::uint32_t>(type));
  if (row == nullptr) throw std::logic_error("ggml type");
  return *row;
}

}  // namespace

bool is_ggml_type(std::uint32_t number) {
  return find(number) != nullptr;
}

std::string ggml_type_names() {
  std::string names;
  for (const Row& row : kRows) names += (names.empty() ? "" : ", ") + std::string(row.name);
  return names;
}

const char* ggml_type_name(GgmlType type) {
  return row_of(type).name;
}
std::int64_t ggml_block_values(GgmlType type) {
  return row_of(type).values;
}

std::uint64_t ggml_bytes(GgmlType type, std::int64_t values) {
  const Row& row = row_of(type);
  return static_cast<std::uint64_t>(values / row.values) * row.bytes;
}

void ggml_to_f32(GgmlType type, const std::byte* blocks, std::int64_t values, float* out) {
  const Row& row = row_of(type);
  auto from = reinterpret_cast<Bytes>(blocks);
  for (std::int64_t i = 0; i < values; i += row.values, from += row.bytes) row.read(from, out + i);
}

void pack_k_block(GgmlType type, const KBlock& block, std::byte* to) {
  auto* out = reinterpret_cast<std::uint8_t*>(to);
  std::memset(out, 0, row_of(type).bytes);
  const auto put = [&](std::size_t at, int bits) { out[at] = static_cast<std::uint8_t>(out[at] | bits); };
  const auto half_at = [&](std::size_t at, std::uint16_t bits) { std::memcpy(out + at, &bits, 2); };
  for (std::size_t i = 0; i < 256; ++i) {
    const int code = block.codes[i];
    const std::size_t quarter = i / 128 * 32 + i % 32;           // byte of four codes, 32 apart
    const int pair = static_cast<int>(i % 128 / 32 * 2);         // its two bits there
    const std::size_t halves = i / 64 * 32 + i % 32;             // byte of two codes, 32 apart
    const int nibble_at = i / 32 % 2 == 0 ? 0 : 4;
    switch (type) {
      case GgmlType::kQ2_K:
        put(16 + quarter, code << pair);
        break;
      case GgmlType::kQ3_K:
        put(32 + quarter, ((code + 4) & 3) << pair);
        put(i % 32, (code >= 0 ? 1 : 0) << (i / 32));
        break;
      case GgmlType::kQ4_K:
        put(16 + halves, code << nibble_at);
        break;
      case GgmlType::kQ5_K:
        put(48 + halves, (code & 15) << nibble_at);
        put(16 + i % 32, (code >> 4) << (i / 32));
        break;
      case GgmlType::kQ6_K: {
        const std::size_t part = i % 128 / 32;
        put(i / 128 * 64 + part % 2 * 32 + i % 32, ((code + 32) & 15) << (part < 2 ? 0 : 4));
        put(128 + quarter, ((code + 32) >> 4) << pair);
        break;
      }
      default:
        throw std::logic_error("ggml type");
    }
  }
  for (std::size_t g = 0; g < 16; ++g) {
    const int scale = block.scales[g], minimum = block.minima[g];
    if (type == GgmlType::kQ2_K) put(g, scale | minimum << 4);
    if (type == GgmlType::kQ6_K) put(192 + g, scale & 255);
    if (type == GgmlType::kQ3_K) {
      put(96 + g % 8, ((scale + 32) & 15) << (g < 8 ? 0 : 4));
      put(104 + g % 4, ((scale + 32) >> 4) << (g / 4 * 2));
    }
    if (g < 8 && (type == GgmlType::kQ4_K || type == GgmlType::kQ5_K)) {
      if (g < 4) {
        put(4 + g, scale);
        put(8 + g, minimum);
      } else {
        put(8 + g, (scale & 15) | (minimum & 15) << 4);
        put(g, scale >> 4 << 6);
        put(4 + g, minimum >> 4 << 6);
      }
    }
  }
  if (type == GgmlType::kQ2_K) half_at(80, block.d), half_at(82, block.m);
  if (type == GgmlType::kQ3_K) half_at(108, block.d);
  if (type == GgmlType::kQ4_K || type == GgmlType::kQ5_K) half_at(0, block.d), half_at(2, block.m);
  if (type == GgmlType::kQ6_K) half_at(208, block.d);
}

void pack_pair_block(GgmlType type, std::uint16_t scale, std::uint16_t minimum, const std::int8_t* codes,
                     std::byte* to) {
  auto* out = reinterpret_cast<std::uint8_t*>(to);
  std::memset(out, 0, row_of(type).bytes);
  std::memcpy(out, &scale, 2);
  std::memcpy(out + 2, &minimum, 2);
  const std::size_t low = type == GgmlType::kQ5_1 ? 8 : 4;
  for (std::size_t i = 0; i < 32; ++i) {
    out[low + i % 16] = static_cast<std::uint8_t>(out[low + i % 16] | (codes[i] & 15) << (i < 16 ? 0 : 4));
    if (type == GgmlType::kQ5_1) out[4 + i / 8] = static_cast<std::uint8_t>(out[4 + i / 8] | codes[i] >> 4 << (i % 8));
  }
}

bool ggml_scales_are_finite(GgmlType type, const std::byte* blocks, std::int64_t values) {
  const Row& row = row_of(type);
  auto block = reinterpret_cast<Bytes>(blocks);
  for (std::int64_t i = 0; i < values; i += row.values, block += row.bytes)
    if (!finite(half_bits(block)) || (type == GgmlType::kQ4_1 && !finite(half_bits(block + 2)))) return false;
  return true;
}

bool unpack_ggml_row(GgmlType type, const std::byte* blocks, QuantizedTensor& out, std::int64_t row) {
  const std::int64_t groups = out.codec.groups(out.cols);
  auto block = reinterpret_cast<Bytes>(blocks);
  for (std::int64_t g = 0; g < groups; ++g, block += row_of(type).bytes) {
    std::int8_t* codes = out.codes.data() + row * out.cols + g * 32;
    const auto at = static_cast<std::size_t>(row * groups + g);
    std::uint16_t scale = half_bits(block);
    if (!finite(scale)) return false;
    const bool negative = (scale & 0x8000u) != 0;
    if (scale == 0x8000u) scale = 0;  // -0 would be another spelling of no scale
    if (type == GgmlType::kQ8_0) {
      scale &= 0x7fffu;  // codes are symmetric: both signs change
      for (int i = 0; i < 32; ++i) {
        const int code = static_cast<std::int8_t>(block[2 + i]);
        if (code == -128) return false;
        codes[i] = static_cast<std::int8_t>(negative ? -code : code);
      }
    } else if (type == GgmlType::kQ4_0) {
      for (int i = 0; i < 32; ++i) codes[i] = static_cast<std::int8_t>(nibble(block + 2, i) - 8);
    } else {
      std::uint16_t minimum = half_bits(block + 2);
      if (!finite(minimum) || (negative && minimum == 0x8000u)) return false;  // code 0: -0 x scale - 0 is -0
      const float d = f16_to_f32(scale), m = f16_to_f32(minimum);
      bool turned = false;
      if (out.codec.kind == CodecKind::kQ4a) {
        const float zero = d > 0 ? -m / d : 0.0f;
        if (!(d >= 0) || !(zero >= 0 && zero <= 15) || std::floor(zero) != zero || -zero * d != m) return false;
        out.zeros[at] = static_cast<std::uint8_t>(zero);
      } else {
        if (d < 0) {  // code x d + m = (15 - code) x -d + (m + 15 d)
          const double other = static_cast<double>(m) + 15 * static_cast<double>(d);
          minimum = f32_to_f16(static_cast<float>(other));
          if (static_cast<double>(f16_to_f32(minimum)) != other) return false;
          scale &= 0x7fffu;
          turned = true;
        }
        out.minima[at] = minimum;
      }
      for (int i = 0; i < 32; ++i) {
        const int code = nibble(block + 4, i);
        codes[i] = static_cast<std::int8_t>(turned ? 15 - code : code);
      }
    }
    out.scales[at] = scale;
  }
  return true;
}

}  // namespace pare
