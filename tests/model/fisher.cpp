#include "model/fisher.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "model/decoder.h"
#include "tests/quantize/tiny_model.h"

namespace pare {
namespace {

using testing::ScratchFolder;
using testing::tiny_config;
using testing::write_tiny;

// The rule by which labels are drawn, written down again.
std::int64_t label_at(const double* p, std::int64_t vocab, std::uint64_t seed, std::uint64_t place) {
  std::uint64_t z = seed + (place + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  double left = (static_cast<double>(z >> 11) + 0.5) * 0x1p-53;
  for (std::int64_t v = 0; v < vocab; ++v) {
    left -= p[v];
    if (left <= 0) return v;
  }
  return vocab - 1;
}

TEST(Fisher, AreSquaredGradientsOfTheModelsOwnLabels) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config(2), "float32", [](Decoder& decoder) {
    for (auto& item : decoder->named_parameters())
      if (item.value().dim() == 2) item.value().mul_(5.0);
  });
  const Checkpoint model(scratch / "in");
  const CalibrationWindows windows = random_windows(96, 3, 24, 4);
  Context context;
  Progress quiet(true);
  context.progress = &quiet;
  const TokenWeights found = fisher_weights(model, windows, 77, "cpu", 2, context);
  EXPECT_EQ(fisher_weights(model, windows, 77, "cpu", 1, context).values, found.values);

  // In double: what attention and MLP add to the stream is the output of o and of down, so the gradient of the stream
  // after them is theirs; of q, k, v and gate, up by finite differences of a bias put behind them.
  Decoder decoder = load_decoder(model, torch::kCPU);
  decoder->to(torch::kDouble);
  const auto rope = rope_tables(decoder->config(), windows.length, torch::kCPU);
  std::vector<std::vector<double>> squares(8);
  for (std::int64_t w = 0; w < windows.count; ++w) {
    torch::Tensor ids = torch::empty({1, windows.length}, torch::kLong);
    std::copy_n(windows.ids.begin() + w * windows.length, windows.length, ids.data_ptr<std::int64_t>());
    torch::Tensor x = decoder->embed(ids);
    std::vector<torch::Tensor> after;
    for (int layer = 0; layer < 2; ++layer) {
      DecoderBlock block = decoder->block(layer);
      x = block->attention_output(x, block->attention_mix(block->attention_input(x), rope));
      x.retain_grad();
      after.push_back(x);
      x = block->mlp_output(x, block->mlp_mix(block->mlp_input(x)));
      x.retain_grad();
      after.push_back(x);
    }
    const torch::Tensor log_p = torch::log_softmax(decoder->head_logits(decoder->final_norm(x)), -1)[0];
    const torch::Tensor p = log_p.detach().exp().contiguous();
    torch::Tensor labels = torch::empty({windows.length}, torch::kLong);
    for (std::int64_t t = 0; t < windows.length; ++t)
      labels.data_ptr<std::int64_t>()[t] =
          label_at(p.data_ptr<double>() + t * 96, 96, 77, static_cast<std::uint64_t>(w * windows.length + t));
    (-log_p.gather(1, labels.unsqueeze(1)).sum()).backward();
    for (int layer = 0; layer < 2; ++layer)
      for (int half = 0; half < 2; ++half) {
        const torch::Tensor g =
            after[static_cast<std::size_t>(layer * 2 + half)].grad().square().mean(-1).view(-1).contiguous();
        auto& to = squares[static_cast<std::size_t>(layer) * kBlockStages + (half ? 3 : 1)];
        to.insert(to.end(), g.data_ptr<double>(), g.data_ptr<double>() + windows.length);
      }
  }
  for (const std::size_t i : {1u, 3u, 5u, 7u}) {
    std::vector<double> sorted = squares[i];
    std::sort(sorted.begin(), sorted.end());
    const double limit = sorted[static_cast<std::size_t>(kFisherClip * static_cast<double>(sorted.size() - 1))];
    double mean = 0;
    for (double& s : squares[i]) mean += (s = std::min(s, limit)) / static_cast<double>(squares[i].size());
    ASSERT_EQ(found.values[i].size(), squares[i].size());
    for (std::size_t t = 0; t < squares[i].size(); ++t)
      EXPECT_NEAR(found.values[i][t], 0.9 * squares[i][t] / mean + 0.1, 1e-3 * (1 + squares[i][t] / mean)) << i << " " << t;
  }
  for (const auto& values : found.values) {
    ASSERT_EQ(values.size(), 72u);
    EXPECT_NEAR(std::accumulate(values.begin(), values.end(), 0.0) / 72, 1.0, 1e-4);
    EXPECT_GE(*std::min_element(values.begin(), values.end()), 0.1f);
    EXPECT_GT(*std::max_element(values.begin(), values.end()), 1.2f);
  }
}

// q, k, v: the gradient of their output from that of a weight, one token at a time being the only one that counts.
TEST(Fisher, JoinedProjectionsAreSeenToo) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config(1), "float32", [](Decoder& decoder) {
    for (auto& item : decoder->named_parameters())
      if (item.value().dim() == 2) item.value().mul_(5.0);
  });
  Decoder decoder = load_decoder(Checkpoint(scratch / "in"), torch::kCPU);
  decoder->to(torch::kDouble);
  std::map<int, torch::Tensor> outputs;
  decoder->block(0)->set_observer([&](BlockStage stage, const torch::Tensor& output) {
    outputs[static_cast<int>(stage)] = output;
  });
  const torch::Tensor ids = torch::randint(96, {1, 12}, torch::kLong);
  const torch::Tensor loss = torch::log_softmax(decoder->forward(ids), -1).index({0, torch::indexing::Slice(), 5}).sum();
  ASSERT_EQ(outputs.size(), 4u);
  // The sum over tokens of g_t x_t^T is the gradient of the weight, which autograd knows by itself.
  const auto g = torch::autograd::grad({loss}, {outputs[0], outputs[2]}, {}, true);
  const torch::Tensor normed = decoder->block(0)->attention_input(decoder->embed(ids))[0].detach();
  const torch::Tensor from_outputs = torch::mm(g[0][0].t(), normed);
  const auto weights = torch::autograd::grad({loss}, {decoder->block(0)->weight("self_attn.q_proj"),
                                                      decoder->block(0)->weight("self_attn.k_proj"),
                                                      decoder->block(0)->weight("self_attn.v_proj")});
  EXPECT_LT((torch::cat({weights[0], weights[1], weights[2]}, 0) - from_outputs).abs().max().item<double>(), 1e-9);
  EXPECT_EQ(g[1].size(-1), 2 * 96);
}

}  // namespace
}  // namespace pare
