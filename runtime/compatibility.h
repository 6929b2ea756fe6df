// Where a model would load, and run fast, as it is: the rules of the programs that people already have, asked before
// anything is written.
#pragma once

#include <string>
#include <vector>

#include "core/checkpoint.h"

namespace pare {

struct Compatibility {
  enum class Answer { kNo, kPerhaps, kYes };
  std::string target;  // "llama.cpp", "Ollama", "transformers", "vLLM (Marlin)", "vLLM (CPU)", "pare"
  std::string how;     // what to give it: "pare export --to gguf"
  Answer loads = Answer::kYes, fast = Answer::kYes;
  std::vector<std::string> reasons;  // for every answer that is not yes, and what else to know
};

// Headers and tokenizer alone are read, codes of q4a, whose minima decide about Q4_1, and the blocks of a GGUF file,
// which decide about its codecs. Rules: llama.cpp as
// core/gguf_arch.h states them; vLLM's Marlin kernels take 4 and 8 bits in groups of 32, 64, 128 or a row, outputs in
// multiples of 64 and inputs of 128, counted after q, k, v and gate, up are joined; its CPU kernels 4 bits, or 8 with
// int8 inputs; compressed-tensors as core/placement.h has_packed_form(); folders of GPTQ need its own loader.
std::vector<Compatibility> compatibility(const Checkpoint& checkpoint);

const char* answer_name(Compatibility::Answer answer);  // "no", "perhaps", "yes"

}  // namespace pare
