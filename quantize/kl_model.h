// An original and its quantized form side by side: the KL between their predictions, and its gradient, with the same bits
// at any number of threads. Include only from .cpp files (LibTorch headers).
#pragma once

#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "model/blocks.h"
#include "model/decoder.h"
#include "model/losses.h"

namespace pare {

class KlModel {
 public:
  // Both in float32, without gradients.
  KlModel(const Checkpoint& original, const Checkpoint& quantized, const std::string& device, int threads,
          std::int64_t length);

  Decoder& original() { return original_; }
  Decoder& quantized() { return quantized_; }
  torch::Device device() const { return device_; }
  // Mean KL(original || quantized) over all positions of all windows, nats.
  double divergence(const CalibrationWindows& windows);
  // Gradients of the mean KL over windows [first, first + count) with respect to `parameters` of the quantized model,
  // which require one; undefined where a parameter took no part. Each window's are made on one thread, and added in order.
  std::vector<torch::Tensor> gradients(const CalibrationWindows& windows, std::int64_t first, std::int64_t count,
                                       const std::vector<torch::Tensor>& parameters, double& kl);

  // Diagonal of the Fisher information of the original per token, with respect to its `parameters`, which require a
  // gradient: at equal predictions the second derivative of the mean KL. Squares of the gradients of whole windows, the
  // labels of which are drawn from the model itself: they are independent, so that products of different tokens vanish in
  // expectation. Zeros where a parameter took no part.
  std::vector<torch::Tensor> curvature(const CalibrationWindows& windows, std::int64_t count, std::uint64_t seed,
                                       const std::vector<torch::Tensor>& parameters);

 private:
  torch::Tensor ids(const CalibrationWindows& windows, std::int64_t window) const;
  torch::Tensor loss(const torch::Tensor& ids, double scale, LossSums& sums);

  torch::Device device_;
  int threads_;
  Decoder original_, quantized_;
};

}  // namespace pare
