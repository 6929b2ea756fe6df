// Attention kernels and attention over pages, for every instruction set and form of the cache, against doubles.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "core/codec.h"
#include "core/error.h"
#include "runtime/kv_cache.h"
#include "tests/runtime/tiny_model.h"

namespace pare {
namespace {

using namespace pare::testing;

constexpr KvType kTypes[] = {KvType::kF32, KvType::kF16, KvType::kQ8, KvType::kMixed};

std::vector<float> random_floats(std::int64_t count, std::uint32_t seed, float scale = 1.0f) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> out(static_cast<std::size_t>(count));
  for (float& v : out) v = normal(rng);
  return out;
}

// What a number becomes in a cache of that type; scale: of its position, kQ8.
double stored(float x, KvType type, float scale) {
  if (type == KvType::kBf16) return static_cast<double>(bf16_to_f32(f32_to_bf16(x)));
  if (type == KvType::kF16) return static_cast<double>(f16_to_f32(f32_to_f16(x)));
  if (type == KvType::kQ8)
    return scale > 0 ? std::nearbyint(x / static_cast<double>(scale)) * static_cast<double>(scale) : 0.0;
  return static_cast<double>(x);
}

class AttentionTest : public ::testing::TestWithParam<std::string> {
 protected:
  const Kernels& kernels() const { return choose_kernels(GetParam()); }
  const AttentionKernels& attention() const { return *kernels().attention; }
};

TEST_P(AttentionTest, NarrowedNumbersAreTheNearest) {
  for (const std::int64_t n : {1, 7, 8, 15, 16, 17, 64, 80, 129}) {
    std::vector<float> x = random_floats(n, static_cast<std::uint32_t>(n), 3.0f);
    if (n > 8) x[3] = 1e-6f, x[7] = 0.0f, x[8] = -60000.0f;
    for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kQ8, KvType::kBf16}) {
      std::vector<std::byte> out(static_cast<std::size_t>(n * 4 + 16), std::byte{0x5a}), plain = out;
      float scale = -1, plain_scale = -1;
      attention().narrow(x.data(), n, type, out.data(), &scale);
      kPlainAttention.narrow(x.data(), n, type, plain.data(), &plain_scale);
      EXPECT_EQ(out, plain) << kv_name(type) << ", " << n;  // and nothing behind the end
      EXPECT_EQ(scale, plain_scale);
      for (std::int64_t i = 0; i < n; ++i) {
        const float value = x[static_cast<std::size_t>(i)];
        if (type == KvType::kF16) {
          std::uint16_t half;
          std::memcpy(&half, out.data() + 2 * i, 2);
          EXPECT_EQ(half, f32_to_f16(value));
        } else if (type == KvType::kBf16) {
          std::uint16_t half;
          std::memcpy(&half, out.data() + 2 * i, 2);
          EXPECT_EQ(half, f32_to_bf16(value));
        } else if (type == KvType::kQ8) {
          EXPECT_NEAR(static_cast<std::int8_t>(out[static_cast<std::size_t>(i)]) * scale, value, 0.5001f * scale);
        }
      }
    }
  }
  std::vector<float> x(20, 1.0f);
  x[17] = std::numeric_limits<float>::quiet_NaN();
  std::byte codes[20];
  float scale = 0;
  attention().narrow(x.data(), 20, KvType::kQ8, codes, &scale);
  EXPECT_TRUE(std::isnan(scale));
  std::uint16_t halves[20];
  for (const KvType type : {KvType::kF16, KvType::kBf16}) {
    attention().narrow(x.data(), 20, type, reinterpret_cast<std::byte*>(halves), nullptr);
    EXPECT_TRUE(std::isnan(type == KvType::kF16 ? f16_to_f32(halves[17]) : bf16_to_f32(halves[17])));
    EXPECT_EQ(type == KvType::kF16 ? f16_to_f32(halves[18]) : bf16_to_f32(halves[18]), 1.0f);
  }
}

TEST_P(AttentionTest, ScaledNumbersAndTheirNaN) {
  for (const std::int64_t n : {1, 4, 7, 8, 15, 16, 17, 40}) {
    std::vector<float> x = random_floats(n + 1, static_cast<std::uint32_t>(n)), out(x.size(), 7.0f);
    x.back() = std::numeric_limits<float>::quiet_NaN();  // behind the end
    EXPECT_FALSE(attention().scale(x.data(), n, 0.3f, out.data())) << n;
    for (std::int64_t i = 0; i < n; ++i)
      EXPECT_EQ(out[static_cast<std::size_t>(i)], x[static_cast<std::size_t>(i)] * 0.3f);
    EXPECT_EQ(out.back(), 7.0f);
    for (std::int64_t i = 0; i < n; ++i) {
      std::vector<float> some = x;
      some[static_cast<std::size_t>(i)] = std::numeric_limits<float>::infinity();
      EXPECT_FALSE(attention().scale(some.data(), n, 2.0f, some.data())) << n;
      EXPECT_TRUE(attention().scale(some.data(), n, 0.0f, some.data())) << i << " of " << n;
    }
  }
}

TEST_P(AttentionTest, HeadsTurnLikeDoubles) {
  for (const std::int64_t n : {8, 10, 24, 64, 80, 128}) {
    for (const std::int64_t half : {n / 2, n / 4, std::int64_t{1}}) {
      const std::vector<float> before = random_floats(n, 5), angles = random_floats(half, 6, 3.0f);
      std::vector<float> x = before, cosine, sine;
      x.push_back(7.0f);
      for (const float angle : angles) cosine.push_back(std::cos(angle)), sine.push_back(std::sin(angle));
      attention().rotate(x.data(), cosine.data(), sine.data(), half, n, 0.25f);
      for (std::int64_t i = 0; i < n; ++i) {
        const auto at = [&](std::int64_t k) { return static_cast<double>(before[static_cast<std::size_t>(k)]); };
        const auto j = static_cast<std::size_t>(i % half);
        const double c = static_cast<double>(cosine[j]), s = static_cast<double>(sine[j]);
        const double want = i >= 2 * half ? at(i) : i < half ? at(i) * c - at(i + half) * s : at(i) * c + at(i - half) * s;
        EXPECT_NEAR(x[static_cast<std::size_t>(i)], want * 0.25, 3e-7) << i << " of " << n << ", " << half;
      }
      EXPECT_EQ(x.back(), 7.0f);
    }
  }
}

TEST_P(AttentionTest, RunningSoftmaxMatchesDoubles) {
  for (const bool bf16 : {false, true}) {
    for (const std::int64_t n : {2, 9, 16, 17, 40, 128}) {
      const std::vector<float> raw = random_floats(n, static_cast<std::uint32_t>(n), 4.0f);
      for (std::int64_t split = 1; split < n; split += 3) {
        std::vector<float> s = raw;
        s.push_back(1e9f);  // what lies behind must neither count nor change
        float peak = -INFINITY, first_shrink = 1, shrink = 1;
        const float first = attention().softmax(s.data(), split, bf16, &peak, &first_shrink);
        const float second = attention().softmax(s.data() + split, n - split, bf16, &peak, &shrink);
        EXPECT_EQ(first_shrink, 0.0f);
        EXPECT_EQ(peak, *std::max_element(raw.begin(), raw.end()));
        double want = 0;
        for (std::int64_t i = 0; i < n; ++i) {
          const float kept = s[static_cast<std::size_t>(i)];
          const double e = std::exp(static_cast<double>(raw[static_cast<std::size_t>(i)]) - static_cast<double>(peak));
          const double got = static_cast<double>(kept) * (i < split ? static_cast<double>(shrink) : 1.0);
          ASSERT_NEAR(got, e, 1e-6 + (bf16 ? e / 256 : 0));
          if (bf16) {
            ASSERT_EQ(kept, bf16_to_f32(f32_to_bf16(kept)));
          }
          want += bf16 ? got : e;
        }
        ASSERT_NEAR(first * shrink + second, want, 2e-6 * want);
        ASSERT_EQ(s.back(), 1e9f);
      }
    }
  }
}

// Over all binades that count: no further from e^x than half a step of bfloat16, but for a float's own errors.
TEST_P(AttentionTest, WeightsAreTheNearestBfloat16) {
  std::vector<float> x = {0.0f, -87.0f, -100.0f, -1e30f, -INFINITY};
  for (int i = 1; i < 40000; ++i) x.push_back(-static_cast<float>(i) * 87.0f / 40000);
  for (int i = 1; i < 40000; ++i) x.push_back(-static_cast<float>(i) / 40000);
  for (std::size_t first = 0; first < x.size(); first += kPage) {
    const auto n = static_cast<std::int64_t>(std::min<std::size_t>(kPage, x.size() - first));
    std::vector<float> got(x.data() + first, x.data() + first + n);
    float peak = 0, shrink = 0;
    attention().softmax(got.data(), n, true, &peak, &shrink);
    EXPECT_EQ(shrink, 1.0f);
    for (std::int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<double>(x[first + static_cast<std::size_t>(i)]);
      const double e = std::exp(at), kept = got[static_cast<std::size_t>(i)];
      ASSERT_EQ(kept, bf16_to_f32(f32_to_bf16(static_cast<float>(kept)))) << at;
      if (at <= -87) {
        ASSERT_TRUE(kept >= 0 && kept < 2e-38) << at << ": " << kept;
        continue;
      }
      int power;
      std::frexp(e, &power);
      ASSERT_LE(std::abs(kept - e), std::ldexp(1.0, power - 9) + e * (2e-7 - at * 5e-8)) << at << ": " << kept;
    }
  }
  std::vector<float> one = {-3.0f, 0.0f};
  float peak = 0, shrink = 0;
  attention().softmax(one.data(), 2, true, &peak, &shrink);
  EXPECT_EQ(one[1], 1.0f);
}

// Whatever the payload, which could carry over into a number where bits are rounded.
TEST_P(AttentionTest, NaNScoresStayNaN) {
  for (const std::uint32_t bits : {0x7fc00000u, 0xffc00000u, 0x7fffe000u, 0xffffe000u, 0x7fffffffu, 0xffffffffu}) {
    for (const bool bf16 : {false, true}) {
      std::vector<float> s(37, -1.0f);
      std::memcpy(&s[20], &bits, 4);
      std::memcpy(&s[36], &bits, 4);
      float peak = 1, shrink = 0;
      EXPECT_TRUE(std::isnan(attention().softmax(s.data(), 37, bf16, &peak, &shrink)));
      EXPECT_TRUE(std::isnan(s[20]) && std::isnan(s[36])) << bits;
    }
  }
}

// Few rows and many are multiplied in different ways. Columns of products and sums too small to be normal numbers, one
// with an infinity, and none that may meet what lies behind the positions.
TEST_P(AttentionTest, WeighedRowsHaveTheSameBitsInAnyNumber) {
  constexpr std::int64_t kRows = 19;
  for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kQ8, KvType::kBf16}) {
    for (const std::int64_t width : {16, 48, 80}) {
      for (const std::int64_t positions : {1, 2, 31, 32, 33, 127, 128}) {
        std::vector<std::byte> data(static_cast<std::size_t>(kPage * width * 4), std::byte{0xff});
        std::vector<float> scales(kPage, 0.01f);
        const KvPlane values{type, data.data(), scales.data(), nullptr};
        const float sizes[] = {1.0f, 1e-20f, 1e-36f, 1e-38f};
        const auto size_at = [&](std::size_t i) { return sizes[i % 4]; };
        std::vector<float> probs = random_floats(kRows * kPage, 7), before = random_floats(kRows * width, 8);
        for (std::size_t i = 0; i < before.size(); ++i) before[i] *= i % 7 < 2 ? 1e-39f : size_at(i);
        for (std::int64_t p = 0; p < positions; ++p) {
          std::vector<float> row = random_floats(width, static_cast<std::uint32_t>(p));
          for (std::size_t d = 0; d < row.size(); ++d) row[d] *= size_at(d);
          if (p == 30) row[3] = INFINITY;
          std::vector<std::byte> narrow(static_cast<std::size_t>(width * 4));
          attention().narrow(row.data(), width, type, narrow.data(), &scales[static_cast<std::size_t>(p)]);
          const bool pairs = type == KvType::kBf16;
          const std::int64_t size = kv_bytes(type);
          for (std::int64_t d = 0; d < width; ++d)
            std::memcpy(data.data() + (pairs ? (p / 2 * width + d) * 2 + p % 2 : p * width + d) * size,
                        narrow.data() + d * size, static_cast<std::size_t>(size));
        }
        for (std::size_t i = 0; i < probs.size(); ++i)
          probs[i] = i % kPage < static_cast<std::size_t>(positions)
                         ? bf16_to_f32(f32_to_bf16(std::abs(probs[i]) * size_at(i / kPage % 3)))
                         : std::nanf("");
        std::vector<float> all = before;
        attention().weigh(probs.data(), kPage, kRows, values, width, positions, all.data());
        for (const std::int64_t count : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 18}) {
          std::vector<float> some(static_cast<std::size_t>(count * width));
          for (std::int64_t first = 0; first + count <= kRows; first += count) {
            std::copy_n(before.begin() + first * width, some.size(), some.begin());
            attention().weigh(probs.data() + first * kPage, kPage, count, values, width, positions, some.data());
            for (std::size_t i = 0; i < some.size(); ++i) {
              const float want = all[static_cast<std::size_t>(first * width) + i];
              const bool meets = positions > 30 && (type == KvType::kQ8 || i % static_cast<std::size_t>(width) == 3);
              ASSERT_TRUE(std::memcmp(&some[i], &want, 4) == 0 || (meets && std::isnan(some[i]) && std::isnan(want)))
                  << kv_name(type) << ", width " << width << ", " << positions << " positions, " << count << " rows: "
                  << some[i] << " and " << want;
            }
          }
        }
      }
    }
  }
}

// All positions of a cache of several pages, windows and caps, many rows and one, against the definition.
TEST_P(AttentionTest, RowsOverPagesMatchDoubles) {
  constexpr std::int64_t every = 7;  // of the rows
  for (const KvType type : kTypes) {
    const KvType key_type = type == KvType::kMixed ? KvType::kF16 : type;
    const KvType value_type = type == KvType::kMixed ? KvType::kBf16 : type;
    for (const auto& [d, heads] : std::vector<std::pair<std::int64_t, std::int64_t>>{
             {8, 2}, {24, 3}, {64, 4}, {48, 2}, {80, 1}}) {
      for (const std::int64_t window : {0, 50, 200}) {
        ModelConfig config = tiny_config("llama", 4 * d, 64, 4, 2, d, 40, true);
        config.attention_softcap = window == 50 ? 7.0 : 0.0;
        config.sliding_window = window;
        config.layer_slides.assign(static_cast<std::size_t>(config.num_layers), window > 0 ? 1 : 0);
        constexpr std::int64_t kPositions = 705, kCall = 64;
        KvCache cache(config, type, kCall);
        const auto keys = random_floats(kPositions * d, 1), values = random_floats(kPositions * d, 2);
        const auto at = [&](const std::vector<float>& from, std::int64_t p) { return from.data() + p * d; };
        const auto kept = [&](const std::vector<float>& x, KvType as) {
          std::vector<double> out;
          for (std::int64_t p = 0; p < kPositions; ++p) {
            float peak = 0;
            for (std::int64_t c = 0; c < d; ++c) peak = std::max(peak, std::abs(at(x, p)[c]));
            for (std::int64_t c = 0; c < d; ++c) out.push_back(stored(at(x, p)[c], as, peak / 127));
          }
          return out;
        };
        const std::vector<double> kept_keys = kept(keys, key_type), kept_values = kept(values, value_type);
        const auto q = random_floats(heads * kMostRowTokens * d, 3, 0.5f);  // [token][head][d]
        AttentionScratch scratch;
        scratch.reserve(d);
        std::int64_t done = 0;
        for (const std::int64_t end : {1, 20, 140, 177, 300, 705}) {
          cache.reserve(end);
          for (; done < end; ++done) cache.store(attention(), 1, done, 1, at(keys, done), at(values, done));
          const std::int64_t count = std::min(kMostRowTokens, end);
          std::vector<float> out(static_cast<std::size_t>(heads * count * d)), alone(static_cast<std::size_t>(d));
          attend_rows(kernels(), config, cache, 1, 1,
                      {q.data(), out.data(), heads * d, count, end - count + 1, 1, heads, d}, scratch);
          for (std::int64_t i = 0; i < heads * count; ++i) {
            if (i % every != 0 && i + 1 < heads * count) continue;
            const std::int64_t seen = end - count + 1 + i / heads;
            attend_rows(kernels(), config, cache, 1, 1, {q.data() + i * d, alone.data(), d, 1, seen, 0}, scratch);
            for (std::int64_t c = 0; c < d; ++c)
              ASSERT_EQ(out[static_cast<std::size_t>(i * d + c)], alone[static_cast<std::size_t>(c)])
                  << "a row's bits depend on its batch: " << kv_name(type) << ", row " << i << " of " << end;
            if (i % (2 * every) != 0 && i + 1 < heads * count) continue;
            // Page by page, as bfloat16 weights depend on the largest score so far. Those near the middle between two may
            // be rounded either way: `slack` is what that changes.
            std::vector<double> want(static_cast<std::size_t>(d));
            double sum = 0, top = -INFINITY, slack = 0;
            const std::int64_t begin = window > 0 ? std::max<std::int64_t>(0, seen - window) : 0;
            for (std::int64_t first = begin; first < seen;) {
              const std::int64_t next = std::min(seen, (first / kPage + 1) * kPage);
              std::vector<double> scores;
              for (std::int64_t p = first; p < next; ++p) {
                double score = 0;
                for (std::int64_t c = 0; c < d; ++c)
                  score += static_cast<double>(q[static_cast<std::size_t>(i * d + c)]) *
                           kept_keys[static_cast<std::size_t>(p * d + c)];
                if (config.attention_softcap > 0)
                  score = config.attention_softcap * std::tanh(score / config.attention_softcap);
                scores.push_back(score);
              }
              const double before = top;
              for (const double score : scores) top = std::max(top, score);
              const double shrink = std::exp(before - top);
              sum *= shrink;
              slack *= shrink;
              for (double& value : want) value *= shrink;
              for (std::int64_t p = first; p < next; ++p) {
                double e = std::exp(scores[static_cast<std::size_t>(p - first)] - top);
                double largest = 0;
                for (std::int64_t c = 0; c < d; ++c)
                  largest = std::max(largest, std::abs(kept_values[static_cast<std::size_t>(p * d + c)]));
                if (type == KvType::kMixed) {
                  const auto nearest = [](double x) {
                    return static_cast<double>(bf16_to_f32(f32_to_bf16(static_cast<float>(x))));
                  };
                  slack += (nearest(e * (1 + 4e-6)) - nearest(e * (1 - 4e-6))) * 2 * largest;  // of the value and the sum
                  e = nearest(e);
                }
                sum += e;
                for (std::int64_t c = 0; c < d; ++c) {
                  want[static_cast<std::size_t>(c)] += e * kept_values[static_cast<std::size_t>(p * d + c)];
                }
              }
              first = next;
            }
            const double tolerance = 2e-5 + slack / sum;
            for (std::int64_t c = 0; c < d; ++c) {
              const float got = out[static_cast<std::size_t>(i * d + c)];
              ASSERT_NEAR(got, want[static_cast<std::size_t>(c)] / sum, tolerance)
                  << kv_name(type) << ", row " << i << " of " << end;
            }
          }
        }
      }
    }
  }
}

// A value that 16 bits do not hold reaches the rows that see it, and no others: one beside the last that a row of an odd
// number of positions sees, one that lies before the windows of later tokens of the call.
TEST_P(AttentionTest, RowsDoNotMeetWhatTheyDoNotSee) {
  constexpr std::int64_t kHeads = 3, kCount = 60, kPositions = 178;
  for (const KvType type : {KvType::kF16, KvType::kMixed}) {
    for (const std::int64_t window : {0, 50}) {
      for (const std::int64_t bad : {141, 127}) {
        const std::int64_t d = 24;
        ModelConfig config = tiny_config("llama", 4 * d, 64, 4, 2, d, 40, true);
        config.sliding_window = window;
        config.layer_slides.assign(static_cast<std::size_t>(config.num_layers), window > 0 ? 1 : 0);
        KvCache cache(config, type, kCount);
        cache.reserve(kPositions);
        const auto keys = random_floats(kPositions * d, 1), q = random_floats(kHeads * kCount * d, 3, 0.5f);
        auto values = random_floats(kPositions * d, 2);
        values[static_cast<std::size_t>(bad * d + 5)] = 3.4e38f;
        for (std::int64_t p = 0; p < kPositions; ++p)
          cache.store(attention(), 1, p, 1, keys.data() + p * d, values.data() + p * d);
        AttentionScratch scratch;
        scratch.reserve(d);
        std::vector<float> out(q.size()), alone(static_cast<std::size_t>(d));
        const std::int64_t begin = kPositions - kCount + 1;
        attend_rows(kernels(), config, cache, 1, 1,
                    {q.data(), out.data(), kHeads * d, kCount, begin, 1, kHeads, d}, scratch);
        int finite = 0;
        for (std::int64_t i = 0; i < kHeads * kCount; ++i) {
          const std::int64_t seen = begin + i / kHeads;
          attend_rows(kernels(), config, cache, 1, 1, {q.data() + i * d, alone.data(), d, 1, seen, 0}, scratch);
          EXPECT_EQ(std::memcmp(alone.data(), out.data() + i * d, alone.size() * 4), 0) << i;
          // Its page is read, and what lies before the window multiplied by 0, as long as one position is seen.
          const bool meets = seen > bad && (window == 0 || (seen - window) / kPage * kPage <= bad);
          EXPECT_EQ(std::isfinite(alone[5]), !meets) << i;
          EXPECT_TRUE(std::isfinite(alone[4]));
          finite += !meets;
        }
        EXPECT_GT(finite, 0);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, AttentionTest, ::testing::ValuesIn(available_kernels()),
                         [](const auto& each) { return each.param; });

TEST(KvCacheTest, HoldsWhatIsComputedAndNoMore) {
  ModelConfig config = tiny_config("llama", 64, 64, 4, 2, 16, 40, true);
  const auto layers = static_cast<std::uint64_t>(config.num_layers);
  const auto bytes = [&](KvType type, std::int64_t positions) {
    KvCache cache(config, type, 288);
    cache.reserve(positions);
    return cache.bytes();
  };
  // layers x heads x positions in whole pages x (keys and values x width, and two scales of q8)
  EXPECT_EQ(bytes(KvType::kF32, 300), layers * 2 * 384 * 2 * 16 * 4);
  EXPECT_EQ(bytes(KvType::kF16, 300), layers * 2 * 384 * 2 * 16 * 2);
  EXPECT_EQ(bytes(KvType::kMixed, 300), bytes(KvType::kF16, 300));
  EXPECT_EQ(bytes(KvType::kQ8, 300), layers * 2 * 384 * (2 * 16 + 2 * 4));
  config.sliding_window = 256;
  config.layer_slides.assign(static_cast<std::size_t>(config.num_layers), 0);
  config.layer_slides[0] = 1;
  EXPECT_EQ(bytes(KvType::kF16, 128 * 100), 2 * (6 + (layers - 1) * 100) * 128 * 2 * 16 * 2);
  EXPECT_THROW(parse_kv("f64"), Error);
}

}  // namespace
}  // namespace pare
