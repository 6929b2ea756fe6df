// AMX: attention's sums of values that are bfloat16, by tiles of 16 rows x 16 dimensions x 32 positions, and with the same
// bits by vectors for few rows. Weights are bfloat16, sums floats. What a row gets depends on nothing but that row.
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
#include "runtime/stream_x86.h"

namespace pare {
namespace {

constexpr std::int64_t kStep = 32;    // positions of one instruction
constexpr std::int64_t kFewRows = 8;  // at most, for which vectors are faster
constexpr std::int64_t kDimBytes = kPage / 2 * 4;  // of a dimension: pairs of positions

// Weights of 16 rows and 32 positions.
using Left = std::uint8_t[kMaxQueries / kTileRows][kPage / kStep][kTileRows * kLine];

// Arithmetic as the tiles have it, whatever the caller has set: to the nearest, without exceptions, and numbers too small
// to be normal are zeros before and after.
class TileArithmetic {
 public:
  TileArithmetic() : before_(_mm_getcsr()) {
    _mm_setcsr(_MM_MASK_MASK | _MM_ROUND_NEAREST | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
  }
  TileArithmetic(const TileArithmetic&) = delete;
  TileArithmetic& operator=(const TileArithmetic&) = delete;
  ~TileArithmetic() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

inline __m512 load_probs(const float* row, std::int64_t first, std::int64_t positions) {
  return _mm512_maskz_loadu_ps(tail_mask(std::max<std::int64_t>(0, positions - first)), row + first);
}

// Values as they lie in the cache, of which the first `positions` count.
struct Values {
  KvPlane plane;
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
};

template <int kSum>
inline void add_products() {
  if constexpr (kSum == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (kSum == 1) _tile_dpbf16ps(1, 4, 6);
  if constexpr (kSum == 2) _tile_dpbf16ps(2, 4, 6);
  if constexpr (kSum == 3) _tile_dpbf16ps(3, 4, 6);
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
      for (std::int64_t pair = 0; values.plane.ahead != nullptr && pair < kTileRows; ++pair)
        ask_next<kLine>(values.plane, (dim + c * kTileRows) * kDimBytes + (first / 2 + pair) * kLine);
      if (whole) _tile_loadd(6, values.at(first, dim + c * kTileRows), width * 4);
      else _tile_loadd(6, last[c], kLine);
      each<kTiles>([&](auto t) __attribute__((always_inline)) {
        if (kTiles > 1 || c == 0) _tile_loadd(4, left[t][k], kLine);
        add_products<t * kColumns + c>();
      });
    });
  }
  each<kTiles * kColumns>([&](auto sum) { store_sum<sum>(at(sum), width * 4); });
  PARE_IN_MEMORY;
}

// What the instruction does, for rows too few to be worth a tile: over 32 positions the products of even ones and those of
// odd ones are added from zero, each multiplied and added in one rounding, then both sums to each other and that to what
// there was (Intel's manual, volume 2, TDPBF16PS). Not inlined: compilers know nothing of MXCSR and might move arithmetic
// across its change.
template <int kRows, int kColumns>
__attribute__((noinline)) void multiply_few(const float* probs, std::int64_t ldp, const Values& values, std::int64_t dim,
                                            float* acc) {
  const std::int64_t width = values.width;
  alignas(64) std::uint8_t last_values[kColumns][kTileRows * kLine];
  alignas(64) float last_probs[kRows][kStep];
  for (std::int64_t first = 0; first < values.positions; first += kStep) {
    const float* weights = probs + first;
    const std::byte* from = values.at(first, dim);
    std::int64_t ldw = ldp, row = width * 4, column = kLine;
    if (first + kStep > values.positions) {
      for (std::int64_t i = 0; i < kRows; ++i) {
        _mm512_store_ps(last_probs[i], load_probs(probs + i * ldp, first, values.positions));
        _mm512_store_ps(last_probs[i] + 16, load_probs(probs + i * ldp, first + 16, values.positions));
      }
      for (int c = 0; c < kColumns; ++c) values.put(first, dim + c * kTileRows, last_values[c]);
      weights = last_probs[0];
      from = reinterpret_cast<const std::byte*>(last_values);
      ldw = kStep;
      row = kLine;
      column = sizeof(last_values[0]);
    }
    __m512 even[kRows][kColumns], odd[kRows][kColumns];
    PARE_UNROLL for (int i = 0; i < kRows; ++i) {
      PARE_UNROLL for (int c = 0; c < kColumns; ++c) even[i][c] = odd[i][c] = _mm512_setzero_ps();
    }
    for (std::int64_t pair = 0; pair < kTileRows; ++pair) {
      ask_next<kColumns * kLine>(values.plane, dim * kDimBytes + (first / 2 + pair) * (kColumns * kLine));
      __m512 at_even[kColumns], at_odd[kColumns];
      PARE_UNROLL for (int c = 0; c < kColumns; ++c) {
        const __m512i both = _mm512_loadu_si512(from + pair * row + c * column);
        at_even[c] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        at_odd[c] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
      }
      PARE_UNROLL for (int i = 0; i < kRows; ++i) {
        const float* weight = weights + i * ldw + 2 * pair;
        PARE_UNROLL for (int c = 0; c < kColumns; ++c) {
          even[i][c] = _mm512_fmadd_ps(_mm512_set1_ps(weight[0]), at_even[c], even[i][c]);
          odd[i][c] = _mm512_fmadd_ps(_mm512_set1_ps(weight[1]), at_odd[c], odd[i][c]);
        }
      }
    }
    PARE_UNROLL for (int i = 0; i < kRows; ++i) {
      PARE_UNROLL for (int c = 0; c < kColumns; ++c) {
        float* to = acc + i * width + dim + c * kTileRows;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_add_ps(even[i][c], odd[i][c])));
      }
    }
  }
}

template <int kRows>
void weigh_rows(const float* probs, std::int64_t ldp, const Values& values, float* acc) {
  constexpr int kColumns = kRows > 2 ? 2 : 4;
  std::int64_t dim = 0;
  for (; dim + kColumns * kTileRows <= values.width; dim += kColumns * kTileRows)
    multiply_few<kRows, kColumns>(probs, ldp, values, dim, acc);
  for (; dim < values.width; dim += kTileRows) multiply_few<kRows, 1>(probs, ldp, values, dim, acc);
}

void weigh_few(const float* probs, std::int64_t ldp, std::int64_t count, Values values, float* acc) {
  const TileArithmetic arithmetic;
  for (; count >= 4; count -= 4, probs += 4 * ldp, acc += 4 * values.width) {
    weigh_rows<4>(probs, ldp, values, acc);
    values.plane.ahead = nullptr;  // it is asked for once
  }
  if (count == 3) weigh_rows<3>(probs, ldp, values, acc);
  if (count == 2) weigh_rows<2>(probs, ldp, values, acc);
  if (count == 1) weigh_rows<1>(probs, ldp, values, acc);
}

void weigh(const float* probs, std::int64_t ldp, std::int64_t count, const KvPlane& plane, std::int64_t width,
           std::int64_t positions, float* acc) {
  if (plane.type != KvType::kBf16) return kAvx512VnniAttention.weigh(probs, ldp, count, plane, width, positions, acc);
  const Values values{plane, width, positions};
  if (count <= kFewRows) return weigh_few(probs, ldp, count, values, acc);
  alignas(64) Left left;
  Tiles shapes;
  const auto run = [&](std::int64_t begin, std::int64_t rows) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const auto load = [&](std::int64_t at) { return load_probs(probs + (begin + i) * ldp, at, positions); };
      for (std::int64_t p = 0; p < positions; p += kStep)
        _mm512_store_si512(left[i / kTileRows][p / kStep] + i % kTileRows * kLine,
                           reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(load(p + 16), load(p))));
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
