#include "runtime/roofline.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "core/error.h"
#include "runtime/kernels.h"

namespace pare {
namespace {

TEST(RooflineTest, LoopsDoTheOperationsThatAreCounted) {
  for (const std::string& kernels : available_kernels()) {
    const PeakLoops& loops = peak_loops(kernels);
    ASSERT_EQ(loops.name, kernels);
    EXPECT_EQ(loops.int8(7), 7 * loops.int8_operations / 2 * 3 * -2) << kernels;
    EXPECT_EQ(loops.fma(7), static_cast<float>(7 * loops.fma_operations / 2) * 0.125f) << kernels;
  }
}

TEST(RooflineTest, EveryByteIsRead) {
  constexpr std::int64_t kLines = 45;  // no multiple of what a loop takes at once
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  const std::unique_ptr<std::byte, Free> data(static_cast<std::byte*>(std::aligned_alloc(64, kLines * 64)));
  for (const std::string& kernels : available_kernels()) {
    std::memset(data.get(), 0, kLines * 64);
    for (std::int64_t i = 0; i < kLines * 64; ++i) {
      data.get()[i] = std::byte{1};
      const std::uint64_t sum = peak_loops(kernels).read(data.get(), kLines);
      EXPECT_EQ(sum, std::uint64_t{1} << (i % 8 * 8)) << kernels << ", byte " << i;
      data.get()[i] = std::byte{0};
    }
  }
}

TEST(RooflineTest, MeasuresAndRefuses) {
  for (const std::string& kernels : available_kernels()) {
    int steps = 0;
    const std::vector<std::byte, CacheLineAllocator<std::byte>> file(64 * 64 + 1);
    const Roofline roof = measure_roofline(kernels, 2, 1 << 20, [&] { ++steps; }, file);
    EXPECT_EQ(measure_roofline(kernels, 2, 1 << 20, {}, std::span(file).first(100)).file_bytes.best, 0);
    EXPECT_EQ(steps, 4 * kRooflineRuns);
    EXPECT_EQ(roof.threads, 2);
    for (const Peak& peak : {roof.read_bytes, roof.file_bytes, roof.int8_ops, roof.float_ops}) {
      EXPECT_GT(peak.median, 1e6);
      EXPECT_LE(peak.median, peak.best);
    }
  }
  EXPECT_THROW(measure_roofline("none", 1, 1 << 20), Error);
  EXPECT_THROW(measure_roofline("plain", 1, std::int64_t{1} << 60), Error);
  EXPECT_THROW(measure_roofline("plain", 1, 1 << 20, [] { throw std::runtime_error("stop"); }), std::runtime_error);
}

}  // namespace
}  // namespace pare
