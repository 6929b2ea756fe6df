// What this machine can do at most: the roof under which `pare bench` states its speeds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

namespace pare {

// The loops of one instruction set; each is written so that nothing but its own operation can limit it.
struct PeakLoops {
  const char* name;  // as in Kernels
  // Reads `lines` lines of 64 bytes once, in order. Returns a value that depends on all of them.
  std::uint64_t (*read)(const std::byte* data, std::int64_t lines);
  // `rounds` rounds on registers (plain: the nearest cache); a round has as many multiplications and additions as the
  // member after it says. Returns the sum of all products: of 3 and -2, modulo 2^32, or of 0.5 and 0.25.
  std::int64_t (*int8)(std::int64_t rounds);
  std::int64_t int8_operations;
  float (*fma)(std::int64_t rounds);
  std::int64_t fma_operations;
};

// Those of a name of available_kernels(); error (exit 2) for any other.
const PeakLoops& peak_loops(const std::string& kernels);

extern const PeakLoops kPlainPeaks;
#if defined(__x86_64__)
extern const PeakLoops kAvx2Peaks;
extern const PeakLoops kAvx512VnniPeaks;
#elif defined(__aarch64__)
extern const PeakLoops kNeonPeaks;
extern const PeakLoops kDotprodPeaks;
extern const PeakLoops kI8mmPeaks;
#endif
// By a name of available_kernels(); another one: exit 2.
const PeakLoops& peak_loops(const std::string& kernels);

struct Peak {
  double median = 0, best = 0;  // per second, of kRooflineRuns runs
};
struct Roofline {
  int threads = 0;
  Peak read_bytes;   // from a buffer that no cache holds
  Peak file_bytes;   // from the file that was given, as it lies in the page cache; 0: none, or too small
  Peak int8_ops;     // multiplications and additions
  Peak float_ops;
};
constexpr int kRooflineRuns = 9;
constexpr std::int64_t kRooflineBytes = std::int64_t{1} << 29;

// kernels: a name of available_kernels(). Every thread has a share of one buffer of `buffer_bytes`, and of as many
// first bytes of a mapped file, which begins on 64 bytes. `step` is called before every run and may throw. Takes about a second. Error: exit 5
// where the buffer does not fit.
Roofline measure_roofline(const std::string& kernels, int threads, std::int64_t buffer_bytes = kRooflineBytes,
                          const std::function<void()>& step = {}, std::span<const std::byte> file = {});

}  // namespace pare
