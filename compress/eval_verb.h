// `pare eval` of the full program: folders are scored by LibTorch, and there is a logit cache.
#pragma once

#include "core/options.h"

namespace pare {

Command eval_command();

}  // namespace pare
