// The quantize stage as a command.
#pragma once

#include "core/options.h"

namespace pare {

Command quantize_command();

}  // namespace pare
