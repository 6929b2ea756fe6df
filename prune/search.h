// The shape of a budget: what each way of becoming smaller costs, measured, and the cheapest combination.
// Include only from .cpp files (LibTorch headers).
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "prune/costs.h"
#include "prune/cutter.h"
#include "prune/scores.h"
#include "prune/speed.h"

namespace pare {

struct Budget {
  Unit unit = Unit::kParameters;
  double limit = 0;       // parameters, bytes, or seconds a token
  StoredAs stored;        // what bytes and seconds are of
  TokenTimer timer = {};  // empty: decoding by the runtime on this machine
  std::string in_words(double cost) const;  // "12345 bytes as q4", "120 tokens a second as bf16"
  std::string option() const;               // "--max-params"
};

// Ways to make one thing smaller, each a shape that differs from the model's own in it alone: blocks, heads (with the
// channels where config.json ties them together), neurons, channels, experts; down to half of each. Every combination
// of one of each, or none, is a candidate.
std::vector<std::vector<Shape>> search_axes(const ModelConfig& config, std::int64_t multiple);
// Candidates within the budget that the model can have, the most expensive first. Errors: exit 2 where the model itself
// is within the budget, or no candidate is: it names the smallest.
std::vector<Shape> shapes_within(const ModelConfig& config, std::int64_t multiple, const Budget& budget,
                                 ShapeCosts& costs);

// Measures the divergence of each single cut from the original, adds up what a combination would cost, and of the three
// cheapest candidates within the budget measures the divergence itself: the smallest wins. Of a budget of seconds the
// candidates' decoding is measured too, and what misses it is left out; where all do (exit 1), no time is kept. Reports
// all of it. `plan` says how to rank and
// refit; what it keeps is set. Survives a kill in job.state.
void search_shape(PruneJob& job, CutPlan& plan, std::int64_t multiple, const Budget& budget, const DecodeTimes& times);

// The same where blocks may differ: scores of every block (prune/scores.h), neurons, heads and blocks taken by a
// knapsack. Two ways are measured, with all blocks and with those that the knapsack leaves; the better one is set.
void search_widths(PruneJob& job, CutPlan& plan, std::int64_t multiple, const Budget& budget, const DecodeTimes& times);
// Error: exit 2 where --per-layer is asked for means below the smallest sizes that it measures.
void refuse_means(const ModelConfig& config, const Shape& shape, std::int64_t multiple);
// plan.shape.ffn neurons and plan.shape.kv_heads heads of keys and values for each of plan.layers, given out among them
// so that the sum of the measured costs is the least: sets plan.widths. For means that refuse_means lets pass.
void spread_widths(PruneJob& job, CutPlan& plan, std::int64_t multiple);

// The cheapest widths by scores, costs in the unit of the budget. `least`: what the smallest choice costs; nullopt in
// place of a block: it goes. Error: exit 2 where nothing fits.
std::vector<std::optional<BlockWidths>> widths_within(const ModelConfig& config, std::int64_t multiple,
                                                      const ScoreLevels& levels,
                                                      const std::vector<BlockScores>& scores, const Budget& budget,
                                                      ShapeCosts& costs);

// Error: exit 2 where --per-layer has nothing within the budget to search, or the model itself is.
void refuse_widths(const ModelConfig& config, std::int64_t multiple, const Budget& budget, ShapeCosts& costs);

// Measured once on one machine with as many threads, kept in job.state; reports what was measured.
DecodeTimes decode_times(PruneJob& job, const Budget& budget);

// Single cuts and combinations that a search measures at most, in passes over the calibration text.
double search_passes(const ModelConfig& config, std::int64_t multiple, bool refit);

}  // namespace pare
