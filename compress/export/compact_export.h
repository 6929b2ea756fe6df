// The last step of a run: model folder -> compact file, proven before it gets its name.
#pragma once

#include "compress/toolbox.h"

namespace pare {

// Codes as they stand in the folder, float matrices in `request.codec` ("keep": as stored), vectors in f32; tokenizer,
// configs and the recipe inside. `before_seal`, if set, sees the complete file and gives the report that goes into it.
void export_compact_file(const ExportRequest& request, Context& context);

// Weight payloads of that file and the tokenizer of `folder`, without the model being there yet. A `codec` other than
// "keep" is counted for models without codes alone: where there are codes, hardly a matrix is left in floats.
std::uint64_t compact_bytes(const PlannedModel& model, const fs::path& folder, const std::string& codec);

}  // namespace pare
