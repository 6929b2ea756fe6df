// How large a compact file becomes beside its tensors, before it is written.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/compact.h"

namespace pare {

// Header and embedded files (name -> bytes) of a file that CompactWriter makes of this plan; the report is not known yet.
std::uint64_t compact_overhead(const std::vector<CompactWriter::Plan>& plan,
                               const std::map<std::string, std::uint64_t>& embedded);

}  // namespace pare
