// The prune stage as a command.
#pragma once

#include "core/options.h"

namespace pare {

Command prune_command();

}  // namespace pare
