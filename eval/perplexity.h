// Perplexity of one model.
#pragma once

#include "eval/divergence.h"

namespace pare {

struct PerplexityResult {
  std::int64_t windows = 0, documents = 0, predictions = 0;
  std::string clusters;  // what the standard errors are over
  ModelScore score;
};

// compare() without a second model; same rules, units and errors.
PerplexityResult perplexity(LogitsSource& model, std::span<const Window> windows, const CompareOptions& options,
                            Progress& progress);

}  // namespace pare
