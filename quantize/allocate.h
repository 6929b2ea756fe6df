// Which linear gets how many bits, by what the loss of the whole model says about each. No LibTorch types.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "core/context.h"
#include "model/blocks.h"
#include "quantize/policy.h"

namespace pare {

struct BitChoice {
  Codec codec;
  double bits = 0;  // of the whole tensor, scales and zero points included
  double cost = 0;  // nats per token
};

// One choice for each tensor, with the sum of bits at most `budget`: upgrades along the lower convex hulls of cost over
// bits in the order of what they gain per bit, the greedy solution of the multiple-choice knapsack: the best one at every
// budget that an upgrade fills exactly, else at most one upgrade from the bound. Error: exit 2 where not even the
// smallest choices fit.
std::vector<std::size_t> choose_bits(const std::vector<std::vector<BitChoice>>& tensors, double budget);
// The other way round: the fewest bits along the same hulls with the sum of costs at most `limit`. Error: exit 2 where
// not even the largest choices reach it.
std::vector<std::size_t> choose_cost(const std::vector<std::vector<BitChoice>>& tensors, double limit);

struct AllocateJob {
  const Checkpoint& model;
  const CalibrationWindows& windows;
  const TokenWeights& sensitivity;  // of these windows, with `outputs`
  std::optional<double> bits;       // a weight, scales included, over the tensors that are free; or
  std::optional<double> kl;         // nats per token, of the costs added up
  std::string device = "cpu";
  int threads = 0;
  fs::path spill;
};

// The tensors of the plan that are free: block linears whose codec is the one asked for all of them.
std::vector<std::size_t> free_tensors(const std::vector<TensorPlan>& plan, const Codec& asked);

// Before anything is measured. Errors: exit 2 where no tensor is free; where the narrowest codecs of those that are need
// more than `bits` a weight.
// Where the codec asked for promises more than the choices keep (a zero point, a minimum, int8 inputs), or has fewer bits
// than any of them.
void require_choices(const Codec& asked);
void require_free(const std::vector<std::size_t>& free, const std::string& option);
void require_bits(const std::vector<TensorPlan>& plan, const std::vector<std::size_t>& free, double bits);

// Gives every free tensor the codec that the knapsack chooses from q3, q4g128, q4g64, q4 and q8, as far as they divide its
// rows. What a codec costs is the KL that rounding this tensor alone to it brings, to second order: 1/2 sum_j r_j D_j H
// D_j^T with D the rounding error under searched scales, H the token-weighted Hessian of the input and r_j the Fisher
// information of output j. Errors of different tokens are taken as independent, which is too kind to v.
// Returns [{"name", "codec", "bits", "costs"}, ...]. Error: exit 2 where the bits are too few.
Json allocate_bits(const AllocateJob& job, const std::vector<std::size_t>& free, std::vector<TensorPlan>& plan,
                   Context& context);

}  // namespace pare
