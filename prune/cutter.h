// Writing a model that is smaller in every block: what goes, measured on the original, and least squares for what reads
// the rest. Include only from .cpp files (LibTorch headers).
#pragma once

#include <vector>

#include "prune/cut.h"
#include "prune/method.h"
#include "prune/shape.h"

namespace pare {

// By what units are ranked. kMeasured: energy of what they add to the output of the linear that reads them, on the
// calibration text. kWeights: norms of the weights around them. kRandom: by the seed.
enum class RankBy { kMeasured, kWeights, kRandom };

struct CutPlan {
  Shape shape;              // of the widest block
  std::vector<int> layers;  // blocks of the original
  std::vector<BlockWidths> widths;  // of each of `layers`; empty: the shape's
  Kept channels;            // of the residual stream, the same everywhere: every block reads and writes it
  RankBy rank = RankBy::kMeasured;
  bool refit = true;
  double damping = 0.01;
  bool report = true;
};

// Channels whose removal takes the least of the output energy of all linears that read the residual stream: for each
// norm, E[x_j^2] |W_:j|^2 as a share of all channels', summed over the norms of the blocks `layers` and the last one.
// x: what the norm makes of the original's hidden states, which Minitron ranks channels by (Muralidharan et al. 2024).
Kept choose_channels(PruneJob& job, const std::vector<int>& layers, std::int64_t keep, RankBy rank);
// Blocks that stay by the norm of their weights, or by the seed: choose_blocks() for the other two ways of ranking.
std::vector<int> choose_blocks_unmeasured(PruneJob& job, int keep, RankBy rank);

// The two choices that concern the whole model: plan.layers, where they are not set, and plan.channels.
void choose_globals(PruneJob& job, CutPlan& plan);

// Writes all tensors of the cut model and finishes the folder job.work. Heads, neurons and experts are chosen block by
// block from the original's activations. With `refit` every linear of a block is then refitted (prune/refit.h), in the
// order of the walk, from what it reads in the cut model: q, k, v, gate and up to the outputs of the original, o and
// down to what the cut model's hidden state lacks of the original's. A refit that does not lower the error on windows
// it has not seen is dropped. Resumes block by block. The last norm follows by a factor a channel; a head of its own is
// refitted as well.
void write_cut(PruneJob& job, const CutPlan& plan);

std::uint64_t cut_peak_bytes(const ModelConfig& config, const Shape& shape, std::int64_t windows, std::int64_t length,
                             bool refit, const fs::path& spill);
double cut_passes(const ModelConfig& config, const Shape& shape, bool refit);

}  // namespace pare
