// Students made from their teacher: chosen layers, narrower feed-forward. Include only from .cpp files (LibTorch).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/decoder.h"

namespace pare {

// "0,2,3" -> {0, 2, 3}. Errors: exit 2 when not rising, out of range or not numbers.
std::vector<int> parse_layers(const std::string& text, std::int64_t num_layers);

// Error: exit 2 for a teacher with experts, whose feed-forward cannot be narrowed.
void require_one_mlp(const ModelConfig& teacher);

// The teacher's blocks `layers` (all when empty), and of each feed-forward the `ffn` neurons (0: all) with the largest
// |gate row| * |up row| * |down column|, in their old order. Everything else is copied.
Decoder cut_student(Decoder& teacher, const std::vector<int>& layers, std::int64_t ffn);

}  // namespace pare
