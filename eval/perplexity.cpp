#include "eval/perplexity.h"

namespace pare {

PerplexityResult perplexity(LogitsSource& model, std::span<const Window> windows, const CompareOptions& options,
                            Progress& progress) {
  const DivergenceResult pass = compare(model, nullptr, windows, options, progress);
  return {pass.windows, pass.documents, pass.predictions, pass.clusters, pass.original};
}

}  // namespace pare
