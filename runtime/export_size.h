// How large a compact file becomes beside its tensors, before there is a model to export.
#pragma once

#include <cstdint>
#include <vector>

#include "core/compact.h"
#include "core/config.h"
#include "core/file.h"

namespace pare {

// At most what a compact file of these tensors holds beside them when `pare export` makes it of a folder with the side
// files of this one: header, tokenizer, config and other embedded files, with room for a model card and the report.
std::uint64_t compact_bytes_beside(const fs::path& folder, const ModelConfig& config,
                                   const std::vector<CompactWriter::Plan>& tensors);

}  // namespace pare
