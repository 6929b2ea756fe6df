#include "compress/eval_verb.h"

#include "core/context.h"
#include "eval/logit_cache.h"
#include "model/logits.h"
#include "runtime/verbs/eval.h"

namespace pare {

Command eval_command() {
  EvalBackend backend;
  backend.has_devices = true;
  backend.folder = [](const Checkpoint& checkpoint, const std::string& device, Context& context) {
    return torch_logits(checkpoint, device, context.threads);
  };
  backend.open_cache = [](const fs::path& file, const LogitCacheInfo& expected) {
    return std::make_unique<LogitCacheReader>(file, expected);
  };
  backend.create_cache = [](const fs::path& file, const LogitCacheInfo& info) {
    return std::make_unique<LogitCacheWriter>(file, info);
  };
  return make_eval_command(std::move(backend));
}

}  // namespace pare
