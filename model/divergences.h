// What a student may minimise against its teacher's distribution, in vocabulary chunks as in losses.h. p: the teacher's
// probabilities, q: the student's, both softmax(logits / tau).
//   kForwardKl      KL(p || q)                                                    Hinton et al. 2015
//   kReverseKl      KL(q || p)                                                    Gu et al. 2023 (MiniLLM)
//   kJsd            b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q        Agarwal et al. 2023 (GKD), b in (0,
//   1) kSkewKl         KL(p || a p + (1 - a) q)                                      Ko et al. 2024 (DistiLLM), a in
//   [0, 1) kSkewReverseKl  KL(q || (1 - a) p + a q)                                      the same kAdaptiveKl     h
//   KL(p || q) + (1 - h) KL(q || p)                             Wu et al. 2024 (AKL)
//                   h: the part of sum |p - q| that falls on the teacher's head, its largest probabilities up to 0.5
//                   together (at least one; equal ones by rising id); h is a constant in the gradient
// Include only from .cpp files (LibTorch).
#pragma once

#include "model/divergence_kernels.h"
#include "model/losses.h"

namespace pare {

struct DivergenceLoss {
  Divergence kind = Divergence::kForwardKl;
  double parameter = 0;  // b of kJsd, a of the skewed ones
  DistillLoss weights;   // kl_weight is that of tau^2 D
};

// scale * sum over rows of kl_weight * tau^2 * D + ce_weight * CE; shapes as in distill_loss. sums->kl is the sum of D.
torch::Tensor divergence_loss(const torch::Tensor& hidden, const OutputHead& head, const torch::Tensor& teacher_hidden,
                              const OutputHead& teacher_head, const torch::Tensor& targets, const DivergenceLoss& loss,
                              double scale, LossSums* sums);

// A teacher known by an estimate of its distribution at loss.tau: index [rows, k] int64 and probability [rows, k],
// which add up to 1 in each row (an index with probability 0 counts nothing and may repeat), and its entropy [rows],
// nats.
struct SparseTeacher {
  torch::Tensor index, probability, entropy;
};
// scale * sum over rows of kl_weight * tau^2 * (-entropy - sum_i probability_i log q_i) + ce_weight * CE: where the
// estimate is unbiased, so are this value and its gradient, those of forward KL (Anshumann et al. 2025).
torch::Tensor sparse_distill_loss(const torch::Tensor& hidden, const OutputHead& head, const SparseTeacher& teacher,
                                  const torch::Tensor& targets, const DistillLoss& loss, double scale, LossSums* sums);

}  // namespace pare
