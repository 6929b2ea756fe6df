// A model -> GGUF file for llama.cpp and its kin. Codes are laid out anew, never rounded again unless asked.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/checkpoint.h"
#include "core/context.h"
#include "core/gguf_arch.h"

namespace pare {

struct GgufOptions {
  fs::path out;
  // "keep": floats as stored. f32, f16, bf16, q8 (Q8_0), q4 (Q4_0): float matrices are converted, by round to nearest.
  std::string codec = "keep";
  bool fallback = true;    // a matrix that no block type can hold exactly stands in F32 instead of being an error
  bool requantize = false; // q4a whose minima are no halves: Q4_1 with rounded minima instead of F32
};

struct GgufPlan {
  GgufPairs metadata;
  std::vector<GgufTensor> tensors;
  std::vector<GgufPlacement> sources;         // of each; no parts: `constants` has its values
  std::vector<std::vector<float>> constants;  // of each; empty where there are parts
  std::vector<std::string> notes;
};

// Headers, vectors and tokenizer only; the checkpoint must outlive the plan. Errors: exit 2 for a codec that GGUF does
// not have; exit 3 for a family, an ingredient or a tokenizer that llama.cpp would not reproduce.
GgufPlan plan_gguf(const Checkpoint& checkpoint, const GgufOptions& options);

// Codes: q4 of any group -> Q4_0, q8 and q8c -> Q8_0, q4m -> Q4_1, q4a too where every minimum is a half. Query and key
// rows change places as llama.cpp's rotary embedding wants. With "keep", floats stay bit for bit what they are.
// Errors: exit 3 at a value that is not finite, or too large for the type that it is converted to.
void export_gguf(const Checkpoint& checkpoint, const GgufPlan& plan, const GgufOptions& options, Context& context);

}  // namespace pare
