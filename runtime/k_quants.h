// Numbers -> ggml's blocks of 256: what export does with a float matrix when one of the K types was asked for.
#pragma once

#include <string>

#include "core/gguf.h"

namespace pare {

// Q2_K, Q3_K, Q4_K, Q5_K and Q6_K, and Q4_1 and Q5_1, which stand in where rows are no whole blocks of 256.
bool is_searched_type(GgmlType type);

// values: `columns` numbers that require_blocks() has seen, whole blocks of the type. importance: what an error in each
// column costs, all >= 0; without it all cost the same. out: ggml_bytes(type, columns) bytes.
//
// The least sum of importance x squared error that was found. For each sub-block a scale and a minimum by weighted least
// squares from several starts; the halves of the block from the largest of them, rounded first; then the small integers
// of every sub-block and the nearest codes, by the very products that a reader forms; then halves by least squares and
// integers near the old ones in turn, while the error falls. The same bits everywhere.
void round_to_blocks(GgmlType type, const float* values, std::int64_t columns, const float* importance, std::byte* out);

// Errors (place = `place`): exit 3 for NaN and infinity, exit 1 for magnitudes beyond what the blocks can scale.
void require_blocks(GgmlType type, const float* values, std::int64_t count, const std::string& place);

}  // namespace pare
