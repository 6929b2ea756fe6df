// The inner loops of attention over one page of the key/value cache, compiled once per instruction set. What a query
// row gets depends on nothing but that row and the page, so any batch gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace pare {

constexpr std::int64_t kPage = 128;       // positions per page of the KV cache
constexpr std::int64_t kMaxQueries = 64;  // query rows per call of scores() or weigh()

// How keys and values are kept. kQ8: int8 codes with one float scale per position and head, max|x| / 127. kMixed: keys
// kF16, whose errors the softmax amplifies, values kBf16, whose errors are averaged and which matrix tiles read as they
// lie. kBf16 is of values alone; what they are weighed with is bfloat16, too. Sessions that were saved have these numbers.
enum class KvType : std::uint8_t { kF32, kF16, kQ8, kMixed, kBf16 };
constexpr std::int64_t kv_bytes(KvType type) {
  return type == KvType::kF32 ? 4 : type == KvType::kQ8 ? 1 : 2;
}
const char* kv_name(KvType type);  // "f32", "f16", "q8", "mixed"
KvType parse_kv(const std::string& name);  // exit 2

// Keys [head_dim][kPage] or values [kPage][width] of one page and head; kBf16: values [kPage / 2][width][2].
struct KvPlane {
  KvType type = KvType::kF32;
  std::byte* data = nullptr;
  float* scales = nullptr;  // [kPage], kQ8 only
  // What will be read next, about as long as this: fetched along the way. Null: nothing, or it is near already.
  const std::byte* ahead = nullptr;
};

struct AttentionKernels {
  // x[n] as `type`; kQ8 sets *scale. Numbers beyond a half become infinite there; a non-finite x makes *scale NaN.
  void (*narrow)(const float* x, std::int64_t n, KvType type, std::byte* out, float* scale);
  // out[i * ldo + p] = sum_d q[i * ldq + d] * keys[d][p], p < round_up(positions, 16); count <= kMaxQueries.
  void (*scores)(const float* q, std::int64_t ldq, std::int64_t count, const KvPlane& keys, std::int64_t head_dim,
                 std::int64_t positions, float* out, std::int64_t ldo);
  // One page of a running softmax: raises *peak (-infinity before the first) to the largest of s[0..n), replaces each
  // by exp(s - *peak), with `bf16` the nearest bfloat16 but for a float's errors (where it is no normal number: 0 or a
  // tiny one), and returns their sum. Sums of earlier pages have to be multiplied by *shrink.
  float (*softmax)(float* s, std::int64_t n, bool bf16, float* peak, float* shrink);
  // acc[i * width + d] += sum_p probs[i * ldp + p] * values[p][d]; width is a multiple of 16. probs are bfloat16 beside
  // kBf16 values.
  void (*weigh)(const float* probs, std::int64_t ldp, std::int64_t count, const KvPlane& values, std::int64_t width,
                std::int64_t positions, float* acc);
  // out[i] = x[i] * factor, out may be x; whether one of them is a NaN.
  bool (*scale)(const float* x, std::int64_t n, float factor, float* out);
  // A head at one position: x[i] and x[i + half] turn by the angle of cosine[i] and sine[i], i < half; all n times factor.
  void (*rotate)(float* x, const float* cosine, const float* sine, std::int64_t half, std::int64_t n, float factor);
};

extern const AttentionKernels kPlainAttention;
#if defined(__x86_64__)
extern const AttentionKernels kAvx2Attention;
extern const AttentionKernels kAvx512VnniAttention;
const AttentionKernels& amx_attention();
#elif defined(__aarch64__)
extern const AttentionKernels kNeonAttention;
#endif

}  // namespace pare
