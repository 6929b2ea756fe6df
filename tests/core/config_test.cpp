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

// A model without some of its blocks keeps each block's own window and rotary positions.
TEST(Config, ListsWithAnEntryForEachBlockFollowTheBlocks) {
  Json source = small_config();
  source["architectures"] = {"Gemma2ForCausalLM"};
  source.erase("hidden_act");
  source["num_hidden_layers"] = 5;
  source["sliding_window"] = 8;
  const ModelConfig gemma = with_layers(parse(source), {0, 2, 3});  // of s f s f s
  EXPECT_EQ(gemma.layer_slides, (std::vector<std::uint8_t>{1, 1, 0}));
  EXPECT_EQ(parse(write_config(gemma, "float32")).layer_slides, gemma.layer_slides);
  source["architectures"] = {"SmolLM3ForCausalLM"};
  const ModelConfig smol = with_layers(parse(source), {3, 4});
  EXPECT_EQ(smol.layer_rotates, (std::vector<std::uint8_t>{0, 1}));
  EXPECT_EQ(parse(write_config(smol, "float32")).layer_rotates, smol.layer_rotates);
  source["architectures"] = {"Qwen2ForCausalLM"};
  source["use_sliding_window"] = true;
  source["max_window_layers"] = 3;
  const ModelConfig qwen = with_layers(parse(source), {1, 3, 4});
  const Json written = write_config(qwen, "float32");
  EXPECT_EQ(written["max_window_layers"], 1);
  EXPECT_EQ(parse(written).layer_slides, (std::vector<std::uint8_t>{0, 1, 1}));
}

// Widths of each block stand as lists where the one number stood, and only where blocks differ.
TEST(Config, WidthsMayBeListsOfTheBlocks) {
  Json source = small_config();
  source["num_hidden_layers"] = 3;
  source["num_attention_heads"] = 4;
  source["num_key_value_heads"] = {2, 1, 2};
  source["num_attention_heads"] = {4, 2, 4};
  source["intermediate_size"] = {48, 32, 16};
  source["head_dim"] = 8;
  const ModelConfig config = parse(source);
  EXPECT_EQ(config.layer_widths, (std::vector<BlockWidths>{{4, 2, 48}, {2, 1, 32}, {4, 2, 16}}));
  EXPECT_EQ(config.num_heads, 4);
  EXPECT_EQ(config.num_kv_heads, 2);
  EXPECT_EQ(config.intermediate_size, 48);
  EXPECT_EQ(width_keys(config), "intermediate_size, num_attention_heads, num_key_value_heads");
  const Json written = write_config(config, "float32");
  for (const char* key : {"intermediate_size", "num_attention_heads", "num_key_value_heads"})
    EXPECT_EQ(written[key], source[key]) << key;
  EXPECT_EQ(parse(written).layer_widths, config.layer_widths);
  for (const TensorSpec& spec : expected_tensors(config)) {
    if (spec.module == "mlp.up_proj") {
      EXPECT_EQ(spec.shape[0], config.widths(spec.layer).inner);
    }
    if (spec.module == "self_attn.k_proj") {
      EXPECT_EQ(spec.shape[0], 8 * config.widths(spec.layer).kv_heads);
    }
    if (spec.module == "self_attn.o_proj") {
      EXPECT_EQ(spec.shape[1], 8 * config.widths(spec.layer).heads);
    }
  }
  const ModelConfig last = with_layers(config, {1, 2});
  EXPECT_EQ(last.layer_widths, (std::vector<BlockWidths>{{2, 1, 32}, {4, 2, 16}}));
  EXPECT_EQ(last.intermediate_size, 32);
  const ModelConfig one = with_layers(config, {1});
  EXPECT_TRUE(one.layer_widths.empty());
  EXPECT_EQ(write_config(one, "float32")["intermediate_size"], 32);
  EXPECT_EQ(of_block(config, 1).num_heads, 2);
  EXPECT_TRUE(of_block(config, 1).layer_widths.empty());
  source["intermediate_size"] = {48, 48, 48};
  EXPECT_EQ(write_config(parse(source), "float32")["intermediate_size"], 48);
  // Without a list of their own, heads of keys and values are the heads.
  source.erase("num_key_value_heads");
  EXPECT_EQ(parse(source).widths(1).kv_heads, 2);
  const auto refused = [&](const char* key, const Json& value) {
    Json bad = source;
    bad[key] = value;
    EXPECT_THROW(parse(bad), Error) << key << value;
  };
  refused("intermediate_size", {48, 32});
  refused("intermediate_size", {48, 32, 0});
  refused("intermediate_size", {48, 32, "16"});
  refused("intermediate_size", {48, 32, 1.5});
  refused("intermediate_size", Json::array());
  refused("num_key_value_heads", {2, 4, 2});
  refused("hidden_size", {32, 32, 32});
  Json experts = source;
  experts["architectures"] = {"MixtralForCausalLM"};
  experts.erase("hidden_act");
  experts["num_attention_heads"] = 4;
  experts["intermediate_size"] = {48, 32, 16};
  EXPECT_THROW(parse(experts), Error);
}

TEST(Config, WindowsAreReadAsTheClassesDo) {
  const auto parsed = [](const std::string& architecture, const Json& changes) {
    Json c = small_config();
    c["architectures"] = {architecture};
    c.erase("hidden_act");
    c.update(changes);
    return parse(c);
  };
  EXPECT_EQ(parsed("MistralForCausalLM", Json::object()).window(1), 4096);  // default of the class
  EXPECT_EQ(parsed("MistralForCausalLM", {{"sliding_window", nullptr}}).window(1), 0);
  EXPECT_EQ(parsed("MistralForCausalLM", {{"sliding_window", 16}}).window(0), 16);
  EXPECT_EQ(parsed("Qwen2ForCausalLM", {{"sliding_window", 16}}).window(1), 0);
  const Json late = {{"use_sliding_window", true}, {"sliding_window", 16}, {"max_window_layers", 1}};
  EXPECT_EQ(parsed("Qwen2ForCausalLM", late).window(0), 0);
  EXPECT_EQ(parsed("Qwen2ForCausalLM", late).window(1), 16);
  EXPECT_EQ(parsed("Phi3ForCausalLM", Json::object()).window(0), 0);
  EXPECT_EQ(parsed("Gemma2ForCausalLM", Json::object()).window(0), 4096);
  EXPECT_EQ(parsed("Gemma2ForCausalLM", Json::object()).window(1), 0);
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
  const auto family = [](Json& c, const std::string& name) {
    c["architectures"] = {name + "ForCausalLM"};
    c.erase("hidden_act");
  };
  const auto mistral = [&](Json& c) { family(c, "Mistral"); };
  const auto gpt2 = [&](Json& c) {
    c = {{"architectures", {"GPT2LMHeadModel"}}, {"model_type", "gpt2"}, {"vocab_size", 50}, {"n_embd", 128},
         {"n_layer", 2}, {"n_head", 4}, {"n_positions", 64}};
  };
  const auto long_rope = [](std::size_t shorts, std::size_t longs) {
    return Json{{"type", "longrope"},
                {"short_factor", std::vector<double>(shorts, 1.0)},
                {"long_factor", std::vector<double>(longs, 2.0)}};
  };
  const std::vector<std::pair<std::function<void(Json&)>, std::string>> cases = {
      {[](Json& c) { c["architectures"] = {"GPTJForCausalLM"}; },
       "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"},
      {[](Json& c) { c["architectures"] = {"BloomForCausalLM"}; }, "BloomForCausalLM"},
      {[](Json& c) { c["architectures"] = {"Gemma3ForConditionalGeneration"}; }, "Gemma3ForConditionalGeneration"},
      {[](Json& c) { c.erase("architectures"), c["model_type"] = "mamba"; }, "mamba"},
      {[](Json& c) { c["num_attention_heads"] = 0; }, "num_attention_heads is 0"},
      {[](Json& c) { c["num_attention_heads"] = -4; }, "num_attention_heads is -4"},
      {[](Json& c) { c["num_key_value_heads"] = 0; }, "num_key_value_heads is 0"},
      {[](Json& c) { c["num_key_value_heads"] = -1; }, "num_key_value_heads is -1"},
      {[](Json& c) { c["head_dim"] = 0; }, "head_dim is 0"},
      {[](Json& c) { c["head_dim"] = -32; }, "head_dim is -32"},
      {[](Json& c) { c["intermediate_size"] = 0; }, "intermediate_size is 0"},
      {[](Json& c) { c["intermediate_size"] = -1; }, "intermediate_size is -1"},
      {[](Json& c) { c["vocab_size"] = 0; }, "vocab_size is 0"},
      {[](Json& c) { c["vocab_size"] = -1; }, "vocab_size is -1"},
      {[](Json& c) { c["num_hidden_layers"] = 0; }, "num_hidden_layers is 0"},
      {[](Json& c) { c["num_hidden_layers"] = -2; }, "num_hidden_layers is -2"},
      {[](Json& c) { c["max_position_embeddings"] = -2; }, "max_position_embeddings is -2"},
      {[](Json& c) { c["hidden_size"] = 1ll << 40; }, "hidden_size"},
      {[](Json& c) { c["num_attention_heads"] = 1 << 20, c["num_key_value_heads"] = 1 << 20, c["head_dim"] = 1 << 20; },
       "num_attention_heads times head_dim"},
      {[](Json& c) { c["rope_theta"] = 0; }, "rope_theta"},
      {[](Json& c) { c["rope_theta"] = -1e4; }, "rope_theta"},
      {[](Json& c) {
         c["rope_scaling"] = {{"rope_type", "dynamic"}, {"factor", 2}};
       },
       "dynamic"},
      {[](Json& c) {
         c["rope_scaling"] = {{"type", "spiral"}, {"factor", 2}};
       },
       "\"spiral\"; supported are default, linear, llama3 and longrope"},
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
      {[](Json& c) {
         c["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 2}};
       },
       "yarn"},
      {[](Json& c) {
         c["rope_scaling"] = {{"rope_type", "llama3"}};
       },
       "original_max_position_embeddings is missing"},
      {[](Json& c) {
         c["rope_scaling"] = {{"rope_type", "linear"}};
       },
       "factor is missing"},
      {[](Json& c) { c["rope_scaling"] = 4; }, "not an object"},
      {[](Json& c) { c["partial_rotary_factor"] = 0.5; }, "partial_rotary_factor"},
      {[](Json& c) {
         c["layer_types"] = {"full_attention", "sliding_attention"};
       },
       "sliding_attention"},
      {[](Json& c) { c["layer_types"] = {"full_attention"}; }, "1 entries for 2 layers"},
      {[](Json& c) { c["eos_token_id"] = "x"; }, "eos_token_id"},
      {[&](Json& c) { mistral(c), c["sliding_window"] = 0; }, "sliding_window is 0"},
      {[&](Json& c) { mistral(c), c["sliding_window"] = -3; }, "sliding_window is -3"},
      {[&](Json& c) {
         family(c, "Qwen2"), c["layer_types"] = {"full_attention", "sliding_attention"};
       },
       "does not ask for it"},
      {[&](Json& c) {
         family(c, "Qwen2"), c["layer_types"] = {"full_attention", "chunked_attention"};
       },
       "chunked_attention"},
      {[&](Json& c) { family(c, "Qwen3"), c["use_sliding_window"] = true, c["sliding_window"] = -1; },
       "sliding_window is -1"},
      {[&](Json& c) { family(c, "Gemma"), c["use_bidirectional_attention"] = true; }, "bidirectional"},
      {[&](Json& c) { family(c, "Gemma"), c["hidden_activation"] = "relu"; }, "hidden_activation"},
      {[&](Json& c) { family(c, "Gemma2"), c["query_pre_attn_scalar"] = 0; }, "query_pre_attn_scalar"},
      {[&](Json& c) { family(c, "Gemma2"), c["attn_logit_softcapping"] = -1; }, "attn_logit_softcapping"},
      {[&](Json& c) { family(c, "Gemma2"), c["final_logit_softcapping"] = 0; }, "not above 0"},
      {[&](Json& c) { family(c, "Gemma2"), c["sliding_window"] = nullptr; }, "sliding_window is null"},
      {[&](Json& c) { family(c, "Gemma3"), c["attn_logit_softcapping"] = 50; }, "does not apply"},
      {[&](Json& c) { family(c, "Gemma3"), c["rope_local_base_freq"] = 0; }, "rope_local_base_freq"},
      {[&](Json& c) {
         family(c, "Gemma3"), c["rope_parameters"] = {{"sliding_attention", {{"rope_type", "linear"}}}};
       },
       "supported there is default"},
      {[&](Json& c) {
         family(c, "Gemma3"), c["rope_parameters"] = {{"full_attention", {{"rope_type", "ntk"}}}};
       },
       "ntk"},
      {[&](Json& c) { family(c, "Phi3"), c["partial_rotary_factor"] = 0.1; }, "rotates 3 of 32"},
      {[&](Json& c) { family(c, "Phi3"), c["partial_rotary_factor"] = 2; }, "partial_rotary_factor is 2"},
      {[&](Json& c) {
         family(c, "Phi3"), c["rope_scaling"] = {{"type", "longrope"}};
       },
       "short_factor is missing"},
      {[&](Json& c) { family(c, "Phi3"), c["rope_scaling"] = long_rope(15, 16); },
       "short_factor has 15 entries for 16"},
      {[&](Json& c) { family(c, "Phi3"), c["rope_scaling"] = long_rope(16, 17); }, "long_factor has 17 entries for 16"},
      {[&](Json& c) {
         family(c, "Phi3"), c["rope_scaling"] = long_rope(16, 16), c["rope_scaling"]["long_factor"][3] = 0;
       },
       "not a number above 0"},
      {[&](Json& c) {
         family(c, "Phi3"), c["rope_scaling"] = long_rope(16, 16), c["original_max_position_embeddings"] = -1;
       },
       "original_max_position_embeddings is -1"},
      {[&](Json& c) { family(c, "Mixtral"), c["num_local_experts"] = 0; }, "num_local_experts is 0"},
      {[&](Json& c) { family(c, "Mixtral"), c["num_local_experts"] = 1000000000; }, "num_local_experts"},
      {[&](Json& c) { family(c, "Mixtral"), c["num_local_experts"] = 2, c["num_experts_per_tok"] = 3; },
       "num_experts_per_tok"},
      {[&](Json& c) { family(c, "Mixtral"), c["num_local_experts"] = 4096, c["num_hidden_layers"] = 10000; },
       "experts in all"},
      {[&](Json& c) { family(c, "Qwen3Moe"), c["mlp_only_layers"] = {0}; }, "mlp_only_layers"},
      {[&](Json& c) { family(c, "SmolLM3"), c["no_rope_layers"] = {1}; }, "no_rope_layers"},
      {[&](Json& c) {
         family(c, "SmolLM3"), c["layer_types"] = {"sliding_attention", "full_attention"};
       },
       "sliding_window is missing"},
      {[&](Json& c) { gpt2(c), c["n_head"] = 0; }, "n_head is 0"},
      {[&](Json& c) { gpt2(c), c["n_head"] = 3; }, "n_embd 128 is not divided by n_head 3"},
      {[&](Json& c) { gpt2(c), c["n_head"] = 128; }, "head_dim 1 is odd"},
      {[&](Json& c) { gpt2(c), c["n_embd"] = -128; }, "n_embd is -128"},
      {[&](Json& c) { gpt2(c), c.erase("n_embd"); }, "n_embd is missing"},
      {[&](Json& c) { gpt2(c), c["n_inner"] = 0; }, "n_inner is 0"},
      {[&](Json& c) { gpt2(c), c["n_layer"] = 0; }, "n_layer is 0"},
      {[&](Json& c) { gpt2(c), c["n_positions"] = 0; }, "n_positions is 0"},
      {[&](Json& c) { gpt2(c), c["n_positions"] = 1 << 30; }, "n_positions is 1073741824, above"},
      {[&](Json& c) { gpt2(c), c["head_dim"] = 64; }, "head_dim is not 32"},
      {[&](Json& c) { gpt2(c), c["activation_function"] = "relu"; }, "activation_function is \"relu\""},
      {[&](Json& c) { gpt2(c), c["scale_attn_by_inverse_layer_idx"] = true; }, "scale_attn_by_inverse_layer_idx"},
      {[&](Json& c) { gpt2(c), c["add_cross_attention"] = true; }, "add_cross_attention"},
      {[&](Json& c) { gpt2(c), c["layer_norm_epsilon"] = -1; }, "layer_norm_epsilon"},
      {[&](Json& c) { family(c, "GPTNeoX"), c["num_attention_heads"] = 0; }, "num_attention_heads is 0"},
      {[&](Json& c) { family(c, "GPTNeoX"), c["num_attention_heads"] = 6; }, "not divided"},
      {[&](Json& c) { family(c, "GPTNeoX"), c["rotary_pct"] = 2; }, "rotary_pct is 2"},
      {[&](Json& c) { family(c, "GPTNeoX"), c["rotary_pct"] = 0; }, "rotary_pct rotates 0 of 32"},
      {[&](Json& c) { family(c, "GPTNeoX"), c["rotary_pct"] = 0.1; }, "rotary_pct rotates 3 of 32"},
      {[&](Json& c) { family(c, "GPTNeoX"), c["num_attention_heads"] = 32; }, "rotary_pct rotates 1 of 4"},
      {[&](Json& c) { family(c, "GPTNeoX"), c["rope_parameters"] = {{"partial_rotary_factor", -1}}; },
       "rope_parameters.partial_rotary_factor is -1"},
      {[&](Json& c) { family(c, "GPTNeoX"), c["rotary_emb_base"] = 0; }, "rotary_emb_base is 0"},
      {[&](Json& c) { family(c, "GPTNeoX"), c["hidden_act"] = "relu"; }, "hidden_act is \"relu\""},
      {[&](Json& c) { family(c, "GPTNeoX"), c["use_parallel_residual"] = 1; }, "use_parallel_residual is 1"},
  };
  for (const auto& [change, expected] : cases) {
    const std::string message = with(change);
    EXPECT_TRUE(message.starts_with("3 config.json") && contains(message, expected)) << expected << "\n  " << message;
  }
  const std::string all = with([](Json& c) { c.erase("hidden_size"), c["hidden_act"] = "relu", c["rms_norm_eps"] = "x"; });
  EXPECT_TRUE(contains(all, "hidden_size") && contains(all, "relu") && contains(all, "rms_norm_eps")) << all;
}

}  // namespace
}  // namespace pare
