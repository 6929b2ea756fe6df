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

std::uint64_t compact_bytes(const PlannedModel& model, const fs::path& folder, const std::string& codec) {
  std::uint64_t bytes = model.compact_bytes;
  if (codec != "keep" && !model.quantized)
    bytes = static_cast<std::uint64_t>(parameter_count(model.config)) * (codec == "f32" ? 4 : 2);
  std::error_code none;
  const auto tokenizer = fs::file_size(folder / "tokenizer.json", none);
  if (!none) return bytes + tokenizer;
  return bytes + embedded_tokenizer(folder).value_or("").size();
}

}  // namespace pare
