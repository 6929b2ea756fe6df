#include "model/divergences.h"

#include <cmath>

#include "core/error.h"
#include "model/head_loss.h"

namespace pare {
namespace {

using torch::Tensor;

// D and what its gradient needs for the mean, both [rows, vocab]: see divergence_kernels.cpp.
struct Terms {
  Tensor value, pull;
};

// log(a p + b q)
Tensor log_mixture(const Tensor& log_p, double a, const Tensor& log_q, double b) {
  return torch::logaddexp(log_p + std::log(a), log_q + std::log(b));
}

// The head's part of |p - q| [rows, 1].
Tensor head_share(const Tensor& p, const Tensor& q) {
  const auto [sorted, order] = p.sort(/*stable=*/true, 1, /*descending=*/true);
  Tensor tail = sorted.cumsum(1) > static_cast<double>(kAdaptiveHead);
  tail.select(1, 0).fill_(false);
  const Tensor gap = (sorted - q.gather(1, order)).abs();
  const Tensor head = gap.masked_fill(tail, 0).sum(1, true), all = gap.sum(1, true);
  return torch::where(all > 0, head / all, torch::full_like(all, 0.5));
}

Terms terms(Divergence kind, double parameter, const Tensor& log_p, const Tensor& log_q) {
  const Tensor p = log_p.exp(), q = log_q.exp(), ratio = log_q - log_p;
  switch (kind) {
    case Divergence::kForwardKl:
      return {-p * ratio, -p};
    case Divergence::kReverseKl:
      return {q * ratio, q * ratio};
    case Divergence::kJsd: {
      const Tensor m = log_mixture(log_p, parameter, log_q, 1 - parameter), own = q * (log_q - m) * (1 - parameter);
      return {p * (log_p - m) * parameter + own, own};
    }
    case Divergence::kSkewKl: {
      const Tensor m = log_mixture(log_p, parameter, log_q, 1 - parameter);
      return {p * (log_p - m), (log_p + log_q - m).exp() * (parameter - 1)};
    }
    case Divergence::kSkewReverseKl: {
      const Tensor m = log_mixture(log_p, 1 - parameter, log_q, parameter);
      const Tensor x = q * (log_q - m);
      return {x, x - (2 * log_q - m).exp() * parameter};
    }
    case Divergence::kAdaptiveKl:
      break;
  }
  const Tensor h = head_share(p, q), x = q * ratio * (1 - h);
  return {x - p * ratio * h, x - p * h};
}

// Turns student logits into the gradient in place. teacher is not needed afterwards.
void divergence_rows(Tensor& student, const Tensor& teacher, const Tensor& targets, const DivergenceLoss& loss,
                     double scale, Tensor& value, Tensor& ce) {
  const std::int64_t rows = student.size(0), vocab = student.size(1);
  const DistillLoss& w = loss.weights;
  if (has_kernel(student)) {
    value = torch::empty({rows}, student.options().dtype(torch::kFloat));
    ce = torch::empty_like(value);
    const DivergenceStep step{loss.kind,
                              static_cast<float>(loss.parameter),
                              static_cast<float>(w.tau),
                              static_cast<float>(w.kl_weight),
                              static_cast<float>(w.ce_weight),
                              static_cast<float>(scale)};
    const auto run = [&]<class T>(T* s, const T* t) {
      for_shards(rows, [&](std::int64_t begin, std::int64_t end) {
        divergence_kernel<T>()(step, s + begin * vocab, t + begin * vocab, targets.data_ptr<std::int64_t>() + begin,
                               end - begin, vocab, value.data_ptr<float>() + begin, ce.data_ptr<float>() + begin);
      });
    };
    if (student.scalar_type() == torch::kFloat)
      run(storage<float>(student), storage<float>(teacher));
    else
      run(storage<Bf16>(student), storage<Bf16>(teacher));
    return;
  }
  const auto type = student.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  const Tensor counted = (targets >= 0).to(type).unsqueeze(1), index = targets.clamp_min(0).unsqueeze(1);
  const Tensor z = student.to(type), log_q = torch::log_softmax(z / w.tau, -1);
  const Terms t = terms(loss.kind, loss.parameter, torch::log_softmax(teacher.to(type) / w.tau, -1), log_q);
  value = t.value.sum(1) * counted.squeeze(1);
  Tensor hard = torch::log_softmax(z, -1);
  ce = -(hard.gather(1, index) * counted).squeeze(1);
  hard = hard.exp_();
  hard.scatter_add_(1, index, -torch::ones_like(index, hard.options()));
  const Tensor g = (t.pull - log_q.exp() * t.pull.sum(1, true)) * (w.kl_weight * w.tau) + hard * w.ce_weight;
  student = (g * counted * scale).to(student.scalar_type());
}

// As above for an estimate of the teacher: kl_weight * tau * (q - probability), which is the gradient of a next-token
// loss but at the listed ids and the target.
void sparse_rows(Tensor& student, const SparseTeacher& teacher, const Tensor& targets, const DistillLoss& loss,
                 double scale, Tensor& value, Tensor& ce) {
  const auto type = student.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  const Tensor counted = (targets >= 0).to(type), target = targets.clamp_min(0).unsqueeze(1);
  Tensor hard;
  if (loss.ce_weight != 0) {
    hard = student.clone();
    ce = cross_entropy_rows(hard, targets, scale * loss.ce_weight);
  } else {
    ce = torch::zeros_like(counted);
  }
  if (loss.tau != 1) student.div_(loss.tau);
  // Places that count nothing take the target's, which is set last.
  const Tensor index = torch::where(teacher.probability > 0, teacher.index, target);
  const Tensor listed = student.gather(1, index).to(type), own = student.gather(1, target).to(type);
  const double soft = scale * loss.kl_weight * loss.tau;
  const Tensor losses = cross_entropy_rows(student, targets, soft).to(type);  // lse - own, 0 where nothing is counted
  const Tensor lse = losses.unsqueeze(1) + own, p = teacher.probability.to(type);
  value = ((lse - (p * listed).sum(1, true)).squeeze(1) - teacher.entropy.to(type)) * counted;
  const Tensor weight = counted.unsqueeze(1) * soft;
  // Set, not added to: in bfloat16 the target's own q - 1 has lost q. No q is above 1, but in rows that do not count
  // lse is not one.
  const Tensor hit = (p * (index == target).to(type)).sum(1, true);
  student.scatter_(1, index, (((listed - lse).clamp_max(0).exp() - p) * weight).to(student.scalar_type()));
  student.scatter_(1, target, (((own - lse).exp() - hit) * weight).to(student.scalar_type()));
  if (hard.defined()) student.add_(hard);
}

void add_sums(const Tensor& value, const Tensor& ce, LossSums* sums, double& value_sum, double& ce_sum) {
  value_sum = sum_in_order(value);
  ce_sum = sum_in_order(ce);
  if (sums == nullptr) return;
  sums->kl += value_sum;
  sums->ce += ce_sum;
}

}  // namespace

Tensor divergence_loss(const Tensor& hidden, const OutputHead& head, const Tensor& teacher_hidden,
                       const OutputHead& teacher_head, const Tensor& targets_any, const DivergenceLoss& asked,
                       double scale, LossSums* sums) {
  DivergenceLoss loss = asked;
  if (loss.parameter == 0) {  // nothing mixed in
    if (loss.kind == Divergence::kSkewKl) loss.kind = Divergence::kForwardKl;
    if (loss.kind == Divergence::kSkewReverseKl) loss.kind = Divergence::kReverseKl;
  }
  if (loss.kind == Divergence::kForwardKl)
    return distill_loss(hidden, head, teacher_hidden, teacher_head, targets_any, loss.weights, scale, sums);
  begin_loss(targets_any, head, sums);
  const Tensor targets = targets_any.contiguous(), x = teacher_hidden.detach().to(hidden.scalar_type());
  const OutputHead taught(teacher_head.weight.detach().to(hidden.scalar_type()), teacher_head.softcap);
  return loss_over_head(hidden, head, [&](std::int64_t begin, std::int64_t count, Tensor& logits) {
    Tensor value, ce;
    divergence_rows(logits, head_rows(x, taught, begin, count), targets.narrow(0, begin, count), loss, scale, value,
                    ce);
    double value_sum = 0, ce_sum = 0;
    add_sums(value, ce, sums, value_sum, ce_sum);
    const DistillLoss& w = loss.weights;
    return scale * (w.kl_weight * w.tau * w.tau * value_sum + w.ce_weight * ce_sum);
  });
}

Tensor sparse_distill_loss(const Tensor& hidden, const OutputHead& head, const SparseTeacher& teacher,
                           const Tensor& targets_any, const DistillLoss& loss, double scale, LossSums* sums) {
  begin_loss(targets_any, head, sums);
  const Tensor targets = targets_any.contiguous();
  return loss_over_head(hidden, head, [&](std::int64_t begin, std::int64_t count, Tensor& logits) {
    const SparseTeacher part{teacher.index.narrow(0, begin, count), teacher.probability.narrow(0, begin, count),
                             teacher.entropy.narrow(0, begin, count)};
    Tensor value, ce;
    sparse_rows(logits, part, targets.narrow(0, begin, count), loss, scale, value, ce);
    double value_sum = 0, ce_sum = 0;
    add_sums(value, ce, sums, value_sum, ce_sum);
    return scale * (loss.kl_weight * loss.tau * loss.tau * value_sum + loss.ce_weight * ce_sum);
  });
}

}  // namespace pare
