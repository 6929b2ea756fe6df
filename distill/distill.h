// The distill stage as a command.
#pragma once

#include "core/options.h"

namespace pare {

Command distill_command();

}  // namespace pare
