// AMX: attention's sums of values that are bfloat16, by tiles of 16 rows x 16 dimensions x 32 positions. A weight is the
// sum of two bfloat16, but for 2^-17 of it; sums are floats. What a row gets depends on nothing but that row.
#if defined(__AMX_BF16__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own headers start from undefined registers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <algorithm>
#include <type_traits>

#include "runtime/amx_tiles.h"
#include "runtime/attention_kernels.h"
#include "runtime/lanes_avx512vnni.h"

namespace pare {
namespace {

constexpr std::int64_t kStep = 32;  // positions of one instruction

// Weights of 16 rows and 32 positions: to the nearest bfloat16, and what that leaves.
struct alignas(64) Parts {
  std::uint8_t large[kTileRows * kLine], small[kTileRows * kLine];
};
using Left = Parts[kMaxQueries / kTileRows][kPage / kStep];

inline void put_left(__m512 a, __m512 b, std::int64_t row, Parts& to) {
  const auto large = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
  const auto rest = [](__m512 x, __m256i nearest) {
    return _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(nearest), 16)));
  };
  const __m512 rest_a = rest(a, _mm512_castsi512_si256(large)), rest_b = rest(b, _mm512_extracti64x4_epi64(large, 1));
  _mm512_store_si512(to.large + row * kLine, large);
  _mm512_store_si512(to.small + row * kLine, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(rest_b, rest_a)));
}

// Values as they lie in the cache, of which the first `positions` count.
struct Values {
  const KvPlane& plane;
  std::int64_t width, positions;

  const std::byte* at(std::int64_t position, std::int64_t dim) const {
    return plane.data + (position / 2 * width + dim) * 4;
  }
  // 32 positions from `first` on where there are fewer: zeros behind them.
  void put(std::int64_t first, std::int64_t dim, std::uint8_t* to) const {
    for (std::int64_t i = 0; i < kTileRows; ++i) {
      const std::int64_t left = positions - first - 2 * i;
      __m512i pairs = left > 0 ? _mm512_loadu_si512(at(first + 2 * i, dim)) : _mm512_setzero_si512();
      if (left == 1) pairs = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff));
      _mm512_store_si512(to + i * kLine, pairs);
    }
  }
  template <int kColumns>
  void ask_ahead(std::int64_t first, std::int64_t dim) const {
    if (plane.ahead == nullptr) return;
    const std::byte* from = plane.ahead + (at(first, dim) - plane.data);
    for (std::int64_t i = 0; i < kTileRows; ++i)
      for (int c = 0; c < kColumns; ++c) _mm_prefetch(from + i * width * 4 + c * kLine, _MM_HINT_T0);
  }
};

template <int kSum>
inline void add_products() {
  if constexpr (kSum == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (kSum == 1) _tile_dpbf16ps(1, 4, 6);
  if constexpr (kSum == 2) _tile_dpbf16ps(2, 4, 6);
  if constexpr (kSum == 3) _tile_dpbf16ps(3, 4, 6);
  if constexpr (kSum == 0) _tile_dpbf16ps(0, 5, 6);
  if constexpr (kSum == 1) _tile_dpbf16ps(1, 5, 6);
  if constexpr (kSum == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kSum == 3) _tile_dpbf16ps(3, 5, 6);
}
template <int kSum>
inline void load_sum(const float* from, std::int64_t bytes) {
  if constexpr (kSum == 0) _tile_loadd(0, from, bytes);
  if constexpr (kSum == 1) _tile_loadd(1, from, bytes);
  if constexpr (kSum == 2) _tile_loadd(2, from, bytes);
  if constexpr (kSum == 3) _tile_loadd(3, from, bytes);
}
template <int kSum>
inline void store_sum(float* to, std::int64_t bytes) {
  if constexpr (kSum == 0) _tile_stored(0, to, bytes);
  if constexpr (kSum == 1) _tile_stored(1, to, bytes);
  if constexpr (kSum == 2) _tile_stored(2, to, bytes);
  if constexpr (kSum == 3) _tile_stored(3, to, bytes);
}

template <int kCount, class Work>
inline __attribute__((always_inline)) void each(const Work& work) {
  if constexpr (kCount > 0) work(std::integral_constant<int, 0>());
  if constexpr (kCount > 1) work(std::integral_constant<int, 1>());
  if constexpr (kCount > 2) work(std::integral_constant<int, 2>());
  if constexpr (kCount > 3) work(std::integral_constant<int, 3>());
}

// acc[tile * 16 + row][dim] += weights * values, kTiles tiles of rows by kColumns tiles of dimensions from `dim` on, so
// that there are others to multiply while one sum waits for its last product.
template <int kTiles, int kColumns>
void multiply(const Left& left, const Values& values, std::int64_t dim, float* acc) {
  alignas(64) std::uint8_t last[kColumns][kTileRows * kLine];
  const std::int64_t width = values.width;
  const auto at = [&](int sum) { return acc + sum / kColumns * kTileRows * width + dim + sum % kColumns * kTileRows; };
  PARE_IN_MEMORY;
  each<kTiles * kColumns>([&](auto sum) { load_sum<sum>(at(sum), width * 4); });
  for (std::int64_t k = 0; k * kStep < values.positions; ++k) {
    const std::int64_t first = k * kStep;
    const bool whole = first + kStep <= values.positions;
    for (int c = 0; !whole && c < kColumns; ++c) values.put(first, dim + c * kTileRows, last[c]);
    PARE_IN_MEMORY;
    each<kColumns>([&](auto c) __attribute__((always_inline)) {
      if (whole) _tile_loadd(6, values.at(first, dim + c * kTileRows), width * 4);
      else _tile_loadd(6, last[c], kLine);
      each<kTiles>([&](auto t) __attribute__((always_inline)) {
        if (kTiles > 1 || c == 0) {
          _tile_loadd(4, left[t][k].large, kLine);
          _tile_loadd(5, left[t][k].small, kLine);
        }
        add_products<t * kColumns + c>();
      });
      if (c == 0) values.ask_ahead<kColumns>(first, dim);
    });
  }
  each<kTiles * kColumns>([&](auto sum) { store_sum<sum>(at(sum), width * 4); });
  PARE_IN_MEMORY;
}

void weigh(const float* probs, std::int64_t ldp, std::int64_t count, const KvPlane& plane, std::int64_t width,
           std::int64_t positions, float* acc) {
  if (plane.type != KvType::kBf16) return kAvx512VnniAttention.weigh(probs, ldp, count, plane, width, positions, acc);
  alignas(64) Left left;
  Tiles shapes;
  const Values values{plane, width, positions};
  const auto run = [&](std::int64_t begin, std::int64_t rows) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const auto load = [&](std::int64_t p) {
        return _mm512_maskz_loadu_ps(tail_mask(std::max<std::int64_t>(0, positions - p)), probs + (begin + i) * ldp + p);
      };
      for (std::int64_t p = 0; p < positions; p += kStep)
        put_left(load(p), load(p + 16), i % kTileRows, left[i / kTileRows][p / kStep]);
    }
    float* to = acc + begin * width;
    const auto all = [&](auto multiply, std::int64_t columns, std::int64_t dim) {
      for (; dim + columns * kTileRows <= width; dim += columns * kTileRows) multiply(left, values, dim, to);
      return dim;
    };
    const std::int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    if (tiles == 4) all(multiply<4, 1>, 1, 0);
    if (tiles == 3) all(multiply<3, 1>, 1, 0);
    if (tiles == 2) all(multiply<2, 1>, 1, all(multiply<2, 2>, 2, 0));
    if (tiles == 1) all(multiply<1, 1>, 1, all(multiply<1, 4>, 4, 0));
  };
  const std::int64_t rest = count % kTileRows;
  if (count > rest) {
    shapes.shape(kTileRows, kTileRows, kLine);
    run(0, count - rest);
  }
  if (rest > 0) {
    shapes.shape(rest, rest, kLine);
    run(count - rest, rest);
  }
}

}  // namespace

// A function, not a table that another source's table would have to be there before.
const AttentionKernels& amx_attention() {
  static const AttentionKernels kernels = [] {
    AttentionKernels all = kAvx512VnniAttention;
    all.weigh = weigh;
    return all;
  }();
  return kernels;
}

}  // namespace pare
#endif
