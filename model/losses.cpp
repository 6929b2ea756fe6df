#include "model/losses.h"

#include <vector>

#include "core/error.h"
#include "model/fused_kernels.h"
#include "model/head_loss.h"

namespace pare {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor capped(const Tensor& logits, double cap) {
  return cap > 0 ? torch::tanh(logits / cap) * cap : logits;
}

struct HeadLossFunction : torch::autograd::Function<HeadLossFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& hidden_any, const Tensor& head, double softcap,
                        const LogitRows& rows, bool want_hidden, bool want_head) {
    const Tensor hidden = hidden_any.contiguous(), w = head.to(hidden.scalar_type());
    const std::int64_t n = hidden.size(0), chunk = chunk_rows(head.size(0));
    Tensor g_hidden = want_hidden ? torch::empty_like(hidden) : Tensor();
    Tensor g_head = want_head ? torch::zeros_like(head) : Tensor();
    double total = 0;
    for (std::int64_t begin = 0; begin < n; begin += chunk) {
      const std::int64_t count = std::min(chunk, n - begin);
      const Tensor part = hidden.narrow(0, begin, count);
      Tensor logits = capped(torch::mm(part, w.t()), softcap), slope;
      if (softcap > 0) slope = 1 - (logits / softcap).square();  // of the cap
      total += rows(begin, count, logits);
      if (softcap > 0) logits.mul_(slope);
      if (want_hidden) {
        Tensor target = g_hidden.narrow(0, begin, count);
        torch::mm_out(target, logits, w);
      }
      if (want_head) g_head.add_(torch::mm(logits.t(), part));
    }
    ctx->save_for_backward({g_hidden, g_head});
    return torch::scalar_tensor(total, torch::TensorOptions(hidden.device()).dtype(
                                           hidden.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat));
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const double factor = grads[0].item<double>();
    const auto scaled = [&](const Tensor& g) { return !g.defined() || factor == 1.0 ? g : g * factor; };
    variable_list out{scaled(saved[0]), scaled(saved[1])};
    out.resize(6);
    return out;
  }
};

}  // namespace

std::int64_t chunk_rows(std::int64_t vocab) {
  return std::clamp<std::int64_t>((std::int64_t{1} << 22) / vocab / kRowShard * kRowShard, kRowShard, 2048);
}

Tensor head_rows(const Tensor& hidden, const OutputHead& head, std::int64_t begin, std::int64_t count) {
  return capped(torch::mm(hidden.narrow(0, begin, count), head.weight.t()), head.softcap);
}

Tensor loss_over_head(const Tensor& hidden, const OutputHead& head, const LogitRows& rows) {
  const bool grad = torch::GradMode::is_enabled();
  return HeadLossFunction::apply(hidden, head.weight, head.softcap, rows, grad && hidden.requires_grad(),
                                 grad && head.weight.requires_grad());
}

double sum_in_order(const Tensor& values) {
  const Tensor v = values.to(torch::kCPU, torch::kDouble).contiguous();
  double sum = 0;
  for (std::int64_t i = 0; i < v.numel(); ++i) sum += v.data_ptr<double>()[i];
  return sum;
}

// The kernels write at the target's place. A target is in the text before it is ever an input of the embedding.
void begin_loss(const Tensor& targets, const OutputHead& head, LossSums* sums) {
  if (sums != nullptr) sums->rows += (targets >= 0).sum().item<std::int64_t>();
  if (targets.numel() == 0) return;
  const auto largest = targets.max().item<std::int64_t>();
  if (largest >= head.weight.size(0))
    throw input_error("tokens", "ids below " + std::to_string(head.weight.size(0)), std::to_string(largest),
                      "the tokenizer does not belong to this model");
}

Tensor cross_entropy_rows(Tensor& logits, const Tensor& targets, double scale) {
  const std::int64_t rows = logits.size(0), vocab = logits.size(1);
  if (has_kernel(logits)) {
    Tensor losses = torch::empty({rows}, logits.options().dtype(torch::kFloat));
    const auto run = [&]<class T>(T* data) {
      for_shards(rows, [&](std::int64_t begin, std::int64_t end) {
        row_kernels<T>().cross_entropy(data + begin * vocab, targets.data_ptr<std::int64_t>() + begin, end - begin,
                                       vocab, static_cast<float>(scale), losses.data_ptr<float>() + begin);
      });
    };
    if (logits.scalar_type() == torch::kFloat)
      run(storage<float>(logits));
    else
      run(storage<Bf16>(logits));
    return losses;
  }
  const auto type = logits.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  const Tensor counted = (targets >= 0).to(type).unsqueeze(1), index = targets.clamp_min(0).unsqueeze(1);
  const Tensor log_p = torch::log_softmax(logits.to(type), -1);
  const Tensor losses = -(log_p.gather(1, index) * counted).squeeze(1);
  Tensor g = log_p.exp();
  g.scatter_add_(1, index, -torch::ones_like(index, g.options()));
  logits = (g * counted * scale).to(logits.scalar_type());
  return losses;
}

namespace {

void distill_rows(Tensor& student, Tensor& teacher, const Tensor& targets, const DistillLoss& loss, double scale,
                  Tensor& kl, Tensor& ce) {
  const std::int64_t rows = student.size(0), vocab = student.size(1);
  if (has_kernel(student)) {
    kl = torch::empty({rows}, student.options().dtype(torch::kFloat));
    ce = torch::empty_like(kl);
    const auto run = [&]<class T>(T* s, T* t) {
      for_shards(rows, [&](std::int64_t begin, std::int64_t end) {
        row_kernels<T>().distill(s + begin * vocab, t + begin * vocab, targets.data_ptr<std::int64_t>() + begin,
                                 end - begin, vocab, static_cast<float>(loss.tau), static_cast<float>(loss.kl_weight),
                                 static_cast<float>(loss.ce_weight), static_cast<float>(scale),
                                 kl.data_ptr<float>() + begin, ce.data_ptr<float>() + begin);
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
  const Tensor z = student.to(type), log_q = torch::log_softmax(z / loss.tau, -1);
  const Tensor log_p = torch::log_softmax(teacher.to(type) / loss.tau, -1), log_hard = torch::log_softmax(z, -1);
  kl = ((log_p.exp() * (log_p - log_q)).sum(-1) * counted.squeeze(1));
  ce = -(log_hard.gather(1, index) * counted).squeeze(1);
  Tensor hard = log_hard.exp();
  hard.scatter_add_(1, index, -torch::ones_like(index, hard.options()));
  const Tensor g = (log_q.exp() - log_p.exp()) * (loss.kl_weight * loss.tau) + hard * loss.ce_weight;
  student = (g * counted * scale).to(student.scalar_type());
}

// As distill_rows, for a teacher of k listed outcomes and a rest. With q the student's probabilities, p the teacher's and
// r its rest: d KL / d z_j = q_j - p_j for listed j, q_j (1 - r / q(rest)) for the others.
void topk_rows(Tensor& student, const Tensor& index, const Tensor& log_prob, const Tensor& targets,
               const DistillLoss& loss, double scale, Tensor& kl, Tensor& ce) {
  const auto type = student.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  constexpr double kLeast = 1e-9;
  const Tensor counted = (targets >= 0).to(type).unsqueeze(1), target = targets.clamp_min(0).unsqueeze(1);
  const Tensor log_q = torch::log_softmax(student.to(type), -1), q = log_q.exp();
  const Tensor log_p = log_prob.to(type), p = log_p.exp();
  const Tensor q_listed = q.gather(1, index), log_q_listed = log_q.gather(1, index);
  const Tensor rest_p = (1 - p.sum(1, true)).clamp_min(kLeast), rest_q = (1 - q_listed.sum(1, true)).clamp_min(kLeast);
  const Tensor rest = rest_p * (rest_p / rest_q).log();
  kl = (((p * (log_p - log_q_listed)).sum(1, true) + rest) * counted).squeeze(1);
  ce = -(log_q.gather(1, target) * counted).squeeze(1);
  Tensor g = q * (1 - rest_p / rest_q);
  g.scatter_(1, index, q_listed - p);
  if (loss.ce_weight != 0) {
    Tensor hard = q.clone();
    hard.scatter_add_(1, target, -torch::ones_like(target, hard.options()));
    g = g * loss.kl_weight + hard * loss.ce_weight;
  } else {
    g.mul_(loss.kl_weight);
  }
  student = (g * counted * scale).to(student.scalar_type());
}

}  // namespace

Tensor cross_entropy_loss(const Tensor& hidden, const OutputHead& head, const Tensor& targets_any, double scale,
                          LossSums* sums) {
  begin_loss(targets_any, head, sums);
  const Tensor targets = targets_any.contiguous();
  return loss_over_head(hidden, head, [&](std::int64_t begin, std::int64_t count, Tensor& logits) {
    const double sum = sum_in_order(cross_entropy_rows(logits, targets.narrow(0, begin, count), scale));
    if (sums != nullptr) sums->ce += sum;
    return sum * scale;
  });
}

Tensor distill_loss(const Tensor& hidden, const OutputHead& head, const Tensor& teacher_hidden,
                    const OutputHead& teacher_head, const Tensor& targets_any, const DistillLoss& loss, double scale,
                    LossSums* sums) {
  begin_loss(targets_any, head, sums);
  const Tensor targets = targets_any.contiguous(), x = teacher_hidden.detach().to(hidden.scalar_type());
  const OutputHead taught(teacher_head.weight.detach().to(hidden.scalar_type()), teacher_head.softcap);
  return loss_over_head(hidden, head, [&](std::int64_t begin, std::int64_t count, Tensor& logits) {
    Tensor teacher = head_rows(x, taught, begin, count), kl, ce;
    distill_rows(logits, teacher, targets.narrow(0, begin, count), loss, scale, kl, ce);
    const double kl_sum = sum_in_order(kl), ce_sum = sum_in_order(ce);
    if (sums != nullptr) {
      sums->kl += kl_sum;
      sums->ce += ce_sum;
    }
    return scale * (loss.kl_weight * loss.tau * loss.tau * kl_sum + loss.ce_weight * ce_sum);
  });
}

Tensor topk_distill_loss(const Tensor& hidden, const OutputHead& head, const Tensor& index, const Tensor& log_prob,
                         const Tensor& targets_any, const DistillLoss& loss, double scale, LossSums* sums) {
  begin_loss(targets_any, head, sums);
  const Tensor targets = targets_any.contiguous();
  return loss_over_head(hidden, head, [&](std::int64_t begin, std::int64_t count, Tensor& logits) {
    Tensor kl, ce;
    topk_rows(logits, index.narrow(0, begin, count), log_prob.narrow(0, begin, count), targets.narrow(0, begin, count),
              loss, scale, kl, ce);
    const double kl_sum = sum_in_order(kl), ce_sum = sum_in_order(ce);
    if (sums != nullptr) {
      sums->kl += kl_sum;
      sums->ce += ce_sum;
    }
    return scale * (loss.kl_weight * kl_sum + loss.ce_weight * ce_sum);
  });
}

Tensor row_divergences(const Tensor& hidden, const OutputHead& head, const Tensor& teacher_hidden,
                       const OutputHead& teacher_head, const Tensor& targets) {
  const torch::NoGradGuard no_grad;
  begin_loss(targets, head, nullptr);
  const std::int64_t n = hidden.size(0), chunk = chunk_rows(head.weight.size(0));
  const Tensor index = targets.contiguous();
  std::vector<Tensor> parts;
  for (std::int64_t begin = 0; begin < n; begin += chunk) {
    const std::int64_t count = std::min(chunk, n - begin);
    Tensor student = head_rows(hidden, head, begin, count), teacher = head_rows(teacher_hidden, teacher_head, begin, count);
    Tensor kl, ce;
    distill_rows(student, teacher, index.narrow(0, begin, count), DistillLoss{}, 0.0, kl, ce);
    parts.push_back(kl);
  }
  return torch::cat(parts);
}

Tensor row_losses(const Tensor& hidden, const OutputHead& head, const Tensor& targets) {
  const torch::NoGradGuard no_grad;
  begin_loss(targets, head, nullptr);
  const std::int64_t n = hidden.size(0), chunk = chunk_rows(head.weight.size(0));
  const Tensor index = targets.contiguous();
  std::vector<Tensor> parts;
  for (std::int64_t begin = 0; begin < n; begin += chunk) {
    const std::int64_t count = std::min(chunk, n - begin);
    Tensor logits = head_rows(hidden, head, begin, count);
    parts.push_back(cross_entropy_rows(logits, index.narrow(0, begin, count), 0.0));
  }
  return torch::cat(parts);
}

}  // namespace pare
