#include "runtime/k_quants.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "core/error.h"

namespace pare {
namespace {

typedef float Float4 __attribute__((vector_size(16)));

constexpr int kBlock = 256;
constexpr float kHalfMax = 65504.0f;

std::uint16_t half_bits(float value) {
  return f32_to_f16(std::clamp(value, -kHalfMax, kHalfMax));
}
float round_half(float value) {
  return f16_to_f32(half_bits(value));
}

// Not below `value`: a half so small that it has few digits would cut off the largest numbers.
float round_half_up(float value) {
  std::uint16_t bits = half_bits(value);
  if (std::fabs(f16_to_f32(bits)) < std::min(std::fabs(value), kHalfMax)) ++bits;
  return f16_to_f32(bits);
}

// To the nearest integer between two, ties to even. x: no NaN.
inline Float4 nearest(Float4 x, float low, float high) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: floats beside it are whole numbers
  const Float4 lows = {low, low, low, low}, highs = {high, high, high, high};
  x = x < lows ? lows : x;
  x = x > highs ? highs : x;
  return (x + kMagic) - kMagic;
}

inline float sum(Float4 v) {
  return (v[0] + v[1]) + (v[2] + v[3]);
}

// Sums over a sub-block with weights w: what the squared error and least squares are made of.
struct Sums {
  float error = 0, q = 0, qq = 0, xq = 0;
};

template <int kSize>
struct Group {
  static constexpr int kVectors = kSize / 4;
  Float4 x[kVectors], w[kVectors];
  float weight = 0, first = 0;  // sums of w and w * x
  float least = 0, most = 0;    // of x

  void read(const float* values, const float* weights) {
    std::memcpy(x, values, sizeof x);
    std::memcpy(w, weights, sizeof w);
    Float4 sum_w = {}, sum_wx = {};
    for (int v = 0; v < kVectors; ++v) sum_w += w[v], sum_wx += w[v] * x[v];
    weight = sum(sum_w), first = sum(sum_wx);
    const auto [lowest, highest] = std::minmax_element(values, values + kSize);
    least = *lowest, most = *highest;
  }
};

// Nearest codes for value = scale * code - base, and their sums.
template <int kSize>
inline Sums evaluate(const Group<kSize>& g, float scale, float base, float low, float high) {
  const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
  if (!std::isfinite(inverse)) return {std::numeric_limits<float>::infinity(), 0, 0, 0};
  Float4 error = {}, q1 = {}, q2 = {}, xq = {};
  for (int v = 0; v < Group<kSize>::kVectors; ++v) {
    const Float4 q = nearest((g.x[v] + base) * inverse, low, high);
    const Float4 off = g.x[v] - (q * scale - base), wq = g.w[v] * q;
    error += g.w[v] * off * off;
    q1 += wq;
    q2 += wq * q;
    xq += wq * g.x[v];
  }
  return {sum(error), sum(q1), sum(q2), sum(xq)};
}

// The codes of evaluate().
template <int kSize>
void codes_of(const Group<kSize>& g, float scale, float base, float low, float high, std::int8_t* out) {
  const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
  for (int v = 0; v < Group<kSize>::kVectors; ++v) {
    const Float4 q = nearest((g.x[v] + base) * inverse, low, high);
    for (int i = 0; i < 4; ++i) *out++ = static_cast<std::int8_t>(q[i]);
  }
}

// Least squares of x = scale * code - base for given codes. kBase: 0 none, 1 of at least 0, 2 any.
template <int kBase, int kSize>
void fit(const Group<kSize>& g, const Sums& s, float& scale, float& base) {
  base = 0;
  if (kBase > 0) {
    const float determinant = s.qq * g.weight - s.q * s.q;
    if (determinant > 1e-6f * s.qq * g.weight) {
      scale = (s.xq * g.weight - s.q * g.first) / determinant;
      base = (s.xq * s.q - s.qq * g.first) / determinant;
      if (scale >= 0 && (kBase == 2 || base >= 0)) return;
      base = 0;
    }
  }
  scale = s.qq > 0 ? s.xq / s.qq : 0.0f;
}

// Where the searches of a scale and a base begin: the range of a sub-block, cut from below, from above and from both.
constexpr float kCuts[] = {1.0f, 0.97f, 0.94f, 0.91f, 0.88f, 0.84f, 0.8f, 0.75f, 0.7f};
constexpr float kShifts[] = {0.0f, 0.5f, 1.0f};

// What was chosen for a sub-block.
struct Choice {
  int scale = 0, minimum = 0;
  Sums sums;
};

template <int kSize, int kCodeLow, int kCodeHigh, int kScaleLow, int kScaleHigh, int kMinimumHigh>
class Search {
 public:
  static constexpr int kGroups = kBlock / kSize;
  static constexpr bool kMinima = kMinimumHigh > 0;
  static constexpr float kLow = kCodeLow, kHigh = kCodeHigh;

  Search(const float* x, const float* w) {
    for (int g = 0; g < kGroups; ++g) groups_[g].read(x + g * kSize, w + g * kSize);
  }

  KBlock run() {
    float top_scale = 0, top_base = 0;
    for (int g = 0; g < kGroups; ++g) {
      kMinima ? free_minimum(g) : free_scale(g);
      if (std::fabs(scales_[g]) > std::fabs(top_scale)) top_scale = scales_[g];
      top_base = std::max(top_base, bases_[g]);
    }
    error_ = std::numeric_limits<float>::infinity();
    for (int step = 0; step < kStarts; ++step) {
      if (kMinima) {
        attempt(round_half_up(top_scale / static_cast<float>(kScaleHigh - step)),
                round_half_up(top_base / static_cast<float>(kMinimumHigh)));
      } else {
        attempt(round_half_up(top_scale / static_cast<float>(kScaleLow + step)), 0);
        if (step > 0) attempt(round_half_up(top_scale / static_cast<float>(kScaleHigh + 1 - step)), 0);
      }
    }
    refine();
    if (polish()) refine();
    KBlock block;
    block.d = half_bits(d_), block.m = half_bits(m_);
    for (int g = 0; g < kGroups; ++g) {
      const auto at = static_cast<std::size_t>(g);
      block.scales[at] = static_cast<std::int8_t>(choice_[g].scale);
      block.minima[at] = static_cast<std::int8_t>(choice_[g].minimum);
      codes_of(groups_[g], d_ * static_cast<float>(choice_[g].scale), m_ * static_cast<float>(choice_[g].minimum), kLow,
               kHigh, block.codes.data() + g * kSize);
    }
    return block;
  }

 private:
  // Without the grid of the block: the best of some starts, each moved to the least squares of its codes.
  void from(int g, float scale, float base, float& best) {
    const Group<kSize>& group = groups_[g];
    for (int turn = 0; turn < kTurns; ++turn) {
      const Sums sums = evaluate(group, scale, base, kLow, kHigh);
      if (sums.error < best) best = sums.error, scales_[g] = scale, bases_[g] = base;
      if (turn + 1 < kTurns) fit<kMinima ? 1 : 0>(group, sums, scale, base);
    }
  }
  void free_minimum(int g) {
    const Group<kSize>& group = groups_[g];
    float best = std::numeric_limits<float>::infinity();
    const float low = std::min(0.0f, group.least), high = std::max(group.most, low);
    scales_[g] = bases_[g] = 0;
    for (const float cut : kCuts)
      for (const float shift : kShifts) {
        const float range = (high - low) * cut;
        const float bottom = std::min(0.0f, low + (high - low) * (1 - cut) * shift);
        from(g, range / kHigh, -bottom, best);
      }
  }
  void free_scale(int g) {
    const Group<kSize>& group = groups_[g];
    float best = std::numeric_limits<float>::infinity();
    const float top = group.most > -group.least ? group.most : group.least;
    scales_[g] = bases_[g] = 0;
    for (const float step : kSteps) {
      from(g, top / (kLow + step), 0, best);
      from(g, top / (kHigh + step), 0, best);
    }
  }

  // The best small integers of sub-block g near a scale and a base, for these halves.
  Choice integers(int g, float half, float half_minimum, float scale, float base, int reach) const {
    const Group<kSize>& group = groups_[g];
    const int middle = half != 0 ? whole(scale / half, kScaleLow, kScaleHigh) : 0;
    Choice best;
    best.sums.error = std::numeric_limits<float>::infinity();
    for (int s = std::max(kScaleLow, middle - reach); s <= std::min(kScaleHigh, middle + reach); ++s) {
      const float at = half * static_cast<float>(s);
      int minimum = kMinima && half_minimum != 0 ? whole(base / half_minimum, 0, kMinimumHigh) : 0;
      for (int turn = 0; turn < (kMinima ? kMinimumTurns : 1); ++turn) {
        const Sums sums = evaluate(group, at, half_minimum * static_cast<float>(minimum), kLow, kHigh);
        if (sums.error < best.sums.error) best = {s, minimum, sums};
        if (!kMinima || half_minimum == 0 || group.weight <= 0) break;
        const int next = whole((at * sums.q - group.first) / (group.weight * half_minimum), 0, kMinimumHigh);
        if (next == minimum) break;
        minimum = next;
      }
    }
    return best;
  }
  static int whole(float value, int low, int high) {
    return static_cast<int>(std::lround(std::clamp(value, static_cast<float>(low), static_cast<float>(high))));
  }

  void attempt(float half, float half_minimum) {
    Choice tried[kGroups];
    float error = 0;
    for (int g = 0; g < kGroups && error < error_; ++g) {
      tried[g] = integers(g, half, half_minimum, scales_[g], bases_[g], kReach);
      error += tried[g].sums.error;
    }
    if (!(error < error_)) return;
    error_ = error, d_ = half, m_ = half_minimum;
    std::copy(tried, tried + kGroups, choice_);
  }

  // Least squares of the halves for the integers and codes, then integers near those, while it helps.
  void refine() {
    for (int turn = 0; turn < kRefinements; ++turn) {
      double uu = 0, uv = 0, vv = 0, ux = 0, vx = 0;
      for (int g = 0; g < kGroups; ++g) {
        const double s = choice_[g].scale, k = choice_[g].minimum;
        const Sums& sums = choice_[g].sums;
        uu += s * s * static_cast<double>(sums.qq);
        ux += s * static_cast<double>(sums.xq);
        uv += s * k * static_cast<double>(sums.q);
        vv += k * k * static_cast<double>(groups_[g].weight);
        vx += k * static_cast<double>(groups_[g].first);
      }
      double half = uu > 0 ? ux / uu : 0, half_minimum = 0;
      const double determinant = uu * vv - uv * uv;
      if (kMinima && determinant > 1e-9 * uu * vv) {
        half = (ux * vv - uv * vx) / determinant;
        half_minimum = (ux * uv - uu * vx) / determinant;
      }
      const float error = error_;
      const float to = round_half(static_cast<float>(half)), to_minimum = round_half(static_cast<float>(half_minimum));
      for (int g = 0; g < kGroups; ++g) {
        scales_[g] = to * static_cast<float>(choice_[g].scale);
        bases_[g] = to_minimum * static_cast<float>(choice_[g].minimum);
      }
      attempt(to, to_minimum);
      if (!(error_ < error)) break;
    }
  }

  // All integers around those that were found, for the same halves.
  bool polish() {
    const float before = error_;
    error_ = 0;
    for (int g = 0; g < kGroups; ++g) {
      const Choice middle = choice_[g];
      for (int s = std::max(kScaleLow, middle.scale - kReach); s <= std::min(kScaleHigh, middle.scale + kReach); ++s)
        for (int k = std::max(0, middle.minimum - kReach); k <= std::min(kMinimumHigh, middle.minimum + kReach); ++k) {
          const Sums sums = evaluate(groups_[g], d_ * static_cast<float>(s), m_ * static_cast<float>(k), kLow, kHigh);
          if (sums.error < choice_[g].sums.error) choice_[g] = {s, k, sums};
        }
      error_ += choice_[g].sums.error;
    }
    return error_ < before;
  }

  // Measured on normal, heavy-tailed and trained weights: three times the work gains 1 to 2 % of the error.
  static constexpr int kStarts = 4, kTurns = 4, kReach = 2, kRefinements = 6, kMinimumTurns = 2;
  static constexpr float kSteps[] = {-1.0f, -0.75f, -0.5f, -0.25f, 0.0f, 0.25f, 0.5f, 0.75f, 1.0f};
  Group<kSize> groups_[kGroups];
  Choice choice_[kGroups];
  float scales_[kGroups], bases_[kGroups];  // without the grid of the block
  float d_ = 0, m_ = 0, error_ = 0;
};

// Scale and minimum in half precision for 32 numbers by themselves.
struct Pair {
  std::uint16_t scale = 0, minimum = 0;
  std::array<std::int8_t, 32> codes{};
};

Pair search_pair(const float* x, const float* w, float high) {
  Group<32> group;
  group.read(x, w);
  float best = std::numeric_limits<float>::infinity(), best_scale = 0, best_base = 0;
  const float range = group.most - group.least;
  for (const float cut : kCuts)
    for (const float shift : kShifts) {
      float scale = range * cut / high, base = -(group.least + range * (1 - cut) * shift);
      for (int turn = 0; turn < 4; ++turn) {
        scale = round_half(scale), base = round_half(base);
        const Sums sums = evaluate(group, scale, base, 0, high);
        if (sums.error < best) best = sums.error, best_scale = scale, best_base = base;
        fit<2>(group, sums, scale, base);
      }
    }
  Pair out{half_bits(best_scale), half_bits(-best_base), {}};
  codes_of(group, best_scale, best_base, 0, high, out.codes.data());
  return out;
}

// What errors cost, 1 in the mean of a block: `importance`, or all the same. Weights by the numbers' own size, as x^2 or
// |x| + their root mean square, gave higher KL at every type (2 to 20 % on examples/teacher).
void weigh(const float* importance, int count, float* out) {
  double total = 0;
  for (int i = 0; importance != nullptr && i < count; ++i) total += static_cast<double>(importance[i]);
  for (int i = 0; i < count; ++i)
    out[i] = total > 0 ? static_cast<float>(static_cast<double>(importance[i]) * (count / total)) : 1.0f;
}

template <class Searched>
void k_block(GgmlType type, const float* x, const float* w, std::byte* out) {
  pack_k_block(type, Searched(x, w).run(), out);
}

struct Row {
  GgmlType type;
  float most;  // magnitude that its halves can scale
  void (*write)(GgmlType type, const float* x, const float* w, std::byte* out);
};

template <int kHigh>
void pair_block(GgmlType type, const float* x, const float* w, std::byte* out) {
  const Pair pair = search_pair(x, w, kHigh);
  pack_pair_block(type, pair.scale, pair.minimum, pair.codes.data(), out);
}

constexpr Row kRows[] = {{GgmlType::kQ2_K, kHalfMax * 15, k_block<Search<16, 0, 3, 0, 15, 15>>},
                         {GgmlType::kQ3_K, kHalfMax * 31 * 3, k_block<Search<16, -4, 3, -32, 31, 0>>},
                         {GgmlType::kQ4_K, kHalfMax * 63, k_block<Search<32, 0, 15, 0, 63, 63>>},
                         {GgmlType::kQ5_K, kHalfMax * 63, k_block<Search<32, 0, 31, 0, 63, 63>>},
                         {GgmlType::kQ6_K, kHalfMax * 127 * 31, k_block<Search<16, -32, 31, -128, 127, 0>>},
                         {GgmlType::kQ4_1, kHalfMax, pair_block<15>},
                         {GgmlType::kQ5_1, kHalfMax, pair_block<31>}};

const Row* find(GgmlType type) {
  for (const Row& row : kRows)
    if (row.type == type) return &row;
  return nullptr;
}

}  // namespace

bool is_searched_type(GgmlType type) {
  return find(type) != nullptr;
}

void require_blocks(GgmlType type, const float* values, std::int64_t count, const std::string& place) {
  const Row* row = find(type);
  if (row == nullptr) throw std::logic_error("a type that is not searched");
  for (std::int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(values[i]))
      throw input_error(place, "finite weights", std::to_string(values[i]) + " at " + std::to_string(i),
                        "the model is damaged");
    if (std::fabs(values[i]) > row->most)
      throw failure(place, "weights of at most " + std::to_string(row->most) + ", which " + ggml_type_name(type) + " can scale",
                    std::to_string(values[i]) + " at " + std::to_string(i), "choose bf16 or f32");
  }
}

void round_to_blocks(GgmlType type, const float* values, std::int64_t columns, const float* importance, std::byte* out) {
  const Row& row = *find(type);
  const std::int64_t block = ggml_block_values(type);
  float weights[kBlock];
  for (std::int64_t at = 0; at < columns; at += block, out += ggml_bytes(type, block)) {
    weigh(importance == nullptr ? nullptr : importance + at, static_cast<int>(block), weights);
    row.write(type, values + at, weights, out);
  }
}

}  // namespace pare
