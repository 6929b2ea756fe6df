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

double to_f16(double value) {
  return value > 0 ? static_cast<double>(f16_to_f32(f32_to_f16(static_cast<float>(value)))) : 0.0;
}

// One group of sixteen rows: values, the metric A and A w.
struct Group {
  std::int64_t size = 0;
  std::vector<double> w, v;      // [size * kLanes]: weights, A w
  std::vector<double> offsets;   // [size * kLanes]: code - zero of the candidate
  const double* block = nullptr; // A[j][k] = block[j * stride + k], or null for a diagonal A
  std::int64_t stride = 0;
  const double* diagonal = nullptr;  // A[j][j]; null: ones
  Lanes energy;                  // w^T A w
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
        std::memcpy(&w, g.w.data() + k * kLanes + i * 8, sizeof w);
        sum[i] += factor * w;
      }
    }
    std::memcpy(g.v.data() + j * kLanes, sum, sizeof sum);
    for (int i = 0; i < kVectors; ++i) {
      Double8 w;
      std::memcpy(&w, g.w.data() + j * kLanes + i * 8, sizeof w);
      energy[i] += w * sum[i];
    }
  }
  std::memcpy(g.energy.at, energy, sizeof energy);
}

__attribute__((always_inline)) inline Double8 offsets_of(const Group& g, std::int64_t j, int vector) {
  Double8 q;
  std::memcpy(&q, g.offsets.data() + j * kLanes + vector * 8, sizeof q);
  return q;
}

// Nearest codes under (scale, zero), then b = q^T A w and c = q^T A q with q = code - zero.
PARE_CLONES void project(Group& g, const Lanes& scale, const Lanes& zero, CodeRange range, Lanes& b_out, Lanes& c_out) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding and taking it away rounds half to even
  Double8 divisor[kVectors], low[kVectors], high[kVectors], b[kVectors] = {}, c[kVectors] = {};
  for (int i = 0; i < kVectors; ++i) {
    Double8 s, z;
    std::memcpy(&s, scale.at + i * 8, sizeof s);
    std::memcpy(&z, zero.at + i * 8, sizeof z);
    const Double8 nothing = {};
    divisor[i] = s > 0.0 ? s : nothing + INFINITY;  // dividing by infinity: code - zero = 0
    low[i] = static_cast<double>(range.low) - z;
    high[i] = static_cast<double>(range.high) - z;
  }
  for (std::int64_t j = 0; j < g.size; ++j) {
    for (int i = 0; i < kVectors; ++i) {
      Double8 w, v;
      std::memcpy(&w, g.w.data() + j * kLanes + i * 8, sizeof w);
      std::memcpy(&v, g.v.data() + j * kLanes + i * 8, sizeof v);
      Double8 q = w / divisor[i];
      q = q < low[i] ? low[i] : q;
      q = q > high[i] ? high[i] : q;
      q = (q + kRound) - kRound;
      std::memcpy(g.offsets.data() + j * kLanes + i * 8, &q, sizeof q);
      b[i] += q * v;
    }
  }
  // Some lines of A at a time, so that codes once loaded serve all of them.
  constexpr std::int64_t kLines = 4;
  for (std::int64_t top = 0; top < g.size; top += kLines) {
    const std::int64_t lines = std::min(kLines, g.size - top);
    Double8 inner[kLines][kVectors];
    for (std::int64_t n = 0; n < lines; ++n) {
      const std::int64_t j = top + n;
      const double corner = g.block ? 0.5 * g.block[j * g.stride + j] : 0.5 * (g.diagonal ? g.diagonal[j] : 1.0);
      for (int i = 0; i < kVectors; ++i) inner[n][i] = corner * offsets_of(g, j, i);
      for (std::int64_t k = j + 1; g.block && k < top + lines; ++k)
        for (int i = 0; i < kVectors; ++i) inner[n][i] += g.block[j * g.stride + k] * offsets_of(g, k, i);
    }
    if (g.block && lines == kLines) {
      const double* line = g.block + top * g.stride;
      for (std::int64_t k = top + kLines; k < g.size; ++k) {
        for (int i = 0; i < kVectors; ++i) {
          const Double8 q = offsets_of(g, k, i);
#pragma GCC unroll 4
          for (std::int64_t n = 0; n < kLines; ++n) inner[n][i] += line[n * g.stride + k] * q;
        }
      }
    }
    for (std::int64_t n = 0; n < lines; ++n)
      for (int i = 0; i < kVectors; ++i) c[i] += offsets_of(g, top + n, i) * inner[n][i];
  }
  for (int i = 0; i < kVectors; ++i) c[i] *= 2.0;
  std::memcpy(b_out.at, b, sizeof b);
  std::memcpy(c_out.at, c, sizeof c);
}

struct Best {
  Lanes scale, zero, error;
  bool any = false;
};

// Tries one candidate in all lanes; least-squares scale of its codes into `refit` (0 where there is none).
void consider(Group& g, const Lanes& scale, const Lanes& zero, CodeRange range, Best& best, Lanes& refit) {
  Lanes b, c;
  project(g, scale, zero, range, b, c);
  for (int r = 0; r < kLanes; ++r) {
    const double s = scale.at[r];
    const double error = g.energy.at[r] - 2.0 * s * b.at[r] + s * s * c.at[r];
    if (!best.any || error < best.error.at[r]) {
      best.scale.at[r] = s;
      best.zero.at[r] = zero.at[r];
      best.error.at[r] = error;
    }
    refit.at[r] = c.at[r] > 0 && b.at[r] > 0 ? to_f16(std::min(b.at[r] / c.at[r], kF16Max)) : 0.0;
  }
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
    scale.at[r] = to_f16(absmax.at[r] / range.high);
    // The smallest scale that clips nothing: below 8 bits the negative end reaches one step further.
    widest.at[r] = std::max(e.low.at[r] / range.low, e.high.at[r] / range.high);
  }
  consider(g, scale, zero, range, best, refit);
  if (rule == ScaleRule::kAbsmax) return;
  const SearchGrid grid = search_grid(kind);
  for (int k = 0; k < grid.steps; ++k) {
    const double shrink = grid.first - grid.step * k;
    for (int r = 0; r < kLanes; ++r) scale.at[r] = to_f16(std::min(widest.at[r] * shrink, kF16Max));
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
  for (double& w : g.w) w = -w;
  for (double& v : g.v) v = -v;
  symmetric_group(g, e.negated(), kind, ScaleRule::kSearched, negative);
  for (int r = 0; r < kLanes; ++r) {
    sign.at[r] = negative.error.at[r] < best.error.at[r] && negative.scale.at[r] > 0 ? -1 : 1;
    if (sign.at[r] < 0) {
      best.scale.at[r] = negative.scale.at[r];
      best.error.at[r] = negative.error.at[r];
      continue;
    }
    for (std::int64_t j = 0; j < g.size; ++j) g.w[static_cast<std::size_t>(j * kLanes + r)] *= -1;
  }
  return sign;
}

void asymmetric_group(Group& g, const Extremes& e, ScaleRule rule, Best& best) {
  const CodeRange range = code_range(CodecKind::kQ4a);
  Lanes scale, zero, refit;
  for (int r = 0; r < kLanes; ++r) {
    scale.at[r] = to_f16((e.high.at[r] - e.low.at[r]) / 15.0);
    zero.at[r] = scale.at[r] > 0 ? std::clamp(std::nearbyint(-e.low.at[r] / scale.at[r]), 0.0, 15.0) : 0.0;
  }
  consider(g, scale, zero, range, best, refit);
  if (rule == ScaleRule::kAbsmax) return;
  for (int k = 0; k < 14; ++k) {
    const double shrink = 1.05 - 0.035 * k;
    for (int shift = -1; shift <= 1; ++shift) {
      for (int r = 0; r < kLanes; ++r) {
        const double s = (e.high.at[r] - e.low.at[r]) / 15.0 * shrink;
        scale.at[r] = to_f16(std::min(s, kF16Max));
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
    choose_minima({g.size, g.w.data(), g.block, g.stride, g.diagonal}, rule == ScaleRule::kSearched,
                  found.best.scale.at, found.minimum.at);
    return found;
  }
  Extremes extremes;
  for (std::int64_t j = 0; j < g.size; ++j) {
    for (int r = 0; r < kLanes; ++r) {
      const double w = g.w[static_cast<std::size_t>(j * kLanes + r)];
      extremes.low.at[r] = std::min(extremes.low.at[r], w);
      extremes.high.at[r] = std::max(extremes.high.at[r], w);
    }
  }
  prepare(g);
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
  g.w.resize(static_cast<std::size_t>(size * kLanes));
  g.v.resize(g.w.size());
  g.offsets.resize(g.w.size());
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
    std::fill(g.w.begin(), g.w.end(), 0.0);
    for (std::int64_t j = 0; j < g.size; ++j)
      std::copy_n(values + j * stride + begin, count, g.w.begin() + j * kLanes);
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
        std::fill(g.w.begin(), g.w.end(), 0.0);
        for (std::int64_t r = 0; r < count; ++r) {
          for (std::int64_t j = 0; j < size; ++j)
            g.w[static_cast<std::size_t>(j * kLanes + r)] =
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
                minima ? nearest_code(g.w[lane], found.best.scale.at[r], found.minimum.at[r])
                       : static_cast<int>(g.offsets[lane]) + static_cast<int>(found.best.zero.at[r]));
          }
        }
      }
    }
  }
  return out;
}

}  // namespace pare
