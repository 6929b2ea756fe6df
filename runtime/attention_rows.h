// How an instruction set's tiles cover the query rows of one page: four at a time, then the rest at once. `Tiles` names
// the kinds of keys and values (Float, Half, Byte; Pair of values alone) and the functions scores<Kv, rows> and
// weigh<Kv, rows>. And what their running softmaxes share. Included by the attention sources alone.
#pragma once

#include <cmath>
#include <type_traits>

#include "runtime/attention_kernels.h"

namespace pare {
namespace {

// exp_bf16(x), x <= 0: the bfloat16 nearest to exp(x) = 2^y = 2^floor(y) * p(f), y = x / ln(2), f = y - floor(y); any
// of two that are equally near within 1.2e-7 + 4e-8 * |x|. p = 1 + f * (kPower2[4] + f * (kPower2[3] + ...)) has an
// error of at most 1.2e-7 on [0, 1]. Beside kBf16Steps floats are 2^-7 apart, as bfloat16 are in [1, 2): the sum
// with it is rounded. y is at least kLeastPower, so that results are normal numbers. NaN stays.
[[maybe_unused]] constexpr float kPower2[] = {0x1.e974fcp-10f, 0x1.277854p-7f, 0x1.c91ce6p-5f, 0x1.ebdb56p-3f,
                                              0x1.62e4bap-1f};
[[maybe_unused]] constexpr float kInverseLn2 = 1.44269504f, kBf16Steps = 3 << 15, kLeastPower = -126;

// What sums that were relative to `before` have to be multiplied by to be relative to `peak`; most pages raise no peak.
inline float shrink_to(float before, float peak) {
  if (before == -INFINITY) return 0.0f;
  return before == peak ? 1.0f : std::exp(before - peak);
}

// Calls step(row, its place in the pair) for rows [0, n) of values: the place is 0 where rows are not kept in pairs.
template <class Kv, class Step>
inline __attribute__((always_inline)) void each_row(std::int64_t n, const Step& step) {
  std::int64_t row = 0;
  if constexpr (Kv::kPairs) {
    for (; row + 1 < n; row += 2) {
      step(row, std::integral_constant<int, 0>());
      step(row + 1, std::integral_constant<int, 1>());
    }
  }
  for (; row < n; ++row) step(row, std::integral_constant<int, 0>());
}

template <class Tiles, class Kv>
void scores_of(const float* q, std::int64_t ldq, std::int64_t count, const KvPlane& keys, std::int64_t head_dim,
               std::int64_t positions, float* out, std::int64_t ldo) {
  KvPlane plane = keys;
  for (; count >= 4; count -= 4, q += 4 * ldq, out += 4 * ldo, plane.ahead = nullptr)  // it is asked for once
    Tiles::template scores<Kv, 4>(q, ldq, plane, head_dim, positions, out, ldo);
  if (count == 3) Tiles::template scores<Kv, 3>(q, ldq, plane, head_dim, positions, out, ldo);
  if (count == 2) Tiles::template scores<Kv, 2>(q, ldq, plane, head_dim, positions, out, ldo);
  if (count == 1) Tiles::template scores<Kv, 1>(q, ldq, plane, head_dim, positions, out, ldo);
}

template <class Tiles>
void scores(const float* q, std::int64_t ldq, std::int64_t count, const KvPlane& keys, std::int64_t head_dim,
            std::int64_t positions, float* out, std::int64_t ldo) {
  const auto run = keys.type == KvType::kF32   ? scores_of<Tiles, typename Tiles::Float>
                   : keys.type == KvType::kF16 ? scores_of<Tiles, typename Tiles::Half>
                                               : scores_of<Tiles, typename Tiles::Byte>;
  run(q, ldq, count, keys, head_dim, positions, out, ldo);
}

template <class Tiles, class Kv>
void weigh_of(const float* probs, std::int64_t ldp, std::int64_t count, const KvPlane& values, std::int64_t width,
              std::int64_t positions, float* acc) {
  KvPlane plane = values;
  for (; count >= 4; count -= 4, probs += 4 * ldp, acc += 4 * width, plane.ahead = nullptr)
    Tiles::template weigh<Kv, 4>(probs, ldp, plane, width, positions, acc);
  if (count == 3) Tiles::template weigh<Kv, 3>(probs, ldp, plane, width, positions, acc);
  if (count == 2) Tiles::template weigh<Kv, 2>(probs, ldp, plane, width, positions, acc);
  if (count == 1) Tiles::template weigh<Kv, 1>(probs, ldp, plane, width, positions, acc);
}

template <class Tiles>
void weigh(const float* probs, std::int64_t ldp, std::int64_t count, const KvPlane& values, std::int64_t width,
           std::int64_t positions, float* acc) {
  const auto run = values.type == KvType::kF32    ? weigh_of<Tiles, typename Tiles::Float>
                   : values.type == KvType::kF16  ? weigh_of<Tiles, typename Tiles::Half>
                   : values.type == KvType::kBf16 ? weigh_of<Tiles, typename Tiles::Pair>
                                                  : weigh_of<Tiles, typename Tiles::Byte>;
  run(probs, ldp, count, values, width, positions, acc);
}

}  // namespace
}  // namespace pare
