// NEON with int8 matrix products (Armv8.6 FEAT_I8MM: Neoverse V1 and N2, Cortex-A710 on): one usmmla multiplies 2
// outputs x 8 inputs with 8 inputs x 2 tokens. It takes codes without sign, so none has to be shifted.
#if defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8)
#include "runtime/int8_neon.h"

namespace pare {
namespace {

// [quad 0 of a, quad 0 of b, quad 1 of a, quad 1 of b], and of quads 2 and 3: 8 inputs each of two outputs or tokens.
template <class V>
inline V first_pair(V a, V b) {
  return (V)vzip1q_s32((int32x4_t)a, (int32x4_t)b);
}
template <class V>
inline V second_pair(V a, V b) {
  return (V)vzip2q_s32((int32x4_t)a, (int32x4_t)b);
}

struct I8mm {
  static constexpr int kMostTokens = 8;
  static constexpr bool kMixedSigns = true;

  template <CodecKind kKind, int kQuads, int kTokens>
  class Sums {
   public:
    Sums() {
      PARE_UNROLL for (int t = 0; t < kTokens; ++t) {
        PARE_UNROLL for (int q = 0; q < kQuads; ++q) sum_[t][q] = vdupq_n_s32(0);
      }
    }
    void add(const uint8x16_t (&u)[2][kQuads], const std::int8_t* x0, const std::int8_t* x1) {
      if constexpr (kTokens == 1) {
        const int8x16_t quad0 = repeated_quad(x0), quad1 = repeated_quad(x1);
        PARE_UNROLL for (int q = 0; q < kQuads; ++q) {
          sum_[0][q] = vusdotq_s32(vusdotq_s32(sum_[0][q], u[0][q], quad0), u[1][q], quad1);
        }
      } else {
        uint8x16_t rows[2][kQuads];
        PARE_UNROLL for (int q = 0; q < kQuads; ++q) {
          rows[0][q] = first_pair(u[0][q], u[1][q]);
          rows[1][q] = second_pair(u[0][q], u[1][q]);
        }
        if constexpr (kTokens == 2) {
          const int8x8_t a = vld1_s8(x0), b = vld1_s8(x1);
          add_tokens(0, rows, first_pair(vcombine_s8(a, a), vcombine_s8(b, b)));
        } else {
          PARE_UNROLL for (int t = 0; t < kTokens; t += 4) {
            const int8x16_t a = vld1q_s8(x0 + t * 4), b = vld1q_s8(x1 + t * 4);
            add_tokens(t, rows, first_pair(a, b));
            add_tokens(t + 2, rows, second_pair(a, b));
          }
        }
      }
    }
    int32x4_t total(int t, int q) const {
      if constexpr (kTokens == 1) return sum_[t][q];
      const int even = t / 2 * 2;
      return t == even ? vuzp1q_s32(sum_[even][q], sum_[even + 1][q]) : vuzp2q_s32(sum_[even][q], sum_[even + 1][q]);
    }

   private:
    void add_tokens(int t, const uint8x16_t (&rows)[2][kQuads], int8x16_t pair) {
      PARE_UNROLL for (int q = 0; q < kQuads; ++q) {
        sum_[t][q] = vusmmlaq_s32(sum_[t][q], rows[0][q], pair);
        sum_[t + 1][q] = vusmmlaq_s32(sum_[t + 1][q], rows[1][q], pair);
      }
    }
    // One token: 4 outputs. Else [t]: outputs 0 and 1 of the quad x tokens t and t + 1, [t + 1]: outputs 2 and 3.
    int32x4_t sum_[kTokens][kQuads];
  };
};

}  // namespace

const Kernels kI8mmKernels = kernels_with<I8mm>("i8mm");

}  // namespace pare
#endif
