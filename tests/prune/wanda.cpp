// Wanda's masks of a whole block against an independent computation in double: rotary attention, norms, SwiGLU, input
// statistics of what is pruned so far, scores and a sort, without any of the product's code for them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "model/blocks.h"
#include "tests/prune/small_model.h"

namespace pare {
namespace {

using Rows = std::vector<std::vector<double>>;  // [tokens][width]

struct Matrix {
  std::int64_t rows = 0, cols = 0;
  std::vector<double> values;
};

std::vector<double> times(const Matrix& w, const std::vector<double>& x) {
  std::vector<double> y(static_cast<std::size_t>(w.rows), 0.0);
  for (std::int64_t i = 0; i < w.rows; ++i)
    for (std::int64_t j = 0; j < w.cols; ++j)
      y[static_cast<std::size_t>(i)] +=
          w.values[static_cast<std::size_t>(i * w.cols + j)] * x[static_cast<std::size_t>(j)];
  return y;
}

std::vector<double> normed(const std::vector<double>& x, const std::vector<double>& weight, double eps) {
  double square = 0;
  for (const double v : x) square += v * v;
  const double scale = 1.0 / std::sqrt(square / static_cast<double>(x.size()) + eps);
  std::vector<double> y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) y[i] = x[i] * scale * weight[i];
  return y;
}

// Half of every row goes: the smallest |w| sqrt(sum x^2), by sorting.
void prune_half(Matrix& w, const Rows& inputs) {
  std::vector<double> square(static_cast<std::size_t>(w.cols), 0.0);
  for (const auto& x : inputs)
    for (std::size_t j = 0; j < square.size(); ++j) square[j] += x[j] * x[j];
  for (std::int64_t i = 0; i < w.rows; ++i) {
    double* row = w.values.data() + i * w.cols;
    std::vector<std::pair<double, std::int64_t>> order;
    for (std::int64_t j = 0; j < w.cols; ++j)
      order.emplace_back(std::fabs(row[j]) * std::sqrt(square[static_cast<std::size_t>(j)]), j);
    std::sort(order.begin(), order.end());
    for (std::int64_t k = 0; k < w.cols / 2; ++k) row[order[static_cast<std::size_t>(k)].second] = 0.0;
  }
}

class Reference {
 public:
  explicit Reference(const Checkpoint& model) : model_(model), config_(model.config()) {}

  Matrix matrix(const std::string& name) const {
    const auto& spec = model_.spec(name);
    const auto values = model_.read_f32(name);
    return {spec.shape[0], spec.shape[1], {values.begin(), values.end()}};
  }
  std::vector<double> vector(const std::string& name) const {
    const auto values = model_.read_f32(name);
    return {values.begin(), values.end()};
  }

  // softmax(q k) v of one window; q and k are rotated in place.
  Rows attention(Rows q, Rows k, const Rows& v) const {
    const std::int64_t d = config_.head_dim, half = d / 2, repeat = config_.num_heads / config_.num_kv_heads;
    const auto rotate = [&](Rows& all, std::int64_t heads) {
      for (std::size_t t = 0; t < all.size(); ++t)
        for (std::int64_t h = 0; h < heads; ++h)
          for (std::int64_t j = 0; j < half; ++j) {
            const double angle = static_cast<double>(t) *
                                 std::pow(config_.rope_theta, -2.0 * static_cast<double>(j) / static_cast<double>(d));
            double& a = all[t][static_cast<std::size_t>(h * d + j)];
            double& b = all[t][static_cast<std::size_t>(h * d + j + half)];
            const double x = a, y = b;
            a = x * std::cos(angle) - y * std::sin(angle);
            b = y * std::cos(angle) + x * std::sin(angle);
          }
    };
    rotate(q, config_.num_heads);
    rotate(k, config_.num_kv_heads);
    Rows out(q.size(), std::vector<double>(static_cast<std::size_t>(config_.num_heads * d), 0.0));
    for (std::size_t t = 0; t < q.size(); ++t)
      for (std::int64_t h = 0; h < config_.num_heads; ++h) {
        const std::int64_t kv = h / repeat;
        std::vector<double> p(t + 1, 0.0);
        double sum = 0;
        for (std::size_t s = 0; s <= t; ++s) {
          for (std::int64_t j = 0; j < d; ++j)
            p[s] += q[t][static_cast<std::size_t>(h * d + j)] * k[s][static_cast<std::size_t>(kv * d + j)];
          p[s] = std::exp(p[s] / std::sqrt(static_cast<double>(d)));
          sum += p[s];
        }
        for (std::size_t s = 0; s <= t; ++s)
          for (std::int64_t j = 0; j < d; ++j)
            out[t][static_cast<std::size_t>(h * d + j)] += p[s] / sum * v[s][static_cast<std::size_t>(kv * d + j)];
      }
    return out;
  }

 private:
  const Checkpoint& model_;
  const ModelConfig& config_;
};

TEST(Wanda, BothBlocksEqualAnIndependentDoubleComputation) {
  const testing::Folder folder("wanda");
  testing::make_model(folder / "m", {.layers = 2, .seed = 9});
  write_text(folder / "text.txt", testing::small_text());
  const std::int64_t samples = 10, length = 24;
  const std::uint64_t seed = 4;
  testing::run_prune({{"model", (folder / "m").string()}, {"out", (folder / "out").string()}, {"method", "wanda"},
                      {"sparsity", 0.5}, {"text", {(folder / "text.txt").string()}}, {"samples", samples},
                      {"context", length}},
                     1, seed);
  const Checkpoint before(folder / "m"), after(folder / "out");
  const Reference model(before);
  const CalibrationWindows windows = sample_windows(Tokenizer::from_file(folder / "m" / "tokenizer.json"),
                                                    {folder / "text.txt"}, samples, length, seed);
  ASSERT_FALSE(windows.prefixed);  // so that no first token is capped
  const double eps = before.config().rms_norm_eps;
  const Matrix embedding = model.matrix("model.embed_tokens.weight");
  Rows hidden;
  for (const std::int32_t id : windows.ids)
    hidden.emplace_back(embedding.values.begin() + id * embedding.cols,
                        embedding.values.begin() + (id + 1) * embedding.cols);
  const auto apply = [](const Matrix& w, const Rows& x) {
    Rows y;
    for (const auto& row : x) y.push_back(times(w, row));
    return y;
  };
  for (int layer = 0; layer < 2; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const auto norm_all = [&](const std::string& name) {
      const auto weight = model.vector(prefix + name + ".weight");
      Rows y;
      for (const auto& x : hidden) y.push_back(normed(x, weight, eps));
      return y;
    };
    const auto pruned = [&](const std::string& module, const Rows& inputs) {
      Matrix w = model.matrix(prefix + module + ".weight");
      prune_half(w, inputs);
      const auto got = after.read_f32(prefix + module + ".weight");
      std::size_t different = 0;
      for (std::size_t i = 0; i < got.size(); ++i) different += static_cast<double>(got[i]) != w.values[i] ? 1 : 0;
      EXPECT_EQ(different, 0u) << prefix << module;
      return w;
    };
    const Rows x = norm_all("input_layernorm");
    const Rows q = apply(pruned("self_attn.q_proj", x), x), k = apply(pruned("self_attn.k_proj", x), x),
               v = apply(pruned("self_attn.v_proj", x), x);
    Rows mix;
    for (std::int64_t w = 0; w < samples; ++w) {
      const auto part = [&](const Rows& all) { return Rows(all.begin() + w * length, all.begin() + (w + 1) * length); };
      for (auto& row : model.attention(part(q), part(k), part(v))) mix.push_back(row);
    }
    const Rows attended = apply(pruned("self_attn.o_proj", mix), mix);
    for (std::size_t t = 0; t < hidden.size(); ++t)
      for (std::size_t j = 0; j < hidden[t].size(); ++j) hidden[t][j] += attended[t][j];
    const Rows y = norm_all("post_attention_layernorm");
    const Rows gate = apply(pruned("mlp.gate_proj", y), y), up = apply(pruned("mlp.up_proj", y), y);
    Rows act = gate;
    for (std::size_t t = 0; t < act.size(); ++t)
      for (std::size_t j = 0; j < act[t].size(); ++j) act[t][j] = gate[t][j] / (1.0 + std::exp(-gate[t][j])) * up[t][j];
    const Rows out = apply(pruned("mlp.down_proj", act), act);
    for (std::size_t t = 0; t < hidden.size(); ++t)
      for (std::size_t j = 0; j < hidden[t].size(); ++j) hidden[t][j] += out[t][j];
  }
}

}  // namespace
}  // namespace pare
