// What a stage announces before it runs, so that a chain of stages can be planned before its first folder exists.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/config.h"

namespace pare {

class Checkpoint;

// A model folder as far as it is known in advance.
struct PlannedModel {
  ModelConfig config;
  std::string dtype = "float32";    // of the float tensors
  bool quantized = false;           // some tensors are codes
  std::uint64_t compact_bytes = 0;  // of its tensors in a compact file that keeps what is stored
};

struct StagePlan {
  double seconds = 0;
  std::uint64_t peak_bytes = 0, out_bytes = 0;
  std::vector<std::string> notes;   // announced fallbacks, roundings, what is not measured
  PlannedModel result;
};

// A folder that exists. Where it mixes float dtypes the plan says float32, which holds them all exactly.
PlannedModel planned_model(const Checkpoint& checkpoint);
// A float model of this config stored in `dtype`.
PlannedModel planned_model(const ModelConfig& config, const std::string& dtype);

// Bytes of one element of "float32", "float16" or "bfloat16".
std::uint64_t dtype_bytes(const std::string& dtype);

}  // namespace pare
