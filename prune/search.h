// The shape of a parameter budget: what each way of becoming smaller costs, measured, and the cheapest combination.
// Include only from .cpp files (LibTorch headers).
#pragma once

#include <vector>

#include "prune/cutter.h"

namespace pare {

// Ways to make one thing smaller, each a shape that differs from the model's own in it alone: blocks, heads (with the
// channels where config.json ties them together), neurons, channels, experts; down to half of each. Every combination
// of one of each, or none, is a candidate.
std::vector<std::vector<Shape>> search_axes(const ModelConfig& config, std::int64_t multiple);
// Candidates of at most `budget` parameters that the model can have, the largest first. Errors: exit 2 where the model
// is no larger than the budget, or no candidate is small enough.
std::vector<Shape> shapes_within(const ModelConfig& config, std::int64_t multiple, std::int64_t budget);

// Measures the divergence of each single cut from the original, adds up what a combination would cost, and of the three
// cheapest candidates within the budget measures the divergence itself: the smallest wins. Reports all of it. `plan`
// says how to rank and refit. Survives a kill in job.state.
Shape search_shape(PruneJob& job, const CutPlan& plan, std::int64_t multiple, std::int64_t budget);

// Single cuts and combinations that a search measures at most, in passes over the calibration text.
double search_passes(const ModelConfig& config, std::int64_t multiple, bool refit);

}  // namespace pare
