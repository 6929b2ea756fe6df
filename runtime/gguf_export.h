// A model -> GGUF file for llama.cpp and its kin. Codes are laid out anew, never rounded again unless asked.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/checkpoint.h"
#include "core/context.h"
#include "core/gguf_arch.h"
#include "runtime/importance.h"

namespace pare {

struct GgufOptions {
  fs::path out;
  // "keep": floats as stored. f32, f16, bf16, q8 (Q8_0), q4 (Q4_0): float matrices are converted, by round to nearest;
  // q2_k to q6_k: by runtime/k_quants.h, rows that are no whole blocks of 256 into blocks of 32 that are no coarser.
  std::string codec = "keep";
  bool fallback = true;    // a matrix that no block type can hold exactly stands in F32 instead of being an error
  // Codes are rounded again: to `codec`, or with "keep" q4a whose minima are no halves to Q4_1 instead of F32.
  bool requantize = false;
  fs::path imatrix = {};  // a file of llama-imatrix: weighs the errors of q2_k to q6_k (runtime/importance.h); empty: none
};

struct GgufPlan {
  GgufPairs metadata;
  std::vector<GgufTensor> tensors;
  std::vector<GgufPlacement> sources;         // of each; no parts: `constants` has its values
  std::vector<std::vector<float>> constants;  // of each; empty where there are parts
  std::vector<std::string> notes;
  Importances importances;
};

// Throws (exit 2) at the name of a codec that GGUF does not have.
void check_gguf_codec(const std::string& name);
bool is_k_quant_name(const std::string& name);  // "q4_k"

// Headers, vectors, tokenizer and importances only; the checkpoint must outlive the plan. Errors: exit 2 for a codec that GGUF does
// not have; exit 3 for a family, an ingredient or a tokenizer that llama.cpp would not reproduce.
GgufPlan plan_gguf(const Checkpoint& checkpoint, const GgufOptions& options);

// Codes: q4 of any group -> Q4_0, q8 and q8c -> Q8_0, q4m -> Q4_1, q4a too where every minimum is a half. Query and key
// rows change places as llama.cpp's rotary embedding wants. With "keep", floats stay bit for bit what they are.
// Errors: exit 3 at a value that is not finite, or too large for the type that it is converted to.
void export_gguf(const Checkpoint& checkpoint, const GgufPlan& plan, const GgufOptions& options, Context& context);

}  // namespace pare
