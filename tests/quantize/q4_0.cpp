#include "quantize/q4_0.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "core/error.h"
#include "core/file.h"
#include "core/gguf.h"
#include "core/json.h"

namespace pare {
namespace {

struct Sample {
  std::int64_t rows = 0, cols = 0;
  std::vector<float> weight;
  std::vector<double> importance;
};

// The weights of tests/golden/make_q4_0.py.
Sample sample(std::int64_t rows, std::int64_t cols) {
  Sample s{rows, cols, {}, {}};
  std::uint32_t state = 12345;
  const auto draw = [&] { return state = state * 1664525u + 1013904223u; };
  for (std::int64_t i = 0; i < rows * cols; ++i) {
    const float value = static_cast<float>(static_cast<std::int32_t>(draw()) >> 8) * 0x1p-26f;
    s.weight.push_back(value * (i % 23 == 7 ? 6.0f : 1.0f));
  }
  for (std::int64_t j = 0; j < cols; ++j)
    s.importance.push_back((draw() / 256 % 1000 + 1) * (j % 17 == 3 ? 64.0 : 1.0));
  const auto at = [&](std::int64_t i) -> float& { return s.weight[static_cast<std::size_t>(i)]; };
  for (std::int64_t j = 0; j < 32; ++j) {
    at(2 * cols + j) = 0.0f;
    at(3 * cols + 32 + j) = j % 2 ? 0.25f : -0.25f;
    at(4 * cols + 64 + j) *= 0x1p-14f;
  }
  return s;
}

std::string blocks_of(const QuantizedTensor& tensor) {
  std::vector<std::byte> row(ggml_bytes(GgmlType::kQ4_0, tensor.cols));
  std::string hex;
  for (std::int64_t r = 0; r < tensor.rows; ++r) {
    pack_ggml_row(GgmlType::kQ4_0, tensor, r, row.data());
    for (const std::byte byte : row) {
      hex += "0123456789abcdef"[std::to_integer<int>(byte) >> 4];
      hex += "0123456789abcdef"[std::to_integer<int>(byte) & 15];
    }
  }
  return hex;
}

TEST(Q4_0, CodesAndScalesAreThoseOfLlamaCpp) {
  const Json golden = read_json(fs::path(PARE_SOURCE_DIR) / "tests/golden/q4_0.json");
  const Sample s = sample(golden.at("rows").get<std::int64_t>(), golden.at("cols").get<std::int64_t>());
  const Codec codec = Codec::parse("q4", "");
  int negative = 0;
  for (const char* name : {"plain", "weighted"}) {
    const bool weighted = std::string(name) == "weighted";
    const QuantizedTensor ours =
        round_q4_0(s.weight.data(), s.rows, s.cols, codec, weighted ? s.importance.data() : nullptr, "w", 2);
    ours.validate(name);
    for (const std::uint16_t scale : ours.scales) negative += scale >> 15;
    std::string found = blocks_of(ours), expected = golden.at(name).get<std::string>();
    ASSERT_EQ(found.size(), expected.size());
    for (std::size_t block = 0; block < found.size() / 36; ++block) {
      std::string theirs = expected.substr(block * 36, 36);
      // A group of zeros: -0 and 0 mean the same, and so do all codes.
      if (theirs.substr(0, 4) == "0080" || theirs.substr(0, 4) == "0000") theirs = "0000" + std::string(32, '8');
      EXPECT_EQ(found.substr(block * 36, 36), theirs) << name << ", block " << block;
    }
  }
  EXPECT_GT(negative, 20);
}

// What the weighted search minimises, in double.
double cost_of(const Sample& s, const QuantizedTensor& q) {
  std::vector<float> values(s.weight.size());
  q.unpack(values.data());
  double sum = 0;
  for (std::int64_t r = 0; r < s.rows; ++r) {
    const float* row = s.weight.data() + r * s.cols;
    double squares = 0;
    for (std::int64_t j = 0; j < s.cols; ++j) squares += std::pow(row[j], 2);
    for (std::int64_t j = 0; j < s.cols; ++j) {
      const double w = row[j], d = w - values[static_cast<std::size_t>(r * s.cols + j)];
      const double factor = std::sqrt(squares / static_cast<double>(s.cols) + w * w);
      sum += s.importance[static_cast<std::size_t>(j)] * factor * d * d;
    }
  }
  return sum;
}

TEST(Q4_0, WiderGroupsAndTheWeightedSearchCostsLess) {
  const Sample s = sample(24, 256);
  for (const char* name : {"q4g32", "q4g64", "q4g128"}) {
    const Codec codec = Codec::parse(name, "");
    const QuantizedTensor plain = round_q4_0(s.weight.data(), s.rows, s.cols, codec, nullptr, "w", 1);
    const QuantizedTensor weighted = round_q4_0(s.weight.data(), s.rows, s.cols, codec, s.importance.data(), "w", 1);
    plain.validate(name);
    weighted.validate(name);
    EXPECT_LT(cost_of(s, weighted), 0.95 * cost_of(s, plain)) << name;
    // Every group reaches -8: its widest weight, within the rounding of the scale.
    const std::int64_t size = s.cols / codec.groups(s.cols);
    for (std::int64_t g = 0; g < s.rows * codec.groups(s.cols); ++g) {
      const auto* begin = plain.codes.data() + g * size;
      const bool zero = plain.scales[static_cast<std::size_t>(g)] == 0;
      EXPECT_EQ(*std::min_element(begin, begin + size), zero ? 0 : -8) << name << ", group " << g;
    }
    EXPECT_EQ(round_q4_0(s.weight.data(), s.rows, s.cols, codec, s.importance.data(), "w", 3).codes, weighted.codes);
  }
}

TEST(Q4_0, EdgesOfTheRange) {
  const Codec codec = Codec::parse("q4", "");
  std::vector<float> weight(64, 1e-30f);
  std::vector<double> importance(64, 0.0);
  for (const double* costs : {static_cast<const double*>(nullptr), static_cast<const double*>(importance.data())}) {
    const QuantizedTensor tiny = round_q4_0(weight.data(), 2, 32, codec, costs, "w", 1);
    tiny.validate("tiny");
    EXPECT_EQ(tiny.scales, (std::vector<std::uint16_t>{0, 0}));
    EXPECT_EQ(tiny.codes, std::vector<std::int8_t>(64, 0));
  }
  weight.assign(64, std::numeric_limits<float>::denorm_min());  // a reciprocal that overflows
  round_q4_0(weight.data(), 2, 32, codec, nullptr, "w", 1).validate("denormal");
  weight.assign(64, 0.5f);  // inputs that were never there: nothing to keep
  EXPECT_EQ(round_q4_0(weight.data(), 2, 32, codec, importance.data(), "w", 1).scales[0], 0);
  weight[40] = 6e5f;
  EXPECT_THROW(round_q4_0(weight.data(), 2, 32, codec, nullptr, "w", 1), Error);
  weight[40] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(round_q4_0(weight.data(), 2, 32, codec, nullptr, "w", 1), Error);
}

}  // namespace
}  // namespace pare
