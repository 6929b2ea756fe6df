// Opening what is not a compact file yet.
#include "core/gguf_file.h"
#include "runtime/engine.h"
#include "runtime/export.h"
#include "runtime/temporary_folder.h"

namespace pare {

std::shared_ptr<const Engine> Engine::open(const fs::path& file, const EngineOptions& options) {
  if (!GgufFile::is_gguf(file)) return open_compact(file, options);
  const TemporaryFolder folder;
  const fs::path compact = folder.path() / file.filename();
  export_temporary(Checkpoint::open(file), compact);
  return open_compact(compact, options);  // the mapping outlives the name
}

}  // namespace pare
