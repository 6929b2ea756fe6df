// What rounding costs a linear whose inputs are scaled. No LibTorch types.
#pragma once

#include <span>
#include <string>

#include "core/codec.h"
#include "quantize/scales.h"

namespace pare {

// One linear as it stands in the original: weight [rows * columns].
struct ScaledLinear {
  std::string name;
  const float* weight = nullptr;
  std::int64_t rows = 0, columns = 0;
  Codec codec;
};

// sum ||W x - Q(W S) R(x / s)||^2 over the inputs x [tokens * columns] in the span, with Q the codec's nearest codes
// under `rule` (each error counted with the mean square of its input) and R, where the codec rounds inputs, int8 with
// one scale per token. scales: [columns]. Errors (exit 3): weights that are not finite, or that the codec cannot hold.
// The same bits at any number of threads.
double scaled_error(const ScaledLinear& linear, std::span<const float> inputs, std::span<const float> scales,
                    ScaleRule rule, int threads);

}  // namespace pare
