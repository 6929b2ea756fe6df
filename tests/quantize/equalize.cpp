// Scales that fold away: the candidates of AWQ and SmoothQuant against their formulas, the search against a literal one
// in double precision, and the folded models of every family against the logits of transformers.
#include "quantize/equalize.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/error.h"
#include "model/logits.h"
#include "quantize/awq.h"
#include "quantize/fold.h"
#include "quantize/least_noise.h"
#include "quantize/scale_search.h"
#include "quantize/smooth_quant.h"
#include "tests/families.h"
#include "tests/quantize/layers.h"
#include "tests/quantize/tiny_model.h"

namespace pare {
namespace {

using testing::folder_hash;
using testing::run_quantize;
using testing::ScratchFolder;
using testing::tiny_config;
using testing::write_tiny;
using torch::Tensor;

TEST(EqualizeScales, FollowTheFormulas) {
  const std::vector<double> a = {0.5, 8.0, 0.02, 0.0}, w = {1.0, 0.25, 4.0, 2.0};
  for (const double e : {0.0, 0.35, 1.0}) {
    const std::vector<float> awq = awq_scales(a, e), smooth = smooth_scales(a, w, e);
    for (std::size_t j = 0; j < 3; ++j) {
      EXPECT_NEAR(awq[j] / awq[1], std::pow(a[j] / a[1], e), 1e-6);
      const auto s = [&](std::size_t i) { return std::pow(a[i], e) / std::pow(w[i], 1 - e); };
      EXPECT_NEAR(smooth[j] / smooth[1], s(j) / s(1), 1e-5 * s(j) / s(1));
    }
    for (const std::vector<float>* scales : {&awq, &smooth}) {
      const auto [low, high] = std::minmax_element(scales->begin(), scales->end());
      EXPECT_GT(*low, 0.0f);  // the channel that is always 0 too
      EXPECT_NEAR(*low * *high, 1.0, 1e-4);
    }
  }
  EXPECT_EQ(awq_scales(std::vector<double>(3, 0.0), 0.5), std::vector<float>(3, 1.0f));
}

// ||W x - Q(W S) R(x / s)||^2, one product after the other.
double literal_error(const std::vector<float>& weight, std::int64_t rows, std::int64_t n, const std::vector<float>& x,
                     const std::vector<float>& s, const Codec& codec, ScaleRule rule) {
  const auto at = [](std::int64_t i) { return static_cast<std::size_t>(i); };
  const std::int64_t tokens = static_cast<std::int64_t>(x.size()) / n;
  std::vector<float> scaled(weight), rounded(weight.size());
  std::vector<double> energy(at(n), 0.0);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t j = 0; j < n; ++j) scaled[at(r * n + j)] *= s[at(j)];
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t j = 0; j < n; ++j) energy[at(j)] += std::pow(static_cast<double>(x[at(t * n + j)] / s[at(j)]), 2);
  Importance importance;
  importance.mean_square = energy.data();
  round_to_nearest(scaled.data(), rows, n, codec, rule, importance, "test", 1).unpack(rounded.data());
  double error = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::vector<double> heard(at(n));
    float peak = 0;
    for (std::int64_t j = 0; j < n; ++j) peak = std::max(peak, std::abs(x[at(t * n + j)] / s[at(j)]));
    for (std::int64_t j = 0; j < n; ++j) {
      const double value = x[at(t * n + j)] / s[at(j)];
      heard[at(j)] = codec.int8_inputs ? std::nearbyint(value * 127.0 / peak) * peak / 127.0 : value;
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (std::int64_t j = 0; j < n; ++j)
        sum += static_cast<double>(weight[at(r * n + j)]) * static_cast<double>(x[at(t * n + j)]) -
               static_cast<double>(rounded[at(r * n + j)]) * heard[at(j)];
      error += sum * sum;
    }
  }
  return error;
}

TEST(EqualizeScales, ErrorIsThatOfTheRoundedLayer) {
  std::mt19937_64 random(5);
  std::normal_distribution<double> normal;
  const std::int64_t rows = 70, n = 64, tokens = 300;
  const std::vector<float> weight = testing::random_weight(random, rows, n);
  std::vector<float> x, s;
  for (std::int64_t i = 0; i < tokens * n; ++i)
    x.push_back(static_cast<float>(normal(random) * (i % n % 9 == 0 ? 8 : 1)));
  for (std::int64_t j = 0; j < n; ++j) s.push_back(static_cast<float>(std::exp(0.5 * normal(random))));
  for (const char* name : {"q4g32", "q3g64", "q8c", "w8a8"})
    for (const ScaleRule rule : {ScaleRule::kAbsmax, ScaleRule::kSearched}) {
      const ScaledLinear linear{"test", weight.data(), rows, n, Codec::parse(name, "test")};
      const double found = scaled_error(linear, x, s, rule, 1);
      const double expected = literal_error(weight, rows, n, x, s, linear.codec, rule);
      // A value on the border between two codes may fall to either side in single precision.
      EXPECT_NEAR(found, expected, (linear.codec.int8_inputs ? 3e-3 : 1e-4) * expected) << name;
      EXPECT_GT(expected, 0.0);
      EXPECT_EQ(scaled_error(linear, x, s, rule, 3), found) << name;
    }
}

// The two terms of quantize/least_noise.h as they stand there.
double literal_noise(const std::vector<float>& weight, std::int64_t rows, std::int64_t n, const std::vector<float>& x,
                     const std::vector<double>& s, const Codec& codec, double largest) {
  const auto at = [](std::int64_t i) { return static_cast<std::size_t>(i); };
  const std::int64_t tokens = static_cast<std::int64_t>(x.size()) / n, size = n / codec.groups(n);
  double peaks = 0, energy = 0, noise = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    double peak = 0;
    for (std::int64_t j = 0; j < n; ++j) peak = std::max(peak, std::pow(x[at(t * n + j)] / s[at(j)], 2));
    peaks += peak / static_cast<double>(tokens);
  }
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t g = 0; g < n; g += size) {
      double peak = 0, power = 0;
      for (std::int64_t j = g; j < g + size; ++j) {
        const double scaled = std::pow(weight[at(r * n + j)] * s[at(j)], 2);
        energy += scaled;
        peak = std::max(peak, scaled);
        for (std::int64_t t = 0; t < tokens; ++t)
          power += std::pow(x[at(t * n + j)] / s[at(j)], 2) / static_cast<double>(tokens);
      }
      noise += peak * power / (12 * largest * largest);
    }
  return noise + (codec.int8_inputs ? peaks * energy / (12.0 * 127 * 127) : 0.0);
}

TEST(EqualizeScales, LeastNoiseIsLeast) {
  std::mt19937_64 random(17);
  std::normal_distribution<double> normal;
  for (const auto& [name, largest, n] : {std::tuple("w8a8", 127.5, 12), {"q8c", 127.5, 12}, {"q4g32", 7.5, 64}}) {
    const std::int64_t rows = 9, tokens = 40;
    const Codec codec = Codec::parse(name, "test");
    const std::vector<float> weight = testing::random_weight(random, rows, n);
    std::vector<float> x;
    std::vector<double> gain;
    for (std::int64_t j = 0; j < n; ++j) gain.push_back(std::exp(normal(random)));
    for (std::int64_t i = 0; i < tokens * n; ++i)
      x.push_back(static_cast<float>(normal(random) * gain[static_cast<std::size_t>(i % n)]));
    std::vector<std::int64_t> channel;  // pairs of columns share a scale
    for (std::int64_t j = 0; j < n; ++j) channel.push_back(j / 2);
    const auto columns = [&](const auto& scales) {
      std::vector<double> out;
      for (const std::int64_t c : channel) out.push_back(static_cast<double>(scales[static_cast<std::size_t>(c)]));
      return out;
    };
    const std::vector<ScaledLinear> linears = {{"test", weight.data(), rows, n, codec}};
    const std::vector<float> found = least_noise_scales(linears, x, channel, n / 2);
    const auto noise = [&](const auto& scales) {
      return literal_noise(weight, rows, n, x, columns(scales), codec, largest);
    };
    const double least = noise(found);
    EXPECT_NEAR(noise_of(linears, x, channel, found), least, 1e-4 * least) << name;
    EXPECT_LT(least, 0.97 * noise(std::vector<double>(static_cast<std::size_t>(n / 2), 1.0))) << name;
    // Convex in log s: what no small step betters is least. Steps in single channels and in random directions.
    std::vector<double> best(found.begin(), found.end());
    double reached = least;
    for (int step = 0; step < 3000; ++step) {
      std::vector<double> tried = best;
      const double size = 0.1 * std::pow(0.999, step);
      if (step % 2 == 0) tried[static_cast<std::size_t>(random()) % tried.size()] *= std::exp(size * normal(random));
      else for (double& s : tried) s *= std::exp(size * normal(random));
      if (const double value = noise(tried); value < reached) {
        reached = value;
        best = tried;
      }
    }
    EXPECT_LT(least, 1.01 * reached) << name;
  }
}

TEST(EqualizeScales, WhatANormCanStoreIsDividedOutExactly) {
  std::mt19937_64 random(2);
  std::normal_distribution<double> normal;
  std::vector<float> weight, scales;
  for (int j = 0; j < 500; ++j) {
    weight.push_back(bf16_to_f32(f32_to_bf16(static_cast<float>(normal(random)))));
    scales.push_back(static_cast<float>(std::exp(normal(random))));
  }
  weight[7] = 0;
  weight[8] = -1;
  for (const bool adds_one : {false, true}) {
    ModelConfig config = tiny_config();
    config.norm_adds_one = adds_one;
    config.hidden_size = 500;
    const TensorSpec norm{"n", {500}, TensorRole::kNorm, 0, "input_layernorm"};
    BlockScales folded;
    folded[BlockStage::kQkv] = storable_scales(config, weight, scales, "bfloat16");
    std::vector<float> after = weight;
    fold_scales(config, norm, folded, after);
    const double one = adds_one ? 1 : 0;
    int kept = 0;
    for (std::size_t j = 0; j < weight.size(); ++j) {
      const float s = folded[BlockStage::kQkv][j], stored = bf16_to_f32(f32_to_bf16(after[j]));
      kept += s == 1.0f;
      const double tolerance = 3e-7 * std::abs(weight[j] + one) + (adds_one ? 3e-7 * static_cast<double>(s) : 0);
      EXPECT_NEAR((stored + one) * s, weight[j] + one, tolerance) << j;
      if (s == 1.0f) continue;
      EXPECT_NEAR(s / scales[j], 1.0, adds_one ? 0.6 : 0.005) << j;
    }
    EXPECT_LT(kept, adds_one ? 20 : 2);
    EXPECT_EQ(folded[BlockStage::kQkv][adds_one ? 8 : 7], 1.0f);
  }
}

// Every family: random scales wherever they fold leave the logits those of transformers.
class FoldFamily : public ::testing::TestWithParam<std::string> {
 protected:
  FoldFamily() : golden_(read_json(testing::golden_families() / (GetParam() + ".json"))) {
    testing::make_family_folder(golden_.at("config"), scratch_ / "in");
  }
  void expect_same_logits(const fs::path& folder) const {
    const auto source = torch_logits(Checkpoint(folder), "cpu", 1);
    for (const testing::FamilyText& text : testing::family_texts(golden_))
      EXPECT_LT(testing::largest_difference(*source, text), 2e-4) << text.ids.size() << " tokens";
  }
  ScratchFolder scratch_;
  Json golden_;
};

TEST_P(FoldFamily, RandomScalesLeaveTheLogits) {
  const Checkpoint model(scratch_ / "in");
  const ModelConfig& config = model.config();
  std::mt19937_64 random(11);
  std::normal_distribution<double> normal;
  const auto draw = [&](BlockScales& scales, BlockStage stage) {
    if (cannot_fold(config, stage)) return;
    scales[stage].clear();
    for (std::int64_t c = 0; c < fold_channels(config, stage); ++c)
      scales[stage].push_back(static_cast<float>(std::exp(0.7 * normal(random))));
  };
  CheckpointWriter writer(scratch_ / "out", config, "float32");
  BlockScales block, expert;
  int layer = -1, changed = 0;
  std::int64_t of = -1;
  for (const TensorSpec& spec : model.tensors()) {
    if (spec.layer != layer && spec.layer >= 0)
      for (const BlockStage stage : {BlockStage::kQkv, BlockStage::kO, BlockStage::kGateUp, BlockStage::kDown})
        draw(block, stage);
    if (spec.expert >= 0 && (spec.expert != of || spec.layer != layer)) draw(expert, BlockStage::kDown);
    layer = spec.layer;
    of = spec.expert;
    std::vector<float> values = model.read_f32(spec.name);
    if (layer >= 0) fold_scales(config, spec, of >= 0 ? expert : block, values);
    changed += values != model.read_f32(spec.name);
    writer.put(spec.name, values.data());
  }
  writer.finish();
  // At least the first norm, q, k, v, o of every block, or these in one tensor.
  EXPECT_GE(changed, (config.fused_qkv ? 3 : 5) * config.num_layers);
  expect_same_logits(scratch_ / "out");
}

TEST_P(FoldFamily, EqualizedModelsHaveTheSameLogits) {
  const Checkpoint model(scratch_ / "in");
  Progress progress(true);
  Context context;
  context.progress = &progress;
  const CalibrationWindows windows = random_windows(model.config().vocab_size, 5, 24, 3);
  for (const Equalizing method : {Equalizing::kAwq, Equalizing::kSmoothQuant, Equalizing::kLeastNoise}) {
    const bool awq = method == Equalizing::kAwq;
    const std::vector<TensorPlan> plan = plan_codecs(model.config(), {awq ? "q3" : "w8a8", "keep", "keep", {}, true});
    const fs::path out = scratch_ / std::to_string(static_cast<int>(method));
    CheckpointWriter writer(out, model.config(), "float32");
    equalize({model, plan, writer, scratch_ / "rows", method, ScaleRule::kAbsmax, windows, "float32", "cpu", 1, 8, {}},
             context);
    writer.finish();
    const Json rows = equalize_rows(model.config(), scratch_ / "rows");
    for (const Json& row : rows) EXPECT_LE(row.at("after").get<double>(), row.at("before").get<double>());
    int inputs = 0;
    for (const BlockStage stage : {BlockStage::kQkv, BlockStage::kO, BlockStage::kGateUp, BlockStage::kDown})
      if (!cannot_fold(model.config(), stage))
        inputs += stage == BlockStage::kDown && model.config().has_experts()
                      ? static_cast<int>(model.config().experts.count) : 1;
    EXPECT_EQ(rows.size(), static_cast<std::size_t>(inputs * model.config().num_layers));
    expect_same_logits(out);
  }
}

INSTANTIATE_TEST_SUITE_P(All, FoldFamily, ::testing::ValuesIn(testing::family_names()),
                         [](const auto& info) { return info.param; });

// Norms and weights of unequal channels, so that scales have something to do.
void uneven(Decoder& decoder) {
  for (auto& item : decoder->named_parameters()) {
    const torch::Tensor p = item.value();
    const torch::Tensor wave = torch::exp(1.2 * torch::sin(torch::arange(p.size(-1)) * 2.3));
    if (p.dim() == 1) item.value().mul_(wave);
    else if (item.key().find("embed") == std::string::npos) item.value().mul_(8 / wave.sqrt());
  }
}

// The whole search, in double precision, from the definition.
TEST(Equalize, ChoosesWhatALiteralSearchChooses) {
  ScratchFolder scratch;
  const ModelConfig config = tiny_config(1);
  write_tiny(scratch / "in", config, "float32", uneven);
  const Checkpoint model(scratch / "in");
  const std::int64_t samples = 10, length = 32;
  const Json base = {{"model", (scratch / "in").string()}, {"random-tokens", true}, {"samples", samples},
                     {"context", length}, {"method", "rtn-absmax"}};
  const CalibrationWindows windows = random_windows(config.vocab_size, samples, length, 4);
  const torch::NoGradGuard no_grad;
  Decoder decoder = load_decoder(model, torch::kCPU);
  const RopeTables rope = rope_tables(config, length, torch::kCPU);
  DecoderBlock block = decoder->block(0);
  Tensor ids = torch::empty({samples, length}, torch::kLong);
  std::copy(windows.ids.begin(), windows.ids.end(), ids.data_ptr<std::int64_t>());
  const Tensor hidden = decoder->embed(ids), normed = block->attention_input(hidden),
               mix = block->attention_mix(normed, rope), after = block->attention_output(hidden, mix),
               mlp = block->mlp_input(after), down = block->mlp_mix(mlp);
  struct Input {
    std::string name;
    Tensor x;
    std::vector<std::string> modules;
    std::int64_t group;  // heads that share a channel
  };
  const Input inputs[] = {{"self_attn.q_proj", normed, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, 1},
                          {"self_attn.o_proj", mix, {"self_attn.o_proj"}, 2},
                          {"mlp.gate_proj", mlp, {"mlp.gate_proj", "mlp.up_proj"}, 1},
                          {"mlp.down_proj", down, {"mlp.down_proj"}, 1}};
  for (const char* method : {"awq", "smoothquant"}) {
    const bool awq = std::string(method) == "awq";
    const Codec codec = Codec::parse(awq ? "q3" : "w8a8", "test");
    Json given = base;
    given.update({{"out", (scratch / method).string()}, {"equalize", method}, {"codec", codec.name()}});
    run_quantize(given, 2, 4);
    const Json rows = read_json(scratch / method / "quantize.json").at("scaled");
    ASSERT_EQ(rows.size(), 4u);
    int scaled = 0;
    for (std::size_t i = 0; i < 4; ++i) {
      const Input& input = inputs[i];
      ASSERT_EQ(rows[i].at("name"), "model.layers.0." + input.name + ".weight");
      const Tensor all = input.x.reshape({samples * length, -1});
      const std::int64_t n = all.size(1), channels = n / input.group;
      // Heads 0 and 1 read the first values, 2 and 3 the second: [kv head][head of the group][dimension].
      const auto by_channel = [&](const Tensor& values) {
        return input.group == 1 ? values.view({1, n}) : values.view({2, 2, 16}).transpose(0, 1).reshape({2, channels});
      };
      const Tensor held = input.x.index_select(0, torch::tensor({4, 9})).reshape({2 * length, n}).contiguous();
      const Tensor others = input.x.index_select(0, torch::tensor({0, 1, 2, 3, 5, 6, 7, 8})).reshape({8 * length, n});
      const Tensor root = by_channel(all.to(torch::kDouble).square().mean(0)).mean(0).sqrt();
      const Tensor peak = std::get<0>(by_channel(std::get<0>(others.abs().to(torch::kDouble).max(0))).max(0));
      std::vector<Tensor> weights;
      for (const std::string& module : input.modules) weights.push_back(block->weight(module).contiguous());
      const Tensor most =
          std::get<0>(by_channel(std::get<0>(torch::cat(weights).abs().to(torch::kDouble).max(0))).max(0));
      double least = 0, before = 0;
      Json best = nullptr;
      for (int k = -1; k <= 20; ++k) {
        const double e = k / 20.0;
        Tensor s = awq ? root.pow(e) : peak.pow(e) / most.pow(1 - e);
        if (k < 0) s = torch::ones_like(root);
        if (awq && (k == 0 || k == 20)) continue;
        s = s / (s.min() * s.max()).sqrt();
        const Tensor shared = input.group == 1 ? s : s.view({2, 1, 16}).expand({2, 2, 16}).reshape({n});
        const Tensor columns = shared.to(torch::kFloat);
        const auto list = [](const Tensor& t) {
          const Tensor c = t.contiguous();
          return std::vector<float>(c.data_ptr<float>(), c.data_ptr<float>() + c.numel());
        };
        double error = 0;
        for (const Tensor& weight : weights)
          error += literal_error(list(weight), weight.size(0), n, list(held), list(columns), codec, ScaleRule::kAbsmax);
        if (k < 0) before = least = error;
        if (error >= least) continue;
        least = error;
        best = e;
      }
      EXPECT_NEAR(rows[i].at("before").get<double>(), before, 1e-2 * before) << method << " " << input.name;
      EXPECT_NEAR(rows[i].at("after").get<double>(), least, 1e-2 * least) << method << " " << input.name;
      ASSERT_EQ(rows[i].at("exponent").is_null(), best.is_null()) << method << " " << input.name;
      if (best.is_null()) continue;
      EXPECT_NEAR(rows[i].at("exponent").get<double>(), best.get<double>(), 0.051) << method << " " << input.name;
      ++scaled;
    }
    EXPECT_GE(scaled, 3) << method;
  }
}

TEST(Equalize, LowersTheErrorAndIsTheSameAtAnyThreadCount) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config(2), "bfloat16", uneven);
  const auto command = [&](const std::string& out, const Json& more) {
    Json given = {{"model", (scratch / "in").string()}, {"out", (scratch / out).string()}, {"random-tokens", true},
                  {"samples", 10}, {"context", 33}, {"codec", "q3"}};
    given.update(more);
    return given;
  };
  for (const Json& more :
       std::vector<Json>{{{"method", "rtn"}}, {{"retarget", true}}, {{"bits", 5.0}, {"fisher", true}}}) {
    Json with = more;
    with["equalize"] = more.contains("retarget") ? "least-noise" : "awq";
    const Json plain = run_quantize(command("plain", more)), scaled = run_quantize(command("scaled", with), 1);
    run_quantize(command("again", with), 3);
    EXPECT_EQ(folder_hash(scratch / "scaled"), folder_hash(scratch / "again")) << more.dump();
    EXPECT_FALSE(plain.contains("scaled"));
    ASSERT_EQ(scaled.at("scaled").size(), 4u);
    for (const Json& row : scaled.at("scaled")) EXPECT_LE(row.at("after"), row.at("before"));
    EXPECT_LT(scaled.at("layer_error"), plain.at("layer_error")) << more.dump();
    EXPECT_FALSE(fs::exists(scratch / "scaled" / "quantize.equalized"));
    for (const char* folder : {"plain", "scaled", "again"}) fs::remove_all(scratch / folder);
  }
}

TEST(Equalize, RefusesWhatCannotBe) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config(1));
  const Json base = {{"model", (scratch / "in").string()}, {"out", (scratch / "out").string()}, {"equalize", "awq"}};
  const auto refused = [&](const Json& more) -> std::string {
    Json given = base;
    given.update(more);
    try {
      run_quantize(given);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage);
      EXPECT_FALSE(fs::exists(scratch / "out.partial"));
      return error.what();
    }
    return "";
  };
  EXPECT_NE(refused({{"method", "rtn"}}).find("--equalize"), std::string::npos);
  const std::string few = refused({{"random-tokens", true}, {"samples", 4}, {"context", 16}});
  EXPECT_NE(few.find("at least 5 --samples"), std::string::npos) << few;
  const Json calibrated = {{"random-tokens", true}, {"samples", 8}, {"context", 16}, {"method", "rtn"}};
  Json keep = calibrated;
  keep.update({{"codec", "keep"}});
  EXPECT_NE(refused(keep).find("linears are all quantized"), std::string::npos);
  keep.update({{"codec", "q4"}, {"policy", {"*v_proj*=keep", "*up_proj*=keep"}}});
  EXPECT_NE(refused(keep).find("linears are all quantized"), std::string::npos);
}

TEST(Equalize, WhatIsKeptStaysAsItIs) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config(2), "bfloat16", uneven);
  const Json result = run_quantize({{"model", (scratch / "in").string()}, {"out", (scratch / "out").string()},
                                    {"random-tokens", true}, {"samples", 10}, {"context", 33}, {"codec", "q3"},
                                    {"method", "rtn"}, {"equalize", "awq"}, {"policy", {"*up_proj*=keep"}}});
  ASSERT_EQ(result.at("scaled").size(), 2u) << "up_proj reads the inputs of the MLP and makes those of down_proj";
  EXPECT_EQ(result.at("scaled")[0].at("kind"), "self_attn.q_proj");
  EXPECT_EQ(result.at("scaled")[1].at("kind"), "self_attn.o_proj");
  const Checkpoint before(scratch / "in"), after(scratch / "out");
  for (const TensorSpec& spec : after.tensors()) {
    if (spec.name.find("up_proj") == std::string::npos && spec.name.find("post_attention") == std::string::npos) continue;
    EXPECT_EQ(before.read_f32(spec.name), after.read_f32(spec.name)) << spec.name;
  }
}

}  // namespace
}  // namespace pare
