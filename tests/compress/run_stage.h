// A stage's command with these options, silent and on one thread.
#pragma once

#include "core/context.h"
#include "core/options.h"

namespace pare::testing {

inline Json run_stage(const Command& command, const Json& given) {
  Progress progress(true);
  Context context;
  context.json = true;
  context.quiet = true;
  context.threads = 1;
  context.progress = &progress;
  return command.run(Options(command.options, given, "test"), context);
}

}  // namespace pare::testing
