// How much the loss of the whole model depends on what a linear gives at each token. No LibTorch types.
#pragma once

#include <cstdint>
#include <string>

#include "core/checkpoint.h"
#include "core/context.h"
#include "model/blocks.h"

namespace pare {

inline constexpr double kFisherClip = 0.999;  // quantile at which a token's weight is cut
inline constexpr double kFisherFloor = 0.1;   // share of the weight that all tokens have alike

// For every input that linears share, the mean over their outputs z of (d loss / d z)^2 at each token, where the loss
// is the next-token loss on labels drawn from the model itself: the diagonal of the Fisher information, which at equal
// distributions is the Hessian of the KL (GuidedQuant, Kim et al. 2025, with one group of output channels). Cut at the
// quantile, mixed with a constant and scaled to mean 1. The whole model is in memory, in float32, once.
// The same bits at any number of threads. Error: exit 2 for a model with experts.
TokenWeights fisher_weights(const Checkpoint& checkpoint, const CalibrationWindows& windows, std::uint64_t seed,
                            const std::string& device, int threads, Context& context);

// Peak memory beside the calibration windows' activations, in bytes.
std::uint64_t fisher_peak_bytes(const ModelConfig& config, std::int64_t windows, std::int64_t length, int threads);

}  // namespace pare
