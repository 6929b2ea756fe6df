// Which heads, neurons and experts of a block stay. Include only from .cpp files (LibTorch headers).
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "prune/cutter.h"

namespace pare {

// Of the parts of a block: energies of what they add to the output of the linear that reads them, summed over the
// tokens, or what stands in their place where nothing is measured. Lists of what is not cut are empty.
struct Importance {
  std::vector<double> heads, kv_heads, experts;
  std::vector<std::vector<double>> neurons;  // of the MLP, or of each expert
  std::map<std::string, double> norms;       // by module: see norm_narrowing; empty where all channels stay
};

// `original(window)`: what the block reads there in the original model, [1, length, hidden_size].
// shape: what this block is cut to.
Importance measure_block(const PruneJob& job, const CutPlan& plan, const Shape& shape, DecoderBlock& whole, const RopeTables& rope,
                         const torch::Device& device, const std::function<torch::Tensor(std::int64_t)>& original);
BlockCut choose_parts(const ModelConfig& config, const Shape& shape, const Importance& importance);
// Mean over the rows of x of the rms that a norm sees in `channels` over the rms that it sees in all of x.
double norm_narrowing(const ModelConfig& config, const torch::Tensor& x, const torch::Tensor& channels);

torch::Tensor rows_of(const torch::Tensor& x);  // [.., n] -> [rows, n]
torch::Tensor parameter_of(DecoderBlock& block, const std::string& name);  // undefined where there is none

}  // namespace pare
