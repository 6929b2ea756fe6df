// compare_models against whole models and whole softmaxes: more windows than a group, more positions than are taken at
// a time, more ids than a slice.
#include <gtest/gtest.h>

#include "core/config.h"
#include "core/random_weights.h"
#include "prune/measure.h"
#include "tests/scratch.h"

namespace pare {
namespace {

void write_model(const fs::path& folder, const Json& config, std::uint64_t seed) {
  fs::create_directories(folder);
  Progress progress(true);
  Context context;
  context.progress = &progress;
  write_random_model(folder, parse_config(config, nullptr, "test"), seed, context);
}

void make_random(const fs::path& folder, double softcap, bool tied, std::uint64_t seed) {
  Json config = {{"architectures", {softcap > 0 ? "Gemma2ForCausalLM" : "LlamaForCausalLM"}},
                 {"model_type", softcap > 0 ? "gemma2" : "llama"},
                 {"vocab_size", 2060},
                 {"hidden_size", 16},
                 {"intermediate_size", 24},
                 {"num_hidden_layers", 2},
                 {"num_attention_heads", 2},
                 {"num_key_value_heads", 1},
                 {"head_dim", 8},
                 {"max_position_embeddings", 2048},
                 {"tie_word_embeddings", tied},
                 {"rms_norm_eps", 1e-6}};
  if (softcap > 0) {
    config["final_logit_softcapping"] = softcap;
    config["query_pre_attn_scalar"] = 8;
  }
  write_model(folder, config, seed);
}

Divergence brute_force(const Checkpoint& original, const Checkpoint& other, const CalibrationWindows& windows) {
  const torch::NoGradGuard no_grad;
  Decoder a = load_decoder(original, torch::kCPU), b = load_decoder(other, torch::kCPU);
  std::vector<double> kl, loss, original_loss;
  for (std::int64_t w = 0; w < windows.count; ++w) {
    torch::Tensor ids = torch::empty({1, windows.length}, torch::kLong);
    std::copy_n(windows.ids.data() + w * windows.length, windows.length, ids.data_ptr<std::int64_t>());
    const torch::Tensor p = torch::log_softmax(a->forward(ids)[0].to(torch::kDouble), -1).slice(0, 0, -1),
                        q = torch::log_softmax(b->forward(ids)[0].to(torch::kDouble), -1).slice(0, 0, -1),
                        target = ids[0].slice(0, 1).unsqueeze(1);
    kl.push_back((p.exp() * (p - q)).sum(1).mean().item<double>());
    loss.push_back(-q.gather(1, target).mean().item<double>());
    original_loss.push_back(-p.gather(1, target).mean().item<double>());
  }
  return WindowFigures{kl, loss, original_loss}.divergence();
}

TEST(CompareModels, EqualsWholeSoftmaxesOfWholeModels) {
  for (const double softcap : {0.0, 3.0}) {
    const testing::Scratch scratch("compare");
    make_random(scratch / "a", softcap, true, 1);
    make_random(scratch / "b", softcap, softcap > 0, 2);
    const Checkpoint a(scratch / "a"), b(scratch / "b");
    const CalibrationWindows windows = random_windows(2060, softcap > 0 ? 3 : 28, 600, 3);
    EXPECT_EQ(shard_groups(windows, torch::kCPU).size(), softcap > 0 ? 1u : 2u);
    Progress progress(true);
    Context context;
    context.progress = &progress;
    const Divergence found = compare_models(a, b, windows, torch::kCPU, context), wanted = brute_force(a, b, windows);
    EXPECT_GT(wanted.kl, 1e-4);
    EXPECT_NEAR(found.kl / wanted.kl, 1.0, 1e-4);
    EXPECT_NEAR(found.kl_error / wanted.kl_error, 1.0, 1e-3);
    EXPECT_NEAR(found.loss, wanted.loss, 1e-5);
    EXPECT_NEAR(found.loss_error, wanted.loss_error, 1e-5);
    EXPECT_NEAR(found.original_loss, wanted.original_loss, 1e-5);
    if (softcap == 0) continue;
    EXPECT_EQ(compare_models(a, a, windows, torch::kCPU, context).kl, 0.0);
    context.threads = 1;
    EXPECT_EQ(compare_models(a, b, windows, torch::kCPU, context).kl, found.kl);
  }
}

TEST(CompareModels, EqualsWholeModelsWithExpertsAndWithLearnedPositions) {
  const Json mixtral = {{"architectures", {"MixtralForCausalLM"}},
                        {"model_type", "mixtral"},
                        {"vocab_size", 90},
                        {"hidden_size", 16},
                        {"intermediate_size", 24},
                        {"num_hidden_layers", 2},
                        {"num_attention_heads", 2},
                        {"num_key_value_heads", 1},
                        {"num_local_experts", 4},
                        {"num_experts_per_tok", 2},
                        {"initializer_range", 0.5},
                        {"max_position_embeddings", 64}};
  const Json gpt2 = {{"architectures", {"GPT2LMHeadModel"}},
                     {"model_type", "gpt2"},
                     {"vocab_size", 90},
                     {"n_embd", 16},
                     {"n_layer", 2},
                     {"n_head", 2},
                     {"initializer_range", 0.5},
                     {"n_positions", 64}};
  for (const Json& config : {mixtral, gpt2}) {
    const testing::Scratch scratch("compare");
    write_model(scratch / "a", config, 1);
    write_model(scratch / "b", config, 2);
    const Checkpoint a(scratch / "a"), b(scratch / "b");
    const CalibrationWindows windows = random_windows(90, 7, 50, 3);
    Progress progress(true);
    Context context;
    context.progress = &progress;
    const Divergence found = compare_models(a, b, windows, torch::kCPU, context), wanted = brute_force(a, b, windows);
    EXPECT_GT(wanted.kl, 1e-2);
    EXPECT_NEAR(found.kl / wanted.kl, 1.0, 1e-4);
    EXPECT_NEAR(found.loss, wanted.loss, 1e-4);
  }
}

}  // namespace
}  // namespace pare
