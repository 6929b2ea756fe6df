// All parameters as one flat row each of weights, gradients and moments: one clipping pass, one optimizer pass, one
// tensor each in the state file. Include only from .cpp files (LibTorch headers).
#pragma once

#include <torch/torch.h>

#include <string>
#include <vector>

#include "core/file.h"
#include "core/json.h"
#include "model/decoder.h"
#include "model/fused_kernels.h"
#include "model/ranks.h"

namespace pare {

class FlatParameters {
 public:
  // Moves the decoder's parameters into the flat storage (they become views). keep_zeros: "on" keeps every exact zero
  // of the linear weights at zero, "auto" does so for a linear with more than 5 % of them, "off" never.
  // companions: further matrices, trained alike.
  FlatParameters(Decoder& decoder, const std::string& keep_zeros, const torch::Device& device,
                 const std::vector<torch::Tensor>& companions = {});
  void clear_gradients();
  double gradient_norm() const;
  // One AdamW step; weight decay on matrices only. t counts from 1.
  void step(double lr, double beta1, double beta2, double decay, double clip_factor, std::int64_t t);
  std::string hash() const;  // of the weights
  std::int64_t kept_zeros() const { return kept_zeros_; }
  void sum_gradients(Ranks& ranks) const { ranks.sum(g_); }
  void share(Ranks& ranks) const;  // rank 0's weights and moments for all

  // `meta` travels in the file's metadata. read() returns it; exit 3 when the file does not fit the model.
  void write(const fs::path& file, const Json& meta) const;
  Json read(const fs::path& file);

 private:
  struct Range {
    std::int64_t begin = 0, count = 0;
    bool decay = false;
  };
  torch::Tensor w_, g_, m_, v_, keep_;  // keep_: uint8, undefined when nothing is kept at zero
  std::vector<Range> ranges_;
  std::int64_t kept_zeros_ = 0;
};

}  // namespace pare
