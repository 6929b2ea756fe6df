// Reference of the attention kernels in plain C++.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "core/codec.h"
#include "core/error.h"
#include "runtime/attention_rows.h"

namespace pare {

const char* kv_name(KvType type) {
  return type == KvType::kF32 ? "f32" : type == KvType::kF16 ? "f16" : type == KvType::kQ8 ? "q8" : "mixed";
}

KvType parse_kv(const std::string& name) {
  for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kMixed, KvType::kQ8})
    if (name == kv_name(type)) return type;
  throw usage_error("key/value cache", "f32, f16, mixed or q8", "\"" + name + "\"");
}

namespace {

float value_at(const KvPlane& plane, std::int64_t row, std::int64_t column, std::int64_t pitch) {
  if (plane.type == KvType::kBf16)
    return bf16_to_f32(reinterpret_cast<const std::uint16_t*>(plane.data)[(row / 2 * pitch + column) * 2 + row % 2]);
  const std::int64_t i = row * pitch + column;
  if (plane.type == KvType::kF32) return reinterpret_cast<const float*>(plane.data)[i];
  if (plane.type == KvType::kF16) return f16_to_f32(reinterpret_cast<const std::uint16_t*>(plane.data)[i]);
  return static_cast<float>(reinterpret_cast<const std::int8_t*>(plane.data)[i]);
}

void narrow(const float* x, std::int64_t n, KvType type, std::byte* out, float* scale) {
  if (type == KvType::kF32) {
    std::memcpy(out, x, static_cast<std::size_t>(n) * 4);
    return;
  }
  if (type == KvType::kF16 || type == KvType::kBf16) {
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint16_t half = type == KvType::kF16 ? f32_to_f16(x[i]) : f32_to_bf16(x[i]);
      std::memcpy(out + 2 * i, &half, 2);
    }
    return;
  }
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < n; ++i) largest = std::max(largest, std::bit_cast<std::uint32_t>(x[i]) & 0x7fffffffu);
  const float peak = std::bit_cast<float>(largest);
  const bool finite = largest < 0x7f800000u;
  const float inverse = finite && peak > 1e-30f ? 127.0f / peak : 0.0f;
  for (std::int64_t i = 0; i < n; ++i)
    out[i] = static_cast<std::byte>(static_cast<std::int8_t>(finite ? std::nearbyint(x[i] * inverse) : 0.0f));
  *scale = finite ? peak / 127.0f : std::bit_cast<float>(0x7fc00000u);
}

void scores(const float* q, std::int64_t ldq, std::int64_t count, const KvPlane& keys, std::int64_t head_dim,
            std::int64_t positions, float* out, std::int64_t ldo) {
  const std::int64_t n = (positions + 15) / 16 * 16;
  for (std::int64_t i = 0; i < count; ++i) std::fill(out + i * ldo, out + i * ldo + n, 0.0f);
  float row[kPage];
  for (std::int64_t d = 0; d < head_dim; ++d) {
    for (std::int64_t p = 0; p < n; ++p) row[p] = value_at(keys, d, p, kPage);
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = q[i * ldq + d];
      for (std::int64_t p = 0; p < n; ++p) out[i * ldo + p] += value * row[p];
    }
  }
  if (keys.type != KvType::kQ8) return;
  for (std::int64_t i = 0; i < count; ++i)
    for (std::int64_t p = 0; p < n; ++p) out[i * ldo + p] *= keys.scales[p];
}

float softmax(float* s, std::int64_t n, bool bf16, float* peak, float* shrink) {
  const float next = std::max(*peak, *std::max_element(s, s + n));
  *shrink = shrink_to(*peak, next);
  *peak = next;
  float sum = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    s[i] = std::exp(s[i] - next);
    if (bf16) s[i] = bf16_to_f32(f32_to_bf16(s[i]));
    sum += s[i];
  }
  return sum;
}

void weigh(const float* probs, std::int64_t ldp, std::int64_t count, const KvPlane& values, std::int64_t width,
           std::int64_t positions, float* acc) {
  constexpr std::int64_t kTogether = 64;
  float row[kTogether];
  for (std::int64_t p = 0; p < positions; ++p) {
    for (std::int64_t first = 0; first < width; first += kTogether) {
      const std::int64_t n = std::min(kTogether, width - first);
      for (std::int64_t d = 0; d < n; ++d) row[d] = value_at(values, p, first + d, width);
      for (std::int64_t i = 0; i < count; ++i) {
        float value = probs[i * ldp + p];
        if (values.type == KvType::kQ8) value *= values.scales[p];
        for (std::int64_t d = 0; d < n; ++d) acc[i * width + first + d] += value * row[d];
      }
    }
  }
}

bool scale(const float* x, std::int64_t n, float factor, float* out) {
  bool nan = false;
  for (std::int64_t i = 0; i < n; ++i) {
    out[i] = x[i] * factor;
    nan |= std::isnan(out[i]);
  }
  return nan;
}

void rotate(float* x, const float* cosine, const float* sine, std::int64_t half, std::int64_t n, float factor) {
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = (a * cosine[i] - b * sine[i]) * factor;
    x[i + half] = (b * cosine[i] + a * sine[i]) * factor;
  }
  for (std::int64_t i = 2 * half; i < n; ++i) x[i] *= factor;
}

}  // namespace

const AttentionKernels kPlainAttention = {narrow, scores, softmax, weigh, scale, rotate};

}  // namespace pare
