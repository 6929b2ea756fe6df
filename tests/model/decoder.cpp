#include "model/decoder.h"

#include <set>

#include "model/logits.h"
#include "tests/model/models.h"

namespace pare {
namespace {

using testing::Folder;

class Golden : public ::testing::TestWithParam<const char*> {};

TEST_P(Golden, LogitsEqualTransformers) {
  const fs::path folder = fs::path(PARE_SOURCE_DIR) / "tests/golden/decoders" / GetParam();
  const Checkpoint checkpoint(folder);
  const Json expected = read_json(folder / "expected.json");
  const auto ids = expected.at("ids").get<std::vector<std::int32_t>>();
  const auto rows = expected.at("rows").get<std::vector<std::int64_t>>();
  const auto source = torch_logits(checkpoint, "cpu");
  source->begin(ids);
  std::vector<float> logits(static_cast<std::size_t>(source->vocab_size()));
  for (std::size_t r = 0; r < rows.size(); ++r) {
    source->logits(rows[r], 1, logits.data());
    for (std::size_t i = 0; i < logits.size(); ++i)
      ASSERT_NEAR(logits[i], expected.at("logits")[r][i].get<double>(), 1e-4) << "row " << rows[r] << " id " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Families, Golden,
                         ::testing::Values("llama_untied", "llama_tied_mha", "llama_head_dim", "llama_rope3",
                                           "llama_linear", "llama_biases", "qwen2", "mistral_head_dim"),
                         [](const auto& info) { return std::string(info.param); });

TEST(DecoderModule, ParametersCarryTheCheckpointNames) {
  for (const bool tied : {true, false}) {
    ModelConfig config = testing::small_config();
    config.tie_word_embeddings = tied;
    config.qkv_bias = config.o_bias = config.mlp_bias = true;
    Decoder decoder(config);
    std::set<std::string> expected, found;
    for (const TensorSpec& spec : expected_tensors(config)) {
      expected.insert(spec.name);
      EXPECT_EQ(decoder->tensor(spec.name).sizes().vec(), spec.shape) << spec.name;
    }
    for (const auto& item : decoder->named_parameters()) EXPECT_TRUE(found.insert(item.key()).second) << item.key();
    EXPECT_EQ(found, expected);
  }
}

TEST(DecoderModule, SubStagesComposeToForward) {
  const torch::NoGradGuard no_grad;
  Decoder decoder = testing::small_decoder(3);
  const torch::Tensor hidden = torch::randn({2, 17, 32});
  const RopeTables rope = rope_tables(decoder->config(), 17, torch::kCPU);
  DecoderBlock block = decoder->block(1);
  const torch::Tensor middle = block->attention_output(hidden, block->attention_mix(block->attention_input(hidden), rope));
  const torch::Tensor out = block->mlp_output(middle, block->mlp_mix(block->mlp_input(middle)));
  EXPECT_TRUE(torch::equal(out, block->forward(hidden, rope)));
}

TEST(DecoderModule, CausalAndIndependentOfTheBatch) {
  const torch::NoGradGuard no_grad;
  Decoder decoder = testing::small_decoder(4);
  const torch::Tensor ids = torch::randint(0, 300, {3, 41}, torch::kLong);
  const torch::Tensor whole = decoder->forward(ids);
  const torch::Tensor prefix = decoder->forward(ids.narrow(0, 1, 1).narrow(1, 0, 23));
  EXPECT_LT((whole[1].narrow(0, 0, 23) - prefix[0]).abs().max().item<double>(), 1e-4);
}

TEST(DecoderModule, InitialisationComesFromTheSeedAlone) {
  Decoder a(testing::small_config()), b(testing::small_config()), c(testing::small_config());
  torch::manual_seed(1);
  initialize(a, 5);
  torch::manual_seed(2);
  initialize(b, 5);
  initialize(c, 6);
  const std::string name = "model.layers.1.mlp.up_proj.weight";
  EXPECT_TRUE(torch::equal(a->tensor(name), b->tensor(name)));
  EXPECT_FALSE(torch::equal(a->tensor(name), c->tensor(name)));
  EXPECT_NEAR(a->tensor("model.embed_tokens.weight").std().item<double>(), 0.02, 0.001);
  EXPECT_NEAR(a->tensor("model.embed_tokens.weight").mean().item<double>(), 0.0, 0.001);
}

TEST(DecoderModule, SavedAndLoadedIsTheSame) {
  const torch::NoGradGuard no_grad;
  Folder folder("save");
  testing::write_tokenizer(folder / "like");
  Decoder decoder = testing::small_decoder(8);
  save_decoder(decoder, "float32", folder / "like", folder / "out");
  EXPECT_TRUE(fs::exists(folder / "out" / "tokenizer.json"));
  const Checkpoint checkpoint(folder / "out");
  Decoder loaded = load_decoder(checkpoint, torch::kCPU);
  for (const TensorSpec& spec : expected_tensors(decoder->config()))
    EXPECT_TRUE(torch::equal(decoder->tensor(spec.name), loaded->tensor(spec.name))) << spec.name;
  DecoderBlock block = load_block(checkpoint, 2, torch::kCPU);
  EXPECT_TRUE(torch::equal(block->weight("mlp.down_proj"), decoder->tensor("model.layers.2.mlp.down_proj.weight")));
  try {
    save_decoder(decoder, "float32", folder / "like", folder / "out");
    FAIL() << "an existing folder was overwritten";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
  }
}

TEST(Devices, UnknownNamesAndAbsentDevicesAreRefused) {
  EXPECT_TRUE(parse_device("cpu").is_cpu());
  for (const auto& [name, code] : {std::pair{"tpu9", ExitCode::kUsage}, {"meta", ExitCode::kUsage}}) {
    try {
      parse_device(name);
      FAIL() << name;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), code) << name;
    }
  }
  if (!torch::cuda::is_available()) {
    try {
      parse_device("cuda");
      FAIL();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kResources);
    }
  }
}

}  // namespace
}  // namespace pare
