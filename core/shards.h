// The weights of a model folder as Hugging Face lays them out: model.safetensors, or numbered shards and their index.
#pragma once

#include <functional>
#include <map>
#include <span>
#include <string>

#include "core/safetensors.h"

namespace pare {

// One tensor and the function that streams its bytes, called once, in order.
struct ShardTensor {
  TensorDecl decl;
  std::function<void(SafetensorsWriter&)> write;
};

// One safetensors file.
void write_tensors(const fs::path& path, std::span<const ShardTensor> tensors,
                   const std::map<std::string, std::string>& metadata);

// Files of at most `shard_bytes` of tensors (a larger tensor stands alone); Hugging Face's limit is decimal.
void write_shards(const fs::path& folder, std::span<const ShardTensor> tensors,
                  std::uint64_t shard_bytes = 5'000'000'000);

}  // namespace pare
