#include "quantize/tune.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/error.h"
#include "core/random_weights.h"
#include "quantize/kl_model.h"
#include "tests/quantize/tiny_model.h"

namespace pare {
namespace {

using testing::folder_hash;
using testing::run_quantize;
using testing::ScratchFolder;
using testing::tiny_config;
using testing::write_tiny;

// A model whose predictions are not all alike: random weights of their usual size give an almost flat distribution.
void write_lively(const fs::path& folder, const ModelConfig& config, const std::string& dtype = "float32") {
  write_tiny(folder, config, dtype, [](Decoder& decoder) {
    for (auto& item : decoder->named_parameters())
      if (item.value().dim() == 2) item.value().mul_(4.0);
  });
}

Json command(const fs::path& in, const fs::path& out, const Json& more) {
  Json given = {{"model", in.string()}, {"out", out.string()}, {"random-tokens", true}, {"samples", 10}, {"context", 32}};
  given.update(more);
  return given;
}

// Mean KL over random windows that neither calibration nor tuning has seen.
double divergence(const fs::path& original, const fs::path& quantized) {
  const torch::NoGradGuard no_grad;
  Decoder a = load_decoder(Checkpoint(original), torch::kCPU), b = load_decoder(Checkpoint(quantized), torch::kCPU);
  const CalibrationWindows windows = random_windows(a->config().vocab_size, 64, 32, 12345);
  torch::Tensor ids = torch::empty({64, 32}, torch::kLong);
  std::copy(windows.ids.begin(), windows.ids.end(), ids.data_ptr<std::int64_t>());
  const torch::Tensor p = torch::log_softmax(a->forward(ids).to(torch::kDouble), -1),
                      q = torch::log_softmax(b->forward(ids).to(torch::kDouble), -1);
  return (p.exp() * (p - q)).sum(-1).mean().item<double>();
}

// Of single weights, against sum over t, v of p(v | t) (d log p(v | t) / d w)^2 by central differences in double.
TEST(Tune, CurvatureIsTheFisherInformationOfEachWeight) {
  ScratchFolder scratch;
  write_lively(scratch / "in", tiny_config(2));
  const Checkpoint model(scratch / "in");
  CalibrationWindows windows = random_windows(96, 1, 6, 4);
  constexpr std::int64_t kDraws = 500;
  CalibrationWindows repeated = windows;
  repeated.count = kDraws;
  repeated.ids.clear();
  for (std::int64_t i = 0; i < kDraws; ++i) repeated.ids.insert(repeated.ids.end(), windows.ids.begin(), windows.ids.end());

  const std::vector<std::string> names = {"model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight"};
  KlModel one(model, model, "cpu", 1, windows.length), two(model, model, "cpu", 2, windows.length);
  std::vector<std::vector<torch::Tensor>> found;
  for (KlModel* models : {&one, &two}) {
    std::vector<torch::Tensor> parameters;
    for (const std::string& name : names)
      parameters.push_back(models->original()->tensor(name).set_requires_grad(true));
    found.push_back(models->curvature(repeated, kDraws, 7, parameters));
  }
  Decoder decoder = load_decoder(model, torch::kCPU);
  decoder->to(torch::kDouble);
  const torch::NoGradGuard no_grad;
  torch::Tensor ids = torch::empty({1, windows.length}, torch::kLong);
  std::copy(windows.ids.begin(), windows.ids.end(), ids.data_ptr<std::int64_t>());
  const auto log_p = [&] { return torch::log_softmax(decoder->forward(ids), -1); };
  const torch::Tensor p = log_p().exp();
  for (std::size_t n = 0; n < names.size(); ++n) {
    EXPECT_TRUE(torch::equal(found[0][n], found[1][n])) << names[n];
    torch::Tensor weight = decoder->tensor(names[n]).view(-1), ours = found[0][n].view(-1);
    double sum = 0, sum_ours = 0;
    for (std::int64_t i = 0; i < weight.numel(); i += weight.numel() / 40) {
      constexpr double kStep = 1e-4;
      torch::Tensor one_weight = weight[i];
      const double at = one_weight.item<double>();
      one_weight.fill_(at + kStep);
      const torch::Tensor above = log_p();
      one_weight.fill_(at - kStep);
      const torch::Tensor slope = (above - log_p()) / (2 * kStep);
      one_weight.fill_(at);
      const double exact = (p * slope.square()).sum().item<double>() / static_cast<double>(windows.length);
      EXPECT_NEAR(ours[i].item<double>(), exact, 0.5 * exact) << names[n] << " " << i;
      sum += exact;
      sum_ours += ours[i].item<double>();
    }
    EXPECT_NEAR(sum_ours, sum, 0.1 * sum) << names[n];
  }
}

TEST(Tune, ScalesAndNormsLowerTheDivergenceAndCodesStay) {
  ScratchFolder scratch;
  write_lively(scratch / "in", tiny_config(2), "bfloat16");
  run_quantize(command(scratch / "in", scratch / "plain", {{"codec", "q4"}}));
  const Json result = run_quantize(
      command(scratch / "in", scratch / "tuned", {{"codec", "q4"}, {"tune", 20}, {"tune-batch", 4}, {"tune-lr", 0.004}}));
  EXPECT_TRUE(result.at("tuned").at("improved").get<bool>());
  EXPECT_EQ(result.at("tuned").at("codes_moved"), 0);
  EXPECT_LT(result.at("tuned").at("kl_after").get<double>(), result.at("tuned").at("kl_before").get<double>());
  EXPECT_LT(divergence(scratch / "in", scratch / "tuned"), 0.97 * divergence(scratch / "in", scratch / "plain"));
  const Checkpoint plain(scratch / "plain"), tuned(scratch / "tuned");
  int scales = 0, norms = 0;
  for (const TensorSpec& spec : plain.tensors()) {
    if (plain.is_quantized(spec.name)) {
      EXPECT_EQ(plain.codes(spec.name).codes, tuned.codes(spec.name).codes) << spec.name;
      scales += plain.codes(spec.name).scales != tuned.codes(spec.name).scales;
    } else {
      norms += plain.read_f32(spec.name) != tuned.read_f32(spec.name);
    }
  }
  EXPECT_EQ(scales, 15);  // seven linears of two blocks and the embedding
  EXPECT_GT(norms, 0);
  EXPECT_FALSE(fs::exists(scratch / "tuned" / "quantize.rounded"));
}

TEST(Tune, MinimaMoveWithTheScales) {
  ScratchFolder scratch;
  write_lively(scratch / "in", tiny_config(2), "bfloat16");
  const Json q4m = {{"codec", "q4m"}, {"embedding-codec", "q4m"}};
  run_quantize(command(scratch / "in", scratch / "plain", q4m));
  Json tuned_with = q4m;
  tuned_with.update({{"tune-codes", 60}, {"tune", 10}, {"tune-batch", 4}, {"tune-code-lr", 0.01}});
  const Json result = run_quantize(command(scratch / "in", scratch / "tuned", tuned_with));
  EXPECT_TRUE(result.at("tuned").at("improved").get<bool>());
  EXPECT_GT(result.at("tuned").at("codes_moved").get<int>(), 0);
  EXPECT_LT(divergence(scratch / "in", scratch / "tuned"), divergence(scratch / "in", scratch / "plain"));
  const Checkpoint plain(scratch / "plain"), tuned(scratch / "tuned");
  for (const TensorSpec& spec : plain.tensors()) {
    if (!plain.is_quantized(spec.name)) continue;
    EXPECT_NE(plain.codes(spec.name).minima, tuned.codes(spec.name).minima) << spec.name;
    EXPECT_NE(plain.codes(spec.name).scales, tuned.codes(spec.name).scales) << spec.name;
  }
}

TEST(Tune, MovingCodesLowersItFurther) {
  ScratchFolder scratch;
  write_lively(scratch / "in", tiny_config(2));
  const Json scales = run_quantize(
      command(scratch / "in", scratch / "scales", {{"codec", "q4g64"}, {"tune", 60}, {"tune-batch", 4}}));
  const Json codes = run_quantize(
      command(scratch / "in", scratch / "codes",
              {{"codec", "q4g64"}, {"tune-codes", 50}, {"tune", 10}, {"tune-batch", 4}, {"tune-code-lr", 0.01}}));
  EXPECT_GT(codes.at("tuned").at("codes_moved").get<int>(), 100);
  EXPECT_LT(divergence(scratch / "in", scratch / "codes"), divergence(scratch / "in", scratch / "scales"));
  EXPECT_LT(codes.at("tuned").at("kl_after").get<double>(), scales.at("tuned").at("kl_after").get<double>());
}

TEST(Tune, SameBytesAtAnyThreadCount) {
  ScratchFolder scratch;
  write_lively(scratch / "in", tiny_config(2), "bfloat16");
  const Json more = {{"retarget", true}, {"fisher", true}, {"tune-codes", 3}, {"tune", 2}, {"tune-batch", 5}};
  run_quantize(command(scratch / "in", scratch / "one", more), 1);
  run_quantize(command(scratch / "in", scratch / "three", more), 3);
  EXPECT_EQ(folder_hash(scratch / "one"), folder_hash(scratch / "three"));
}

TEST(Tune, AsymmetricCodesAndPrunedZeros) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config(1), "float32", [](Decoder& decoder) {
    for (auto& item : decoder->named_parameters()) {
      if (item.value().dim() != 2) continue;
      item.value().mul_(4.0);
      if (item.key().find("proj") != std::string::npos) item.value().view({-1}).slice(0, 0, c10::nullopt, 2).zero_();
    }
  });
  for (const char* codec : {"q4a", "q4", "q8"}) {
    const fs::path out = scratch / codec;
    const Json result = run_quantize(
        command(scratch / "in", out, {{"codec", codec}, {"tune-codes", 6}, {"tune", 2}, {"tune-batch", 4}}));
    // Where it is not kept, what follows looks at nothing that was tuned; 8 bits leave nothing to gain in six steps.
    if (std::string(codec) != "q8") {
      EXPECT_TRUE(result.at("tuned").at("improved").get<bool>()) << codec;
    }
    const Checkpoint original(scratch / "in"), tuned(out);
    for (const TensorSpec& spec : tuned.tensors()) {
      if (spec.role != TensorRole::kLinear) continue;
      tuned.codes(spec.name).validate(spec.name);
      const std::vector<float> before = original.read_f32(spec.name), after = tuned.read_f32(spec.name);
      for (std::size_t i = 0; i < before.size(); i += 2) EXPECT_EQ(after[i], 0.0f) << spec.name << " " << i;
    }
  }
}

// Rows of zeros stay; the few zeros elsewhere are weights like others, whose code 0 would be the least of their group.
TEST(Tune, MinimaBesideRowsOfZeros) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config(1), "float32", [](Decoder& decoder) {
    for (auto& item : decoder->named_parameters()) {
      if (item.value().dim() != 2) continue;
      item.value().mul_(4.0);
      if (item.key().find("proj") == std::string::npos) continue;
      item.value().slice(0, 0, c10::nullopt, 4).zero_();
      item.value().view({-1}).slice(0, 5, c10::nullopt, 53).zero_();
    }
  });
  const Json result = run_quantize(command(scratch / "in", scratch / "out",
                                           {{"codec", "q4m"}, {"tune-codes", 6}, {"tune", 2}, {"tune-batch", 4}}));
  EXPECT_TRUE(result.at("tuned").at("improved").get<bool>());
  EXPECT_LT(result.at("tuned").at("kl_after"), result.at("tuned").at("kl_before"));
  const Checkpoint original(scratch / "in"), tuned(scratch / "out");
  for (const TensorSpec& spec : tuned.tensors()) {
    if (spec.role != TensorRole::kLinear) continue;
    const std::vector<float> before = original.read_f32(spec.name), after = tuned.read_f32(spec.name);
    const auto columns = static_cast<std::size_t>(spec.shape[1]);
    for (std::size_t i = 0; i < before.size(); ++i) {
      if (i / columns % 4 != 0) continue;
      ASSERT_EQ(after[i], 0.0f) << spec.name << " " << i;
    }
  }
}

TEST(Tune, AWorseResultIsNotKept) {
  ScratchFolder scratch;
  write_lively(scratch / "in", tiny_config(1));
  const Json result = run_quantize(
      command(scratch / "in", scratch / "out", {{"codec", "q8"}, {"tune", 3}, {"tune-batch", 1}, {"tune-lr", 0.9}}));
  EXPECT_FALSE(result.at("tuned").at("improved").get<bool>());
  run_quantize(command(scratch / "in", scratch / "plain", {{"codec", "q8"}}));
  EXPECT_EQ(divergence(scratch / "in", scratch / "out"), divergence(scratch / "in", scratch / "plain"));
}

TEST(Tune, ModelsWithExperts) {
  ScratchFolder scratch;
  ModelConfig config = tiny_config(1, false);
  config.family = "mixtral";
  config.experts = {.count = 4, .per_token = 2, .renormalize = true, .module = "block_sparse_moe", .gate = "w1", .up = "w3",
                    .down = "w2"};
  write_lively(scratch / "in", config);
  const Json result = run_quantize(command(
      scratch / "in", scratch / "out", {{"tune", 20}, {"tune-batch", 4}, {"tune-lr", 0.004}, {"expert-tokens", 1}}));
  EXPECT_TRUE(result.at("tuned").at("improved").get<bool>());
}

TEST(Tune, PresetsStandForOptionsAndTheUsersOwnStand) {
  ScratchFolder scratch;
  write_lively(scratch / "in", tiny_config(1));
  const auto hash = [&](const std::string& name, Json more) {
    run_quantize(command(scratch / "in", scratch / name, more));
    // But for the echoed options.
    const Checkpoint made(scratch / name);
    Hasher hasher;
    for (const TensorSpec& spec : made.tensors()) {
      const std::vector<float> values = made.read_f32(spec.name);
      hasher.update(std::as_bytes(std::span(values)));
    }
    return hasher.hex();
  };
  EXPECT_EQ(hash("a", {{"preset", "fast"}}), hash("b", {{"method", "rtn"}}));
  EXPECT_EQ(hash("c", {{"preset", "balanced"}}), hash("d", {{"retarget", true}}));
  EXPECT_EQ(hash("e", {{"preset", "best"}, {"tune-codes", 2}, {"tune", 1}}),
            hash("f", {{"retarget", true}, {"fisher", true}, {"tune-codes", 2}, {"tune", 1}, {"tune-batch", 4},
                       {"tune-lr", 0.002}, {"tune-code-lr", 0.007}}));
  EXPECT_EQ(hash("g", {{"preset", "balanced"}, {"method", "rtn"}}), hash("h", {{"method", "rtn"}}));
}

TEST(Tune, OptionsThatDoNothingAreRefused) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config(1));
  const std::vector<std::pair<Json, std::string>> cases = {{{{"tune-batch", 4}}, "--tune-batch"},
                                                           {{{"tune-lr", 0.1}}, "--tune-lr"},
                                                           {{{"tune", 5}, {"tune-code-lr", 0.1}}, "--tune-code-lr"},
                                                           {{{"method", "rtn"}, {"retarget", true}}, "--retarget"},
                                                           {{{"retarget", true}, {"samples", 4}}, "--retarget"},
                                                           {{{"tune", 5}, {"tune-text", {"x.txt"}}}, "--tune-text"},
                                                           {{{"bits", 3.0}}, "--bits"},
                                                           {{{"bits", 5.0}, {"kl", 0.1}}, "--kl"},
                                                           {{{"kl", 0.1}, {"codec", "keep"}}, "--kl"},
                                                           {{{"bits", 5.0}, {"codec", "keep"}}, "--bits"},
                                                           {{{"bits", 5.0}, {"policy", {"*proj=q8"}}}, "--bits"}};
  for (const auto& [more, name] : cases) {
    try {
      run_quantize(command(scratch / "in", scratch / "out", more));
      ADD_FAILURE() << more.dump();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage) << error.what();
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
    EXPECT_FALSE(fs::exists(scratch / "out"));
  }
}

}  // namespace
}  // namespace pare
