#include "core/stage_plan.h"

#include "core/checkpoint.h"

namespace pare {

std::uint64_t dtype_bytes(const std::string& dtype) { return dtype == "float32" ? 4 : 2; }

PlannedModel planned_model(const Checkpoint& checkpoint) {
  PlannedModel model = planned_model(checkpoint.config(), checkpoint.float_dtype());
  model.compact_bytes = 0;
  for (const TensorSpec& spec : checkpoint.tensors()) {
    if (checkpoint.dtype(spec.name) != checkpoint.dtype(checkpoint.tensors().front().name)) model.dtype = "float32";
    const Codec codec = checkpoint.codec(spec.name);
    model.quantized = model.quantized || !codec.is_float();
    model.compact_bytes += codec.payload_bytes(spec.shape[0], spec.shape.size() > 1 ? spec.shape[1] : 1);
  }
  return model;
}

PlannedModel planned_model(const ModelConfig& config, const std::string& dtype) {
  return {config, dtype, false, static_cast<std::uint64_t>(parameter_count(config)) * dtype_bytes(dtype)};
}

}  // namespace pare
