#include "compress/export/compact_export.h"

#include "core/error.h"
#include "runtime/export.h"

namespace pare {

void export_compact_file(const ExportRequest& request, Context& context) {
  const Checkpoint checkpoint(request.model);
  ExportOptions options;
  options.out = request.out;
  options.codec = request.codec;
  options.recipe = request.recipe;
  const auto writer = begin_export(checkpoint, options, context);
  const fs::path unsealed = writer->finish_payload();
  writer->seal(request.before_seal ? request.before_seal(unsealed) : "[]\n");
}

std::uint64_t compact_bytes(const fs::path& model, const std::string& codec) {
  const Checkpoint checkpoint(model);
  ExportOptions options;
  options.codec = codec;
  std::uint64_t bytes = plan_export(checkpoint, options).payload_bytes;
  std::error_code ignored;
  const auto tokenizer = fs::file_size(model / "tokenizer.json", ignored);
  if (!ignored) bytes += tokenizer;
  return bytes;
}

}  // namespace pare
