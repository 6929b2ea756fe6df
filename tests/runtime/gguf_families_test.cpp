// Every family as GGUF and back: the weights, the config and the logits that transformers computed.
#include "runtime/engine.h"
#include "tests/runtime/round_trips.h"

namespace pare {
namespace {

using testing::Scratch;

// Why llama.cpp does not compute a model, for those that it does not.
const std::map<std::string, std::string> kRefused = {{"gemma2", "attention is scaled by"},
                                                     {"gemma3_published", "attention is scaled by"},
                                                     {"gpt2_inner", "attention is scaled by"},
                                                     {"gpt_neox_sequential", "attention has biases"},
                                                     {"qwen3_moe_plain", "norm_topk_prob"},
                                                     {"qwen3_window", "attention output has no bias"},
                                                     {"smollm3_window", "MLPs have no bias"}};

class GgufFamily : public ::testing::TestWithParam<std::string> {};

TEST_P(GgufFamily, GoesThereAndBack) {
  const Scratch scratch("gguf-family");
  const Json golden = read_json(testing::golden_families() / (GetParam() + ".json"));
  testing::make_family_folder(golden.at("config"), scratch / "model");
  const Checkpoint model(scratch / "model");
  if (const auto refused = kRefused.find(GetParam()); refused != kRefused.end()) {
    try {
      testing::write_gguf_file(model, scratch / "model.gguf");
      ADD_FAILURE() << "written";
    } catch (const Error& problem) {
      EXPECT_EQ(problem.code(), ExitCode::kInput);
      EXPECT_NE(problem.found().find(refused->second), std::string::npos) << problem.what();
    }
    return;
  }
  testing::write_gguf_file(model, scratch / "model.gguf");
  Context context;
  export_folder(Checkpoint::open(scratch / "model.gguf"), scratch / "back", context);
  testing::expect_same_tensors(scratch / "model", scratch / "back", GetParam());

  EngineOptions options;
  options.threads = 1;
  const auto source = runtime_logits(Engine::open(scratch / "model.gguf", options));
  const ModelConfig& was = model.config();
  const ModelConfig now = Checkpoint(scratch / "back").config();
  std::size_t compared = 0;
  for (testing::FamilyText text : testing::family_texts(golden)) {
    // Where llama.cpp has no window, the file ends where the window does; Phi-3's window is in the file.
    const auto end = static_cast<std::size_t>(now.max_position_embeddings);
    if (text.ids.size() > end) text.ids.resize(end);
    while (!text.rows.empty() && text.rows.back() >= now.max_position_embeddings) text.rows.pop_back();
    EXPECT_LT(testing::largest_difference(*source, text), 1e-4);
    compared += text.rows.size();
  }
  EXPECT_GT(compared, 0u);
  EXPECT_EQ(now.rope_theta, was.rope_theta);
  EXPECT_EQ(now.rms_norm_eps, was.rms_norm_eps);
  EXPECT_EQ(now.eos_ids, was.eos_ids);
}

INSTANTIATE_TEST_SUITE_P(All, GgufFamily, ::testing::ValuesIn(testing::family_names()),
                         [](const auto& given) { return given.param; });

TEST(RoundTrip, RandomModelsComeBackByteForByte) {
  for (std::uint64_t seed = 0; seed < 24; ++seed) testing::round_trip(seed);
}

TEST(RoundTrip, CodesComeBackFromGgufAndCompact) {
  const Scratch scratch("gguf-codes");
  Json config = Json::parse(R"({"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":64,
    "intermediate_size":128,"num_hidden_layers":1,"num_attention_heads":4,"num_key_value_heads":2,"vocab_size":40,
    "max_position_embeddings":64,"rms_norm_eps":1e-05,"tie_word_embeddings":false,"eos_token_id":2})");
  testing::make_family_folder(config, scratch / "model");
  const Checkpoint model(scratch / "model");
  for (const char* name : {"q8", "q4", "q4g64", "q4m", "q4mg64"}) {
    const Codec codec = Codec::parse(name, "");
    Context context;
    ExportOptions options;
    options.out = scratch / (std::string(name) + ".pare");
    options.codec = name;
    export_compact(model, options, context);
    const Checkpoint compact = Checkpoint::open(options.out);
    export_folder(compact, scratch / name, context);
    const Checkpoint folder(scratch / name);
    testing::write_gguf_file(folder, scratch / (std::string(name) + ".gguf"));
    const Checkpoint gguf = Checkpoint::open(scratch / (std::string(name) + ".gguf"));
    for (const TensorSpec& spec : model.tensors()) {
      EXPECT_EQ(folder.codec(spec.name), compact.codec(spec.name)) << spec.name;
      EXPECT_EQ(folder.read_f32(spec.name), compact.read_f32(spec.name)) << spec.name;
      EXPECT_EQ(gguf.read_f32(spec.name), compact.read_f32(spec.name)) << name << " " << spec.name;
      if (spec.role != TensorRole::kLinear) continue;
      EXPECT_EQ(gguf.codec(spec.name), (Codec{codec.kind, 32})) << spec.name;
      EXPECT_EQ(gguf.codes(spec.name).codes, compact.codes(spec.name).codes) << spec.name;
      if (codec.group == 32) {
        EXPECT_EQ(gguf.codes(spec.name).scales, compact.codes(spec.name).scales) << spec.name;
        EXPECT_EQ(gguf.codes(spec.name).minima, compact.codes(spec.name).minima) << spec.name;
      }
    }
  }
}

}  // namespace
}  // namespace pare
