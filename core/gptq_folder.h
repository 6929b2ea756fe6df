// Folders of quant_method "gptq" (AutoGPTQ, GPTQModel), checkpoint formats "gptq" (version 1) and "gptq_v2": what a
// linear "X.weight" [out, in] becomes. With P = 32 / bits codes to a word, the first in the lowest bits:
//
//   X.qweight  I32 [in / P, out]              codes, unsigned, packed along the inputs
//   X.qzeros   I32 [ceil(in / group), out / P]  zero points, packed along the outputs; version 1 stores zero - 1
//   X.scales   F16 [ceil(in / group), out]
//   X.g_idx    I32 [in]                       the group of each input; without it input i has group i / group
//
//   w = (code - zero) * scale of the input's group
//
// A stored zero point of 2^bits - 1 means 2^bits to some readers of version 1 and 0 to others, so it is refused.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/codec.h"
#include "core/json.h"
#include "core/safetensors.h"

namespace pare {

inline constexpr const char* kGptqWeight = "qweight";
inline constexpr const char* kGptqZeros = "qzeros";
inline constexpr const char* kGptqScales = "scales";
inline constexpr const char* kGptqOrder = "g_idx";

struct GptqScheme {
  int bits = 4;              // 4 or 8
  std::int64_t group = 128;  // inputs; Codec::kPerRow: all of them
  bool less_one = true;      // version 1

  // Errors: exit 3 for other bits, packings and checkpoint formats, groups of more than 2^20 inputs, and for modules
  // with bits of their own.
  static GptqScheme parse(const Json& quantization_config, const std::string& place);
  static bool is_gptq(const Json& quantization_config);
  std::int64_t words(std::int64_t count) const { return count * bits / 32; }  // of packed codes
  std::int64_t groups(std::int64_t inputs) const;
};

// One stored linear; `order` may be null. Shapes are those above.
struct GptqViews {
  const TensorView* weight = nullptr;
  const TensorView* zeros = nullptr;
  const TensorView* scales = nullptr;
  const TensorView* order = nullptr;
};

class GptqLinear {
 public:
  // Looks at zero points, scales and order, of 8 bits at the codes too. Errors: exit 3 for a group that does not exist,
  // scales that are not finite, and zero points that readers take for different ones.
  GptqLinear(const GptqScheme& scheme, const GptqViews& views, std::int64_t outputs, std::int64_t inputs,
             const std::string& place);
  // A codec that holds the same weights, or F32: inputs out of order (desc_act), groups that no codec has, 8 bits with
  // a zero point that is not 128 or with the code -128.
  const Codec& codec() const { return codec_; }
  bool reordered() const { return reordered_; }
  QuantizedTensor codes() const;                            // [outputs, inputs], where codec() is no float
  void read_row(std::int64_t output, float* out) const;     // `inputs` floats, each one exact product
  const GptqViews& views() const { return views_; }
  const GptqScheme& scheme() const { return scheme_; }

 private:
  std::uint32_t code(std::int64_t output, std::int64_t input) const;
  std::int32_t zero(std::int64_t group, std::int64_t output) const;
  float scale(std::int64_t group, std::int64_t output) const;
  void choose(const std::string& place);

  GptqScheme scheme_;
  GptqViews views_;
  std::int64_t outputs_ = 0, inputs_ = 0;
  std::vector<std::int32_t> group_of_;  // of each input
  bool reordered_ = false;
  Codec codec_;
};

// Codes -> such a folder. Why a matrix of codes has no form there: bits, a minimum, rounded inputs, sizes that are no
// multiples of 32; "" where it has one. A zero point of 0 has none in version 1 besides.
std::string gptq_obstacle(const Codec& codec, std::int64_t outputs, std::int64_t inputs);
std::vector<std::int32_t> pack_gptq_weight(const QuantizedTensor& tensor);
std::vector<std::int32_t> pack_gptq_zeros(const QuantizedTensor& tensor, bool less_one);
std::vector<std::uint16_t> pack_gptq_scales(const QuantizedTensor& tensor);
std::vector<std::int32_t> gptq_order(const Codec& codec, std::int64_t inputs);
// quantization_config, which is the content of quantize_config.json too. `floats`: modules that stay as they are.
Json gptq_config(const Codec& codec, bool less_one, bool head, const std::vector<std::string>& floats);

}  // namespace pare
