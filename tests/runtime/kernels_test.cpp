// Every codec x instruction set x shape against double-precision references.
#include "runtime/kernels.h"

#include <gtest/gtest.h>
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numbers>
#include <random>

#include "core/error.h"

namespace pare {
namespace {

struct AlignedBytes {
  explicit AlignedBytes(std::span<const std::byte> bytes)
      : size(bytes.size()),
        data(static_cast<std::byte*>(
            std::aligned_alloc(64, static_cast<std::size_t>(round_up(static_cast<std::int64_t>(bytes.size()), 64))))) {
    std::memcpy(data, bytes.data(), bytes.size());
  }
  AlignedBytes(const AlignedBytes&) = delete;
  AlignedBytes& operator=(const AlignedBytes&) = delete;
  ~AlignedBytes() { std::free(data); }
  std::span<const std::byte> span() const { return {data, size}; }
  std::size_t size;
  std::byte* data;
};

// A random matrix with its payload and its weights as doubles.
struct Sample {
  Codec codec;
  std::int64_t rows, cols;
  std::vector<double> weights;
  std::unique_ptr<AlignedBytes> payload;
  PackedMatrix matrix;
};

Sample make_sample(const Codec& codec, std::int64_t rows, std::int64_t cols, std::uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  Sample s{codec, rows, cols, std::vector<double>(static_cast<std::size_t>(rows * cols)), nullptr, {}};
  std::vector<std::byte> bytes;
  if (codec.is_float()) {
    bytes.resize(codec.payload_bytes(rows, cols));
    for (std::int64_t i = 0; i < rows * cols; ++i) {
      float value = normal(rng);
      if (codec.kind == CodecKind::kF32) {
        std::memcpy(bytes.data() + i * 4, &value, 4);
      } else {
        const bool half = codec.kind == CodecKind::kF16;
        const std::uint16_t bits = half ? f32_to_f16(value) : f32_to_bf16(value);
        std::memcpy(bytes.data() + i * 2, &bits, 2);
        value = half ? f16_to_f32(bits) : bf16_to_f32(bits);
      }
      s.weights[static_cast<std::size_t>(i)] = value;
    }
  } else {
    QuantizedTensor q;
    q.codec = codec;
    q.rows = rows;
    q.cols = cols;
    const auto [low, high] = code_range(codec.kind);
    std::uniform_int_distribution<int> code(low, high), zero(0, 15);
    const std::int64_t groups = codec.groups(cols);
    for (std::int64_t i = 0; i < rows * cols; ++i) {
      // Extremes often: they are what overflows.
      const auto draw = rng() % 4;
      q.codes.push_back(static_cast<std::int8_t>(draw == 0 ? high : draw == 1 ? low : code(rng)));
    }
    for (std::int64_t i = 0; i < rows * groups; ++i) {
      q.scales.push_back(i % 7 == 3 ? std::uint16_t{0} : f32_to_f16(0.01f + 0.1f * std::abs(normal(rng))));
      if (codec.kind == CodecKind::kQ4 && i % 3 == 1 && i % 7 != 3) q.scales.back() |= 0x8000u;
      if (codec.kind == CodecKind::kQ4a) q.zeros.push_back(static_cast<std::uint8_t>(zero(rng)));
      if (codec.kind == CodecKind::kQ4m) q.minima.push_back(f32_to_f16(0.5f * normal(rng)));
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < cols; ++c) {
        const std::int64_t g = r * groups + c / (cols / groups);
        const int offset = codec.kind == CodecKind::kQ4a ? q.zeros[static_cast<std::size_t>(g)] : 0;
        s.weights[static_cast<std::size_t>(r * cols + c)] =
            static_cast<double>(q.codes[static_cast<std::size_t>(r * cols + c)] - offset) *
            static_cast<double>(f16_to_f32(q.scales[static_cast<std::size_t>(g)]));
        if (codec.kind == CodecKind::kQ4m)
          s.weights[static_cast<std::size_t>(r * cols + c)] +=
              static_cast<double>(f16_to_f32(q.minima[static_cast<std::size_t>(g)]));
      }
    }
    bytes = pack_payload(q);
  }
  s.payload = std::make_unique<AlignedBytes>(bytes);
  s.matrix = packed_matrix(codec, rows, cols, s.payload->span(), "sample");
  return s;
}

std::vector<float> random_floats(std::int64_t count, std::uint32_t seed, float scale = 1.0f) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& v : values) v = normal(rng);
  return values;
}

const Kernels& kernels_named(const std::string& name) {
  return choose_kernels(name);
}

struct Case {
  Codec codec;
  std::int64_t rows, cols;
};

std::vector<Case> cases() {
  const Codec f32{CodecKind::kF32, 0}, f16{CodecKind::kF16, 0}, bf16{CodecKind::kBf16, 0};
  const Codec q8{CodecKind::kQ8, 32}, q8c{CodecKind::kQ8, Codec::kPerRow};
  std::vector<Case> all;
  for (const Codec& c : {f32, f16, bf16, q8c}) {
    for (const auto& [rows, cols] : {std::pair{1, 4}, {17, 32}, {16, 172}, {5, 64}, {33, 100}, {8, 7}, {29, 30}}) {
      all.push_back({c, rows, cols});
    }
  }
  for (const auto& [rows, cols] : {std::pair{1, 32}, {17, 32}, {40, 96}, {31, 160}, {16, 576}})
    all.push_back({q8, rows, cols});
  for (const CodecKind kind : {CodecKind::kQ4, CodecKind::kQ4a, CodecKind::kQ4m, CodecKind::kQ3, CodecKind::kQ2}) {
    for (const int group : {32, 64, 128}) {
      for (const auto& [rows, groups] : {std::pair{1, 1}, {17, 1}, {23, 3}, {48, 5}}) {
        all.push_back({Codec{kind, group}, rows, groups * group});
      }
    }
  }
  return all;
}

std::string describe(const Case& c) {
  return "codec kind " + std::to_string(static_cast<int>(c.codec.kind)) + " group " + std::to_string(c.codec.group) +
         ", " + std::to_string(c.rows) + " x " + std::to_string(c.cols);
}

class KernelsTest : public ::testing::TestWithParam<std::string> {};

TEST_P(KernelsTest, FloatProductsMatchDoubles) {
  const Kernels& k = kernels_named(GetParam());
  std::uint32_t seed = 1;
  for (const Case& c : cases()) {
    const Sample s = make_sample(c.codec, c.rows, c.cols, ++seed);
    std::vector<float> scratch_memory(static_cast<std::size_t>(16 * round_up(c.cols, 16) + 16));
    void* scratch = scratch_memory.data();
    std::size_t space = scratch_memory.size() * 4;
    std::align(64, space - 64, scratch, space);
    for (std::int64_t tokens : {1, 2, 3, 5, 6, 7, 12, 13, 25, 33}) {
      const std::int64_t ldx = c.cols + 3, ldo = c.rows + 5;  // rows that are not aligned
      const std::vector<float> x = random_floats(tokens * ldx, seed * 31 + static_cast<std::uint32_t>(tokens));
      for (const bool add : {false, true}) {
        std::vector<float> out(static_cast<std::size_t>(tokens * ldo), 2.0f);
        // In two calls, as two threads would.
        const std::int64_t blocks = s.matrix.row_blocks(), middle = blocks / 2;
        k.matmul_float(s.matrix, x.data(), ldx, tokens, 0, middle, out.data(), ldo, add, static_cast<float*>(scratch));
        k.matmul_float(s.matrix, x.data(), ldx, tokens, middle, blocks, out.data(), ldo, add,
                       static_cast<float*>(scratch));
        for (std::int64_t t = 0; t < tokens; ++t) {
          for (std::int64_t r = 0; r < ldo; ++r) {
            double want = r >= c.rows || add ? 2.0 : 0.0, magnitude = 2;
            if (r < c.rows) {
              for (std::int64_t i = 0; i < c.cols; ++i) {
                const double product =
                    s.weights[static_cast<std::size_t>(r * c.cols + i)] * x[static_cast<std::size_t>(t * ldx + i)];
                want += product;
                magnitude += std::abs(product);
              }
            }
            ASSERT_NEAR(out[static_cast<std::size_t>(t * ldo + r)], want, 1e-6 * magnitude)
                << describe(c) << ", tokens " << tokens << ", token " << t << ", row " << r;
          }
        }
      }
    }
  }
}

TEST_P(KernelsTest, Int8ProductsMatchDoublesOnTheSameQuantizedActivations) {
  const Kernels& k = kernels_named(GetParam());
  std::uint32_t seed = 100;
  for (const Case& c : cases()) {
    if (c.codec.is_float()) continue;
    const Sample s = make_sample(c.codec, c.rows, c.cols, ++seed);
    for (std::int64_t tokens = 1; tokens <= 33; tokens += tokens < 14 ? 1 : 9) {
      const std::int64_t ldx = c.cols + 3, ldo = c.rows + 5;
      std::vector<float> x = random_floats(tokens * ldx, seed * 31 + static_cast<std::uint32_t>(tokens));
      if (tokens > 1) std::fill(x.begin(), x.begin() + c.cols, 0.0f);  // a token of zeros
      if (tokens > 2) {                                                // and one of equal extremes: largest sums
        for (std::int64_t i = 0; i < c.cols; ++i) x[static_cast<std::size_t>(ldx + i)] = 3.0f;
      }
      Int8Activations q;
      q.resize(tokens, c.cols);
      for (std::int64_t tile = 0; tile < q.tiles(); ++tile) k.quantize_tile(x.data(), ldx, tile, q);
      // The definition, by itself.
      std::vector<double> quantized(static_cast<std::size_t>(tokens * c.cols));
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t g = 0; g < c.cols; g += 32) {
          float peak = 0;
          for (std::int64_t i = g; i < std::min(c.cols, g + 32); ++i)
            peak = std::max(peak, std::abs(x[static_cast<std::size_t>(t * ldx + i)]));
          const float inverse = peak > 0 ? 127.0f / peak : 0.0f;
          for (std::int64_t i = g; i < std::min(c.cols, g + 32); ++i) {
            quantized[static_cast<std::size_t>(t * c.cols + i)] =
                std::nearbyint(x[static_cast<std::size_t>(t * ldx + i)] * inverse) * static_cast<double>(peak / 127.0f);
          }
        }
      }
      for (const bool add : {false, true}) {
        std::vector<float> out(static_cast<std::size_t>(tokens * ldo), 2.0f);
        const std::int64_t blocks = s.matrix.row_blocks(), middle = blocks / 2;
        k.matmul_int8(s.matrix, q, 0, q.tiles(), 0, middle, out.data(), ldo, add);
        for (std::int64_t tile = 0; tile < q.tiles(); ++tile) {
          k.matmul_int8(s.matrix, q, tile, tile + 1, middle, blocks, out.data(), ldo, add);
        }
        for (std::int64_t t = 0; t < tokens; ++t) {
          for (std::int64_t r = 0; r < ldo; ++r) {
            double want = r >= c.rows || add ? 2.0 : 0.0, magnitude = 2;
            if (r < c.rows) {
              for (std::int64_t i = 0; i < c.cols; ++i) {
                const double product = s.weights[static_cast<std::size_t>(r * c.cols + i)] *
                                       quantized[static_cast<std::size_t>(t * c.cols + i)];
                want += product;
                magnitude += std::abs(product);
              }
            }
            ASSERT_NEAR(out[static_cast<std::size_t>(t * ldo + r)], want, 1e-6 * magnitude)
                << describe(c) << ", tokens " << tokens << ", token " << t << ", row " << r;
          }
        }
      }
    }
  }
}

// One scale per token: the sums are whole numbers, so the result is exact but for three roundings.
TEST_P(KernelsTest, TokenProductsMatchTheDefinitionOfW8a8) {
  const Kernels& k = kernels_named(GetParam());
  const Codec codec{CodecKind::kQ8, Codec::kPerRow, true};
  std::uint32_t seed = 500;
  for (const auto& [rows, cols] :
       {std::pair<int, int>{1, 4}, {17, 32}, {16, 172}, {33, 100}, {8, 7}, {29, 30}, {40, 576}, {18, kRowSpan - 1},
        {3, kRowSpan + 40}, {2, 2 * kRowSpan + 1}}) {
    const Sample s = make_sample(codec, rows, cols, ++seed);
    for (const std::int64_t tokens : {1, 2, 3, 4, 5, 7, 11, 12, 13, 26}) {
      if (cols > 1000 && tokens > 5) continue;
      const std::int64_t ldx = cols + 3, ldo = rows + 5;
      std::vector<float> x = random_floats(tokens * ldx, seed * 31 + static_cast<std::uint32_t>(tokens));
      const auto token = [&](std::int64_t t) { return x.begin() + static_cast<std::ptrdiff_t>(t * ldx); };
      if (tokens > 1) std::fill(token(0), token(0) + cols, 0.0f);
      if (tokens > 2) std::fill(token(1), token(1) + cols, -3.0f);  // all codes -127: largest sums
      if (tokens > 3) *token(2) = 900.0f;                           // an outlier: most other codes are 0
      Int8Activations q;
      q.resize(tokens, cols, Int8Activations::Form::kToken);
      for (std::int64_t tile = 0; tile < q.tiles(); ++tile) k.quantize_tile(x.data(), ldx, tile, q);
      std::vector<double> quantized(static_cast<std::size_t>(tokens * cols));
      for (std::int64_t t = 0; t < tokens; ++t) {
        float peak = 0;
        for (std::int64_t i = 0; i < cols; ++i)
          peak = std::max(peak, std::abs(x[static_cast<std::size_t>(t * ldx + i)]));
        const float inverse = peak > 0 ? 127.0f / peak : 0.0f;
        for (std::int64_t i = 0; i < cols; ++i)
          quantized[static_cast<std::size_t>(t * cols + i)] =
              std::nearbyint(x[static_cast<std::size_t>(t * ldx + i)] * inverse) * static_cast<double>(peak / 127.0f);
      }
      for (const bool add : {false, true}) {
        std::vector<float> out(static_cast<std::size_t>(tokens * ldo), 2.0f);
        const std::int64_t blocks = s.matrix.row_blocks(), middle = blocks / 2;
        k.matmul_int8(s.matrix, q, 0, q.tiles(), 0, middle, out.data(), ldo, add);
        for (std::int64_t tile = 0; tile < q.tiles(); ++tile)
          k.matmul_int8(s.matrix, q, tile, tile + 1, middle, blocks, out.data(), ldo, add);
        for (std::int64_t t = 0; t < tokens; ++t) {
          for (std::int64_t r = 0; r < ldo; ++r) {
            double product = 0;
            for (std::int64_t i = 0; i < cols && r < rows; ++i)
              product += s.weights[static_cast<std::size_t>(r * cols + i)] *
                         quantized[static_cast<std::size_t>(t * cols + i)];
            const double want = product + (r >= rows || add ? 2.0 : 0.0);
            ASSERT_NEAR(out[static_cast<std::size_t>(t * ldo + r)], want, 1e-6 * (2 + std::abs(product)))
                << rows << " x " << cols << ", tokens " << tokens << ", token " << t << ", row " << r;
          }
        }
      }
    }
  }
}

TEST_P(KernelsTest, TokenRoundingIsTheSameOnEveryInstructionSet) {
  const Kernels& k = kernels_named(GetParam());
  for (const std::int64_t cols : {4, 31, 32, 172, 576, 40000}) {
    for (const std::int64_t tokens : {4, 12, 14}) {
      if (tokens > kActTile && GetParam() == "amx") continue;  // an order of its own
      std::vector<float> x = random_floats(tokens * cols, static_cast<std::uint32_t>(cols));
      x[0] = 1e-38f;
      x[static_cast<std::size_t>(cols)] = 3e38f;
      for (std::int64_t i = 0; i < cols; ++i) x[static_cast<std::size_t>(2 * cols + i)] *= 1e-44f;  // subnormal
      x[static_cast<std::size_t>(3 * cols + 1)] = std::numeric_limits<float>::quiet_NaN();
      Int8Activations mine, reference;
      mine.resize(tokens, cols, Int8Activations::Form::kToken);
      reference.resize(tokens, cols, Int8Activations::Form::kToken);
      for (std::int64_t tile = 0; tile < mine.tiles(); ++tile) {
        k.quantize_tile(x.data(), cols, tile, mine);
        kPlainKernels.quantize_tile(x.data(), cols, tile, reference);
      }
      EXPECT_EQ(mine.codes, reference.codes) << cols;
      EXPECT_EQ(mine.minus128, reference.minus128) << cols;
      EXPECT_EQ(0, std::memcmp(mine.scale.data(), reference.scale.data(), mine.scale.size() * 4)) << cols;
      EXPECT_TRUE(std::isnan(mine.scale[3]));
    }
  }
}

TEST_P(KernelsTest, AnOutputHasTheSameBitsInAnyBatch) {
  const Kernels& k = kernels_named(GetParam());
  std::uint32_t seed = 300;
  for (const Case& c : cases()) {
    const Sample s = make_sample(c.codec, c.rows, c.cols, ++seed);
    constexpr std::int64_t kTokens = 27;
    const std::vector<float> x = random_floats(kTokens * c.cols, seed);
    std::vector<float> memory(static_cast<std::size_t>(16 * round_up(c.cols, 16) + 16));
    void* scratch = memory.data();
    std::size_t space = memory.size() * 4;
    std::align(64, space - 64, scratch, space);
    std::vector<float> all(static_cast<std::size_t>(kTokens * c.rows)), one(static_cast<std::size_t>(c.rows));
    k.matmul_float(s.matrix, x.data(), c.cols, kTokens, 0, s.matrix.row_blocks(), all.data(), c.rows, false,
                   static_cast<float*>(scratch));
    for (std::int64_t t = 0; t < kTokens; ++t) {
      k.matmul_float(s.matrix, x.data() + t * c.cols, c.cols, 1, 0, s.matrix.row_blocks(), one.data(), c.rows, false,
                     static_cast<float*>(scratch));
      ASSERT_EQ(0, std::memcmp(one.data(), all.data() + t * c.rows, static_cast<std::size_t>(c.rows) * 4))
          << describe(c) << ", token " << t;
    }
    if (c.codec.is_float()) continue;
    Int8Activations many, single;
    const auto form = seed % 2 == 0 && c.codec.group == Codec::kPerRow ? Int8Activations::Form::kToken
                                                                       : Int8Activations::Form::kGroup;
    many.resize(kTokens, c.cols, form);
    for (std::int64_t tile = 0; tile < many.tiles(); ++tile) k.quantize_tile(x.data(), c.cols, tile, many);
    k.matmul_int8(s.matrix, many, 0, many.tiles(), 0, s.matrix.row_blocks(), all.data(), c.rows, false);
    for (std::int64_t t = 0; t < kTokens; ++t) {
      single.resize(1, c.cols, form);
      k.quantize_tile(x.data() + t * c.cols, c.cols, 0, single);
      k.matmul_int8(s.matrix, single, 0, 1, 0, s.matrix.row_blocks(), one.data(), c.rows, false);
      ASSERT_EQ(0, std::memcmp(one.data(), all.data() + t * c.rows, static_cast<std::size_t>(c.rows) * 4))
          << describe(c) << ", token " << t;
    }
  }
}

TEST_P(KernelsTest, BytesAreMultipliedToTheSameBitsInBothWaysOf256) {
  if (GetParam() != "avxvnni") return;  // the others have sums of their own
  const Kernels &vnni = kernels_named("avxvnni"), &avx2 = kernels_named("avx2");
  EXPECT_NE(vnni.matmul_int8, avx2.matmul_int8);
  std::uint32_t seed = 500;
  for (const Case& c : cases()) {
    if (c.codec.is_float()) continue;
    const Sample s = make_sample(c.codec, c.rows, c.cols, ++seed);
    constexpr std::int64_t kTokens = 15;
    const std::vector<float> x = random_floats(kTokens * c.cols, seed);
    Int8Activations q;
    q.resize(kTokens, c.cols);
    for (std::int64_t tile = 0; tile < q.tiles(); ++tile) avx2.quantize_tile(x.data(), c.cols, tile, q);
    std::vector<float> a(static_cast<std::size_t>(kTokens * c.rows)), b(a.size());
    vnni.matmul_int8(s.matrix, q, 0, q.tiles(), 0, s.matrix.row_blocks(), a.data(), c.rows, false);
    avx2.matmul_int8(s.matrix, q, 0, q.tiles(), 0, s.matrix.row_blocks(), b.data(), c.rows, false);
    ASSERT_EQ(0, std::memcmp(a.data(), b.data(), a.size() * 4)) << describe(c);
  }
}

TEST_P(KernelsTest, QuantizationIsTheSameOnEveryInstructionSet) {
  const Kernels& k = kernels_named(GetParam());
  for (const std::int64_t cols : {4, 31, 32, 172, 576}) {
    for (const std::int64_t tokens : {2, 12, 14}) {
      if (tokens > kActTile && GetParam() == "amx") continue;  // an order of its own
      std::vector<float> x = random_floats(tokens * cols, static_cast<std::uint32_t>(cols));
      x[0] = 1e-38f;
      x[static_cast<std::size_t>(cols)] = 3e38f;
      Int8Activations mine, reference;
      mine.resize(tokens, cols);
      reference.resize(tokens, cols);
      for (std::int64_t tile = 0; tile < mine.tiles(); ++tile) {
        k.quantize_tile(x.data(), cols, tile, mine);
        kPlainKernels.quantize_tile(x.data(), cols, tile, reference);
      }
      EXPECT_EQ(mine.codes, reference.codes) << cols;
      EXPECT_EQ(mine.scale, reference.scale) << cols;
      EXPECT_EQ(mine.minus8, reference.minus8) << cols;
      EXPECT_EQ(mine.minus128, reference.minus128) << cols;
      EXPECT_EQ(mine.minus1, reference.minus1) << cols;
    }
  }
}

TEST_P(KernelsTest, NonFiniteActivationsReachTheOutput) {
  const Kernels& k = kernels_named(GetParam());
  const Sample s = make_sample(Codec{CodecKind::kQ4, 32}, 16, 64, 9);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    std::vector<float> x = random_floats(128, 5);
    x[40] = bad;
    Int8Activations q;
    q.resize(2, 64);
    k.quantize_tile(x.data(), 64, 0, q);
    std::vector<float> out(32);
    k.matmul_int8(s.matrix, q, 0, 1, 0, 1, out.data(), 16, false);
    EXPECT_TRUE(std::isnan(out[1]));
    EXPECT_TRUE(std::isfinite(out[17]));
  }
}

TEST_P(KernelsTest, ElementwiseKernelsMatchDoubles) {
  const Kernels& k = kernels_named(GetParam());
  for (const std::int64_t n : {1, 7, 8, 16, 17, 64, 172, 1000}) {
    const std::vector<float> x = random_floats(n, 1, 4.0f), w = random_floats(n, 2);
    std::vector<float> out(static_cast<std::size_t>(n));
    k.rms_norm(x.data(), w.data(), 1e-5f, n, out.data());
    double squares = 0;
    for (const float v : x) squares += static_cast<double>(v) * v;
    const double scale = 1 / std::sqrt(squares / static_cast<double>(n) + 1e-5);
    for (std::size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(out[i], x[i] * scale * w[i], 2e-6 * (1 + std::abs(out[i])));

    std::vector<float> gate = x;
    if (n > 6) {
      gate[0] = 100;
      gate[1] = -100;
      gate[2] = 1e30f;
      gate[3] = -1e30f;
      gate[4] = 0;
    }
    const std::vector<float> before = gate;
    k.silu_mul(gate.data(), w.data(), n);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double g = before[i];
      const double want = g / (1 + std::exp(-g)) * w[i];
      ASSERT_NEAR(gate[i], want, 1e-6 * std::abs(want) + 1e-6) << before[i];
    }

    std::vector<float> tanh_gate = before, capped = before, tanh_alone = before, exact = before;
    k.gelu_mul(tanh_gate.data(), w.data(), n);
    k.gelu_tanh(tanh_alone.data(), n);
    k.gelu(exact.data(), n);
    k.soft_cap(capped.data(), 5.0f, n);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double g = before[i], inner = std::sqrt(2 / std::numbers::pi) * (g + 0.044715 * g * g * g);
      const double want = 0.5 * g * (1 + std::tanh(inner)) * w[i];
      ASSERT_NEAR(tanh_gate[i], want, 1e-6 * std::abs(want) + 1e-6) << before[i];
      const double alone = 0.5 * g * (1 + std::tanh(inner)), by_erf = 0.5 * g * std::erfc(-g / std::sqrt(2.0));
      ASSERT_NEAR(tanh_alone[i], alone, 1e-6 * std::abs(alone) + 1e-6) << before[i];
      ASSERT_NEAR(exact[i], by_erf, 1e-6 * std::abs(by_erf) + 1e-6) << before[i];
      ASSERT_NEAR(capped[i], 5 * std::tanh(g / 5), 2e-6) << before[i];
    }

  }
}

TEST_P(KernelsTest, NanPassesThroughElementwiseKernels) {
  const Kernels& k = kernels_named(GetParam());
  std::vector<float> gate(20, 1.0f), up(20, 1.0f), s(32, 0.5f), out(20);
  gate[17] = s[17] = std::numeric_limits<float>::quiet_NaN();
  float peak = -INFINITY, shrink = 1;
  k.rms_norm(gate.data(), up.data(), 1e-5f, 20, out.data());
  EXPECT_TRUE(std::isnan(out[0]));
  std::vector<float> tanh_gate = gate, capped = gate;
  k.gelu_mul(tanh_gate.data(), up.data(), 20);
  EXPECT_TRUE(std::isnan(tanh_gate[17]));
  for (const auto kernel : {k.gelu_tanh, k.gelu}) {
    std::vector<float> alone = gate;
    kernel(alone.data(), 20);
    EXPECT_TRUE(std::isnan(alone[17]));
    EXPECT_FALSE(std::isnan(alone[16]));
  }
  k.soft_cap(capped.data(), 30.0f, 20);
  EXPECT_TRUE(std::isnan(capped[17]));
  k.silu_mul(gate.data(), up.data(), 20);
  EXPECT_TRUE(std::isnan(gate[17]));
  for (const bool bf16 : {false, true}) {
    std::vector<float> row = s;
    float top = peak;
    EXPECT_TRUE(std::isnan(k.attention->softmax(row.data(), 20, bf16, &top, &shrink)));
  }
}

INSTANTIATE_TEST_SUITE_P(All, KernelsTest, ::testing::ValuesIn(available_kernels()),
                         [](const auto& each) { return each.param; });

// Sums of codes are exact and groups are added alike, with fused steps, on all but the plain set.
TEST(FastKernelsTest, Int8ProductsHaveTheSameBitsOnAll) {
  const std::vector<std::string> names = available_kernels();
  if (names.size() < 3) GTEST_SKIP() << "this machine has fewer than two";
  const Kernels& first = kernels_named(names[1]);
  std::uint32_t seed = 700;
  for (const Case& c : cases()) {
    if (c.codec.is_float()) continue;
    const Sample s = make_sample(c.codec, c.rows, c.cols, ++seed);
    for (const std::int64_t tokens : {1, 2, 7, 12}) {
      const std::vector<float> x = random_floats(tokens * c.cols, seed);
      Int8Activations q;
      q.resize(tokens, c.cols);
      first.quantize_tile(x.data(), c.cols, 0, q);
      const auto products = [&](const Kernels& k) {
        std::vector<float> out(static_cast<std::size_t>(tokens * c.rows));
        k.matmul_int8(s.matrix, q, 0, 1, 0, s.matrix.row_blocks(), out.data(), c.rows, false);
        return out;
      };
      const std::vector<float> want = products(first);
      for (std::size_t i = 2; i < names.size(); ++i) {
        const std::vector<float> got = products(kernels_named(names[i]));
        ASSERT_EQ(0, std::memcmp(got.data(), want.data(), want.size() * 4))
            << names[i] << ", " << describe(c) << ", tokens " << tokens;
      }
    }
  }
}

// More than one tile, where a set may keep activations in an order of its own: whole, by parts and added to what is there.
TEST(FastKernelsTest, ManyTokensHaveTheSameBitsOnAll) {
  const std::vector<std::string> names = available_kernels();
  if (names.size() < 3) GTEST_SKIP() << "this machine has fewer than two";
  std::vector<Case> all = cases();
  all.push_back({Codec{CodecKind::kQ8, Codec::kPerRow}, 40, kRowSpan + 100});  // two sums a row
  all.push_back({Codec{CodecKind::kQ4, 32}, 150, 40 * 32});                    // more than one panel and set of blocks
  all.push_back({Codec{CodecKind::kQ4m, 64}, 70, 18 * 64});
  std::uint32_t seed = 900;
  for (const Case& c : all) {
    if (c.codec.is_float()) continue;
    const Sample s = make_sample(c.codec, c.rows, c.cols, ++seed);
    const std::int64_t blocks = s.matrix.row_blocks();
    for (const auto form : {Int8Activations::Form::kGroup, Int8Activations::Form::kToken}) {
      if (form == Int8Activations::Form::kToken && (c.codec.kind != CodecKind::kQ8 || c.codec.group != Codec::kPerRow))
        continue;
      for (const std::int64_t tokens : {13, 16, 40, 77}) {
        std::vector<float> x = random_floats(tokens * c.cols, seed);
        x[static_cast<std::size_t>(tokens * c.cols / 2)] = std::numeric_limits<float>::infinity();
        const auto products = [&](const Kernels& k, bool parts) {
          Int8Activations q;
          q.resize(tokens, c.cols, form);
          for (std::int64_t tile = 0; tile < q.tiles(); ++tile) k.quantize_tile(x.data(), c.cols, tile, q);
          std::vector<float> out(static_cast<std::size_t>(tokens * c.rows), 0.25f);
          const std::int64_t tile_step = parts ? 1 : q.tiles(), block_step = parts ? 3 : blocks;
          for (std::int64_t tile = 0; tile < q.tiles(); tile += tile_step)
            for (std::int64_t b = 0; b < blocks; b += block_step)
              k.matmul_int8(s.matrix, q, tile, tile + tile_step, b, std::min(blocks, b + block_step), out.data(), c.rows,
                            tokens != 16);
          return out;
        };
        const std::vector<float> want = products(kernels_named(names[1]), false);
        for (std::size_t i = 2; i < names.size(); ++i) {
          for (const bool parts : {false, true}) {
            const std::vector<float> got = products(kernels_named(names[i]), parts);
            ASSERT_EQ(0, std::memcmp(got.data(), want.data(), want.size() * 4))
                << names[i] << ", " << describe(c) << ", tokens " << tokens << (parts ? ", by parts" : "");
          }
        }
      }
    }
  }
}

TEST(PackedMatrixTest, RowsComeBackExactly) {
  std::uint32_t seed = 500;
  for (const Case& c : cases()) {
    const Sample s = make_sample(c.codec, c.rows, c.cols, ++seed);
    std::vector<float> row(static_cast<std::size_t>(c.cols));
    for (std::int64_t r = 0; r < c.rows; ++r) {
      unpack_matrix_row(s.matrix, r, row.data());
      for (std::int64_t i = 0; i < c.cols; ++i) {
        ASSERT_EQ(row[static_cast<std::size_t>(i)], s.weights[static_cast<std::size_t>(r * c.cols + i)]) << describe(c);
      }
    }
  }
}

TEST(PackedMatrixTest, LaterRowsAreTheSameInPlace) {
  std::uint32_t seed = 800;
  for (const Case& c : cases()) {
    const Sample s = make_sample(c.codec, c.rows, c.cols, ++seed);
    std::vector<float> whole(static_cast<std::size_t>(c.cols)), part(whole.size());
    for (std::int64_t block = 0; block < s.matrix.row_blocks(); ++block) {
      const PackedMatrix later = rows_from(s.matrix, block);
      ASSERT_EQ(later.rows, c.rows - block * kBlockRows);
      for (std::int64_t r = 0; r < later.rows; ++r) {
        unpack_matrix_row(s.matrix, block * kBlockRows + r, whole.data());
        unpack_matrix_row(later, r, part.data());
        ASSERT_EQ(whole, part) << describe(c) << ", block " << block;
      }
    }
  }
}

TEST(PackedMatrixTest, RefusesShortAndMisalignedPayloads) {
  const Sample s = make_sample(Codec{CodecKind::kQ4, 32}, 17, 64, 1);
  EXPECT_THROW(packed_matrix(s.codec, 17, 64, s.payload->span().first(s.payload->size - 1), "w"), Error);
  EXPECT_THROW(packed_matrix(s.codec, 16, 64, s.payload->span().subspan(4), "w"), Error);
  EXPECT_THROW(packed_matrix(s.codec, 17, 48, s.payload->span(), "w"), Error);
  EXPECT_THROW(packed_matrix(s.codec, 0, 64, s.payload->span(), "w"), Error);
}

TEST(ChooseKernelsTest, NamesAndEnvironment) {
  const char* old = std::getenv("PARE_KERNELS");
  const std::string saved = old == nullptr ? "" : old;
  setenv("PARE_KERNELS", "plain", 1);
  EXPECT_STREQ(choose_kernels("").name, "plain");
  EXPECT_EQ(choose_kernels(available_kernels().back()).name, available_kernels().back());
  setenv("PARE_KERNELS", "sse9", 1);
  try {
    choose_kernels("");
    FAIL() << "an unknown name was taken";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    EXPECT_NE(std::string(e.what()).find("plain"), std::string::npos);
    EXPECT_NE(std::string(e.what()).find("sse9"), std::string::npos);
  }
  unsetenv("PARE_KERNELS");
  EXPECT_EQ(choose_kernels("").name, available_kernels().back());
  if (old != nullptr) setenv("PARE_KERNELS", saved.c_str(), 1);
}

#if defined(__x86_64__) && defined(__linux__)
// The permission is the whole process's and makes small signal stacks fail, so only who uses the tiles asks for it. In a
// process of its own (threadsafe: the program starts again), as other tests here use them.
TEST(Kernels, TilesAreAskedForOnlyWhereTheyAreUsed) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto permitted = [] {
    constexpr long kPermissions = 0x1022;  // ARCH_GET_XCOMP_PERM
    std::uint64_t features = 0;
    return syscall(SYS_arch_prctl, kPermissions, &features) == 0 && (features >> 18 & 1) != 0;
  };
  const auto choose = [&](const char* name) {
    available_kernels();
    choose_kernels(name);
    std::exit(permitted() ? 1 : 0);
  };
  EXPECT_EXIT(choose("plain"), ::testing::ExitedWithCode(0), "");
  const std::vector<std::string> names = available_kernels();
  if (std::find(names.begin(), names.end(), "avx2") != names.end()) {
    EXPECT_EXIT(choose("avx2"), ::testing::ExitedWithCode(0), "");
  }
  if (names.back() == "amx") {
    EXPECT_EXIT(choose("amx"), ::testing::ExitedWithCode(1), "");
  }
}
#endif

}  // namespace
}  // namespace pare
