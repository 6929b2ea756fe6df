// The `pack-quantized` and `int-quantized` forms of compressed-tensors
// (https://github.com/neuralmagic/compressed-tensors): what a linear "X.weight" becomes, and the quantization_config
// that says so. The second form is that of codecs with int8_inputs: "X.weight" stays, as I8 [out, in].
#pragma once

#include <map>
#include <string>
#include <vector>

#include "core/codec.h"
#include "core/json.h"
#include "core/safetensors.h"

namespace pare {

// Suffixes that replace "weight" in the tensor name.
inline constexpr const char* kPackedSuffix = "weight_packed";        // I32 [out, ceil(in * bits / 32)]
inline constexpr const char* kScaleSuffix = "weight_scale";          // F32 [out, groups], values of half precision
inline constexpr const char* kShapeSuffix = "weight_shape";          // I64 [2] = [out, in]
inline constexpr const char* kZeroSuffix = "weight_zero_point";      // I32 [ceil(out * bits / 32), groups], asymmetric only

std::int64_t packed_words(std::int64_t count, int bits);

// Dense bit stream along a row, lowest bits first, code + 2^(bits - 1); 3-bit codes may lie in two words. Zero points
// run along the rows, the same way.
std::vector<std::int32_t> pack_weight(const QuantizedTensor& tensor);
// `tensor` has codec, rows and cols; fills codes or zeros.
void unpack_weight(const TensorView& packed, QuantizedTensor& tensor);
void unpack_zero_points(const TensorView& packed, QuantizedTensor& tensor);

// quantization_config for symmetric linears by module name ("model.layers.0.mlp.up_proj"); `ignored`: float linears.
Json quantization_config(const std::map<std::string, Codec>& modules, const std::vector<std::string>& ignored);

// The reading side: which codec a module has. Errors: exit 3 for methods, formats and schemes without a codec here.
class QuantizationSchemes {
 public:
  QuantizationSchemes(const Json& quantization_config, const std::string& place);
  // Exact target, then "re:" patterns, then "Linear". Throws when nothing names the module.
  Codec codec(const std::string& module) const;

 private:
  struct Target {
    std::string pattern;
    Codec codec;
  };
  std::map<std::string, Codec> exact_;
  std::vector<Target> patterns_;
  std::vector<Codec> linear_;
  std::string place_;
};

}  // namespace pare
