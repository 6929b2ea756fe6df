// `pare compress`: a recipe from model folder to compact file.
#pragma once

#include "compress/toolbox.h"
#include "core/options.h"

namespace pare {

Command compress_command(Toolbox tools);
Command doctor_command();

}  // namespace pare
