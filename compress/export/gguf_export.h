// Model folder -> GGUF file for llama.cpp and what is built on it. Codes are laid out anew, never rounded again.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/checkpoint.h"
#include "core/context.h"
#include "core/gguf.h"

namespace pare {

struct GgufOptions {
  fs::path out;
  // "keep": floats as stored. f32, f16, bf16, q8 (Q8_0), q4 (Q4_0): float matrices are converted, by round to nearest.
  std::string codec = "keep";
  bool fallback = true;  // a matrix that no block type can hold exactly stands in F32 instead of being an error
};

struct GgufPlan {
  std::vector<std::pair<std::string, GgufValue>> metadata;
  std::vector<GgufTensor> tensors;
  std::vector<std::string> sources;  // the folder's tensor behind each; "" for the divisors of llama3 RoPE
  std::vector<std::string> notes;
};

// Headers and tokenizer only. Errors: exit 2 for a codec that GGUF does not have; exit 3 for a family, an ingredient or
// a tokenizer that llama.cpp would not reproduce.
GgufPlan plan_gguf(const Checkpoint& checkpoint, const GgufOptions& options);

// Codes: q4 of any group -> Q4_0, q8 and q8c -> Q8_0, q4m -> Q4_1, q4a too where every minimum is a half. Query and key
// rows change places as llama.cpp's rotary embedding wants for the Llama family.
// Errors: exit 3 at a value that is not finite, or too large for the type that it is written in.
void export_gguf(const Checkpoint& checkpoint, const GgufPlan& plan, const fs::path& out, Context& context);

// tokenizer.ggml.* keys of tokenizer.json, in gguf_tokenizer.cpp. Notes say where llama.cpp differs on rare input.
std::vector<std::pair<std::string, GgufValue>> gguf_tokenizer(const fs::path& folder, const ModelConfig& config,
                                                              std::vector<std::string>& notes);

}  // namespace pare
