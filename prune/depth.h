// Which decoder blocks to keep: those go without which the predictions change least, measured, one at a time.
#pragma once

#include <vector>

#include "prune/method.h"

namespace pare {

// Their numbers, ascending. Choices survive a kill in job.state; report: the costs of all candidates.
std::vector<int> choose_blocks(PruneJob& job, int keep, bool report);
std::uint64_t choose_blocks_peak_bytes(const ModelConfig& config, std::int64_t samples, std::int64_t length);
double choose_blocks_passes(const ModelConfig& config, std::int64_t keep);

}  // namespace pare
