#include "runtime/round_to_nearest.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace pare {

QuantizedTensor round_to_nearest(const Codec& codec, std::int64_t rows, std::int64_t cols, const float* values,
                                 const std::string& place) {
  QuantizedTensor out;
  out.codec = codec;
  out.rows = rows;
  out.cols = cols;
  const std::int64_t groups = codec.groups(cols), width = cols / groups;
  const bool asymmetric = codec.kind == CodecKind::kQ4a, lowest = codec.kind == CodecKind::kQ4m;
  const auto [low, high] = code_range(codec.kind);
  // An 8-bit code uses only +-127, so its extreme value can be met exactly.
  const float steps = codec.kind == CodecKind::kQ8 ? 127.0f
                      : asymmetric || lowest       ? 15.0f
                                                   : static_cast<float>(high) + 0.5f;
  out.codes.resize(static_cast<std::size_t>(rows * cols));
  out.scales.resize(static_cast<std::size_t>(rows * groups));
  if (asymmetric) out.zeros.resize(out.scales.size());
  if (lowest) out.minima.resize(out.scales.size());

  for (std::int64_t at = 0; at < rows * groups; ++at) {
    const float* group = values + at * width;
    float smallest = lowest ? group[0] : 0, largest = smallest;
    for (std::int64_t i = 0; i < width; ++i) {
      if (!std::isfinite(group[i]))
        throw input_error(place, "finite weights", std::to_string(group[i]) + " in row " + std::to_string(at / groups),
                          "the model is damaged");
      smallest = std::min(smallest, group[i]);
      largest = std::max(largest, group[i]);
    }
    const float range = asymmetric || lowest ? largest - smallest : std::max(largest, -smallest);
    const std::uint16_t bits = f32_to_f16(range / steps);
    const float scale = f16_to_f32(bits), base = lowest ? f16_to_f32(f32_to_f16(smallest)) : 0.0f;
    if (!std::isfinite(scale) || !std::isfinite(base))
      throw failure(place, "weights of a range that half precision can scale",
                    std::to_string(std::max(range, std::fabs(smallest))) + " in row " + std::to_string(at / groups));
    out.scales[static_cast<std::size_t>(at)] = bits;
    if (lowest) out.minima[static_cast<std::size_t>(at)] = f32_to_f16(smallest);
    const int zero = asymmetric && scale > 0 ? std::clamp(static_cast<int>(std::lround(-smallest / scale)), 0, 15) : 0;
    if (asymmetric) out.zeros[static_cast<std::size_t>(at)] = static_cast<std::uint8_t>(zero);
    for (std::int64_t i = 0; i < width; ++i) {
      // A scale that underflows to a tiny value must not overflow the quotient's integer.
      const float quotient = scale > 0 ? std::clamp((group[i] - base) / scale, -1000.0f, 1000.0f) : 0.0f;
      const int code = static_cast<int>(std::lround(quotient)) + zero;
      out.codes[static_cast<std::size_t>(at * width + i)] = static_cast<std::int8_t>(std::clamp<int>(code, low, high));
    }
  }
  return out;
}

}  // namespace pare
