// Quantizing models with experts: what the report says about them.
#include <gtest/gtest.h>

#include "core/error.h"
#include "tests/quantize/tiny_model.h"

namespace pare {
namespace {

using testing::folder_hash;
using testing::run_quantize;
using testing::ScratchFolder;
using testing::write_tiny;

ModelConfig expert_config(std::int64_t experts, std::int64_t chosen) {
  const Json json = {{"architectures", {"MixtralForCausalLM"}},
                     {"model_type", "mixtral"},
                     {"vocab_size", 96},
                     {"hidden_size", 64},
                     {"intermediate_size", 32},
                     {"num_hidden_layers", 2},
                     {"num_attention_heads", 4},
                     {"num_key_value_heads", 2},
                     {"num_local_experts", experts},
                     {"num_experts_per_tok", chosen},
                     {"max_position_embeddings", 64}};
  return parse_config(json, nullptr, "test");
}

void enlarge(Decoder& decoder) {
  for (torch::Tensor& p : decoder->parameters())
    if (p.dim() == 2) p.mul_(8.0);
}

TEST(QuantizeExperts, EveryExpertIsCalibratedOnItsOwnTokensAndTheReportSaysHowMany) {
  const ScratchFolder scratch;
  write_tiny(scratch / "in", expert_config(4, 2), "float32", enlarge);
  Json given = {{"model", (scratch / "in").string()}, {"random-tokens", true}, {"samples", 12}, {"context", 48}};
  given["out"] = (scratch / "one").string();
  const Json result = run_quantize(given, 1);
  std::map<std::string, std::int64_t> tokens;
  int experts = 0, blocks = 0;
  for (const Json& row : result.at("linears")) {
    if (row.contains("expert_tokens")) {
      ++blocks;
      std::int64_t sum = 0;
      for (const Json& count : row.at("expert_tokens")) sum += count.get<std::int64_t>();
      EXPECT_EQ(sum, 12 * 48 * 2);  // every token chooses two
    }
    const auto name = row.at("name").get<std::string>();
    if (name.find(".experts.") == std::string::npos) continue;
    ++experts;
    EXPECT_FALSE(row.at("all_tokens").get<bool>()) << row.dump();
    EXPECT_GT(row.at("tokens").get<std::int64_t>(), 128);
    EXPECT_LT(row.at("after").get<double>(), row.at("before").get<double>()) << row.dump();
  }
  EXPECT_EQ(blocks, 2);
  EXPECT_EQ(experts, 2 * 4 * 3);
  EXPECT_LT(result.at("layer_error").get<double>(), result.at("layer_error_before").get<double>());
  const Checkpoint out(scratch / "one");
  EXPECT_EQ(out.codec("model.layers.1.block_sparse_moe.experts.3.w2.weight").name(), "q4g32");
  EXPECT_TRUE(out.codec("model.layers.1.block_sparse_moe.gate.weight").is_float()) << "the router stays float";
  given["out"] = (scratch / "three").string();
  run_quantize(given, 3);
  EXPECT_EQ(folder_hash(scratch / "one"), folder_hash(scratch / "three"));
}

TEST(QuantizeExperts, AnExpertThatNoTokenChoseFallsBackAndIsNamed) {
  const ScratchFolder scratch;
  write_tiny(scratch / "in", expert_config(3, 1), "float32", [](Decoder& decoder) {
    enlarge(decoder);
    for (int layer = 0; layer < 2; ++layer) {  // v x, -v x and 0: the third is never the largest
      torch::Tensor& router =
          decoder->tensor("model.layers." + std::to_string(layer) + ".block_sparse_moe.gate.weight");
      router[1].copy_(-router[0]);
      router[2].zero_();
    }
  });
  const Json result = run_quantize({{"model", (scratch / "in").string()},
                                    {"out", (scratch / "out").string()},
                                    {"random-tokens", true},
                                    {"samples", 12},
                                    {"context", 48}});
  int fallbacks = 0;
  for (const Json& row : result.at("linears")) {
    if (!row.contains("all_tokens")) continue;
    const bool third = row.at("name").get<std::string>().find(".experts.2.") != std::string::npos;
    EXPECT_EQ(row.at("all_tokens").get<bool>(), third) << row.dump();
    if (!third) continue;
    ++fallbacks;
    EXPECT_EQ(row.at("tokens"), 0);
    EXPECT_LT(row.at("after").get<double>(), row.at("before").get<double>());
  }
  EXPECT_EQ(fallbacks, 2 * 3);
}

TEST(QuantizeExperts, TheOptionIsRefusedWhereItMeansNothing) {
  const ScratchFolder scratch;
  write_tiny(scratch / "dense", testing::tiny_config(2));
  write_tiny(scratch / "moe", expert_config(4, 2));
  const auto code = [&](Json given) {
    given["out"] = (scratch / "out").string();
    try {
      run_quantize(given);
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("expert-tokens"), std::string::npos) << error.what();
      return error.code();
    }
    return ExitCode::kOk;
  };
  EXPECT_EQ(code({{"model", (scratch / "dense").string()}, {"random-tokens", true}, {"expert-tokens", 9}}),
            ExitCode::kUsage);
  EXPECT_EQ(code({{"model", (scratch / "moe").string()}, {"method", "rtn"}, {"expert-tokens", 9}}), ExitCode::kUsage);
  EXPECT_FALSE(fs::exists(scratch / "out"));
}

}  // namespace
}  // namespace pare
