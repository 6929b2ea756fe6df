// Which tensor gets which codec. No LibTorch types.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/codec.h"
#include "core/config.h"
#include "model/sparsity.h"

namespace pare {

// Codec names of core/codec.h that quantize, or "keep": the tensor stays in the floats it is stored in.
struct QuantizePolicy {
  std::string linear = "q4", embedding = "q8", head = "q8";
  std::vector<std::string> rules;  // "PATTERN=codec": * and ? on tensor or module names, a later rule wins
  bool fallback = true;            // a group that does not divide a row: the next smaller one, at last q8c
};

struct TensorPlan {
  TensorSpec spec;
  std::optional<Codec> codec;  // empty: stays float
  Codec asked;                 // what the policy said; differs from `codec` after a fallback
  bool fallback() const { return codec && !(*codec == asked); }
};

// One entry per expected tensor, in canonical order. Norms and biases stay float. Tied embeddings are one tensor and
// follow `embedding`. Errors, all in one (exit 2 for the policy itself, exit 3 for shapes it does not fit): unknown
// codec, malformed rule, a rule that matches no matrix, and without fallback every tensor whose rows do not divide.
std::vector<TensorPlan> plan_codecs(const ModelConfig& config, const QuantizePolicy& policy);

// One line per codec that fell back: "mlp.down_proj (5 tensors): q4g32 does not divide 172 columns, q8c instead".
std::vector<std::string> fallback_notes(const std::vector<TensorPlan>& plan);

// Refuses (exit 2, naming place) what keeps a block's linear from getting these zeros: no codec, or one without a code
// for exactly 0; N:M that a scale's weights are no multiple of; a fraction that removes nothing of a row.
void require_zeros(const std::vector<TensorPlan>& plan, const Sparsity& sparsity, const std::string& place);

// A module without the number of its expert: "mlp.experts.*.up_proj".
std::string module_kind(const std::string& module);

// Matches all of `text`; * is any run of characters, ? any one.
bool glob_match(std::string_view pattern, std::string_view text);

}  // namespace pare
