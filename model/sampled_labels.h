// Labels drawn from a model's own predictions. Include only from .cpp files (LibTorch headers).
#pragma once

#include <cstdint>

#include "model/decoder.h"

namespace pare {

// One label for each row of `hidden` [n, width], drawn from the model's distribution there: int64 [n], on the device of
// `hidden`. Draws depend on the seed and on first_place + row only.
// vocab > 0: from the first ids alone.
torch::Tensor sampled_labels(Decoder& decoder, const torch::Tensor& hidden, std::uint64_t seed, std::uint64_t first_place,
                             std::int64_t vocab = 0);

}  // namespace pare
