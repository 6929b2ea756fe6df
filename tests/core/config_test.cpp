#include "core/config.h"

#include <cmath>
#include <functional>

#include "model_folder.h"

namespace pare {
namespace {

using testing::contains;
using testing::error_of;
using testing::small_config;

Json golden() { return read_json(fs::path(PARE_SOURCE_DIR) / "tests/golden/config.json"); }

ModelConfig parse(const Json& config) { return parse_config(config, nullptr, "config.json"); }

TEST(Config, RopeFrequenciesAreThoseOfTransformers) {
  const Json rope = golden()["rope"];
  ASSERT_EQ(rope.size(), 3u);
  for (const auto& [name, row] : rope.items()) {
    const std::vector<double> ours = rope_frequencies(parse(row["config"]));
    ASSERT_EQ(ours.size(), row["inv_freq"].size()) << name;
    for (std::size_t i = 0; i < ours.size(); ++i)  // the reference computes in float32
      EXPECT_NEAR(ours[i] / row["inv_freq"][i].get<double>(), 1.0, 1e-6) << name << " " << i;
  }
}

// Tensor names, shapes and fields of models that transformers built from its own config.json.
TEST(Config, FamiliesHaveTheTensorsOfTransformers) {
  const Json configs = golden()["configs"];
  ASSERT_EQ(configs.size(), 3u);
  for (const auto& [name, row] : configs.items()) {
    const ModelConfig config = parse(row["config"]);
    EXPECT_EQ(config.family, name);
    std::map<std::string, std::vector<std::int64_t>> ours, theirs;
    for (const TensorSpec& spec : expected_tensors(config)) ours[spec.name] = spec.shape;
    for (const auto& [tensor, shape] : row["shapes"].items()) theirs[tensor] = shape.get<std::vector<std::int64_t>>();
    EXPECT_EQ(ours, theirs) << name;
  }
  EXPECT_EQ(parse(configs["qwen2"]["config"]).eos_ids, (std::vector<std::int64_t>{3, 4}));
  EXPECT_EQ(parse(configs["mistral"]["config"]).head_dim, 64);
  EXPECT_EQ(parse(configs["llama"]["config"]).rope_theta, 500000.0);
  EXPECT_EQ(parse(configs["llama"]["config"]).rope_llama3->factor, 32.0);
}

TEST(Config, BothRopeSpellingsGiveTheSame) {
  Json old = small_config(), renewed = small_config();
  old["rope_theta"] = 500000.0;
  old["rope_scaling"] = Json::parse(R"({"type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192})");
  renewed.erase("rope_theta");
  renewed["rope_parameters"] = Json::parse(R"({"rope_type":"llama3","rope_theta":500000.0,"factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192})");
  EXPECT_EQ(rope_frequencies(parse(old)), rope_frequencies(parse(renewed)));
  EXPECT_NE(rope_frequencies(parse(old)), rope_frequencies(parse(small_config())));
  Json per_kind = small_config();
  per_kind["rope_parameters"] = {{"full_attention", renewed["rope_parameters"]}};
  EXPECT_EQ(rope_frequencies(parse(old)), rope_frequencies(parse(per_kind)));
  Json at_root = old;
  at_root["rope_scaling"].erase("original_max_position_embeddings");
  at_root["original_max_position_embeddings"] = 8192;
  EXPECT_EQ(rope_frequencies(parse(old)), rope_frequencies(parse(at_root)));
}

TEST(Config, WritingKeepsUnknownKeysAndReadsBack) {
  Json source = small_config();
  source["quantization_config"] = {{"quant_method", "x"}};
  source["auto_map"] = {{"AutoModel", "x.py"}};
  source["rope_scaling"] = {{"type", "linear"}, {"factor", 2.0}};
  ModelConfig config = parse(source);
  config.intermediate_size = 64;
  config.num_layers = 1;
  const Json written = write_config(config, "bfloat16");
  EXPECT_EQ(written["my_own_key"], source["my_own_key"]);
  EXPECT_FALSE(written.contains("quantization_config"));
  EXPECT_FALSE(written.contains("auto_map"));
  EXPECT_EQ(written["torch_dtype"], "bfloat16");
  EXPECT_EQ(written["dtype"], "bfloat16");
  EXPECT_EQ(written["rope_scaling"]["type"], "linear");
  EXPECT_EQ(written["rope_parameters"], Json::parse(R"({"rope_type":"linear","factor":2.0,"rope_theta":10000.0})"));
  const ModelConfig again = parse(written);
  EXPECT_EQ(again.intermediate_size, 64);
  EXPECT_EQ(rope_frequencies(again), rope_frequencies(config));
  EXPECT_EQ(write_config(again, "bfloat16"), written);
  ModelConfig fresh = config;  // built from dimensions alone
  fresh.source = Json::object();
  fresh.eos_ids = {7, 9};
  EXPECT_EQ(parse(write_config(fresh, "float32")).eos_ids, fresh.eos_ids);
}

TEST(Config, EndTokensComeFromGenerationFirst) {
  EXPECT_EQ(parse(small_config()).eos_ids, std::vector<std::int64_t>{2});
  EXPECT_EQ(parse_config(small_config(), Json::parse(R"({"eos_token_id":[5,2]})"), "c").eos_ids, (std::vector<std::int64_t>{5, 2}));
  EXPECT_EQ(parse_config(small_config(), Json::parse(R"({"eos_token_id":null})"), "c").eos_ids, std::vector<std::int64_t>{2});
}

TEST(Config, RefusesWhatItCannotCompute) {
  const auto with = [](const std::function<void(Json&)>& change) {
    Json config = small_config();
    change(config);
    return error_of([&] { parse(config); });
  };
  const auto mistral = [](Json& c) { c["architectures"] = {"MistralForCausalLM"}; };
  const std::vector<std::pair<std::function<void(Json&)>, std::string>> cases = {
      {[](Json& c) { c["architectures"] = {"GPT2LMHeadModel"}; }, "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"},
      {[](Json& c) { c.erase("architectures"), c["model_type"] = "gemma"; }, "gemma"},
      {[](Json& c) { c.erase("architectures"), c.erase("model_type"); }, "no architecture"},
      {[](Json& c) { c.erase("hidden_size"); }, "hidden_size is missing"},
      {[](Json& c) { c["hidden_size"] = 0; }, "hidden_size is 0"},
      {[](Json& c) { c["hidden_size"] = -5; }, "hidden_size is -5"},
      {[](Json& c) { c["hidden_size"] = "128"; }, "hidden_size"},
      {[](Json& c) { c["hidden_size"] = 128.5; }, "hidden_size"},
      {[](Json& c) { c["vocab_size"] = 18446744073709551615ull; }, "vocab_size"},
      {[](Json& c) { c["num_hidden_layers"] = 1000000000; }, "num_hidden_layers"},
      {[](Json& c) { c["num_key_value_heads"] = 3; }, "not a multiple"},
      {[](Json& c) { c["num_attention_heads"] = 6, c["num_key_value_heads"] = 2; }, "not divided"},
      {[](Json& c) { c["head_dim"] = 33; }, "odd"},
      {[](Json& c) { c["rms_norm_eps"] = -1; }, "rms_norm_eps"},
      {[](Json& c) { c["hidden_act"] = "gelu"; }, "gelu"},
      {[](Json& c) { c["tie_word_embeddings"] = 1; }, "tie_word_embeddings"},
      {[](Json& c) { c["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 2}}; }, "yarn"},
      {[](Json& c) { c["rope_scaling"] = {{"rope_type", "llama3"}}; }, "original_max_position_embeddings is missing"},
      {[](Json& c) { c["rope_scaling"] = {{"rope_type", "linear"}}; }, "factor is missing"},
      {[](Json& c) { c["rope_scaling"] = 4; }, "not an object"},
      {[](Json& c) { c["partial_rotary_factor"] = 0.5; }, "partial_rotary_factor"},
      {[](Json& c) { c["layer_types"] = {"full_attention", "sliding_attention"}; }, "sliding_attention"},
      {[](Json& c) { c["layer_types"] = {"full_attention"}; }, "1 entries for 2 layers"},
      {[](Json& c) { c["eos_token_id"] = "x"; }, "eos_token_id"},
      {[&](Json& c) { mistral(c), c["max_position_embeddings"] = 8192; }, "by the default of its class"},
      {[&](Json& c) { mistral(c), c["sliding_window"] = 16; }, "sliding_window is 16"},
      {[](Json& c) { c["architectures"] = {"Qwen2ForCausalLM"}, c["use_sliding_window"] = true, c["sliding_window"] = 16, c["max_window_layers"] = 1; }, "use_sliding_window"},
  };
  for (const auto& [change, expected] : cases) {
    const std::string message = with(change);
    EXPECT_TRUE(message.starts_with("3 config.json") && contains(message, expected)) << expected << "\n  " << message;
  }
  const std::string all = with([](Json& c) { c.erase("hidden_size"), c["hidden_act"] = "relu", c["rms_norm_eps"] = "x"; });
  EXPECT_TRUE(contains(all, "hidden_size") && contains(all, "relu") && contains(all, "rms_norm_eps")) << all;
  EXPECT_EQ(with([&](Json& c) { mistral(c), c["sliding_window"] = nullptr; }), "no error");
  EXPECT_EQ(with([&](Json& c) { mistral(c), c["sliding_window"] = 64; }), "no error");  // as wide as the context
  EXPECT_EQ(with([](Json& c) { c["architectures"] = {"Qwen2ForCausalLM"}, c["sliding_window"] = 16; }), "no error");
}

}  // namespace
}  // namespace pare
