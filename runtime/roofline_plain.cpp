// Peaks of plain C++ as the compiler translates it for any machine: small arrays in the nearest cache.
#include <algorithm>
#include <cstring>

#include "runtime/roofline.h"

namespace pare {
namespace {

std::uint64_t read(const std::byte* data, std::int64_t lines) {
  std::uint64_t sum[8] = {};
  for (std::int64_t i = 0; i < lines; ++i) {
    std::uint64_t words[8];
    std::memcpy(words, data + i * 64, 64);
    for (int k = 0; k < 8; ++k) sum[k] += words[k];
  }
  std::uint64_t all = 0;
  for (const std::uint64_t s : sum) all += s;
  return all;
}

constexpr int kLength = 256;  // products of a round

std::int64_t int8(std::int64_t rounds) {
  std::int8_t a[kLength], b[kLength];
  std::fill(a, a + kLength, std::int8_t{3});
  std::fill(b, b + kLength, std::int8_t{-2});
  std::int64_t total = 0;
  for (std::int64_t r = 0; r < rounds; ++r) {
    asm volatile("" : : "r"(a), "r"(b) : "memory");  // the arrays may have changed
    std::int32_t sum = 0;
    for (int i = 0; i < kLength; ++i) sum += a[i] * b[i];
    total += sum;
  }
  return static_cast<std::int32_t>(total);
}

float fma(std::int64_t rounds) {
  constexpr int kLanes = 16;
  float sum[kLanes] = {}, a[kLength], b[kLength];
  std::fill(a, a + kLength, 0.5f);
  std::fill(b, b + kLength, 0.25f);
  for (std::int64_t r = 0; r < rounds; ++r) {
    asm volatile("" : : "r"(a), "r"(b) : "memory");
    for (int i = 0; i < kLength; i += kLanes)
      for (int k = 0; k < kLanes; ++k) sum[k] += a[i + k] * b[i + k];
  }
  float all = 0;
  for (const float s : sum) all += s;
  return all;
}

}  // namespace

const PeakLoops kPlainPeaks = {"plain", read, int8, 2 * kLength, fma, 2 * kLength};

}  // namespace pare
