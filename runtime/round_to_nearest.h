// Plain round-to-nearest with the scale from the extremes of each group: what export does with a float matrix when a
// quantized codec was asked for. Better choices are the business of the quantize stage.
#pragma once

#include <string>

#include "core/codec.h"

namespace pare {

// values: [rows, cols]. Symmetric: scale = absmax / 127 for 8 bits, absmax / 7.5, 3.5, 1.5 for 4, 3, 2; q4a: the range of
// the group with zero inside it; q4m: the range itself, as llama.cpp rounds Q4_1. Scales are rounded to half
// before codes are chosen.
// Errors (place = `place`): exit 3 for NaN and infinity, exit 1 for a scale beyond half precision.
QuantizedTensor round_to_nearest(const Codec& codec, std::int64_t rows, std::int64_t cols, const float* values,
                                 const std::string& place);

}  // namespace pare
