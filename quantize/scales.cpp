#include "quantize/scales.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "model/clones.h"
#include "quantize/lanes.h"
#include "quantize/minima.h"

namespace pare {
namespace {

static_assert(kLanes == kMinimaRows);

// To the nearest float16, ties to even; not above 65504. What is not positive becomes 0.
PARE_CLONES void to_f16(Lanes& values) {
  float rounded[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    const auto value = static_cast<float>(values.at[r]);
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu;
    float normal;
    std::memcpy(&normal, &bits, sizeof normal);
    const float subnormal = (value + 0.75f) - 0.75f;  // steps of 2^-24
    const float nearest = value < 0x1p-14f ? subnormal : normal;
    rounded[r] = value > 0 ? std::min(nearest, 65504.0f) : 0.0f;
  }
  for (int r = 0; r < kLanes; ++r) values.at[r] = static_cast<double>(rounded[r]);
}

typedef float Float16 __attribute__((vector_size(64)));
static_assert(kLanes == 16);

// One group of sixteen rows: values, the metric A and A w.
template <class S>
struct Sums {
  std::vector<S> w, v;     // [size * kLanes]: weights, A w
  std::vector<S> offsets;  // [size * kLanes]: code - zero of the candidate
};
struct Group {
  std::int64_t size = 0;
  Sums<double> exact;
  const double* block = nullptr; // A[j][k] = block[j * stride + k], or null for a diagonal A
  std::int64_t stride = 0;
  const double* diagonal = nullptr;  // A[j][j]; null: ones
  Lanes energy;                  // w^T A w
  // Candidates of few codes differ by more than the rounding of floats: they are compared in single precision.
  bool single = false;
  Sums<float> near;
  std::vector<float> near_block, near_diagonal;  // [size * size] or [size]
};

// v = A w and energy = w^T A w.
PARE_CLONES void prepare(Group& g) {
  Double8 energy[kVectors] = {};
  for (std::int64_t j = 0; j < g.size; ++j) {
    Double8 sum[kVectors] = {};
    const std::int64_t begin = g.block ? 0 : j, end = g.block ? g.size : j + 1;
    for (std::int64_t k = begin; k < end; ++k) {
      const double factor = g.block ? g.block[j * g.stride + k] : (g.diagonal ? g.diagonal[j] : 1.0);
      for (int i = 0; i < kVectors; ++i) {
        Double8 w;
        std::memcpy(&w, g.exact.w.data() + k * kLanes + i * 8, sizeof w);
        sum[i] += factor * w;
      }
    }
    std::memcpy(g.exact.v.data() + j * kLanes, sum, sizeof sum);
    for (int i = 0; i < kVectors; ++i) {
      Double8 w;
      std::memcpy(&w, g.exact.w.data() + j * kLanes + i * 8, sizeof w);
      energy[i] += w * sum[i];
    }
  }
  std::memcpy(g.energy.at, energy, sizeof energy);
}

template <class V, class S>
__attribute__((always_inline)) inline V load(const S* from) {
  V vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

// Nearest codes under (scale, zero), then b = q^T A w and c = q^T A q with q = code - zero. kLines lines of A at a
// time, so that codes once loaded serve all of them.
template <class S, class V, int kLines>
__attribute__((always_inline)) inline void project_body(Sums<S>& sums, std::int64_t size, const S* block,
                                                        std::int64_t stride, const S* diagonal, const Lanes& scale,
                                                        const Lanes& zero, CodeRange range, Lanes& b_out,
                                                        Lanes& c_out) {
  constexpr int kWidth = sizeof(V) / sizeof(S), kParts = kLanes / kWidth;
  // 1.5 * 2^52, 1.5 * 2^23: adding and taking it away rounds half to even.
  constexpr S kRound = sizeof(S) == 8 ? S(6755399441055744.0) : S(12582912.0);
  V divisor[kParts], low[kParts], high[kParts], b[kParts] = {}, c[kParts] = {};
  for (int i = 0; i < kLanes; ++i) {
    const auto s = static_cast<S>(scale.at[i]);
    divisor[i / kWidth][i % kWidth] = s > 0 ? s : static_cast<S>(INFINITY);  // code - zero = 0
    low[i / kWidth][i % kWidth] = static_cast<S>(range.low - zero.at[i]);
    high[i / kWidth][i % kWidth] = static_cast<S>(range.high - zero.at[i]);
  }
  const S* offsets = sums.offsets.data();
  for (std::int64_t j = 0; j < size; ++j) {
    for (int i = 0; i < kParts; ++i) {
      V q = load<V>(sums.w.data() + j * kLanes + i * kWidth) / divisor[i];
      q = q < low[i] ? low[i] : q;
      q = q > high[i] ? high[i] : q;
      q = (q + kRound) - kRound;
      std::memcpy(sums.offsets.data() + j * kLanes + i * kWidth, &q, sizeof q);
      b[i] += q * load<V>(sums.v.data() + j * kLanes + i * kWidth);
    }
  }
  for (std::int64_t top = 0; top < size; top += kLines) {
    const std::int64_t lines = std::min<std::int64_t>(kLines, size - top);
    V inner[kLines][kParts] = {};
    for (std::int64_t n = 0; n < lines; ++n) {
      const std::int64_t j = top + n;
      const S corner = S(0.5) * (block ? block[j * stride + j] : diagonal ? diagonal[j] : S(1));
      for (int i = 0; i < kParts; ++i) inner[n][i] = corner * load<V>(offsets + j * kLanes + i * kWidth);
      for (std::int64_t k = j + 1; block && k < top + lines; ++k)
        for (int i = 0; i < kParts; ++i)
          inner[n][i] += block[j * stride + k] * load<V>(offsets + k * kLanes + i * kWidth);
    }
    if (block && lines == kLines) {
      const S* line = block + top * stride;
      for (std::int64_t k = top + kLines; k < size; ++k) {
        for (int i = 0; i < kParts; ++i) {
          const V q = load<V>(offsets + k * kLanes + i * kWidth);
#pragma GCC unroll 8
          for (std::int64_t n = 0; n < kLines; ++n) inner[n][i] += line[n * stride + k] * q;
        }
      }
    }
    for (std::int64_t n = 0; n < lines; ++n)
      for (int i = 0; i < kParts; ++i) c[i] += load<V>(offsets + (top + n) * kLanes + i * kWidth) * inner[n][i];
  }
  for (int i = 0; i < kLanes; ++i) {
    b_out.at[i] = static_cast<double>(b[i / kWidth][i % kWidth]);
    c_out.at[i] = 2.0 * static_cast<double>(c[i / kWidth][i % kWidth]);
  }
}
PARE_CLONES void project(Group& g, const Lanes& scale, const Lanes& zero, CodeRange range, Lanes& b, Lanes& c) {
  project_body<double, Double8, 4>(g.exact, g.size, g.block, g.stride, g.diagonal, scale, zero, range, b, c);
}
PARE_CLONES void project_single(Group& g, const Lanes& scale, const Lanes& zero, CodeRange range, Lanes& b, Lanes& c) {
  const auto of = [](const std::vector<float>& list) { return list.empty() ? nullptr : list.data(); };
  project_body<float, Float16, 8>(g.near, g.size, of(g.near_block), g.size, of(g.near_diagonal), scale, zero, range, b,
                                  c);
}

// What project_single works with, after prepare. Where floats could overflow or vanish, candidates stay doubles.
void prepare_single(Group& g) {
  constexpr double kLeastEnergy = 1e-25, kLargestEnergy = 1e30, kLargestSquare = 1e15;  // these bound A w
  g.single = std::all_of(g.energy.at, g.energy.at + kLanes, [](double energy) {
    return energy == 0 || (energy > kLeastEnergy && energy < kLargestEnergy);
  });
  for (std::int64_t j = 0; g.single && j < g.size; ++j)
    g.single = (g.block ? g.block[j * g.stride + j] : g.diagonal ? g.diagonal[j] : 1.0) < kLargestSquare;
  if (!g.single) return;
  g.near.w.assign(g.exact.w.begin(), g.exact.w.end());
  g.near.v.assign(g.exact.v.begin(), g.exact.v.end());
  g.near.offsets.resize(g.near.w.size());
  g.near_block.clear();
  g.near_diagonal.clear();
  for (std::int64_t j = 0; g.block && j < g.size; ++j)
    g.near_block.insert(g.near_block.end(), g.block + j * g.stride, g.block + j * g.stride + g.size);
  if (!g.block && g.diagonal) g.near_diagonal.assign(g.diagonal, g.diagonal + g.size);
}

struct Best {
  Lanes scale, zero, error;
  bool any = false;
};

// Tries one candidate in all lanes; least-squares scale of its codes into `refit` (0 where there is none).
void consider(Group& g, const Lanes& scale, const Lanes& zero, CodeRange range, Best& best, Lanes& refit) {
  Lanes b, c;
  (g.single ? project_single : project)(g, scale, zero, range, b, c);
  for (int r = 0; r < kLanes; ++r) {
    const double s = scale.at[r];
    const double error = g.energy.at[r] - 2.0 * s * b.at[r] + s * s * c.at[r];
    if (!best.any || error < best.error.at[r]) {
      best.scale.at[r] = s;
      best.zero.at[r] = zero.at[r];
      best.error.at[r] = error;
    }
    refit.at[r] = c.at[r] > 0 && b.at[r] > 0 ? std::min(b.at[r] / c.at[r], kF16Max) : 0.0;
  }
  to_f16(refit);
  best.any = true;
}

struct Extremes {
  Lanes low, high;  // min(0, ...) and max(0, ...)
  Extremes negated() const {
    Extremes other;
    for (int r = 0; r < kLanes; ++r) {
      other.low.at[r] = -high.at[r];
      other.high.at[r] = -low.at[r];
    }
    return other;
  }
};

// Scales tried, as shares of the smallest one that clips nothing. The fewer codes, the more clipping pays.
struct SearchGrid {
  double first = 1, step = 0;
  int steps = 0;
};

SearchGrid search_grid(CodecKind kind) {
  switch (kind) {
    case CodecKind::kQ4: return {1.05, 0.025, 20};
    case CodecKind::kQ3: return {1.05, 0.025, 30};
    case CodecKind::kQ2: return {1.05, 0.025, 36};
    default: return {1.0, 0.01, 6};
  }
}

void symmetric_group(Group& g, const Extremes& e, CodecKind kind, ScaleRule rule, Best& best) {
  const CodeRange range = code_range(kind);
  const Lanes zero;
  Lanes scale, refit, absmax, widest;
  for (int r = 0; r < kLanes; ++r) {
    absmax.at[r] = std::max(-e.low.at[r], e.high.at[r]);
    scale.at[r] = absmax.at[r] / range.high;
    // The smallest scale that clips nothing: below 8 bits the negative end reaches one step further.
    widest.at[r] = std::max(e.low.at[r] / range.low, e.high.at[r] / range.high);
  }
  to_f16(scale);
  consider(g, scale, zero, range, best, refit);
  if (rule == ScaleRule::kAbsmax) return;
  const SearchGrid grid = search_grid(kind);
  for (int k = 0; k < grid.steps; ++k) {
    const double shrink = grid.first - grid.step * k;
    for (int r = 0; r < kLanes; ++r) scale.at[r] = std::min(widest.at[r] * shrink, kF16Max);
    to_f16(scale);
    consider(g, scale, zero, range, best, refit);
    consider(g, Lanes(refit), zero, range, best, refit);
  }
  for (int k = 0; k < 2; ++k) {
    consider(g, Lanes(best.scale), zero, range, best, refit);
    consider(g, Lanes(refit), zero, range, best, refit);
  }
}

// Where codes reach one step further down than up, the best of both signs of the scale: a negative scale is a positive one
// for the negated weights. Leaves the weights of the lanes that are better negated negated, and says which they are.
Lanes either_sign(Group& g, const Extremes& e, CodecKind kind, Best& best) {
  Lanes sign;
  Best negative;
  for (double& w : g.exact.w) w = -w;
  for (double& v : g.exact.v) v = -v;
  for (float& w : g.near.w) w = -w;
  for (float& v : g.near.v) v = -v;
  symmetric_group(g, e.negated(), kind, ScaleRule::kSearched, negative);
  for (int r = 0; r < kLanes; ++r) {
    sign.at[r] = negative.error.at[r] < best.error.at[r] && negative.scale.at[r] > 0 ? -1 : 1;
    if (sign.at[r] < 0) {
      best.scale.at[r] = negative.scale.at[r];
      best.error.at[r] = negative.error.at[r];
      continue;
    }
    for (std::int64_t j = 0; j < g.size; ++j) g.exact.w[static_cast<std::size_t>(j * kLanes + r)] *= -1;
  }
  return sign;
}

void asymmetric_group(Group& g, const Extremes& e, ScaleRule rule, Best& best) {
  const CodeRange range = code_range(CodecKind::kQ4a);
  Lanes scale, zero, refit;
  for (int r = 0; r < kLanes; ++r) scale.at[r] = (e.high.at[r] - e.low.at[r]) / 15.0;
  to_f16(scale);
  for (int r = 0; r < kLanes; ++r) {
    zero.at[r] = scale.at[r] > 0 ? std::clamp(std::nearbyint(-e.low.at[r] / scale.at[r]), 0.0, 15.0) : 0.0;
  }
  consider(g, scale, zero, range, best, refit);
  if (rule == ScaleRule::kAbsmax) return;
  for (int k = 0; k < 14; ++k) {
    const double shrink = 1.05 - 0.035 * k;
    for (int shift = -1; shift <= 1; ++shift) {
      for (int r = 0; r < kLanes; ++r)
        scale.at[r] = std::min((e.high.at[r] - e.low.at[r]) / 15.0 * shrink, kF16Max);
      to_f16(scale);
      for (int r = 0; r < kLanes; ++r) {
        // Centre of the range on the centre of the codes, then one step to either side.
        const double centre = scale.at[r] > 0 ? 7.5 - (e.high.at[r] + e.low.at[r]) / 2.0 / scale.at[r] : 0.0;
        zero.at[r] = std::clamp(std::nearbyint(centre) + shift, 0.0, 15.0);
      }
      consider(g, scale, zero, range, best, refit);
      consider(g, Lanes(refit), zero, range, best, refit);
    }
  }
  for (int k = 0; k < 2; ++k) {
    consider(g, Lanes(best.scale), Lanes(best.zero), range, best, refit);
    consider(g, Lanes(refit), Lanes(best.zero), range, best, refit);
  }
}

struct Found {
  Best best;  // scale, zero
  Lanes sign, minimum;
};

// Weights [size * kLanes] of the group are in place. Rows that have none hold zeros.
Found search(Group& g, CodecKind kind, ScaleRule rule) {
  Found found;
  std::fill_n(found.sign.at, kLanes, 1.0);
  if (kind == CodecKind::kQ4m) {
    choose_minima({g.size, g.exact.w.data(), g.block, g.stride, g.diagonal}, rule == ScaleRule::kSearched,
                  found.best.scale.at, found.minimum.at);
    return found;
  }
  Extremes extremes;
  for (std::int64_t j = 0; j < g.size; ++j) {
    for (int r = 0; r < kLanes; ++r) {
      const double w = g.exact.w[static_cast<std::size_t>(j * kLanes + r)];
      extremes.low.at[r] = std::min(extremes.low.at[r], w);
      extremes.high.at[r] = std::max(extremes.high.at[r], w);
    }
  }
  prepare(g);
  if (code_range(kind).high - code_range(kind).low < 16 && rule == ScaleRule::kSearched) prepare_single(g);
  if (kind == CodecKind::kQ4a) {
    asymmetric_group(g, extremes, rule, found.best);
    return found;
  }
  symmetric_group(g, extremes, kind, rule, found.best);
  const CodeRange range = code_range(kind);
  if (rule == ScaleRule::kSearched && range.low != -range.high) found.sign = either_sign(g, extremes, kind, found.best);
  return found;
}

// What lane `lane` found, for group number `at` of the tensor.
void store(const Found& found, std::int64_t lane, std::size_t at, QuantizedTensor& out) {
  out.scales[at] = f32_to_f16(static_cast<float>(found.sign.at[lane] * found.best.scale.at[lane]));
  if (!out.zeros.empty()) out.zeros[at] = static_cast<std::uint8_t>(found.best.zero.at[lane]);
  if (!out.minima.empty()) out.minima[at] = f32_to_f16(static_cast<float>(found.minimum.at[lane]));
}

Group group_of(std::int64_t size) {
  Group g;
  g.size = size;
  g.exact.w.resize(static_cast<std::size_t>(size * kLanes));
  g.exact.v.resize(g.exact.w.size());
  g.exact.offsets.resize(g.exact.w.size());
  return g;
}

// A code of q4m means exactly 0 only by luck; in a group of nothing but zeros all do.
void refuse_zeros(const float* weight, std::int64_t rows, std::int64_t cols, const Codec& codec,
                  const std::string& place) {
  std::int64_t zeros = 0;
  for (std::int64_t begin = 0; begin < rows * cols; begin += codec.group) {
    const std::int64_t own = std::count(weight + begin, weight + begin + codec.group, 0.0f);
    if (own < codec.group) zeros += own;
  }
  if (static_cast<double>(zeros) < kPrunedShare * static_cast<double>(rows * cols)) return;
  throw input_error(place, "weights that are not pruned, for " + codec.name(), std::to_string(zeros) + " exact zeros",
                    "it has no code for exactly 0; q4 and q4a have");
}

}  // namespace

void search_group(const double* values, std::int64_t stride, std::int64_t first, std::int64_t rows, std::int64_t group,
                  const double* metric, QuantizedTensor& tensor) {
  const std::int64_t groups = tensor.codec.groups(tensor.cols);
  Group g = group_of(tensor.cols / groups);
  g.block = metric;
  g.stride = g.size;
  for (std::int64_t begin = 0; begin < rows; begin += kLanes) {
    const std::int64_t count = std::min<std::int64_t>(kLanes, rows - begin);
    std::fill(g.exact.w.begin(), g.exact.w.end(), 0.0);
    for (std::int64_t j = 0; j < g.size; ++j)
      std::copy_n(values + j * stride + begin, count, g.exact.w.begin() + j * kLanes);
    const Found found = search(g, tensor.codec.kind, ScaleRule::kSearched);
    for (std::int64_t r = 0; r < count; ++r)
      store(found, r, static_cast<std::size_t>((first + begin + r) * groups + group), tensor);
  }
}

void require_finite(const float* weight, std::int64_t rows, std::int64_t cols, const std::string& place) {
  for (std::int64_t i = 0; i < rows * cols; ++i) {
    if (!std::isfinite(weight[i])) {
      throw input_error(place, "finite weights",
                        (std::isnan(weight[i]) ? "NaN at row " : "infinity at row ") + std::to_string(i / cols) +
                            ", column " + std::to_string(i % cols),
                        "the model is damaged: quantizing it would spread the damage");
    }
  }
}

QuantizedTensor round_to_nearest(const float* weight, std::int64_t rows, std::int64_t cols, const Codec& codec,
                                 ScaleRule rule, const Importance& importance, const std::string& place, int threads) {
  require_finite(weight, rows, cols, place);
  const CodeRange range = code_range(codec.kind);
  const bool minima = codec.kind == CodecKind::kQ4m;
  // A minimum is a half itself.
  const double span = minima ? 1.0 : codec.kind == CodecKind::kQ4a ? 15.0 : static_cast<double>(range.high);
  for (std::int64_t i = 0; i < rows * cols; ++i) {
    // Asymmetric ranges span at most twice the magnitude.
    const double magnitude = std::fabs(static_cast<double>(weight[i])) * (codec.kind == CodecKind::kQ4a ? 2.0 : 1.0);
    if (magnitude / span > kF16Max) {
      throw input_error(place, "magnitudes whose scale fits float16", "a weight of " + std::to_string(weight[i]),
                        "keep this tensor in float with --policy");
    }
  }
  if (minima) refuse_zeros(weight, rows, cols, codec, place);
  QuantizedTensor out;
  out.codec = codec;
  out.rows = rows;
  out.cols = cols;
  const std::int64_t groups = codec.groups(cols), size = cols / groups;
  out.codes.resize(static_cast<std::size_t>(rows * cols));
  out.scales.resize(static_cast<std::size_t>(rows * groups));
  if (codec.kind == CodecKind::kQ4a) out.zeros.resize(static_cast<std::size_t>(rows * groups));
  if (minima) out.minima.resize(static_cast<std::size_t>(rows * groups));

  const std::int64_t tiles = (rows + kLanes - 1) / kLanes;
#pragma omp parallel num_threads(threads > 0 ? threads : omp_get_num_procs())
  {
    Group g = group_of(size);
    g.stride = importance.blocks_only ? size : cols;
#pragma omp for schedule(dynamic)
    for (std::int64_t t = 0; t < tiles; ++t) {
      const std::int64_t first = t * kLanes, count = std::min<std::int64_t>(kLanes, rows - first);
      for (std::int64_t group = 0; group < groups; ++group) {
        const std::int64_t begin = group * size;
        std::fill(g.exact.w.begin(), g.exact.w.end(), 0.0);
        for (std::int64_t r = 0; r < count; ++r) {
          for (std::int64_t j = 0; j < size; ++j)
            g.exact.w[static_cast<std::size_t>(j * kLanes + r)] =
                static_cast<double>(weight[(first + r) * cols + begin + j]);
        }
        const bool block = importance.hessian && size <= kBlockObjectiveLimit;
        g.block = block ? importance.hessian + begin * g.stride + (importance.blocks_only ? 0 : begin) : nullptr;
        g.diagonal = importance.mean_square ? importance.mean_square + begin : nullptr;
        const Found found = search(g, codec.kind, rule);
        Lanes b, c;
        if (!minima) project(g, found.best.scale, found.best.zero, range, b, c);
        for (std::int64_t r = 0; r < count; ++r) {
          store(found, r, static_cast<std::size_t>((first + r) * groups + group), out);
          for (std::int64_t j = 0; j < size; ++j) {
            const auto lane = static_cast<std::size_t>(j * kLanes + r);
            out.codes[static_cast<std::size_t>((first + r) * cols + begin + j)] = static_cast<std::int8_t>(
                minima ? nearest_code(g.exact.w[lane], found.best.scale.at[r], found.minimum.at[r])
                       : static_cast<int>(g.exact.offsets[lane]) + static_cast<int>(found.best.zero.at[r]));
          }
        }
      }
    }
  }
  return out;
}

}  // namespace pare
