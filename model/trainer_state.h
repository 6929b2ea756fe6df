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

inline constexpr double kPrunedShare = 0.05;  // exact zeros never come in such numbers by themselves

class FlatParameters {
 public:
  // Moves the decoder's parameters into the flat storage (they become views). keep_zeros: "on" keeps every exact zero
  // of the linear weights at zero, "auto" does so for a linear with more than 5 % of them, "off" never.
  // companions: further matrices, trained alike.
  // frozen: the decoder's own parameters are left as they are and take no gradient.
  FlatParameters(Decoder& decoder, const std::string& keep_zeros, const torch::Device& device,
                 const std::vector<torch::Tensor>& companions = {}, bool frozen = false);
  void clear_gradients();
  double gradient_norm() const;
  // One AdamW step; weight decay on matrices only. t counts from 1.
  void step(double lr, double beta1, double beta2, double decay, double clip_factor, std::int64_t t);
  std::string hash() const;  // of the weights
  std::int64_t kept_zeros() const { return kept_zeros_; }
  // The weights as they are, to come back to: part of the state file from then on.
  void keep_best() { best_ = w_.clone(); }
  bool has_best() const { return best_.defined(); }
  void take_best();
  void sum_gradients(Ranks& ranks) const { ranks.sum(g_); }
  void share(Ranks& ranks);  // rank 0's weights, best weights and moments for all

  // `meta` travels in the file's metadata. read() returns it; exit 3 when the file does not fit the model.
  void write(const fs::path& file, const Json& meta) const;
  Json read(const fs::path& file);

 private:
  struct Range {
    std::int64_t begin = 0, count = 0;
    bool decay = false;
  };
  torch::Tensor best_;  // undefined until keep_best
  torch::Tensor w_, g_, m_, v_, keep_;  // keep_: uint8, undefined when nothing is kept at zero
  std::vector<Range> ranges_;
  std::int64_t kept_zeros_ = 0;
};

}  // namespace pare
