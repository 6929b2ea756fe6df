// Peaks with plain NEON: products of bytes are added as 16 bits, 8 at a time, and widened once for 16 of them.
#if defined(__aarch64__)
#include "runtime/roofline_neon.h"

namespace pare {
namespace {

constexpr int kProducts = 16;  // of a lane before it is widened

std::int64_t int8(std::int64_t rounds) {
  return peak_int8(rounds, [](int32x4_t sum, int8x16_t a, int8x16_t b) {
    int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    PARE_UNROLL for (int k = 1; k < kProducts; ++k) {
      asm volatile("" : "+w"(a));
      low = vmlal_s8(low, vget_low_s8(a), vget_low_s8(b));
      high = vmlal_high_s8(high, a, b);
    }
    return vpadalq_s16(vpadalq_s16(sum, low), high);
  });
}

}  // namespace

const PeakLoops kNeonPeaks = {"neon", peak_read, int8, 2 * 16 * kProducts * kSums, peak_fma, kFmaOperations};

}  // namespace pare
#endif
