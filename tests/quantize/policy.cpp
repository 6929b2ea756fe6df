#include "quantize/policy.h"

#include <gtest/gtest.h>

#include "core/error.h"

namespace pare {
namespace {

ModelConfig small_config(std::int64_t hidden, std::int64_t wide, bool tied) {
  ModelConfig config;
  config.family = "llama";
  config.vocab_size = 512;
  config.hidden_size = hidden;
  config.intermediate_size = wide;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = hidden / 4;
  config.max_position_embeddings = 64;
  config.tie_word_embeddings = tied;
  return config;
}

std::string codec_of(const std::vector<TensorPlan>& plan, const std::string& name) {
  for (const TensorPlan& tensor : plan) {
    if (tensor.spec.name == name) return tensor.codec ? tensor.codec->name() : "float";
  }
  return "absent";
}

TEST(Glob, StarsAndQuestionMarks) {
  EXPECT_TRUE(glob_match("*", ""));
  EXPECT_TRUE(glob_match("*.down_proj*", "model.layers.0.mlp.down_proj.weight"));
  EXPECT_TRUE(glob_match("model.layers.?.mlp.*", "model.layers.3.mlp.up_proj"));
  EXPECT_TRUE(glob_match("a*b*c", "a-b-b-c"));
  EXPECT_FALSE(glob_match("model.layers.?.mlp.*", "model.layers.13.mlp.up_proj"));
  EXPECT_FALSE(glob_match("down_proj", "mlp.down_proj"));
  EXPECT_FALSE(glob_match("a*b", "abc"));
}

TEST(Policy, DefaultsAndRulesInOrder) {
  QuantizePolicy policy;
  policy.rules = {"*.layers.1.*=q8", "*.mlp.down_proj=q4a", "lm_head=keep"};
  const std::vector<TensorPlan> plan = plan_codecs(small_config(64, 128, false), policy);
  EXPECT_EQ(codec_of(plan, "model.embed_tokens.weight"), "q8");
  EXPECT_EQ(codec_of(plan, "model.layers.0.self_attn.q_proj.weight"), Codec::parse("q4", "t").name());
  EXPECT_EQ(codec_of(plan, "model.layers.1.self_attn.q_proj.weight"), "q8");
  EXPECT_EQ(codec_of(plan, "model.layers.1.mlp.down_proj.weight"), Codec::parse("q4a", "t").name());
  EXPECT_EQ(codec_of(plan, "lm_head.weight"), "float");
  EXPECT_EQ(codec_of(plan, "model.norm.weight"), "float");
  EXPECT_TRUE(fallback_notes(plan).empty());
  EXPECT_EQ(codec_of(plan_codecs(small_config(64, 128, true), {}), "lm_head.weight"), "absent");
}

TEST(Policy, FallbackIsTheNextSmallerGroupThenPerRow) {
  QuantizePolicy policy;
  policy.linear = "q4g128";
  const std::vector<TensorPlan> plan = plan_codecs(small_config(64, 172, true), policy);
  EXPECT_EQ(codec_of(plan, "model.layers.0.self_attn.q_proj.weight"), "q4g64");
  EXPECT_EQ(codec_of(plan, "model.layers.0.mlp.down_proj.weight"), "q8c");
  const std::vector<std::string> notes = fallback_notes(plan);
  ASSERT_EQ(notes.size(), 7u);
  EXPECT_EQ(notes.back(), "mlp.down_proj (2 tensors): q4g128 does not divide 172 columns, q8c instead");
}

TEST(Policy, LowBitsFallBackLikeTheOthersAndInt8InputsNeedALinear) {
  QuantizePolicy policy;
  policy.linear = "q3g128";
  policy.embedding = "q2g128";
  const std::vector<TensorPlan> plan = plan_codecs(small_config(64, 172, true), policy);
  EXPECT_EQ(codec_of(plan, "model.layers.0.self_attn.q_proj.weight"), "q3g64");
  EXPECT_EQ(codec_of(plan, "model.layers.0.mlp.down_proj.weight"), "q8c");
  EXPECT_EQ(codec_of(plan, "model.embed_tokens.weight"), "q2g64");

  policy.linear = "w8a8";
  policy.rules = {"*.down_proj=q8c"};
  const std::vector<TensorPlan> int8 = plan_codecs(small_config(64, 172, true), policy);
  EXPECT_EQ(codec_of(int8, "model.layers.0.self_attn.q_proj.weight"), "w8a8");
  EXPECT_EQ(codec_of(int8, "model.layers.0.mlp.down_proj.weight"), "q8c");
  policy.embedding = "w8a8";
  try {
    plan_codecs(small_config(64, 172, true), policy);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    EXPECT_NE(error.found().find("model.embed_tokens.weight"), std::string::npos) << error.found();
  }
}

TEST(Policy, WithoutFallbackEveryTensorIsNamed) {
  QuantizePolicy policy;
  policy.fallback = false;
  try {
    plan_codecs(small_config(64, 172, true), policy);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInput);
    EXPECT_NE(error.found().find("model.layers.0.mlp.down_proj.weight"), std::string::npos);
    EXPECT_NE(error.found().find("model.layers.1.mlp.down_proj.weight"), std::string::npos);
    EXPECT_NE(error.found().find("172"), std::string::npos);
    EXPECT_EQ(error.found().find("up_proj"), std::string::npos);
  }
}

TEST(Policy, AllProblemsAtOnce) {
  QuantizePolicy policy;
  policy.linear = "q5";
  policy.embedding = "f16";
  policy.rules = {"*.down_prj=q8", "nonsense", "*=q9"};
  try {
    plan_codecs(small_config(64, 128, true), policy);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    for (const char* part : {"q5", "f16", "down_prj", "nonsense", "q9"}) {
      EXPECT_NE(error.found().find(part), std::string::npos) << part << "\n" << error.found();
    }
  }
}

}  // namespace
}  // namespace pare
