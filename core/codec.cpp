#include "core/codec.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "core/codecs/codecs.h"
#include "core/error.h"
#include "core/options.h"

namespace pare {
namespace {

struct CodecName {
  const char* name;
  Codec codec;
};
constexpr CodecName kCodecs[] = {
    {"f32", {CodecKind::kF32, 0}},       {"f16", {CodecKind::kF16, 0}},       {"bf16", {CodecKind::kBf16, 0}},
    {"q8", {CodecKind::kQ8, 32}},        {"q8c", {CodecKind::kQ8, Codec::kPerRow}},
    {"q4g32", {CodecKind::kQ4, 32}},     {"q4g64", {CodecKind::kQ4, 64}},     {"q4g128", {CodecKind::kQ4, 128}},
    {"q4ag32", {CodecKind::kQ4a, 32}},   {"q4ag64", {CodecKind::kQ4a, 64}},   {"q4ag128", {CodecKind::kQ4a, 128}},
    {"q4mg32", {CodecKind::kQ4m, 32}},   {"q4mg64", {CodecKind::kQ4m, 64}},   {"q4mg128", {CodecKind::kQ4m, 128}},
    {"q3g32", {CodecKind::kQ3, 32}},     {"q3g64", {CodecKind::kQ3, 64}},     {"q3g128", {CodecKind::kQ3, 128}},
    {"q2g32", {CodecKind::kQ2, 32}},     {"q2g64", {CodecKind::kQ2, 64}},     {"q2g128", {CodecKind::kQ2, 128}},
    {"w8a8", {CodecKind::kQ8, Codec::kPerRow, true}},
    // short names, after the canonical ones
    {"q4", {CodecKind::kQ4, 32}},        {"q4a", {CodecKind::kQ4a, 32}},
    {"q4m", {CodecKind::kQ4m, 32}},
    {"q3", {CodecKind::kQ3, 32}},        {"q2", {CodecKind::kQ2, 32}},
};

std::uint64_t scale_bytes(std::int64_t rows, std::int64_t groups) {
  return padded(static_cast<std::uint64_t>(row_blocks(rows) * groups * kBlockRows) * 2);
}

// Byte of a scale or minimum in its plane: [row block][group][16 rows] halves.
std::size_t half_slot(std::int64_t row, std::int64_t group, std::int64_t groups) {
  return static_cast<std::size_t>(((row / kBlockRows) * groups + group) * kBlockRows + row % kBlockRows) * 2;
}

struct CodePlane {
  std::uint64_t (*bytes)(std::int64_t rows, std::int64_t cols);
  void (*pack)(const QuantizedTensor& tensor, std::span<std::byte> plane);
  void (*unpack)(std::span<const std::byte> plane, QuantizedTensor& tensor);
};

CodePlane code_plane(CodecKind kind) {
  switch (kind) {
    case CodecKind::kQ8: return {q8_code_bytes, pack_q8_codes, unpack_q8_codes};
    case CodecKind::kQ4:
    case CodecKind::kQ4a:
    case CodecKind::kQ4m: return {q4_code_bytes, pack_q4_codes, unpack_q4_codes};
    case CodecKind::kQ3: return {q3_code_bytes, pack_q3_codes, unpack_q3_codes};
    case CodecKind::kQ2: return {q2_code_bytes, pack_q2_codes, unpack_q2_codes};
    default: throw std::logic_error("floats have no codes");
  }
}

}  // namespace

float f16_to_f32(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 31u;
  const std::uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {  // zero and subnormal: mantissa * 2^-24, exact in float
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

std::uint16_t f32_to_f16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {  // what a half was widened from comes back bit for bit
    const std::uint32_t payload = (magnitude >> 13) & 0x3ffu;
    return static_cast<std::uint16_t>(sign | 0x7c00u | (payload != 0 ? payload : 0x200u));
  }
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: subnormal, multiples of 2^-24
    // Adding 2^-1 leaves 24 - 1 bits below it: the sum rounds to a multiple of 2^-24 by the float adder itself.
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(sum) - std::bit_cast<std::uint32_t>(0.5f)));
  }
  const std::uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

float bf16_to_f32(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

std::uint16_t f32_to_bf16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return static_cast<std::uint16_t>((bits >> 16) | ((bits & 0x7f0000u) != 0 ? 0u : 0x40u));
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

Codec Codec::parse(std::string_view name, const std::string& place) {
  std::vector<std::string> names;
  for (const CodecName& row : kCodecs) {
    if (name == row.name) return row.codec;
    names.emplace_back(row.name);
  }
  std::string all;
  for (const auto& known : names) all += (all.empty() ? "" : ", ") + known;
  const std::string near = nearest_name(name, names);
  throw usage_error(place, "a codec: " + all, "\"" + std::string(name) + "\"",
                    near.empty() ? "" : "did you mean \"" + near + "\"?");
}

std::string Codec::name() const {
  for (const CodecName& row : kCodecs)
    if (*this == row.codec) return row.name;
  throw std::logic_error("Codec without a name: group " + std::to_string(group));
}

int Codec::bits() const {
  switch (kind) {
    case CodecKind::kF32: return 32;
    case CodecKind::kF16:
    case CodecKind::kBf16: return 16;
    case CodecKind::kQ8: return 8;
    case CodecKind::kQ4:
    case CodecKind::kQ4a:
    case CodecKind::kQ4m: return 4;
    case CodecKind::kQ3: return 3;
    case CodecKind::kQ2: return 2;
  }
  throw std::logic_error("Codec of no kind");
}

int Codec::group_bits() const {
  if (is_float()) return 0;
  return kind == CodecKind::kQ4a ? 20 : kind == CodecKind::kQ4m ? 32 : 16;
}

CodeRange code_range(CodecKind kind) {
  switch (kind) {
    case CodecKind::kQ8: return {-127, 127};
    case CodecKind::kQ4: return {-8, 7};
    case CodecKind::kQ4a:
    case CodecKind::kQ4m: return {0, 15};
    case CodecKind::kQ3: return {-4, 3};
    case CodecKind::kQ2: return {-2, 1};
    default: return {0, 0};
  }
}

std::int64_t Codec::groups(std::int64_t cols) const {
  if (is_float()) return 0;
  return group == kPerRow ? 1 : cols / group;
}

bool Codec::fits(std::int64_t cols) const { return cols > 0 && (is_float() || group == kPerRow || cols % group == 0); }

Codec Codec::fitting(std::int64_t cols) const {
  if (fits(cols)) return *this;
  if (kind != CodecKind::kQ8) {
    for (const std::int64_t smaller : {64, 32}) {
      const Codec next{kind, smaller};
      if (smaller < group && next.fits(cols)) return next;
    }
  }
  return {CodecKind::kQ8, kPerRow};
}

std::uint64_t Codec::payload_bytes(std::int64_t rows, std::int64_t cols) const {
  if (is_float()) return padded(static_cast<std::uint64_t>(rows) * static_cast<std::uint64_t>(cols) * static_cast<std::uint64_t>(bits() / 8));
  const std::uint64_t scales = scale_bytes(rows, groups(cols));
  const std::uint64_t more = kind == CodecKind::kQ4a   ? q4a_zero_bytes(rows, groups(cols))
                             : kind == CodecKind::kQ4m ? scales
                                                       : 0;
  return code_plane(kind).bytes(rows, cols) + scales + more;
}

void QuantizedTensor::unpack_row(std::int64_t row, float* out) const {
  const std::int64_t per_row = codec.groups(cols);
  const std::int64_t width = codec.group == Codec::kPerRow ? cols : codec.group;
  const std::int8_t* code = codes.data() + row * cols;
  for (std::int64_t g = 0; g < per_row; ++g) {
    const auto at = static_cast<std::size_t>(row * per_row + g);
    const float scale = f16_to_f32(scales[at]);
    const int zero = codec.kind == CodecKind::kQ4a ? zeros[at] : 0;
    if (codec.kind == CodecKind::kQ4m) {
      const float minimum = f16_to_f32(minima[at]);
      for (std::int64_t i = g * width; i < (g + 1) * width; ++i) out[i] = static_cast<float>(code[i]) * scale + minimum;
      continue;
    }
    for (std::int64_t i = g * width; i < (g + 1) * width; ++i) out[i] = static_cast<float>(code[i] - zero) * scale;
  }
}

void QuantizedTensor::unpack(float* out) const {
  for (std::int64_t row = 0; row < rows; ++row) unpack_row(row, out + row * cols);
}

void QuantizedTensor::validate(const std::string& place) const {
  if (codec.is_float() || rows <= 0 || cols <= 0 || !codec.fits(cols))
    throw input_error(place, "a quantized matrix whose row the group divides",
                      std::to_string(rows) + " x " + std::to_string(cols) + " as " + codec.name());
  const auto count = static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols);
  const auto scale_count = static_cast<std::size_t>(rows * codec.groups(cols));
  const bool asymmetric = codec.kind == CodecKind::kQ4a;
  const std::size_t minimum_count = codec.kind == CodecKind::kQ4m ? scale_count : 0;
  if (codes.size() != count || scales.size() != scale_count || zeros.size() != (asymmetric ? scale_count : 0) ||
      minima.size() != minimum_count)
    throw input_error(place, std::to_string(count) + " codes and " + std::to_string(scale_count) + " scales",
                      std::to_string(codes.size()) + " codes, " + std::to_string(scales.size()) + " scales, " +
                          std::to_string(zeros.size()) + " zeros, " + std::to_string(minima.size()) + " minima");
  const auto [low, high] = code_range(codec.kind);
  for (std::size_t i = 0; i < count; ++i) {
    if (codes[i] < low || codes[i] > high)
      throw input_error(place, "codes from " + std::to_string(low) + " to " + std::to_string(high),
                        std::to_string(codes[i]) + " at row " + std::to_string(i / static_cast<std::size_t>(cols)));
  }
  // Codes below 8 bits reach one step further down than up: with either sign, the longer arm can point either way.
  const bool either_sign = codec.kind == CodecKind::kQ4 || codec.kind == CodecKind::kQ3 || codec.kind == CodecKind::kQ2;
  for (std::size_t i = 0; i < scale_count; ++i) {
    const bool finite = (scales[i] & 0x7c00u) != 0x7c00u, negative = (scales[i] & 0x8000u) != 0;
    if (!finite || (negative && (!either_sign || scales[i] == 0x8000u)))
      throw input_error(place, either_sign ? "finite scales, no negative zero" : "finite scales, zero or above",
                        std::to_string(f16_to_f32(scales[i])) + " as scale " + std::to_string(i));
    if (asymmetric && zeros[i] > 15)
      throw input_error(place, "zeros from 0 to 15", std::to_string(zeros[i]) + " as zero " + std::to_string(i));
    if (minimum_count > 0 && (minima[i] & 0x7c00u) == 0x7c00u)
      throw input_error(place, "finite minima",
                        std::to_string(f16_to_f32(minima[i])) + " as minimum " + std::to_string(i));
  }
}

std::vector<std::byte> pack_payload(const QuantizedTensor& tensor) {
  tensor.validate("tensor to pack");
  std::vector<std::byte> payload(tensor.codec.payload_bytes(tensor.rows, tensor.cols));
  const std::span<std::byte> all(payload);
  const CodePlane plane = code_plane(tensor.codec.kind);
  const std::uint64_t codes = plane.bytes(tensor.rows, tensor.cols);
  plane.pack(tensor, all.first(codes));

  const std::int64_t groups = tensor.codec.groups(tensor.cols);
  const std::uint64_t after = codes + scale_bytes(tensor.rows, groups);
  for (std::int64_t row = 0; row < tensor.rows; ++row) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const auto slot = half_slot(row, g, groups), at = static_cast<std::size_t>(row * groups + g);
      std::memcpy(payload.data() + codes + slot, &tensor.scales[at], 2);
      if (tensor.codec.kind == CodecKind::kQ4m) std::memcpy(payload.data() + after + slot, &tensor.minima[at], 2);
    }
  }
  if (tensor.codec.kind == CodecKind::kQ4a) pack_q4a_zeros(tensor, all.subspan(after));
  return payload;
}

QuantizedTensor unpack_payload(const Codec& codec, std::int64_t rows, std::int64_t cols,
                               std::span<const std::byte> payload, const std::string& place) {
  if (codec.is_float() || rows <= 0 || cols <= 0 || !codec.fits(cols))
    throw input_error(place, "a quantized matrix whose row the group divides",
                      std::to_string(rows) + " x " + std::to_string(cols) + " as " + codec.name());
  if (payload.size() != codec.payload_bytes(rows, cols))
    throw input_error(place, std::to_string(codec.payload_bytes(rows, cols)) + " bytes of payload",
                      std::to_string(payload.size()));
  QuantizedTensor tensor;
  tensor.codec = codec;
  tensor.rows = rows;
  tensor.cols = cols;
  const std::int64_t groups = codec.groups(cols);
  tensor.codes.resize(static_cast<std::size_t>(rows * cols));
  tensor.scales.resize(static_cast<std::size_t>(rows * groups));
  const CodePlane plane = code_plane(codec.kind);
  const std::uint64_t codes = plane.bytes(rows, cols);
  plane.unpack(payload.first(codes), tensor);
  const std::uint64_t after = codes + scale_bytes(rows, groups);
  if (codec.kind == CodecKind::kQ4m) tensor.minima.resize(tensor.scales.size());
  for (std::int64_t row = 0; row < tensor.rows; ++row) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const auto slot = half_slot(row, g, groups), at = static_cast<std::size_t>(row * groups + g);
      std::memcpy(&tensor.scales[at], payload.data() + codes + slot, 2);
      if (codec.kind == CodecKind::kQ4m) std::memcpy(&tensor.minima[at], payload.data() + after + slot, 2);
    }
  }
  if (codec.kind == CodecKind::kQ4a) {
    tensor.zeros.resize(tensor.scales.size());
    unpack_q4a_zeros(payload.subspan(after), tensor);
  }
  tensor.validate(place);
  return tensor;
}

}  // namespace pare
