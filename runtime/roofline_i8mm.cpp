// Peaks with int8 matrix products: one instruction multiplies and adds 32 pairs of bytes.
#if defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8)
#include "runtime/roofline_neon.h"

namespace pare {
namespace {

std::int64_t int8(std::int64_t rounds) {
  return peak_int8(rounds, [](int32x4_t sum, int8x16_t a, int8x16_t b) { return vmmlaq_s32(sum, a, b); });
}

}  // namespace

const PeakLoops kI8mmPeaks = {"i8mm", peak_read, int8, 2 * 32 * kSums, peak_fma, kFmaOperations};

}  // namespace pare
#endif
