// Linears whose inputs are rounded to int8 (w8a8), in both forwards, for every kind of linear of every family.
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "core/context.h"
#include "core/fused_rows.h"
#include "model/decoder.h"
#include "model/logits.h"
#include "quantize/policy.h"
#include "runtime/engine.h"
#include "runtime/export.h"
#include "runtime/round_to_nearest.h"
#include "tests/families.h"
#include "tests/scratch.h"

namespace pare {
namespace {

constexpr Codec kRounded{CodecKind::kQ8, Codec::kPerRow, true};

bool is_linear(const TensorSpec& spec) {
  return spec.role == TensorRole::kLinear || spec.role == TensorRole::kHead;
}

// The model with its linears as w8a8.
void write_codes(const Checkpoint& original, const fs::path& folder) {
  CheckpointWriter writer(folder, original.config(), "float32");
  for (const TensorSpec& spec : original.tensors()) {
    const std::vector<float> values = original.read_f32(spec.name);
    if (!is_linear(spec) || not_splittable(original.config(), spec)) {
      writer.put(spec.name, values.data());
      continue;
    }
    writer.put_codes(spec.name, round_to_nearest(kRounded, spec.shape[0], spec.shape[1], values.data(), spec.name));
  }
  writer.finish();
}

std::vector<float> all_logits(LogitsSource& source, std::span<const std::int32_t> ids) {
  std::vector<float> logits(ids.size() * static_cast<std::size_t>(source.vocab_size()));
  source.begin(ids);
  source.logits(0, static_cast<std::int64_t>(ids.size()), logits.data());
  return logits;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, power = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    power += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(difference / power);
}

struct Golden {
  explicit Golden(const std::string& name, const fs::path& folder)
      : json(read_json(testing::golden_families() / (name + ".json"))) {
    testing::make_family_folder(json.at("config"), folder);
    for (const Json& id : json.at("texts").back().at("ids")) ids.push_back(id.get<std::int32_t>());
  }
  Json json;
  std::vector<std::int32_t> ids;
};

class RoundedInputsOf : public ::testing::TestWithParam<std::string> {};

// The module knows each of them by its name: rounding one kind alone changes the logits, a little.
TEST_P(RoundedInputsOf, EveryKindOfLinear) {
  const torch::NoGradGuard no_grad;
  const testing::Scratch scratch("rounded");
  const Golden golden(GetParam(), scratch / "model");
  const Checkpoint original(scratch / "model");
  const torch::Tensor ids = torch::tensor(golden.ids).to(torch::kLong).unsqueeze(0);
  const torch::Tensor exact = load_decoder(original, torch::kCPU)->forward(ids);
  std::set<std::string> kinds;
  for (const TensorSpec& spec : original.tensors())
    if (is_linear(spec)) kinds.insert(module_kind(spec.module));
  for (const std::string& kind : kinds) {
    Decoder decoder = load_decoder(original, torch::kCPU);
    for (const TensorSpec& spec : original.tensors()) {
      if (!is_linear(spec) || module_kind(spec.module) != kind) continue;
      if (spec.layer < 0) decoder->round_head_inputs();
      else decoder->block(spec.layer)->round_inputs(spec.module);
    }
    const double off = ((decoder->forward(ids) - exact).norm() / exact.norm()).item<double>();
    EXPECT_GT(off, 1e-5) << kind;
    EXPECT_LT(off, 0.3) << kind;  // another expert may be chosen
  }
  EXPECT_GE(kinds.size(), 3u);
}

INSTANTIATE_TEST_SUITE_P(Goldens, RoundedInputsOf, ::testing::ValuesIn(testing::family_names()),
                         [](const auto& info) { return info.param; });

// Folder, compact file, both forwards, once for each architecture.
TEST(RoundedInputs, BothForwardsAgree) {
  std::set<std::string> seen;
  Progress progress(true);
  Context context;
  context.progress = &progress;
  for (const std::string& name : testing::family_names()) {
    const testing::Scratch scratch("rounded");
    const Golden golden(name, scratch / "model");
    const Checkpoint original(scratch / "model");
    if (!seen.insert(original.config().family).second) continue;
    write_codes(original, scratch / "codes");
    const Checkpoint codes(scratch / "codes");
    export_compact(codes, {.out = scratch / "codes.pare"}, context);
    const auto rounded = all_logits(*torch_logits(codes, "cpu"), golden.ids);
    const double cost = distance(all_logits(*torch_logits(codes, "cpu", 0, true), golden.ids), rounded);
    EngineOptions options;
    options.threads = 1;
    options.int8_activations = false;
    const auto runtime = all_logits(*runtime_logits(Engine::open(scratch / "codes.pare", options)), golden.ids);
    // A last digit decides between two codes here and there, and the choice travels on.
    EXPECT_LT(distance(runtime, rounded), 0.5 * cost) << name;
    EXPECT_GT(cost, 1e-4) << name;
  }
  EXPECT_GE(seen.size(), 8u);
}

// The definition of runtime/FORMAT.md section 4, row by row in plain C++.
TEST(RoundTokens, IsTheDefinitionAndPassesGradients) {
  torch::manual_seed(3);
  torch::Tensor x = torch::randn({2, 5, 37}) * torch::logspace(-3, 3, 5).view({1, 5, 1});
  x[0][1].zero_();
  x[1][2][7] = NAN;
  x[1][3][0] = INFINITY;
  const torch::Tensor y = round_tokens(x);
  for (std::int64_t row = 0; row < 10; ++row) {
    const float* from = x.data_ptr<float>() + row * 37;
    const float* got = y.data_ptr<float>() + row * 37;
    float peak = 0;
    bool finite = true;
    for (int i = 0; i < 37; ++i) {
      finite = finite && std::isfinite(from[i]);
      peak = std::max(peak, std::abs(from[i]));
    }
    for (int i = 0; i < 37; ++i) {
      if (!finite) EXPECT_TRUE(std::isnan(got[i])) << row;
      else EXPECT_EQ(got[i], peak > 0 ? std::nearbyint(from[i] * (127.0f / peak)) * (peak / 127.0f) : 0.0f) << row;
    }
  }
  torch::Tensor w = torch::randn({4, 37}).requires_grad_();
  const torch::Tensor factor = torch::randn({4, 37});
  (round_tokens(w) * factor).sum().backward();
  EXPECT_TRUE(torch::equal(w.grad(), factor));
  EXPECT_EQ(round_tokens(w.detach().to(torch::kBFloat16)).scalar_type(), torch::kBFloat16);
}

}  // namespace
}  // namespace pare
