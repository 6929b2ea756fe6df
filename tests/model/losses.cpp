// Losses and gradients against long-hand float64, over several chunks of rows and ragged vocabularies.
#include "model/losses.h"

#include <cmath>

#include "core/error.h"
#include "tests/model/models.h"

namespace pare {
namespace {

using torch::Tensor;

struct Problem {
  Tensor hidden, head, teacher_hidden, teacher_head, targets;
};

Problem problem(std::int64_t rows, std::int64_t vocab) {
  torch::manual_seed(rows + vocab);
  Problem p{torch::randn({rows, 12}), torch::randn({vocab, 12}), torch::randn({rows, 7}), torch::randn({vocab, 7}),
            torch::randint(0, vocab, {rows}, torch::kLong)};
  for (std::int64_t i = 0; i < rows; i += 5) p.targets[i] = -1;
  return p;
}

// d loss / d logits and the loss by the definitions, in double.
struct Reference {
  double ce = 0, kl = 0;
  std::int64_t rows = 0;
  Tensor g_hidden, g_head;
};

Reference reference(const Problem& p, double tau, double kl_weight, double ce_weight, double scale) {
  const Tensor h = p.hidden.to(torch::kDouble), w = p.head.to(torch::kDouble);
  const Tensor z = torch::matmul(h, w.t()).contiguous();
  const Tensor y = torch::matmul(p.teacher_hidden.to(torch::kDouble), p.teacher_head.to(torch::kDouble).t()).contiguous();
  const std::int64_t rows = z.size(0), vocab = z.size(1);
  Tensor g = torch::zeros_like(z);
  Reference r;
  const auto lse = [&](const double* x, double t) {
    double top = -1e300, sum = 0;
    for (std::int64_t i = 0; i < vocab; ++i) top = std::max(top, x[i] / t);
    for (std::int64_t i = 0; i < vocab; ++i) sum += std::exp(x[i] / t - top);
    return top + std::log(sum);
  };
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto target = p.targets[row].item<std::int64_t>();
    if (target < 0) continue;
    ++r.rows;
    const double *s = z.data_ptr<double>() + row * vocab, *t = y.data_ptr<double>() + row * vocab;
    double* out = g.data_ptr<double>() + row * vocab;
    const double hard = lse(s, 1), soft = lse(s, tau), taught = lse(t, tau);
    r.ce += hard - s[target];
    for (std::int64_t i = 0; i < vocab; ++i) {
      const double pt = std::exp(t[i] / tau - taught), q = std::exp(s[i] / tau - soft);
      r.kl += pt * ((t[i] / tau - taught) - (s[i] / tau - soft));
      out[i] = scale * (kl_weight * tau * (q - pt) + ce_weight * (std::exp(s[i] - hard) - (i == target ? 1 : 0)));
    }
  }
  r.g_hidden = torch::matmul(g, w);
  r.g_head = torch::matmul(g.t(), h);
  return r;
}

double relative_error(const Tensor& a, const Tensor& b) {
  return ((a.to(torch::kDouble) - b).norm() / (b.norm() + 1e-30)).item<double>();
}

// 700 rows of 6,001 ids are two chunks with a ragged end.
const std::pair<std::int64_t, std::int64_t> kShapes[] = {{2, 2}, {37, 33}, {700, 6001}};

TEST(Losses, CrossEntropy) {
  for (const auto& [rows, vocab] : kShapes) {
    const Problem p = problem(rows, vocab);
    const double scale = 1.0 / static_cast<double>(rows);
    const Reference expected = reference(p, 1, 0, 1, scale);
    for (const auto& [dtype, tolerance] : {std::pair{torch::kFloat, 2e-5}, {torch::kDouble, 1e-12}}) {
      const Tensor hidden = p.hidden.clone().to(dtype).requires_grad_(), head = p.head.clone().to(dtype).requires_grad_();
      LossSums sums;
      const Tensor loss = cross_entropy_loss(hidden, head, p.targets, scale, &sums);
      EXPECT_EQ(sums.rows, expected.rows);
      EXPECT_NEAR(sums.ce * scale, expected.ce * scale, 2e-6);
      EXPECT_NEAR(loss.item<double>(), expected.ce * scale, 5e-6);
      (loss * 3).backward();
      EXPECT_LT(relative_error(hidden.grad(), expected.g_hidden * 3), tolerance);
      EXPECT_LT(relative_error(head.grad(), expected.g_head * 3), tolerance);
    }
  }
}

TEST(Losses, KlWithTemperatureAndCrossEntropyTogether) {
  for (const auto& [rows, vocab] : kShapes)
    for (const double tau : {0.7, 1.0, 2.5})
      for (const double ce_weight : {0.0, 0.3}) {
        Problem p = problem(rows, vocab);
            const double scale = 1.0 / static_cast<double>(rows), kl_weight = 0.8;
        const Reference expected = reference(p, tau, kl_weight, ce_weight, scale);
        for (const auto& [dtype, tolerance] : {std::pair{torch::kFloat, 5e-5}, {torch::kDouble, 1e-11}}) {
          const Tensor hidden = p.hidden.clone().to(dtype).requires_grad_(), head = p.head.clone().to(dtype).requires_grad_();
          LossSums sums;
          const Tensor loss = distill_loss(hidden, head, p.teacher_hidden, p.teacher_head, p.targets,
                                           {tau, kl_weight, ce_weight}, scale, &sums);
          EXPECT_NEAR(sums.kl, expected.kl, 2e-5 * std::abs(expected.kl) + 1e-6);
          EXPECT_NEAR(loss.item<double>(), scale * (kl_weight * tau * tau * expected.kl + ce_weight * expected.ce), 1e-4);
          loss.backward();
          EXPECT_LT(relative_error(hidden.grad(), expected.g_hidden), tolerance) << rows << " " << tau;
          EXPECT_LT(relative_error(head.grad(), expected.g_head), tolerance) << rows << " " << tau;
        }
      }
}

TEST(Losses, BfloatLogitsStayNearTheExactGradient) {
  const Problem p = problem(200, 500);
  const Reference expected = reference(p, 1, 1, 0.5, 1.0 / 200);
  const Tensor hidden = p.hidden.to(torch::kBFloat16).requires_grad_(), head = p.head.clone().requires_grad_();
  LossSums sums;
  distill_loss(hidden, head, p.teacher_hidden, p.teacher_head, p.targets, {1, 1, 0.5}, 1.0 / 200, &sums).backward();
  EXPECT_LT(relative_error(hidden.grad(), expected.g_hidden), 0.02);
  EXPECT_LT(relative_error(head.grad(), expected.g_head), 0.02);
}

TEST(Losses, ATeacherEqualToTheStudentTeachesNothing) {
  const Problem p = problem(50, 70);
  const Tensor hidden = p.hidden.clone().requires_grad_(), head = p.head.clone().requires_grad_();
  LossSums sums;
  distill_loss(hidden, head, p.hidden, p.head, p.targets, {2.0, 1, 0}, 1, &sums).backward();
  EXPECT_NEAR(sums.kl, 0, 1e-4);
  EXPECT_LT(hidden.grad().abs().max().item<double>(), 1e-5);
}

TEST(Losses, ListedOutcomesWithAllIdsEqualTheFullKl) {
  const Problem p = problem(60, 40);
  const Tensor log_p = torch::log_softmax(torch::matmul(p.teacher_hidden, p.teacher_head.t()), -1);
  const auto [values, index] = log_p.topk(40, -1);
  const Reference expected = reference(p, 1, 0.9, 0.2, 0.1);
  const Tensor hidden = p.hidden.clone().requires_grad_(), head = p.head.clone().requires_grad_();
  LossSums sums;
  topk_distill_loss(hidden, head, index, values, p.targets, {1, 0.9, 0.2}, 0.1, &sums).backward();
  EXPECT_NEAR(sums.kl, expected.kl, 1e-3);
  EXPECT_LT(relative_error(hidden.grad(), expected.g_hidden), 1e-4);
}

TEST(Losses, ListedOutcomesGradientByDifferences) {
  Problem p = problem(6, 12);
  const Tensor log_p =
      torch::log_softmax(torch::matmul(p.teacher_hidden, p.teacher_head.t()).to(torch::kDouble), -1);
  const auto [values, index] = log_p.topk(4, -1);
  const auto loss_at = [&](const Tensor& head) {
    return topk_distill_loss(p.hidden.to(torch::kDouble), head, index, values, p.targets, {1, 1, 0.5}, 1, nullptr);
  };
  Tensor head = p.head.to(torch::kDouble).requires_grad_();
  loss_at(head).backward();
  for (const auto& [i, j] : {std::pair{0, 0}, {3, 7}, {11, 11}}) {
    Tensor up = head.detach().clone(), down = head.detach().clone();
    up[i][j] += 1e-5;
    down[i][j] -= 1e-5;
    const double slope = (loss_at(up) - loss_at(down)).item<double>() / 2e-5;
    EXPECT_NEAR(head.grad()[i][j].item<double>(), slope, 1e-6);
  }
}

TEST(Losses, RowsForEvaluation) {
  const Problem p = problem(700, 6001);
  const Tensor z = torch::matmul(p.hidden.to(torch::kDouble), p.head.to(torch::kDouble).t());
  const Tensor expected = -torch::log_softmax(z, -1).gather(1, p.targets.clamp_min(0).unsqueeze(1)).squeeze(1);
  const Tensor counted = (p.targets >= 0).to(torch::kDouble);
  EXPECT_LT(((row_losses(p.hidden, p.head, p.targets) - expected) * counted).abs().max().item<double>(), 1e-4);
  EXPECT_EQ((row_losses(p.hidden, p.head, p.targets) * (1 - counted)).abs().max().item<double>(), 0);
}

TEST(Losses, TargetsBeyondTheVocabularyAreRefused) {
  Problem p = problem(10, 40);
  p.targets[7] = 40;
  EXPECT_THROW(cross_entropy_loss(p.hidden, p.head, p.targets, 1, nullptr), Error);
  EXPECT_THROW(distill_loss(p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.targets, {}, 1, nullptr), Error);
  EXPECT_THROW(row_losses(p.hidden, p.head, p.targets), Error);
  EXPECT_THROW(row_divergences(p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.targets), Error);
}

TEST(Losses, NaNIsSeen) {
  Problem p = problem(10, 40);
  p.hidden[3][2] = std::nan("");
  LossSums sums;
  EXPECT_TRUE(std::isnan(cross_entropy_loss(p.hidden, p.head, p.targets, 1, &sums).item<double>()));
}

}  // namespace
}  // namespace pare
