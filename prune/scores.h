// What it costs to make one block smaller and leave all others as they are. Include only from .cpp files (LibTorch
// headers).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "prune/cutter.h"

namespace pare {

// Sizes to measure in every block: neurons of the MLP and heads of keys and values (with their query heads), each
// falling; and the model without the block.
struct ScoreLevels {
  std::vector<std::int64_t> ffn, kv_heads;
  bool without = false;
};

struct BlockScores {
  std::vector<double> ffn, kv_heads;  // mean KL(original || model with this block cut to the level) in nats
  double without = 0;
};

// Of each of `layers`, in order. What goes is chosen by the plan's ranking; with plan.refit the linear that reads the
// rest is refitted to the original's outputs first. Survives a kill in job.state.
std::vector<BlockScores> measure_scores(PruneJob& job, const CutPlan& plan, const std::vector<int>& layers,
                                        const ScoreLevels& levels);
std::uint64_t scores_peak_bytes(const ModelConfig& config, const ScoreLevels& levels, std::int64_t windows,
                                std::int64_t length, bool refit, const fs::path& spill);
double scores_passes(const ModelConfig& config, const ScoreLevels& levels, std::int64_t layers);

// The divergence `kl` of `model`, in words. Error: exit 1 where it is not a number.
double finite_divergence(double kl, const std::string& model);

// `count` levels or fewer, evenly spread below `all`, multiples of `step` and at least `step`, falling.
std::vector<std::int64_t> even_levels(std::int64_t all, std::int64_t step, int count);
// Levels as --per-layer measures them: eighths of the neurons and of the heads that a block of this model can lose.
ScoreLevels score_levels(const ModelConfig& config, std::int64_t multiple, bool ffn, bool heads, bool without);

// Cost of size `n` between 0 at `all` and the measured levels, linear in between; it never rises with n. Below the last
// level: infinite.
double level_cost(std::int64_t all, const std::vector<std::int64_t>& levels, const std::vector<double>& scores,
                  std::int64_t n);

}  // namespace pare
