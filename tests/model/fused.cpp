// The kernels against literal loops in double, and their gradients against float64 autograd of composed operations.
#include "model/fused.h"

#include <cmath>

#include "model/trainer_state.h"
#include "tests/model/models.h"

namespace pare {
namespace {

using torch::Tensor;

double relative_error(const Tensor& a, const Tensor& b) {
  const Tensor x = a.to(torch::kDouble), y = b.to(torch::kDouble);
  return ((x - y).norm() / (y.norm() + 1e-30)).item<double>();
}

// Values that bfloat16 represents exactly, so that only the kernel's own rounding counts.
Tensor values(at::IntArrayRef shape) { return torch::randn(shape).to(torch::kBFloat16).to(torch::kFloat); }

// Runs f on float (or bfloat16) and on double copies of the inputs and compares outputs and gradients.
template <class F>
void compare(const std::vector<Tensor>& inputs, const std::vector<bool>& half, torch::ScalarType dtype, double tolerance,
             F&& f) {
  std::vector<Tensor> fast, exact;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    fast.push_back(inputs[i].to(half[i] ? dtype : torch::kFloat).detach().clone().requires_grad_());
    exact.push_back(inputs[i].to(torch::kDouble).detach().clone().requires_grad_());
  }
  const Tensor a = f(fast, dtype), b = f(exact, torch::kDouble);
  EXPECT_LT(relative_error(a, b), tolerance);
  const Tensor g = values(a.sizes());
  a.backward(g.to(a.scalar_type()));
  b.backward(g.to(torch::kDouble));
  for (std::size_t i = 0; i < inputs.size(); ++i)
    EXPECT_LT(relative_error(fast[i].grad(), exact[i].grad()), tolerance) << "input " << i;
}

const std::pair<torch::ScalarType, double> kDtypes[] = {{torch::kFloat, 2e-6}, {torch::kBFloat16, 8e-3}};

TEST(Fused, RmsNorm) {
  torch::manual_seed(1);
  for (const auto& [dtype, tolerance] : kDtypes)
    for (const std::int64_t width : {1, 15, 16, 40, 257})
      compare({values({3, 50, width}), values({width})}, {false, false}, dtype, tolerance,
              [](const std::vector<Tensor>& x, torch::ScalarType type) { return rms_norm(x[0], x[1], 1e-5, type); });
}

TEST(Fused, SwigluIncludingSaturatedGates) {
  torch::manual_seed(2);
  for (const auto& [dtype, tolerance] : kDtypes)
    for (const std::int64_t width : {1, 16, 43})
      compare({values({70, 2 * width}) * 40}, {true}, dtype, tolerance,
              [](const std::vector<Tensor>& x, torch::ScalarType) { return swiglu(x[0]); });
}

TEST(Fused, ResidualAddAndProjection) {
  torch::manual_seed(3);
  for (const auto& [dtype, tolerance] : kDtypes) {
    compare({values({2, 33, 20}), values({2, 33, 20})}, {false, true}, dtype, tolerance,
            [](const std::vector<Tensor>& x, torch::ScalarType) { return residual_add(x[0], x[1]); });
    compare({values({2, 33, 20}), values({24, 20}), values({24})}, {true, false, false}, dtype, tolerance,
            [](const std::vector<Tensor>& x, torch::ScalarType) { return project(x[0], x[1], x[2]); });
  }
}

struct Heads {
  std::int64_t positions, heads, kv_heads, head_dim;
};

RopeTables random_rope(std::int64_t positions, std::int64_t half) {
  const Tensor angle = torch::rand({positions, half}) * 6.28;
  return {torch::cos(angle), torch::sin(angle)};
}

TEST(Fused, AttentionGradientsAgainstFloat64Autograd) {
  torch::manual_seed(4);
  for (const auto& [dtype, tolerance] : kDtypes)
    for (const Heads& h : {Heads{1, 1, 1, 2}, {7, 2, 1, 8}, {8, 4, 2, 32}, {33, 4, 4, 10}, {65, 6, 2, 64}, {50, 3, 1, 80}}) {
      const RopeTables rope = random_rope(h.positions + 3, h.head_dim / 2);
      compare({values({2, h.positions, (h.heads + 2 * h.kv_heads) * h.head_dim})}, {true}, dtype, tolerance * 2,
              [&](const std::vector<Tensor>& x, torch::ScalarType) {
                return rope_attention(x[0], rope.cos, rope.sin, h.heads, h.kv_heads, h.head_dim);
              });
    }
}

TEST(Fused, AttentionAgainstLoops) {
  torch::manual_seed(5);
  const Heads h{19, 4, 2, 6};
  const std::int64_t half = h.head_dim / 2, width = (h.heads + 2 * h.kv_heads) * h.head_dim;
  const RopeTables rope = random_rope(h.positions, half);
  const Tensor qkv = torch::randn({1, h.positions, width}) * 2;
  const Tensor mix = rope_attention(qkv, rope.cos, rope.sin, h.heads, h.kv_heads, h.head_dim);
  const auto rotated = [&](std::int64_t t, std::int64_t head, std::int64_t d) {
    const double c = rope.cos[t][d % half].item<double>(), s = rope.sin[t][d % half].item<double>();
    const double x = qkv[0][t][head * h.head_dim + d].item<double>();
    const double y = qkv[0][t][head * h.head_dim + (d + half) % h.head_dim].item<double>();
    return d < half ? x * c - y * s : x * c + y * s;
  };
  for (std::int64_t head = 0; head < h.heads; ++head) {
    const std::int64_t kv = head / (h.heads / h.kv_heads);
    for (const std::int64_t t : {std::int64_t{0}, std::int64_t{7}, h.positions - 1}) {
      std::vector<double> weight;
      double sum = 0;
      for (std::int64_t j = 0; j <= t; ++j) {
        double score = 0;
        for (std::int64_t d = 0; d < h.head_dim; ++d) score += rotated(t, head, d) * rotated(j, h.heads + kv, d);
        weight.push_back(std::exp(score / std::sqrt(static_cast<double>(h.head_dim))));
        sum += weight.back();
      }
      for (std::int64_t d = 0; d < h.head_dim; ++d) {
        double expected = 0;
        for (std::int64_t j = 0; j <= t; ++j)
          expected += weight[static_cast<std::size_t>(j)] / sum *
                      qkv[0][j][(h.heads + h.kv_heads + kv) * h.head_dim + d].item<double>();
        EXPECT_NEAR(mix[0][t][head * h.head_dim + d].item<double>(), expected, 2e-5) << head << " " << t << " " << d;
      }
    }
  }
}

TEST(Fused, AttentionSurvivesHugeScoresAndPassesNaNOn) {
  const RopeTables rope = random_rope(20, 4);
  Tensor qkv = torch::randn({1, 20, 24}) * 1e4;
  EXPECT_TRUE(torch::isfinite(rope_attention(qkv, rope.cos, rope.sin, 1, 1, 8)).all().item<bool>());
  qkv[0][5][2] = std::nan("");
  const Tensor out = rope_attention(qkv, rope.cos, rope.sin, 1, 1, 8);
  EXPECT_TRUE(torch::isnan(out[0][5]).any().item<bool>());
  EXPECT_TRUE(torch::isfinite(out[0].narrow(0, 0, 5)).all().item<bool>());
}

TEST(Fused, AdamWAgainstDouble) {
  Decoder decoder = testing::small_decoder(9);
  FlatParameters flat(decoder, "off", torch::kCPU);
  struct Row {
    std::vector<double> w, m, v;
    bool decay = false;
  };
  std::map<std::string, Row> reference;
  for (const TensorSpec& spec : expected_tensors(decoder->config())) {
    const Tensor w = decoder->tensor(spec.name).detach().to(torch::kDouble).contiguous();
    Row& row = reference[spec.name];
    row.w.assign(w.data_ptr<double>(), w.data_ptr<double>() + w.numel());
    row.m.assign(row.w.size(), 0);
    row.v.assign(row.w.size(), 0);
    row.decay = w.dim() == 2;
  }
  const double lr = 0.01, b1 = 0.9, b2 = 0.95, decay = 0.1, clip = 0.7;
  for (int t = 1; t <= 4; ++t) {
    flat.clear_gradients();
    for (auto& [name, row] : reference) {
      Tensor g = decoder->tensor(name).mutable_grad();
      g.copy_(torch::randn(g.sizes()) * (t == 2 ? 0.0 : 1.0));
      const Tensor exact = g.to(torch::kDouble).contiguous();
      for (std::size_t i = 0; i < row.w.size(); ++i) {
        const double gi = exact.data_ptr<double>()[i] * clip;
        row.m[i] = b1 * row.m[i] + (1 - b1) * gi;
        row.v[i] = b2 * row.v[i] + (1 - b2) * gi * gi;
        const double step = row.m[i] / (1 - std::pow(b1, t)) / (std::sqrt(row.v[i] / (1 - std::pow(b2, t))) + 1e-8);
        row.w[i] -= lr * (row.decay ? decay * row.w[i] : 0.0) + lr * step;
      }
    }
    flat.step(lr, b1, b2, decay, clip, t);
  }
  for (const auto& [name, row] : reference) {
    const Tensor w = decoder->tensor(name).detach().contiguous();
    for (std::size_t i = 0; i < row.w.size(); ++i)
      ASSERT_NEAR(w.data_ptr<float>()[i], row.w[i], 2e-6) << name << " " << i;
  }
}

TEST(Fused, GradientNormAddsInAFixedOrder) {
  const Tensor x = torch::randn({300001});
  at::set_num_threads(1);
  const double one = sum_of_squares(x);
  at::set_num_threads(2);
  EXPECT_EQ(one, sum_of_squares(x));
  EXPECT_NEAR(one, x.to(torch::kDouble).pow(2).sum().item<double>(), 1e-6);
}

}  // namespace
}  // namespace pare
