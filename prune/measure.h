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

// Shards whose hidden states are held at a time: the rest of the windows follows in later groups, so that memory does
// not grow with the calibration text. Figures are per window: grouping changes none.
inline constexpr std::int64_t kGroupTokens = 16384;
std::vector<std::vector<torch::Tensor>> shard_groups(const CalibrationWindows& windows, const torch::Device& device);
std::int64_t group_tokens(std::int64_t windows, std::int64_t length);  // of the largest group

// float32 hidden states, one [windows, length, hidden_size] per shard. Tensors are never changed in place, so streams
// may share them.
using Stream = std::vector<torch::Tensor>;

Stream embed_stream(const Checkpoint& model, const std::vector<torch::Tensor>& shards, const torch::Device& device);
// Carries several streams past a block; of experts one is resident at a time.
void advance(const Checkpoint& model, int layer, const RopeTables& rope, const std::vector<Stream*>& streams,
             const torch::Device& device, int threads);

// Final norm and head of a model; the rows of the head are read where they are needed, on other devices than the CPU
// once.
class Head {
 public:
  Head(const Checkpoint& model, const torch::Device& device);
  std::int64_t vocab_size() const { return model_->config().vocab_size; }
  torch::Tensor normed(const torch::Tensor& hidden) const;
  // [rows, width] normed -> logits of `count` ids from `first` on, [rows, count] in double.
  torch::Tensor logits(const torch::Tensor& normed, std::int64_t first, std::int64_t count) const;

 private:
  const Checkpoint* model_;
  std::string name_;
  torch::Tensor norm_, norm_bias_, resident_;  // no bias: RMSNorm; resident: undefined on the CPU
};

struct Divergence {
  double kl = 0, kl_error = 0;                  // mean KL(original || other) in nats per position; standard error
  double loss = 0, loss_error = 0;              // mean -log p(next id) of the other model, nats
  double original_loss = 0, original_loss_error = 0;
};

// Per-window means in window order.
struct WindowFigures {
  std::vector<double> kl, loss, original_loss;
  void append(const WindowFigures& more);
  // Standard errors are over windows, which share documents: they say how much a number moves with other windows.
  Divergence divergence() const;
};

// Of each of `others`. Softmaxes in double, in one pass over slices of the vocabulary; every position that has a next
// id in its window is scored.
std::vector<WindowFigures> compare_streams(const Stream& original, const Head& original_head,
                                           const std::vector<const Stream*>& others, const Head& other_head,
                                           const std::vector<torch::Tensor>& shards, const torch::Device& device,
                                           int threads);

// Both models over all windows, one block of each resident at a time.
Divergence compare_models(const Checkpoint& original, const Checkpoint& other, const CalibrationWindows& windows,
                          const torch::Device& device, Context& context);
// Peak anonymous bytes of compare_models, or with more streams of one compare_streams.
std::uint64_t compare_peak_bytes(const ModelConfig& config, std::int64_t windows, std::int64_t length,
                                 std::int64_t others = 1);

}  // namespace pare
