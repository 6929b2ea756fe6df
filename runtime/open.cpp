// Opening what is not a compact file yet.
#include <exception>

#include "core/error.h"
#include "core/gguf_file.h"
#include "runtime/engine.h"
#include "runtime/export.h"
#include "runtime/temporary_folder.h"

namespace pare {

std::shared_ptr<const Engine> Engine::open(const fs::path& file, const EngineOptions& options) {
  if (!GgufFile::is_gguf(file)) return open_compact(file, options);
  const TemporaryFolder folder;
  const fs::path compact = folder.path() / file.filename();
  const Checkpoint model = Checkpoint::open(file);
  export_temporary(model, compact);
  std::exception_ptr no_tokenizer;
  try {
    if (!CompactFile(compact).embedded("tokenizer.json")) model.tokenizer_text();
  } catch (const Error&) {
    no_tokenizer = std::current_exception();  // for whoever asks for it; others do not need one
  }
  return open_compact(compact, options, file, no_tokenizer);  // the mapping outlives the name
}

}  // namespace pare
