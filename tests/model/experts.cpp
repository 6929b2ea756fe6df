// The block walk of models with experts: what each expert's linears are calibrated on.
#include <cmath>
#include <map>

#include "core/file.h"
#include "core/safetensors.h"
#include "model/blocks.h"
#include "model/logits.h"
#include "tests/families.h"
#include "tests/model/models.h"

namespace pare {
namespace {

using testing::Folder;

constexpr std::int64_t kExperts = 5, kChosen = 2, kWindows = 11, kLength = 19;

ModelConfig expert_config() {
  const Json json = {{"architectures", {"MixtralForCausalLM"}},
                     {"model_type", "mixtral"},
                     {"vocab_size", 80},
                     {"hidden_size", 32},
                     {"intermediate_size", 24},
                     {"num_hidden_layers", 2},
                     {"num_attention_heads", 4},
                     {"num_key_value_heads", 2},
                     {"num_local_experts", kExperts},
                     {"num_experts_per_tok", kChosen},
                     {"max_position_embeddings", 64}};
  return parse_config(json, nullptr, "test");
}

class Recorder : public BlockVisitor {
 public:
  explicit Recorder(bool restores = false) : restores_(restores) {}
  bool finished(int) override { return restores_; }
  void restore(int, std::span<BlockLinear> linears) override { restored += linears.size(); }
  void routed(int layer, std::span<const std::int64_t> tokens) override {
    routes[layer].assign(tokens.begin(), tokens.end());
  }
  void compress(int layer, BlockStage stage, std::span<BlockLinear> linears, const InputStatistics& input) override {
    EXPECT_EQ(input.expert >= 0, stage == BlockStage::kGateUp || stage == BlockStage::kDown);
    statistics[{layer, static_cast<int>(stage), input.expert}] = input;
    for (const BlockLinear& linear : linears) {
      EXPECT_EQ(linear.cols, input.columns);
      if (input.expert >= 0) {
        const std::string prefix = "block_sparse_moe.experts." + std::to_string(input.expert) + ".";
        EXPECT_TRUE(linear.module.starts_with(prefix)) << linear.module;
      }
    }
  }
  std::map<std::tuple<int, int, std::int64_t>, InputStatistics> statistics;
  std::map<int, std::vector<std::int64_t>> routes;
  std::size_t restored = 0;

 private:
  bool restores_;
};

class ExpertWalk : public ::testing::Test {
 protected:
  ExpertWalk() : folder_("experts") {
    Decoder decoder = testing::small_decoder(3, expert_config(), 12);
    save_decoder(decoder, "float32", {}, folder_ / "model");
  }
  Recorder walk(WalkOptions options, Recorder recorder = Recorder(), int threads = 2) const {
    Context context;
    options.hessian = true;
    options.threads = threads;
    walk_blocks(Checkpoint(folder_ / "model"), windows_, options, context, recorder);
    return recorder;
  }
  Folder folder_;
  CalibrationWindows windows_ = random_windows(80, kWindows, kLength, 5);
};

// sum of (share x)(share x)^T over the tokens that chose the expert, over all tokens; everything in double from the
// definition: softmax over all experts, the two largest, made to sum to 1.
TEST_F(ExpertWalk, StatisticsWeighTokensByTheSquareOfTheirShare) {
  WalkOptions options;
  options.expert_tokens = 1;
  const Recorder found = walk(options);
  Decoder decoder = load_decoder(Checkpoint(folder_ / "model"), torch::kCPU);
  decoder->to(torch::kDouble);
  const torch::NoGradGuard no_grad;
  std::map<std::tuple<int, int, std::int64_t>, torch::Tensor> sums;
  std::map<int, std::vector<std::int64_t>> counts;
  for (std::int64_t w = 0; w < kWindows; ++w) {
    const auto first = windows_.ids.begin() + w * kLength;
    const auto ids = torch::tensor(std::vector<std::int64_t>(first, first + kLength)).unsqueeze(0);
    torch::Tensor hidden = decoder->embed(ids);
    for (int layer = 0; layer < 2; ++layer) {
      DecoderBlock block = decoder->block(layer);
      const torch::Tensor mix = block->attention_mix(block->attention_input(hidden), decoder->rope(kLength));
      const torch::Tensor middle = block->attention_output(hidden, mix), normed = block->mlp_input(middle)[0];
      const torch::Tensor odds = torch::softmax(normed.mm(block->weight("block_sparse_moe.gate").t()), -1);
      counts[layer].resize(kExperts);
      for (std::int64_t t = 0; t < kLength; ++t) {
        std::vector<std::pair<double, std::int64_t>> order;
        for (std::int64_t e = 0; e < kExperts; ++e) order.emplace_back(-odds[t][e].item<double>(), e);
        std::sort(order.begin(), order.end());
        for (std::int64_t k = 0; k < kChosen; ++k) {
          const auto [score, e] = order[static_cast<std::size_t>(k)];
          const double share = score / (order[0].first + order[1].first);
          ++counts[layer][static_cast<std::size_t>(e)];
          const std::string expert = "block_sparse_moe.experts." + std::to_string(e) + ".";
          const torch::Tensor x = normed[t], gate = block->weight(expert + "w1").mv(x);
          const torch::Tensor inner = gate * torch::sigmoid(gate) * block->weight(expert + "w3").mv(x);
          for (const auto& [stage, input] : {std::pair(2, x), std::pair(3, inner)}) {
            const torch::Tensor product = torch::outer(input, input) * share * share;
            torch::Tensor& sum = sums[{layer, stage, e}];
            sum = sum.defined() ? sum + product : product;
          }
        }
      }
      hidden = block->forward(hidden, decoder->rope(kLength));
    }
  }
  for (int layer = 0; layer < 2; ++layer) EXPECT_EQ(found.routes.at(layer), counts[layer]);
  EXPECT_EQ(found.statistics.size(), 2u * (2 + 2 * kExperts));
  for (const auto& [key, input] : found.statistics) {
    if (input.expert < 0) continue;
    EXPECT_FALSE(input.all_tokens);
    EXPECT_EQ(input.tokens, counts[std::get<0>(key)][static_cast<std::size_t>(input.expert)]);
    const torch::Tensor expected = sums.at(key) / static_cast<double>(kWindows * kLength);
    const torch::Tensor hessian = torch::tensor(input.hessian.doubles(), torch::kDouble).view({input.columns, input.columns});
    EXPECT_LT((hessian - expected).abs().max().item<double>(),
              testing::statistics_tolerance() * expected.abs().max().item<double>());
  }
  const Recorder again = walk(options, Recorder(), 1);
  for (const auto& [key, input] : found.statistics) EXPECT_EQ(input.hessian, again.statistics.at(key).hessian);
}

TEST_F(ExpertWalk, AnExpertThatTooFewTokensChoseSeesAllOfThem) {
  WalkOptions options;
  options.expert_tokens = 1;
  const Recorder chosen = walk(options);
  std::vector<std::int64_t> sorted = chosen.routes.at(0);
  std::sort(sorted.begin(), sorted.end());
  options.expert_tokens = sorted[2];  // the two least used experts of the first block have fewer
  ASSERT_LT(sorted[1], sorted[2]);
  const Recorder found = walk(options);
  int fallbacks = 0;
  for (std::int64_t e = 0; e < kExperts; ++e) {
    const InputStatistics& input = found.statistics.at({0, 2, e});
    const std::int64_t tokens = found.routes.at(0)[static_cast<std::size_t>(e)];
    EXPECT_EQ(input.tokens, tokens);
    EXPECT_EQ(input.all_tokens, tokens < sorted[2]);
    if (!input.all_tokens) {
      EXPECT_EQ(input.hessian, chosen.statistics.at({0, 2, e}).hessian);
      continue;
    }
    ++fallbacks;
    // Normed rows of width 32 have a mean square of 1 before the (unit) norm weight: the trace is known.
    double trace = 0;
    for (const double x : input.mean_square) trace += x;
    EXPECT_NEAR(trace, 32.0 / (kExperts * kChosen), 0.02 * 32.0 / (kExperts * kChosen));
  }
  EXPECT_EQ(fallbacks, 2);
}

TEST_F(ExpertWalk, RestoredBlocksTellTheirRoutesToo) {
  const Recorder fresh = walk({}), restored = walk({}, Recorder(true));
  EXPECT_EQ(restored.routes, fresh.routes);
  EXPECT_EQ(restored.restored, 2u * (4 + 3 * kExperts));
  EXPECT_TRUE(restored.statistics.empty());
}

// transformers 5 keeps all experts of a block in two tensors in memory, and some tools store them so.
TEST(ExpertFolders, FusedTensorsAreTheSameModel) {
  for (const std::string name : {"mixtral", "qwen3_moe"}) {
    const Folder folder("fused-" + name);
    const Json golden = read_json(testing::golden_families() / (name + ".json"));
    testing::make_family_folder(golden.at("config"), folder / "single");
    const Checkpoint single(folder / "single");
    const ModelConfig& config = single.config();
    fs::create_directories(folder / "fused");
    write_text(folder / "fused" / "config.json", golden.at("config").dump());
    std::vector<TensorDecl> decls;
    std::map<std::string, std::vector<float>> values;
    for (const TensorSpec& spec : single.tensors()) {
      const auto source = other_source(config, spec);
      std::vector<float>& to = values[source ? source->name : spec.name];
      if (to.empty())
        decls.push_back({source ? source->name : spec.name, DType::kF32, source ? source->shape : spec.shape});
      const std::vector<float> part = single.read_f32(spec.name);
      const auto first = static_cast<std::size_t>(source ? source->first : 0);
      if (to.size() < first + part.size()) to.resize(first + part.size());
      std::copy(part.begin(), part.end(), to.begin() + static_cast<std::ptrdiff_t>(first));
    }
    ASSERT_TRUE(values.contains("model.layers.0.mlp.experts.gate_up_proj"));
    {
      SafetensorsWriter writer(folder / "fused" / "model.safetensors", decls, {{"format", "pt"}});
      for (const TensorDecl& decl : decls) writer.write(std::as_bytes(std::span<const float>(values.at(decl.name))));
      writer.finish();
    }
    const Checkpoint fused(folder / "fused");
    for (const TensorSpec& spec : single.tensors())
      EXPECT_EQ(fused.read_f32(spec.name), single.read_f32(spec.name)) << spec.name;
    EXPECT_EQ(fused.tensors().size(), single.tensors().size());
  }
}

TEST(ExpertSummary, NamesTheFallback) {
  EXPECT_EQ(expert_summary(std::vector<std::int64_t>{30, 0, 200, 64}, 64),
            "tokens of its 4 experts: 0 to 200, median 64; 2 of them calibrated on all tokens");
}

}  // namespace
}  // namespace pare
