// Values and gradients of the distillation losses: recorded ones of the published definitions, float64 autograd of the
// same definitions over several chunks and ragged vocabularies, and what must hold at the edges.
#include "model/divergences.h"

#include <cmath>
#include <span>

#include "core/error.h"
#include "core/json.h"
#include "core/uniform.h"
#include "eval/tail_samples.h"
#include "tests/model/models.h"

namespace pare {
namespace {

using torch::Tensor;

struct Kind {
  const char* name;
  Divergence kind;
  double parameter;
};
const Kind kKinds[] = {{"forward-kl", Divergence::kForwardKl, 0},
                       {"reverse-kl", Divergence::kReverseKl, 0},
                       {"jsd", Divergence::kJsd, 0.5},
                       {"jsd", Divergence::kJsd, 0.1},
                       {"skew-kl", Divergence::kSkewKl, 0.1},
                       {"skew-kl", Divergence::kSkewKl, 0},
                       {"skew-reverse-kl", Divergence::kSkewReverseKl, 0.1},
                       {"skew-reverse-kl", Divergence::kSkewReverseKl, 0},
                       {"adaptive-kl", Divergence::kAdaptiveKl, 0}};

// The definitions, on probabilities [rows, vocab] in double.
Tensor by_definition(Divergence kind, double x, const Tensor& p, const Tensor& q) {
  const auto kl = [](const Tensor& a, const Tensor& b) { return (a * (a.log() - b.log())).sum(1); };
  switch (kind) {
    case Divergence::kForwardKl:
      return kl(p, q);
    case Divergence::kReverseKl:
      return kl(q, p);
    case Divergence::kJsd: {
      const Tensor m = p * x + q * (1 - x);
      return kl(p, m) * x + kl(q, m) * (1 - x);
    }
    case Divergence::kSkewKl:
      return kl(p, p * x + q * (1 - x));
    case Divergence::kSkewReverseKl:
      return kl(q, p * (1 - x) + q * x);
    case Divergence::kAdaptiveKl:
      break;
  }
  Tensor h = torch::zeros({p.size(0)}, p.options());
  for (std::int64_t row = 0; row < p.size(0); ++row) {
    std::vector<std::pair<double, double>> ids;  // teacher's probability, gap
    for (std::int64_t i = 0; i < p.size(1); ++i) {
      const auto a = p[row][i].item<double>();
      ids.push_back({a, std::abs(a - q[row][i].item<double>())});
    }
    std::sort(ids.rbegin(), ids.rend());
    double mass = 0, head = 0, all = 0;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      mass += ids[i].first;
      if (mass <= 0.5 || i == 0) head += ids[i].second;
      all += ids[i].second;
    }
    h[row] = head / all;
  }
  return kl(p, q) * h + kl(q, p) * (1 - h);
}

struct Problem {
  Tensor hidden, head, teacher_hidden, teacher_head, targets;
};

Problem problem(std::int64_t rows, std::int64_t vocab) {
  torch::manual_seed(rows * 3 + vocab);
  Problem p{torch::randn({rows, 12}), torch::randn({vocab, 12}), torch::randn({rows, 7}), torch::randn({vocab, 7}),
            torch::randint(0, vocab, {rows}, torch::kLong)};
  for (std::int64_t i = 0; i < rows; i += 5) p.targets[i] = -1;
  return p;
}

struct Expected {
  double value = 0, ce = 0;  // sums over counted rows
  Tensor g_hidden, g_head;   // of scale * (kl_weight * tau^2 * value + ce_weight * ce)
};

Expected by_autograd(const Problem& p, const Kind& kind, const DistillLoss& w, double scale) {
  const Tensor h = p.hidden.to(torch::kDouble).requires_grad_(), head = p.head.to(torch::kDouble).requires_grad_();
  const Tensor rows = (p.targets >= 0).nonzero().squeeze(1), targets = p.targets.index_select(0, rows);
  const Tensor z = torch::matmul(h.index_select(0, rows), head.t());
  const Tensor y =
      torch::matmul(p.teacher_hidden.index_select(0, rows).to(torch::kDouble), p.teacher_head.to(torch::kDouble).t());
  const Tensor value =
      by_definition(kind.kind, kind.parameter, torch::softmax(y / w.tau, 1), torch::softmax(z / w.tau, 1)).sum();
  const Tensor ce = -torch::log_softmax(z, 1).gather(1, targets.unsqueeze(1)).sum();
  ((value * (w.kl_weight * w.tau * w.tau) + ce * w.ce_weight) * scale).backward();
  return {value.item<double>(), ce.item<double>(), h.grad(), head.grad()};
}

double relative_error(const Tensor& a, const Tensor& b) {
  return ((a.to(torch::kDouble) - b).norm() / (b.norm() + 1e-30)).item<double>();
}

TEST(Divergences, ValuesAndGradientsAreThoseOfThePublishedDefinitions) {
  const Json golden =
      parse_json(testing::bytes_of(fs::path(PARE_SOURCE_DIR) / "tests/golden/distill_losses.json"), "golden");
  const auto row_of = [&](const Json& values) {
    return torch::tensor(values.get<std::vector<double>>(), torch::kDouble).view({1, -1});
  };
  int seen = 0;
  for (const Json& c : golden.at("cases")) {
    const auto found =
        std::find_if(std::begin(kKinds), std::end(kKinds), [&](const Kind& k) { return k.name == c.at("loss"); });
    ASSERT_NE(found, std::end(kKinds)) << c.at("loss");
    const DivergenceLoss loss{found->kind, c.at("parameter").get<double>(), {c.at("tau").get<double>(), 1, 0}};
    const Json& row = golden.at("rows").at(c.at("row").get<std::string>());
    const Tensor y = row_of(row.at("teacher")), z = row_of(row.at("student"));
    const Tensor expected = row_of(c.at("gradient"));
    const auto value = c.at("value").get<double>();
    for (const auto& [dtype, tolerance] : {std::pair{torch::kDouble, 1e-10}, {torch::kFloat, 3e-5}}) {
      // Hidden is one unit, the head holds the logits: the head's gradient is that of the logits.
      const Tensor one = torch::ones({1, 1}, dtype), head = z.t().contiguous().to(dtype).requires_grad_();
      LossSums sums;
      divergence_loss(one, head, one, y.t().contiguous().to(dtype), torch::zeros({1}, torch::kLong), loss, 1, &sums)
          .backward();
      const std::string what = c.at("loss").get<std::string>() + " " + c.at("row").get<std::string>() + " " +
                               std::to_string(loss.parameter) + " tau " + std::to_string(loss.weights.tau);
      EXPECT_NEAR(sums.kl, value, tolerance * (1 + std::abs(value))) << what;
      const double off = (head.grad().t().to(torch::kDouble) - expected).abs().max().item<double>();
      EXPECT_LE(off, tolerance * (1 + expected.abs().max().item<double>())) << what;
    }
    ++seen;
  }
  EXPECT_EQ(seen, 12 * 2 * 6);
}

TEST(Divergences, GradientsAreThoseOfAutogradOverChunksAndRaggedVocabularies) {
  // 700 rows of 6,001 ids are two chunks with a ragged end.
  const std::pair<std::int64_t, std::int64_t> shapes[] = {{2, 2}, {37, 33}, {700, 6001}};
  for (const auto& [rows, vocab] : shapes) {
    const Problem p = problem(rows, vocab);
    for (const Kind& kind : kKinds) {
      if (vocab > 6000 && (kind.kind == Divergence::kForwardKl || kind.parameter == 0)) continue;  // seconds each
      const DistillLoss w = vocab > 6000 ? DistillLoss{2.0, 0.8, 0.3} : DistillLoss{0.7, 0.8, vocab == 2 ? 0.0 : 0.3};
      const double scale = 1.0 / static_cast<double>(rows);
      const Expected expected = by_autograd(p, kind, w, scale);
      for (const auto& [dtype, tolerance] : {std::pair{torch::kFloat, 1e-4}, {torch::kDouble, 1e-10}}) {
        const Tensor hidden = p.hidden.clone().to(dtype).requires_grad_(),
                     head = p.head.clone().to(dtype).requires_grad_();
        LossSums sums;
        const Tensor loss = divergence_loss(hidden, head, p.teacher_hidden.to(dtype), p.teacher_head.to(dtype),
                                            p.targets, {kind.kind, kind.parameter, w}, scale, &sums);
        EXPECT_NEAR(sums.kl, expected.value, 5e-5 * std::abs(expected.value) + 1e-6) << kind.name << vocab;
        EXPECT_NEAR(loss.item<double>(),
                    scale * (w.kl_weight * w.tau * w.tau * expected.value + w.ce_weight * expected.ce),
                    1e-4 * (1 + std::abs(expected.value) * scale));
        (loss * 3).backward();
        EXPECT_LT(relative_error(hidden.grad(), expected.g_hidden * 3), tolerance)
            << kind.name << kind.parameter << " " << vocab;
        EXPECT_LT(relative_error(head.grad(), expected.g_head * 3), tolerance)
            << kind.name << kind.parameter << " " << vocab;
      }
    }
  }
}

TEST(Divergences, BfloatLogitsStayNearTheExactGradient) {
  const Problem p = problem(100, 200);
  for (const Kind& kind : kKinds) {
    const Expected expected = by_autograd(p, kind, {1, 1, 0.5}, 0.01);
    const Tensor hidden = p.hidden.to(torch::kBFloat16).requires_grad_(), head = p.head.clone().requires_grad_();
    divergence_loss(hidden, head, p.teacher_hidden, p.teacher_head, p.targets, {kind.kind, kind.parameter, {1, 1, 0.5}},
                    0.01, nullptr)
        .backward();
    EXPECT_LT(relative_error(hidden.grad(), expected.g_hidden), 0.03) << kind.name;
    EXPECT_LT(relative_error(head.grad(), expected.g_head), 0.03) << kind.name;
  }
}

TEST(Divergences, ATeacherEqualToTheStudentTeachesNothing) {
  const Problem p = problem(50, 70);
  for (const Kind& kind : kKinds) {
    const Tensor hidden = p.hidden.clone().requires_grad_(), head = p.head.clone().requires_grad_();
    LossSums sums;
    divergence_loss(hidden, head, p.hidden, p.head, p.targets, {kind.kind, kind.parameter, {2.0, 1, 0}}, 1, &sums)
        .backward();
    EXPECT_NEAR(sums.kl, 0, 1e-4) << kind.name;
    EXPECT_LT(hidden.grad().abs().max().item<double>(), 1e-5) << kind.name;
  }
}

TEST(Divergences, LogitsFarApartStayFinite) {
  torch::manual_seed(2);
  const Tensor one = torch::ones({3, 1}), targets = torch::zeros({3}, torch::kLong);
  for (const Kind& kind : kKinds) {
    Tensor y = torch::randn({50, 1}), z = torch::randn({50, 1});
    y[7] = 3000;  // both sure, of other ids
    z[9] = 2000;
    const Tensor head = z.clone().requires_grad_();
    LossSums sums;
    divergence_loss(one, head, one, y, targets, {kind.kind, kind.parameter, {}}, 1, &sums).backward();
    EXPECT_TRUE(std::isfinite(sums.kl)) << kind.name;
    EXPECT_TRUE(head.grad().isfinite().all().item<bool>()) << kind.name;
    if (kind.kind == Divergence::kJsd) {  // bounded by the entropy of the mixture's weights
      const double b = kind.parameter;
      EXPECT_NEAR(sums.kl / 3, -b * std::log(b) - (1 - b) * std::log(1 - b), 1e-4);
    }
  }
}

TEST(Divergences, TargetsBeyondTheVocabularyAndNaNAreSeen) {
  Problem p = problem(10, 40);
  for (const Kind& kind : kKinds) {
    Tensor targets = p.targets.clone();
    targets[7] = 40;
    const DivergenceLoss loss{kind.kind, kind.parameter, {}};
    EXPECT_THROW(divergence_loss(p.hidden, p.head, p.teacher_hidden, p.teacher_head, targets, loss, 1, nullptr), Error);
    Tensor hidden = p.hidden.clone();
    hidden[3][2] = std::nan("");
    const Tensor value = divergence_loss(hidden, p.head, p.teacher_hidden, p.teacher_head, p.targets, loss, 1, nullptr);
    EXPECT_TRUE(std::isnan(value.item<double>())) << kind.name;
  }
}

// An estimate that is the whole distribution gives forward KL.
TEST(SparseTeachers, TheWholeDistributionIsForwardKl) {
  const Problem p = problem(300, 41);
  for (const double tau : {1.0, 2.0})
    for (const double ce_weight : {0.0, 0.4}) {
      const DistillLoss w{tau, 0.8, ce_weight};
      const Expected expected = by_autograd(p, kKinds[0], w, 0.01);
      const Tensor log_p = torch::log_softmax(torch::matmul(p.teacher_hidden, p.teacher_head.t()) / tau, -1);
      const auto [values, index] = log_p.exp().topk(41, -1);
      // Unused places: probability 0 at ids that are listed too.
      const SparseTeacher teacher{torch::cat({index, torch::full({300, 3}, 5, torch::kLong)}, 1),
                                  torch::cat({values, torch::zeros({300, 3})}, 1), -(log_p.exp() * log_p).sum(1)};
      for (const auto& [dtype, tolerance] :
           {std::pair{torch::kFloat, 1e-4}, {torch::kDouble, 1e-6}, {torch::kBFloat16, 0.03}}) {
        const Tensor hidden = p.hidden.clone().to(dtype).requires_grad_();
        const Tensor head =
            p.head.clone().to(dtype == torch::kDouble ? torch::kDouble : torch::kFloat).requires_grad_();
        LossSums sums;
        const Tensor loss = sparse_distill_loss(hidden, head, teacher, p.targets, w, 0.01, &sums);
        EXPECT_NEAR(sums.kl / expected.value, 1, dtype == torch::kBFloat16 ? 0.02 : 1e-4);
        EXPECT_NEAR(loss.item<double>(), 0.01 * (0.8 * tau * tau * sums.kl + ce_weight * sums.ce), 1e-4);
        loss.backward();
        EXPECT_LT(relative_error(hidden.grad(), expected.g_hidden), tolerance) << tau << " " << ce_weight;
        EXPECT_LT(relative_error(head.grad(), expected.g_head), tolerance) << tau << " " << ce_weight;
      }
    }
}

// Over many draws the mean loss and the mean gradient are those of the whole distribution, each within its standard
// error; of the listed ids alone, made to fill the row, they are not.
TEST(SparseTeachers, SampledTailsHaveNoBias) {
  torch::manual_seed(4);
  constexpr std::int64_t kVocab = 50, kRows = 3000, kListed = 4, kDraws = 6;
  const Tensor one = torch::randn({1, 12}), head = torch::randn({kVocab, 12}), y = torch::randn({kVocab}) * 1.5;
  for (const double tau : {1.0, 2.0}) {
    const DistillLoss w{tau, 1, 0};
    const Tensor log_p = torch::log_softmax(y.to(torch::kDouble) / tau, 0), p = log_p.exp().contiguous();
    const Tensor live = one.clone().requires_grad_();
    LossSums exact;
    distill_loss(live, head, torch::ones({1, 1}), y.view({kVocab, 1}), torch::zeros({1}, torch::kLong), w, 1, &exact)
        .backward();
    const Tensor order = p.argsort(0, true);
    std::vector<std::uint32_t> listed;
    for (std::int64_t i = 0; i < kListed; ++i)
      listed.push_back(static_cast<std::uint32_t>(order[i].item<std::int64_t>()));
    const auto worst = [&](bool with_samples) {
      SparseTeacher t{torch::zeros({kRows, kListed + kDraws}, torch::kLong), torch::zeros({kRows, kListed + kDraws}),
                      torch::full({kRows}, -(p * log_p).sum().item<double>())};
      const std::span<const double> row(p.data_ptr<double>(), kVocab);
      for (std::int64_t r = 0; r < kRows; ++r) {
        const TailSamples s = sample_tail(row, listed, kDraws, uniform_at(3, static_cast<std::uint64_t>(r)));
        for (std::int64_t i = 0; i < kListed; ++i) {
          t.index[r][i] = static_cast<std::int64_t>(listed[static_cast<std::size_t>(i)]);
          t.probability[r][i] = p[listed[static_cast<std::size_t>(i)]] / (with_samples ? 1 : 1 - s.mass);
        }
        for (std::size_t i = 0; with_samples && i < s.index.size(); ++i) {
          t.index[r][kListed + static_cast<std::int64_t>(i)] = static_cast<std::int64_t>(s.index[i]);
          t.probability[r][kListed + static_cast<std::int64_t>(i)] = s.mass * s.count[i] / kDraws;
        }
      }
      const Tensor hidden = one.repeat({kRows, 1}).requires_grad_();
      LossSums sums;
      sparse_distill_loss(hidden, head, t, torch::zeros({kRows}, torch::kLong), w, 1, &sums).backward();
      const Tensor g = hidden.grad().to(torch::kDouble), mean = g.mean(0);
      const Tensor error = g.std(0, true, false) / std::sqrt(static_cast<double>(kRows)) + 1e-5;
      const double z = ((mean - live.grad()[0].to(torch::kDouble)) / error).abs().max().item<double>();
      return std::pair(z, std::abs(sums.kl / kRows - exact.kl) / exact.kl);
    };
    const auto [z, value] = worst(true);
    EXPECT_LT(z, 4) << tau;
    EXPECT_LT(value, 0.02) << tau;
    const auto [wrong_z, wrong_value] = worst(false);
    EXPECT_GT(wrong_z, 20) << tau;
    EXPECT_GT(wrong_value, 0.05) << tau;
  }
}

// A row without a target may hold anything.
TEST(SparseTeachers, RowsWithoutATargetGiveNothing) {
  Tensor head = torch::zeros({20, 1});
  head[3] = 200;  // e^200 above the row's first id
  const Tensor hidden = torch::ones({2, 1}).requires_grad_(), targets = torch::tensor({-1, 3}, torch::kLong);
  const SparseTeacher teacher{torch::full({2, 1}, 3, torch::kLong), torch::ones({2, 1}), torch::zeros({2})};
  const Tensor loss = sparse_distill_loss(hidden, head, teacher, targets, {}, 1, nullptr);
  EXPECT_NEAR(loss.item<double>(), 0, 1e-5);
  loss.backward();
  EXPECT_EQ(hidden.grad()[0][0].item<double>(), 0);
}

TEST(SparseTeachers, GradientByDifferences) {
  const Problem p = problem(6, 12);
  torch::manual_seed(5);
  const Tensor index = torch::tensor({1, 4, 7, 11}, torch::kLong).repeat({6, 1});
  const SparseTeacher teacher{index, torch::softmax(torch::randn({6, 4}, torch::kDouble), 1),
                              torch::zeros({6}, torch::kDouble)};
  const auto loss_at = [&](const Tensor& head) {
    return sparse_distill_loss(p.hidden.to(torch::kDouble), head, teacher, p.targets, {1.5, 1, 0.5}, 1, nullptr);
  };
  Tensor head = p.head.to(torch::kDouble).requires_grad_();
  loss_at(head).backward();
  for (const auto& [i, j] : {std::pair{0, 0}, {4, 7}, {11, 11}}) {
    Tensor up = head.detach().clone(), down = head.detach().clone();
    up[i][j] += 1e-5;
    down[i][j] -= 1e-5;
    EXPECT_NEAR(head.grad()[i][j].item<double>(), (loss_at(up) - loss_at(down)).item<double>() / 2e-5, 1e-6);
  }
}

}  // namespace
}  // namespace pare
