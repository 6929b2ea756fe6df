// `pare eval`, shared by both programs: they differ in how a model folder is scored and in whether there is a cache.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "core/checkpoint.h"
#include "core/options.h"
#include "eval/cached_logits.h"
#include "eval/logits_source.h"

namespace pare {

struct EvalBackend {
  // Logits of a model folder with float activations; codes count as the weights they unpack to. `device` is "" where
  // the program has no choice.
  std::function<std::unique_ptr<LogitsSource>(const Checkpoint&, const std::string& device, Context&)> folder;
  // Both null: no --cache.
  std::function<std::unique_ptr<CachedLogits>(const fs::path&, const LogitCacheInfo& expected)> open_cache;
  std::function<std::unique_ptr<LogitsSink>(const fs::path&, const LogitCacheInfo&)> create_cache;
  bool has_devices = false;
};

Command make_eval_command(EvalBackend backend);

// A folder, written as a temporary compact file under TMPDIR and scored by the runtime. The file is gone before the
// first logits; what a killed process leaves is removed by the next one. Errors: exit 5 where it has no room.
std::unique_ptr<LogitsSource> folder_logits_by_runtime(const Checkpoint& checkpoint, Context& context);

}  // namespace pare
