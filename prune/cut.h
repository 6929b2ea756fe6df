// Which parts of a model a structured cut keeps, and what its tensors become. Include only from .cpp files (LibTorch
// headers).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/config.h"
#include "model/decoder.h"

namespace pare {

using Kept = std::vector<std::int64_t>;  // indices in the original, ascending

Kept all_of(std::int64_t count);

// Of one decoder block.
struct BlockCut {
  Kept heads, kv_heads;         // query heads; heads of keys and values
  Kept experts;                 // empty without experts
  std::vector<Kept> neurons{};  // of the MLP, or of each kept expert
};

// Rows and columns of an original tensor that stay, [..] -> smaller. `block`: null outside the blocks; of an expert's
// tensor, `expert` is its place among the kept ones.
torch::Tensor cut_tensor(const ModelConfig& config, const TensorSpec& spec, const torch::Tensor& values,
                         const Kept& channels, const BlockCut* block, std::int64_t expert = -1);
// The tensor of the original that a tensor of the cut comes from; `layer`: its block there.
std::string source_name(const ModelConfig& config, const TensorSpec& cut, int layer, const BlockCut& block);

}  // namespace pare
