// The stages train and finetune as commands.
#pragma once

#include "core/options.h"

namespace pare {

Command train_command();
Command finetune_command();

}  // namespace pare
