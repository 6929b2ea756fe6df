// The train stage as a command.
#pragma once

#include "core/options.h"

namespace pare {

Command train_command();

}  // namespace pare
