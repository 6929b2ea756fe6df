// Peaks with the dot product: one instruction multiplies and adds 16 pairs of bytes.
#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include "runtime/roofline_neon.h"

namespace pare {
namespace {

std::int64_t int8(std::int64_t rounds) {
  return peak_int8(rounds, [](int32x4_t sum, int8x16_t a, int8x16_t b) { return vdotq_s32(sum, a, b); });
}

}  // namespace

const PeakLoops kDotprodPeaks = {"dotprod", peak_read, int8, 2 * 16 * kSums, peak_fma, kFmaOperations};

}  // namespace pare
#endif
