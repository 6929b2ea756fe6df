// Hidden states of the calibration windows outside the block walk, and how far two models' predictions are apart.
// Include only from .cpp files (LibTorch headers).
#pragma once

#include <functional>
#include <vector>

#include "model/blocks.h"
#include "model/decoder.h"

namespace pare {

// Runs work(0) .. work(count - 1), on the CPU on `threads` threads (0: all cores) with LibTorch single-threaded inside
// each, so that results do not depend on the thread count; on other devices one after the other. The first exception
// is thrown again. No gradients inside.
void for_each_shard(const torch::Device& device, int threads, std::size_t count,
                    const std::function<void(std::size_t)>& work);

// The calibration windows cut into fixed shards: [windows, length] int64.
std::vector<torch::Tensor> window_shards(const CalibrationWindows& windows, const torch::Device& device);

// float32 hidden states, one [windows, length, hidden_size] per shard. Tensors are never changed in place, so streams
// may share them.
using Stream = std::vector<torch::Tensor>;

Stream embed_stream(const Checkpoint& model, const std::vector<torch::Tensor>& shards, const torch::Device& device);
// Applies a block to all shards of several streams.
void advance(DecoderBlock& block, const RopeTables& rope, const std::vector<Stream*>& streams,
             const torch::Device& device, int threads);

// Final norm and head of a model.
struct Head {
  torch::Tensor norm, norm_bias, weight;  // norm: what RMSNorm multiplies by; with a bias: LayerNorm
  double eps = 1e-6, softcap = 0;
};
Head load_head(const Checkpoint& model, const torch::Device& device);

struct Divergence {
  double kl = 0, kl_error = 0;                  // mean KL(original || other) in nats per position; standard error
  double loss = 0, loss_error = 0;              // mean -log p(next id) of the other model, nats
  double original_loss = 0, original_loss_error = 0;
};

// Standard errors are over windows, which share documents: they say how much the number moves with other windows.
// Softmaxes in double; every position that has a next id in its window is scored.
std::vector<Divergence> compare_streams(const Stream& original, const Head& original_head,
                                        const std::vector<const Stream*>& others, const Head& other_head,
                                        const std::vector<torch::Tensor>& shards, const torch::Device& device,
                                        int threads);

// Both models over all windows, one block of each resident at a time.
Divergence compare_models(const Checkpoint& original, const Checkpoint& other, const CalibrationWindows& windows,
                          const torch::Device& device, Context& context);

}  // namespace pare
