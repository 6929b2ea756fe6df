#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "core/checkpoint.h"
#include "core/error.h"
#include "core/random_weights.h"
#include "core/shapes.h"
#include "tests/core/model_folder.h"

namespace pare {
namespace {

TEST(Shapes, HaveThePublishedNumberOfParameters) {
  // As the model cards and transformers' num_parameters() give them.
  const std::map<std::string, std::int64_t> published = {
      {"SmolLM2-135M", 134515008},   {"SmolLM2-360M", 361821120},  {"SmolLM2-1.7B", 1711376384},
      {"Llama-3.2-1B", 1235814400},  {"Llama-3.1-8B", 8030261248}, {"Qwen2.5-0.5B", 494032768},
      {"Qwen2.5-1.5B", 1543714304},  {"DeepSeek-R1-Distill-Qwen-1.5B", 1777088000},
      {"Gemma-3-270M", 268098176},   {"Gemma-3-1B", 999885952},    {"Phi-3-mini", 3821079552},
      {"Mistral-7B", 7241732096},    {"Mixtral-8x7B", 46702792704}, {"GPT-2", 124439808},
      {"Pythia-160M", 162322944}};
  ASSERT_EQ(shapes().size(), published.size());
  for (const PublishedShape& shape : shapes())
    EXPECT_EQ(parameter_count(parse_config(parse_json(shape.config, shape.name), nullptr, shape.name)),
              published.at(shape.name))
        << shape.name;
  EXPECT_EQ(find_shape("llama-3.2-1b"), find_shape("Llama-3.2-1B"));
  EXPECT_EQ(find_shape("Llama-3.2"), nullptr);
}

TEST(RandomWeights, AreNormalAndTheSameInAnyPieces) {
  constexpr std::int64_t kCount = 200000;
  std::vector<float> all(kCount), part(777);
  random_normals(5, "a", 0, kCount, all.data());
  for (const std::int64_t first : {0, 1, 4321, 99999}) {
    random_normals(5, "a", first, 777, part.data());
    for (std::int64_t i = 0; i < 777; ++i) ASSERT_EQ(part[static_cast<std::size_t>(i)], all[static_cast<std::size_t>(first + i)]);
  }
  double moment[5] = {};
  for (const float x : all)
    for (int k = 1; k <= 4; ++k) moment[k] += std::pow(static_cast<double>(x), k) / kCount;
  EXPECT_NEAR(moment[1], 0, 0.01);  // four standard errors: 0.009, 0.013, 0.035, 0.09
  EXPECT_NEAR(moment[2], 1, 0.015);
  EXPECT_NEAR(moment[3], 0, 0.04);
  EXPECT_NEAR(moment[4], 3, 0.1);
  std::vector<float> other(kCount);
  for (const auto& [seed, name] : {std::pair(6, "a"), std::pair(5, "b")}) {
    random_normals(static_cast<std::uint64_t>(seed), name, 0, kCount, other.data());
    double product = 0;
    for (std::int64_t i = 0; i < kCount; ++i)
      product += static_cast<double>(all[static_cast<std::size_t>(i)]) * other[static_cast<std::size_t>(i)] / kCount;
    EXPECT_NEAR(product, 0, 0.01);
  }
}

TEST(RandomWeights, MakeAFolderThatOpens) {
  const testing::Scratch scratch;
  Json json = parse_json(find_shape("SmolLM2-135M")->config, "test");
  json["num_hidden_layers"] = 1;
  json["vocab_size"] = 300;
  const ModelConfig config = parse_config(json, nullptr, "test");
  Progress quiet(true);
  Context context;
  context.progress = &quiet;
  write_random_model(scratch.path(), config, 3, context);
  const Checkpoint model(scratch.path());
  EXPECT_EQ(model.float_dtype(), "bfloat16");
  for (const float w : model.read_f32("model.norm.weight")) ASSERT_EQ(w, 1.0f);
  const auto values = model.read_f32("model.layers.0.mlp.up_proj.weight");
  double square = 0;
  for (const float w : values) square += static_cast<double>(w) * w;
  EXPECT_NEAR(std::sqrt(square / static_cast<double>(values.size())), 0.02, 1e-4);
}

}  // namespace
}  // namespace pare
