// Model folder -> compact file, torch-free.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "core/compact.h"
#include "core/context.h"

namespace pare {

struct ExportOptions {
  fs::path out;
  // "keep": codes stay codes, float matrices keep 16 bits where they are stored so, else f32. Any other codec name:
  // float matrices are converted to it (round to nearest); codes are never rounded again.
  std::string codec = "keep";
  bool fallback = true;    // a row that the group does not divide: q8c (announced) instead of an error
  std::string recipe = {}; // embedded as "recipe" when not empty
  bool origin = true;      // embed what the folder says of its base and licence, or its name
};

struct ExportPlan {
  std::vector<CompactWriter::Plan> tensors;
  std::vector<std::string> notes;    // announced fallbacks and what is missing in the folder
  std::uint64_t payload_bytes = 0;
};

// The text of a tokenizer.json that a file of this folder carries: the runtime reads that form alone, so a
// tokenizer.model travels as what it means. Nothing, and a note, where the folder has neither or has one that cannot be
// read: the weights are worth a file all the same.
std::optional<std::string> embedded_tokenizer(const fs::path& folder, std::vector<std::string>* notes = nullptr);
std::optional<std::string> embedded_tokenizer(const Checkpoint& checkpoint, std::vector<std::string>* notes = nullptr);

// Headers only. Errors: exit 2 for an unknown codec, exit 3 for a row that does not fit with fallback off.
ExportPlan plan_export(const Checkpoint& checkpoint, const ExportOptions& options);

// Writes everything but the report; the writer's finish_payload() gives the file to measure on, seal() ends it.
std::unique_ptr<CompactWriter> begin_export(const Checkpoint& checkpoint, const ExportOptions& options, Context& context);

// begin_export and seal with the deterministic rows of context.report. Adds the rows "tensor_bytes" and "file_bytes".
void export_compact(const Checkpoint& checkpoint, const ExportOptions& options, Context& context);

// export_compact without reports. Errors: exit 5 where the place has not the room.
void export_temporary(const Checkpoint& checkpoint, const fs::path& out, Context context = {});

// What there is to say about a folder of this form, before it is written. Errors: exit 3 for codes that GPTQ cannot
// hold, with the first linear and why.
std::vector<std::string> plan_folder(const Checkpoint& checkpoint, FolderForm form);

// Model -> model folder (transformers and pare read it): codes stay codes, floats keep their type and their bits, but
// doubles, which become F32. Returns what to say about it. Errors: exit 2 when `out` exists or its work folder holds
// work of others, exit 3 for doubles that no float holds, and as plan_folder(); nothing of its own is left then.
std::vector<std::string> export_folder(const Checkpoint& checkpoint, const fs::path& out, Context& context,
                                       FolderForm form = FolderForm::kCompressedTensors);

}  // namespace pare
