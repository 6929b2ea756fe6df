// `pare export` of the full program: the compact file, and the formats of other runtimes.
#pragma once

#include "core/options.h"

namespace pare {

Command export_command_full();

}  // namespace pare
