// NEON with the dot product (Armv8.2 FEAT_DotProd: Cortex-A55 and A76 on): one sdot adds the products of 4 outputs with
// 4 inputs of a token. Codes of up to 4 bits are small enough to count as signed; 8-bit ones are made so.
#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include "runtime/int8_neon.h"

namespace pare {
namespace {

struct Dotprod {
  static constexpr int kMostTokens = 8;
  static constexpr bool kMixedSigns = false;

  template <CodecKind kKind, int kQuads, int kTokens>
  class Sums {
   public:
    Sums() {
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
        PARE_UNROLL for (int q = 0; q < kQuads; ++q) sum_[t][q] = vdupq_n_s32(0);
      }
    }
    void add(const uint8x16_t (&u)[2][kQuads], const std::int8_t* x0, const std::int8_t* x1) {
      add_quad(u[0], x0);
      add_quad(u[1], x1);
    }
    int32x4_t total(int t, int q) const { return sum_[t][q]; }

   private:
    void add_quad(const uint8x16_t (&u)[kQuads], const std::int8_t* x) {
      if constexpr (kTokens % 4 == 0) {
        PARE_UNROLL for (int t = 0; t < kTokens; t += 4) {
          const int8x16_t quads = vld1q_s8(x + t * 4);
          PARE_UNROLL for (int q = 0; q < kQuads; ++q) {
            const int8x16_t codes = vreinterpretq_s8_u8(u[q]);
            sum_[t][q] = vdotq_laneq_s32(sum_[t][q], codes, quads, 0);
            sum_[t + 1][q] = vdotq_laneq_s32(sum_[t + 1][q], codes, quads, 1);
            sum_[t + 2][q] = vdotq_laneq_s32(sum_[t + 2][q], codes, quads, 2);
            sum_[t + 3][q] = vdotq_laneq_s32(sum_[t + 3][q], codes, quads, 3);
          }
        }
      } else {
        PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
          const int8x16_t quad = repeated_quad(x + t * 4);
          PARE_UNROLL for (int q = 0; q < kQuads; ++q) {
            sum_[t][q] = vdotq_s32(sum_[t][q], vreinterpretq_s8_u8(u[q]), quad);
          }
        }
      }
    }
    int32x4_t sum_[kTokens][kQuads];
  };
};

}  // namespace

const Kernels kDotprodKernels = kernels_with<Dotprod>("dotprod");

}  // namespace pare
#endif
