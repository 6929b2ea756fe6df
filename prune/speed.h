// How fast a shape decodes on this machine, measured with the runtime on files of random weights.
#pragma once

#include <functional>
#include <vector>

#include "core/context.h"
#include "core/file.h"
#include "prune/costs.h"

namespace pare {

// Median seconds of a token that the runtime decodes at the beginning of its context, one sequence, as `pare bench`
// measures them, of a model of this config whose weights are random. The file stands at `scratch` meanwhile.
// Errors: exit 5 where the disk is too small for it.
double seconds_per_token(const ModelConfig& config, const StoredAs& stored, int threads, const fs::path& scratch);

using TokenTimer = std::function<double(const ModelConfig&)>;  // seconds of a token

struct Timing {
  Shape shape;
  double seconds = 0;
};
// Times of the model's own shape and of shapes with half of one thing each.
std::vector<Timing> measure_shapes(const ModelConfig& config, const TokenTimer& timer, Context& context);
// What a time holds for: the processor, its kernels and the threads (0: all cores).
std::string timed_on(int threads);
// The times, none below 0, that say these timings best (relative least squares).
DecodeTimes fit_times(const ModelConfig& config, const StoredAs& stored, const std::vector<Timing>& timings);

}  // namespace pare
