// Rotary positions in config.json, both ways.
#pragma once

#include "core/arch/arch.h"

namespace pare {

// transformers 5 writes rope_parameters (rope_theta and partial_rotary_factor inside; one object per kind of layer for
// some families), transformers 4 rope_theta, partial_rotary_factor, rope_local_base_freq and rope_scaling.
void read_rope(ConfigReader& reader, const Family& family, ModelConfig& config);
void write_rope(const ModelConfig& config, const Family& family, Json& out);

}  // namespace pare
