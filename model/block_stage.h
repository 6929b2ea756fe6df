// The four distinct inputs inside a block, in the order in which the walk visits them; with experts the last two of
// each expert in turn.
#pragma once

#include <cstddef>

namespace pare {

enum class BlockStage { kQkv, kO, kGateUp, kDown };
inline constexpr std::size_t kBlockStages = 4;

}  // namespace pare
