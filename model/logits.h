// A LibTorch model as seen by the evaluator. No LibTorch types here.
#pragma once

#include <memory>
#include <string>

#include "core/checkpoint.h"
#include "eval/logits_source.h"

namespace pare {

// threads of LibTorch from now on; 0: as they are. float_inputs: what codecs with int8_inputs would compute without
// that rounding.
std::unique_ptr<LogitsSource> torch_logits(const Checkpoint& checkpoint, const std::string& device, int threads = 0,
                                           bool float_inputs = false);

}  // namespace pare
