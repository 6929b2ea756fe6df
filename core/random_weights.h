// Weights as training starts them, for folders that only have a shape.
#pragma once

#include <cstdint>

#include "core/config.h"
#include "core/context.h"
#include "core/file.h"

namespace pare {

// Element `index` of a tensor's stream of normal numbers (mean 0, deviation 1): a function of seed, name and index
// alone, so any part can be made anywhere. Box-Muller on splitmix64 outputs.
void random_normals(std::uint64_t seed, std::string_view name, std::int64_t first, std::int64_t count, float* out);

// Writes weights and config.json of a random model into an existing folder: matrices normal with deviation
// `initializer_range` of the configuration (0.02 without it), biases 0, norms the identity. bfloat16, sharded, a few
// MiB of memory whatever the size. Errors: exit 5 before anything is written if the disk is too small.
void write_random_model(const fs::path& folder, const ModelConfig& config, std::uint64_t seed, Context& context);

}  // namespace pare
