// On-policy distillation (Agarwal et al. 2023): the student continues prompts of the text, and learns from what the
// teacher would have said at each place of its own continuation. Include only from .cpp files (LibTorch).
#pragma once

#include <cstdint>

#include "model/data.h"
#include "model/decoder.h"

namespace pare {

// Of steps 0 .. n - 1 about n * share, evenly spread.
bool on_policy_step(double share, std::int64_t step);

// Of each sequence the first `prompt` ids stay and `tokens` sampled ids follow, at temperature 1 from the student's
// first `vocab` ids; ids become [sequences, prompt + tokens]. Predicted are the sampled ids alone, up to and including
// an end of text; of a sequence whose text is shorter than the prompt, none. `place`: of the first draw (uniform.h);
// `stride`: places from one id of a sequence to its next, 0: as many as there are sequences. At most `micro` sequences
// run at a time.
void continue_prompts(Decoder& student, Batch& batch, std::int64_t prompt, std::int64_t tokens, std::int64_t vocab,
                      std::uint64_t seed, std::uint64_t place, std::int64_t micro, const torch::Device& device,
                      std::int64_t stride = 0);

}  // namespace pare
