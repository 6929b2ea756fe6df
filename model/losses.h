// Losses on logits that are never stored whole: rows are taken in chunks, the gradient with respect to the hidden
// states and the head is computed in the forward pass, and backward only scales it. Include only from .cpp files.
#pragma once

#include <torch/torch.h>

#include <utility>

namespace pare {

// Sums over the rows that count (target >= 0), in float64.
struct LossSums {
  double ce = 0;          // -log p(target), nats
  double kl = 0;          // KL(teacher || student) at the given temperature, nats (distillation only)
  std::int64_t rows = 0;  // rows counted
};

// What turns final hidden states into logits: hidden times weight^T, then softcap * tanh(logit / softcap) where softcap
// > 0.
struct OutputHead {
  torch::Tensor weight;  // [vocab, width]
  double softcap = 0;
  OutputHead(torch::Tensor matrix, double cap = 0) : weight(std::move(matrix)), softcap(cap) {}
};

// Next-token loss. hidden [rows, width] (float, bfloat16 or double), targets [rows] int64, -1
// where nothing is predicted. Returns a scalar: scale * sum of -log p(target); differentiable in hidden and head.
torch::Tensor cross_entropy_loss(const torch::Tensor& hidden, const OutputHead& head, const torch::Tensor& targets,
                                 double scale, LossSums* sums);

struct DistillLoss {
  double tau = 1;          // temperature of both softmaxes; the KL is multiplied by tau^2 (Hinton et al. 2015)
  double kl_weight = 1;
  double ce_weight = 0;
};

// scale * sum over rows of kl_weight * tau^2 * KL(softmax(teacher / tau) || softmax(student / tau)) + ce_weight * CE.
// teacher_hidden [rows, teacher width] and teacher_head [vocab, teacher width] take no gradient.
torch::Tensor distill_loss(const torch::Tensor& hidden, const OutputHead& head, const torch::Tensor& teacher_hidden,
                           const OutputHead& teacher_head, const torch::Tensor& targets, const DistillLoss& loss,
                           double scale, LossSums* sums);

// A teacher known by its largest k log-probabilities of each row: index [rows, k] int64, log_prob [rows, k].
// scale * sum over rows of kl_weight * KL + ce_weight * CE at temperature 1, where KL is over k + 1 outcomes: the k
// listed ids and "any other" (a lower bound of the full KL; its gradient pulls the others' mass together, not apart).
torch::Tensor topk_distill_loss(const torch::Tensor& hidden, const OutputHead& head, const torch::Tensor& index,
                                const torch::Tensor& log_prob, const torch::Tensor& targets, const DistillLoss& loss,
                                double scale, LossSums* sums);

// KL(teacher || student) of each row at temperature 1, without gradient (evaluation); targets < 0 give 0.
torch::Tensor row_divergences(const torch::Tensor& hidden, const OutputHead& head, const torch::Tensor& teacher_hidden,
                              const OutputHead& teacher_head, const torch::Tensor& targets);

// -log p(target) of each row [rows] float, without gradient (evaluation); rows with target < 0 give 0.
torch::Tensor row_losses(const torch::Tensor& hidden, const OutputHead& head, const torch::Tensor& targets);

}  // namespace pare
