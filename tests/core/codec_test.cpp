#include "core/codec.h"

#include <bit>
#include <cmath>

#include "model_folder.h"

namespace pare {
namespace {

using testing::contains;
using testing::error_of;
using testing::random_codes;

// Every half, from the definition in double.
TEST(CodecFloat, EveryHalfHasItsValueAndComesBack) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const int exponent = (half >> 10) & 31, mantissa = half & 0x3ff;
    const float value = f16_to_f32(half);
    if (exponent == 31 && mantissa != 0) {
      EXPECT_TRUE(std::isnan(value));
      EXPECT_TRUE(std::isnan(f16_to_f32(f32_to_f16(value))));
      continue;
    }
    double expected = exponent == 31 ? INFINITY : exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (half & 0x8000) expected = -expected;
    ASSERT_EQ(static_cast<double>(value), expected) << bits;
    ASSERT_EQ(f32_to_f16(value), half) << bits;
  }
}

// Between neighbours: the nearer one, the even one in the middle.
TEST(CodecFloat, HalfAndBrainRoundToNearestEven) {
  for (std::uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const auto low = static_cast<std::uint16_t>(bits), high = static_cast<std::uint16_t>(bits + 1);
    const float middle = 0.5f * (f16_to_f32(low) + f16_to_f32(high));  // exact in float
    ASSERT_EQ(f32_to_f16(middle), low % 2 == 0 ? low : high) << bits;
    ASSERT_EQ(f32_to_f16(std::nextafter(middle, 0.0f)), low) << bits;
    ASSERT_EQ(f32_to_f16(std::nextafter(middle, 1e9f)), high) << bits;
    ASSERT_EQ(f32_to_f16(-middle), (low % 2 == 0 ? low : high) | 0x8000) << bits;
  }
  EXPECT_EQ(f32_to_f16(65519.996f), 0x7bff);
  EXPECT_EQ(f32_to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(f32_to_f16(INFINITY), 0x7c00);
  for (std::uint32_t bits = 0; bits < 0x7f80; ++bits) {
    const float low = bf16_to_f32(static_cast<std::uint16_t>(bits));
    ASSERT_EQ(f32_to_bf16(low), bits);
    const float middle = std::bit_cast<float>((bits << 16) | 0x8000u);
    ASSERT_EQ(f32_to_bf16(middle), bits + bits % 2);
    ASSERT_EQ(f32_to_bf16(std::bit_cast<float>((bits << 16) | 0x8001u)), bits + 1);
    ASSERT_EQ(f32_to_bf16(std::bit_cast<float>((bits << 16) | 0x7fffu)), bits);
  }
  EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(Codec, NamesGoBothWays) {
  for (const char* name : {"f32", "f16", "bf16", "q8", "q8c", "w8a8", "q4g32", "q4g64", "q4g128", "q4ag32", "q4ag64",
                           "q4ag128", "q4mg32", "q4mg64", "q4mg128", "q3g32", "q3g64", "q3g128", "q2g32", "q2g64",
                           "q2g128"})
    EXPECT_EQ(Codec::parse(name, "").name(), name);
  EXPECT_EQ(Codec::parse("q4", ""), Codec::parse("q4g32", ""));
  EXPECT_EQ(Codec::parse("q4a", ""), Codec::parse("q4ag32", ""));
  EXPECT_EQ(Codec::parse("q4m", ""), Codec::parse("q4mg32", ""));
  EXPECT_EQ(Codec::parse("q3", ""), Codec::parse("q3g32", ""));
  EXPECT_EQ(Codec::parse("q2", ""), Codec::parse("q2g32", ""));
  EXPECT_NE(Codec::parse("w8a8", ""), Codec::parse("q8c", ""));
  EXPECT_EQ(Codec::parse("w8a8", "").layout(), Codec::parse("q8c", ""));
  EXPECT_TRUE(error_of([] { Codec::parse("q3g16", "--codec"); }).starts_with("2 "));
  const std::string message = error_of([] { Codec::parse("q4g63", "--codec"); });
  EXPECT_TRUE(message.starts_with("2 --codec") && contains(message, "did you mean \"q4g")) << message;
  EXPECT_FALSE(Codec::parse("q4g64", "").fits(96));
  EXPECT_TRUE(Codec::parse("q8c", "").fits(97));
}

// The layout of runtime/FORMAT.md section 3, element by element and without any of the packer's code.
std::vector<std::byte> naive_payload(const QuantizedTensor& t) {
  const auto pad64 = [](std::size_t n) { return (n + 63) / 64 * 64; };
  const std::size_t rows = static_cast<std::size_t>(t.rows), cols = static_cast<std::size_t>(t.cols);
  const std::size_t blocks = (rows + 15) / 16, groups = static_cast<std::size_t>(t.codec.groups(t.cols));
  const bool eight = t.codec.kind == CodecKind::kQ8, asymmetric = t.codec.kind == CodecKind::kQ4a,
             minima = t.codec.kind == CodecKind::kQ4m;
  const bool three = t.codec.kind == CodecKind::kQ3, two = t.codec.kind == CodecKind::kQ2;
  // Lines come in chunks; 3 bits: of three lines and 32 inputs, so 32 / 3 inputs a line.
  const std::size_t per_line = eight ? 4 : two ? 16 : 8;
  const std::size_t chunks = three ? cols / 32 * 3 : (cols + per_line - 1) / per_line;
  const std::size_t scales_at = blocks * chunks * 64, zeros_at = scales_at + pad64(blocks * groups * 32);
  std::vector<std::byte> out(zeros_at + (asymmetric ? pad64(blocks * groups * 8) : 0) +
                             (minima ? pad64(blocks * groups * 32) : 0));
  for (std::size_t row = 0; row < blocks * 16; ++row) {
    for (std::size_t col = 0; col < (three ? cols : chunks * per_line); ++col) {
      const int code = row < rows && col < cols ? t.codes[row * cols + col] : 0;
      const std::size_t line = (row / 16 * chunks + col / per_line) * 64 + row % 16 * 4;
      if (three) {
        const auto u = static_cast<unsigned>(code + 4);
        const std::size_t first = (row / 16 * chunks + col / 32 * 3) * 64 + row % 16 * 4 + col % 4;
        out[first + col % 32 / 16 * 64] |= std::byte((u & 3) << (col % 16 / 4 * 2));
        out[first + 128] |= std::byte((u >> 2) << (col % 32 / 4));
      } else if (two) {
        out[line + col % 4] |= std::byte(static_cast<unsigned>(code + 2) << (col % 16 / 4 * 2));
      } else if (eight) {
        out[line + col % 4] = std::byte(code + 128);
      } else {
        const auto u = static_cast<unsigned>(code + (asymmetric || minima ? 0 : 8));
        out[line + col % 4] |= std::byte(col % 8 < 4 ? u : u << 4);
      }
    }
    for (std::size_t g = 0; row < rows && g < groups; ++g) {
      const std::uint16_t scale = t.scales[row * groups + g];
      const std::size_t at = scales_at + ((row / 16 * groups + g) * 16 + row % 16) * 2;
      out[at] = std::byte(scale & 255);
      out[at + 1] = std::byte(scale >> 8);
      if (minima) {
        const std::uint16_t minimum = t.minima[row * groups + g];
        out[at - scales_at + zeros_at] = std::byte(minimum & 255);
        out[at - scales_at + zeros_at + 1] = std::byte(minimum >> 8);
      }
      if (asymmetric) out[zeros_at + (row / 16 * groups + g) * 8 + row % 8] |= std::byte(t.zeros[row * groups + g] << (row % 16 < 8 ? 0 : 4));
    }
  }
  return out;
}

TEST(Codec, PayloadMatchesTheSpecificationAndComesBack) {
  for (const char* name : {"q8", "q8c", "w8a8", "q4g32", "q4g64", "q4g128", "q4ag32", "q4ag64", "q4ag128", "q4mg32",
                           "q4mg64", "q4mg128", "q3g32", "q3g64", "q3g128", "q2g32", "q2g64", "q2g128"}) {
    const Codec codec = Codec::parse(name, "");
    for (const std::int64_t rows : {1, 7, 8, 15, 16, 17, 40}) {
      for (const std::int64_t cols : {1, 3, 32, 64, 96, 101, 128, 384}) {
        if (!codec.fits(cols)) continue;
        const QuantizedTensor tensor = random_codes(codec, rows, cols, static_cast<std::uint32_t>(rows * 1000 + cols));
        const std::vector<std::byte> payload = pack_payload(tensor);
        ASSERT_EQ(payload, naive_payload(tensor)) << name << " " << rows << " x " << cols;
        ASSERT_EQ(payload.size(), codec.payload_bytes(rows, cols));
        ASSERT_EQ(payload.size() % 64, 0u);
        ASSERT_TRUE(testing::same(unpack_payload(codec, rows, cols, payload, "x"), tensor)) << name;
        EXPECT_TRUE(error_of([&] { unpack_payload(codec, rows, cols, std::span(payload).first(payload.size() - 1), "x"); }).starts_with("3 "));
      }
    }
  }
}

TEST(Codec, BitsOfTheWholePayload) {
  const auto bits = [](const char* name) {
    return static_cast<double>(Codec::parse(name, "").payload_bytes(256, 512)) * 8 / (256 * 512);
  };
  EXPECT_EQ(bits("q3g32"), 3.5);
  EXPECT_EQ(bits("q3g128"), 3.125);
  EXPECT_EQ(bits("q2g32"), 2.5);
  EXPECT_EQ(bits("q2g64"), 2.25);
  EXPECT_EQ(bits("q4g32"), 4.5);
  EXPECT_EQ(bits("q4mg32"), 5.0);  // those of GGUF's Q4_1
  EXPECT_EQ(bits("q4mg128"), 4.25);
  for (const char* name : {"q8", "q8c", "q4ag32", "q4ag64", "q4mg64", "q2g128"}) {
    const Codec codec = Codec::parse(name, "");
    EXPECT_EQ(bits(name), codec.bits() + static_cast<double>(codec.group_bits() * codec.groups(512)) / 512) << name;
  }
  EXPECT_EQ(Codec::parse("bf16", "").group_bits(), 0);
}

// The worked examples of runtime/FORMAT.md section 5.
TEST(Codec, TheDocumentedExampleOfThreeBits) {
  QuantizedTensor tensor;
  tensor.codec = Codec::parse("q3g32", "");
  tensor.rows = 1;
  tensor.cols = 32;
  for (int i = 0; i < 32; ++i) tensor.codes.push_back(static_cast<std::int8_t>(i % 8 - 4));
  tensor.scales = {f32_to_f16(0.5f)};
  std::vector<unsigned> expected;
  for (int line = 0; line < 2; ++line) {
    expected.insert(expected.end(), {0x00u, 0x55u, 0xaau, 0xffu});
    expected.insert(expected.end(), 60, 0u);
  }
  expected.insert(expected.end(), 4, 0xaau);
  expected.insert(expected.end(), 60, 0xffu);
  expected.insert(expected.end(), {0x00u, 0x38u});
  expected.insert(expected.end(), 62, 0u);
  std::vector<unsigned> bytes;
  for (const std::byte byte : pack_payload(tensor)) bytes.push_back(std::to_integer<unsigned>(byte));
  EXPECT_EQ(bytes, expected);
}

TEST(Codec, TheDocumentedExample) {
  QuantizedTensor tensor;
  tensor.codec = Codec::parse("q4g32", "");
  tensor.rows = 2;
  tensor.cols = 32;
  for (int i = 0; i < 32; ++i) tensor.codes.push_back(static_cast<std::int8_t>(i % 16 - 8));
  tensor.codes.resize(64, 1);
  tensor.scales = {f32_to_f16(0.5f), f32_to_f16(2.0f)};
  std::vector<unsigned> expected;
  for (int line = 0; line < 4; ++line) {
    for (const unsigned byte : {0x40u, 0x51u, 0x62u, 0x73u}) expected.push_back(line % 2 == 0 ? byte : byte + 0x88u);
    expected.insert(expected.end(), 4, 0x99u);
    expected.insert(expected.end(), 56, 0x88u);
  }
  expected.insert(expected.end(), {0x00u, 0x38u, 0x00u, 0x40u});
  expected.insert(expected.end(), 60, 0u);
  std::vector<unsigned> bytes;
  for (const std::byte byte : pack_payload(tensor)) bytes.push_back(std::to_integer<unsigned>(byte));
  EXPECT_EQ(bytes, expected);
}

TEST(Codec, UnpackIsOneRounding) {
  for (const char* name : {"q8", "q8c", "q4g32", "q4ag64", "q4mg32", "q4mg128", "q3g64", "q2g32"}) {
    const Codec codec = Codec::parse(name, "");
    const QuantizedTensor tensor = random_codes(codec, 5, 128, 9);
    std::vector<float> values(5 * 128);
    tensor.unpack(values.data());
    const std::int64_t groups = codec.groups(128);
    for (std::int64_t i = 0; i < 5 * 128; ++i) {
      const auto at = static_cast<std::size_t>(i / 128 * groups + i % 128 / (128 / groups));
      const int zero = tensor.zeros.empty() ? 0 : tensor.zeros[at];
      const double minimum = tensor.minima.empty() ? 0.0 : static_cast<double>(f16_to_f32(tensor.minima[at]));
      ASSERT_EQ(values[static_cast<std::size_t>(i)],
                static_cast<float>(static_cast<double>(tensor.codes[static_cast<std::size_t>(i)] - zero) *
                                       static_cast<double>(f16_to_f32(tensor.scales[at])) +
                                   minimum));
    }
  }
}

TEST(Codec, ValidateRefusesValuesOutOfRange) {
  const auto broken = [](const char* name, auto change) {
    QuantizedTensor tensor = random_codes(Codec::parse(name, ""), 3, 64, 1);
    change(tensor);
    return error_of([&] { tensor.validate("t"); });
  };
  EXPECT_EQ(broken("q8", [](auto&) {}), "no error");
  EXPECT_TRUE(contains(broken("q8", [](auto& t) { t.codes[5] = -128; }), "-127"));
  EXPECT_TRUE(contains(broken("q4", [](auto& t) { t.codes[5] = 8; }), "-8 to 7"));
  EXPECT_TRUE(contains(broken("q4", [](auto& t) { t.codes[5] = -9; }), "-8 to 7"));
  EXPECT_TRUE(contains(broken("q4a", [](auto& t) { t.codes[5] = -1; }), "0 to 15"));
  EXPECT_TRUE(contains(broken("q3", [](auto& t) { t.codes[5] = 4; }), "-4 to 3"));
  EXPECT_TRUE(contains(broken("q3", [](auto& t) { t.codes[5] = -5; }), "-4 to 3"));
  EXPECT_TRUE(contains(broken("q2", [](auto& t) { t.codes[5] = 2; }), "-2 to 1"));
  EXPECT_TRUE(contains(broken("q2", [](auto& t) { t.codes[5] = -3; }), "-2 to 1"));
  EXPECT_TRUE(contains(broken("w8a8", [](auto& t) { t.codes[5] = -128; }), "-127"));
  EXPECT_TRUE(contains(broken("q4a", [](auto& t) { t.zeros[0] = 16; }), "zeros"));
  EXPECT_TRUE(contains(broken("q4", [](auto& t) { t.scales[0] = 0x7c00; }), "finite"));
  EXPECT_TRUE(contains(broken("q4", [](auto& t) { t.scales[0] = 0x7e00; }), "finite"));
  EXPECT_TRUE(contains(broken("q8", [](auto& t) { t.scales[0] = 0x8001; }), "zero or above"));
  EXPECT_TRUE(contains(broken("q4a", [](auto& t) { t.scales[0] = 0x8001; }), "zero or above"));
  EXPECT_EQ(broken("q4", [](auto& t) { t.scales[0] = 0x8001; }), "no error");
  EXPECT_TRUE(contains(broken("q4", [](auto& t) { t.scales[0] = 0x8000; }), "negative zero"));
  EXPECT_TRUE(contains(broken("q4", [](auto& t) { t.scales[0] = 0xfc00; }), "finite"));
  EXPECT_TRUE(contains(broken("q4", [](auto& t) { t.scales.pop_back(); }), "scales"));
  EXPECT_TRUE(contains(broken("q4", [](auto& t) { t.codes.pop_back(); }), "codes"));
  EXPECT_TRUE(contains(broken("q4", [](auto& t) { t.zeros.push_back(0); }), "zeros"));
  EXPECT_EQ(broken("q4m", [](auto& t) { t.minima[0] = 0xfbff; }), "no error");
  EXPECT_TRUE(contains(broken("q4m", [](auto& t) { t.minima[0] = 0xfc00; }), "finite minima"));
  EXPECT_TRUE(contains(broken("q4m", [](auto& t) { t.minima.back() = 0x7e00; }), "finite minima"));
  EXPECT_TRUE(contains(broken("q4m", [](auto& t) { t.minima.pop_back(); }), "minima"));
  EXPECT_TRUE(contains(broken("q4m", [](auto& t) { t.zeros.push_back(0); }), "zeros"));
  EXPECT_TRUE(contains(broken("q4a", [](auto& t) { t.minima.push_back(0); }), "minima"));
  EXPECT_TRUE(contains(broken("q4m", [](auto& t) { t.scales[0] = 0x8001; }), "zero or above"));
  EXPECT_TRUE(contains(broken("q4m", [](auto& t) { t.codes[5] = 16; }), "0 to 15"));
  EXPECT_TRUE(contains(broken("q4", [](auto& t) { t.cols = 63; }), "divides"));
}

}  // namespace
}  // namespace pare
