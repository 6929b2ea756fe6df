#include "quantize/q4_0.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>

#include "core/error.h"
#include "quantize/scales.h"

namespace pare {
namespace {

constexpr float kSteps = 8;                // the widest weight lies this many steps from zero
constexpr float kNothing = 1e-15f;         // a group without a larger magnitude is all zero to the weighted search
constexpr float kF16Max = 65504;

float widest(const float* w, std::int64_t n) {
  float magnitude = 0, value = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    if (std::fabs(w[i]) <= magnitude) continue;
    magnitude = std::fabs(w[i]);
    value = w[i];
  }
  return value;
}

// Returns the scale before it is rounded.
float plain_group(const float* w, std::int64_t n, std::int8_t* codes) {
  const float scale = widest(w, n) / -kSteps;
  const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
  for (std::int64_t i = 0; i < n; ++i) {
    // Never below 0.5 before the cut: no weight lies further out than the widest. A reciprocal that overflows belongs
    // to a scale that rounds to zero.
    const float place = std::isfinite(inverse) ? w[i] * inverse + (kSteps + 0.5f) : kSteps;
    codes[i] = static_cast<std::int8_t>(std::min(15, static_cast<int>(place)) - 8);
  }
  return scale;
}

struct Fit {
  float along = 0, square = 0;  // sum c w l and sum c l^2 over codes l with costs c
};

int nearest_code(float value) { return std::clamp(static_cast<int>(std::nearbyintf(value)), -8, 7); }

Fit fit(const float* w, const float* cost, std::int64_t n, float inverse) {
  Fit sum;
  for (std::int64_t i = 0; i < n; ++i) {
    const int code = nearest_code(inverse * w[i]);
    sum.along += cost[i] * w[i] * static_cast<float>(code);
    sum.square += cost[i] * static_cast<float>(code) * static_cast<float>(code);
  }
  return sum;
}

float weighted_group(const float* w, const float* cost, std::int64_t n, std::int8_t* codes) {
  const float extreme = widest(w, n);
  std::fill(codes, codes + n, std::int8_t{0});
  if (std::fabs(extreme) < kNothing) return 0;
  float inverse = -kSteps / extreme;
  Fit sum = fit(w, cost, n, inverse);
  float scale = sum.square != 0 ? sum.along / sum.square : 0.0f;
  float best = scale * sum.along;  // the energy that the codes explain
  float chosen = inverse;
  for (int tenth = -9; tenth <= 9; ++tenth) {
    if (tenth == 0) continue;
    inverse = -(kSteps + 0.1f * static_cast<float>(tenth)) / extreme;
    sum = fit(w, cost, n, inverse);
    if (!(sum.square > 0 && sum.along * sum.along > best * sum.square)) continue;
    scale = sum.along / sum.square;
    best = scale * sum.along;
    chosen = inverse;
  }
  for (std::int64_t i = 0; i < n; ++i) codes[i] = static_cast<std::int8_t>(nearest_code(chosen * w[i]));
  return scale;
}

}  // namespace

QuantizedTensor round_q4_0(const float* weight, std::int64_t rows, std::int64_t cols, const Codec& codec,
                           const double* importance, const std::string& place, int threads) {
  if (codec.kind != CodecKind::kQ4) throw std::logic_error("round_q4_0: " + codec.name());
  require_finite(weight, rows, cols, place);
  QuantizedTensor out;
  out.codec = codec;
  out.rows = rows;
  out.cols = cols;
  const std::int64_t groups = codec.groups(cols), size = cols / groups;
  out.codes.resize(static_cast<std::size_t>(rows * cols));
  out.scales.resize(static_cast<std::size_t>(rows * groups));
  std::atomic<bool> too_large = false;
#pragma omp parallel num_threads(threads > 0 ? threads : omp_get_num_procs())
  {
    std::vector<float> cost(static_cast<std::size_t>(size));
#pragma omp for schedule(static)
    for (std::int64_t r = 0; r < rows; ++r) {
      const float* row = weight + r * cols;
      float squares = 0;
      if (importance != nullptr)
        for (std::int64_t j = 0; j < cols; ++j) squares += row[j] * row[j];
      const float mean = squares / static_cast<float>(cols);
      for (std::int64_t g = 0; g < groups; ++g) {
        const float* w = row + g * size;
        std::int8_t* codes = out.codes.data() + r * cols + g * size;
        float scale = 0;
        if (importance == nullptr) {
          scale = plain_group(w, size, codes);
        } else {
          for (std::int64_t j = 0; j < size; ++j)
            cost[static_cast<std::size_t>(j)] =
                static_cast<float>(importance[g * size + j]) * std::sqrt(mean + w[j] * w[j]);
          scale = weighted_group(w, cost.data(), size, codes);
        }
        if (std::fabs(scale) > kF16Max) too_large = true;
        const std::uint16_t bits = f32_to_f16(scale);
        const bool zero = (bits & 0x7fffu) == 0;
        if (zero) std::fill(codes, codes + size, std::int8_t{0});
        out.scales[static_cast<std::size_t>(r * groups + g)] = zero ? std::uint16_t{0} : bits;
      }
    }
  }
  if (too_large) {
    throw input_error(place, "magnitudes whose scale fits float16", "a scale above 65504",
                      "keep this tensor in float with --policy");
  }
  return out;
}

}  // namespace pare
