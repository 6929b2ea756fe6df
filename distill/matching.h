// Hidden states of the student, and what its attention gives, matched with the teacher's through learned projections
// (Romero et al. 2015; Jiao et al. 2020). Include only from .cpp files (LibTorch).
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "model/decoder.h"

namespace pare {

using LayerPairs = std::vector<std::pair<int, int>>;  // student layer, teacher layer; counted from 0

// "" or "even": student layer i with the teacher layer that ends the same part of its depth, the last with the last.
// "0:1,2:5": exactly these. Error: exit 2.
LayerPairs parse_layer_pairs(const std::string& text, std::int64_t student_layers, std::int64_t teacher_layers);

// What comes out of the final norm, and out of some of the blocks before it and of their attention.
struct HiddenStates {
  torch::Tensor last;                    // as Decoder::hidden
  std::vector<torch::Tensor> blocks;     // [batch, n, width], in the order of `layers`
  std::vector<torch::Tensor> attention;  // the same of o_proj, before it is added
};
HiddenStates hidden_states(Decoder& decoder, const torch::Tensor& ids, const std::vector<int>& layers,
                           const torch::Tensor& starts = {}, const std::vector<int>& attention_layers = {});

class HiddenMatch {
 public:
  // Projections [teacher width, student width] begin as the identity where the widths agree, else random (seed).
  HiddenMatch(LayerPairs pairs, std::int64_t student_width, std::int64_t teacher_width, std::uint64_t seed,
              const torch::Device& device);
  std::vector<int> student_layers() const;
  std::vector<int> teacher_layers() const;
  const std::vector<torch::Tensor>& projections() const { return projections_; }  // trained, never written
  // scale * sum over rows with a target, mean over pairs, of |P s - t|^2 / |t|^2: the part of the teacher's state that
  // is missed. student, teacher: HiddenStates::blocks or ::attention of the layers below.
  torch::Tensor loss(const std::vector<torch::Tensor>& student, const std::vector<torch::Tensor>& teacher,
                     const torch::Tensor& targets, double scale) const;

 private:
  LayerPairs pairs_;
  std::vector<torch::Tensor> projections_;
};

}  // namespace pare
