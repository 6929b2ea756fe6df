// Every family in LibTorch against transformers: logits, gradients, saving. The goldens name the models.
#include "tests/families.h"

#include "core/arch/arch.h"
#include "model/logits.h"
#include "tests/model/models.h"

namespace pare {
namespace {

using testing::family_texts;
using testing::FamilyText;
using testing::Folder;
using testing::largest_difference;

class FamilyGolden : public ::testing::TestWithParam<std::string> {
 protected:
  FamilyGolden()
      : folder_("family-" + GetParam()), golden_(read_json(testing::golden_families() / (GetParam() + ".json"))) {
    testing::make_family_folder(golden_.at("config"), folder_ / "model");
  }
  Folder folder_;
  Json golden_;
};

TEST_P(FamilyGolden, LibTorchLogitsAreThoseOfTransformers) {
  const auto source = torch_logits(Checkpoint(folder_ / "model"), "cpu");
  double largest = 0;
  for (const FamilyText& text : family_texts(golden_)) {
    const double difference = largest_difference(*source, text);
    EXPECT_LT(difference, 1e-4) << text.ids.size() << " tokens";
    largest = testing::larger(largest, difference);
  }
  RecordProperty("difference", std::to_string(largest * 1e6));  // read by tests/bench/families_table.py
}

TEST_P(FamilyGolden, SavedFolderHasTheSameTensorsAndLogits) {
  const torch::NoGradGuard no_grad;
  const Checkpoint original(folder_ / "model");
  Decoder decoder = load_decoder(original, torch::kCPU);
  save_decoder(decoder, "float32", "", folder_ / "saved");
  const Checkpoint saved(folder_ / "saved");
  ASSERT_EQ(saved.tensors().size(), original.tensors().size());
  for (const TensorSpec& spec : original.tensors()) {
    EXPECT_EQ(saved.spec(spec.name).shape, spec.shape) << spec.name;
    EXPECT_EQ(saved.read_f32(spec.name), original.read_f32(spec.name)) << spec.name;
  }
  EXPECT_EQ(write_config(saved.config(), "float32"), saved.config().source) << "a written config reads back as it is";
  const auto source = torch_logits(saved, "cpu");
  for (const FamilyText& text : family_texts(golden_)) EXPECT_LT(largest_difference(*source, text), 1e-4);
  // For tests/interop/families.py, which loads them in transformers.
  if (const char* keep = std::getenv("PARE_KEEP_FAMILIES"); keep != nullptr)
    fs::copy(folder_ / "saved", fs::path(keep) / GetParam(), fs::copy_options::recursive);
}

// Gradients of every parameter against float64, where the same operations are composed of LibTorch's own.
TEST_P(FamilyGolden, GradientsAgreeWithFloat64) {
  const Checkpoint checkpoint(folder_ / "model");
  const FamilyText text = family_texts(golden_).back();
  const torch::Tensor ids =
      torch::tensor(std::vector<std::int64_t>(text.ids.begin(), text.ids.end()), torch::kLong).unsqueeze(0);
  const torch::Tensor targets = torch::roll(ids, -1, 1).view(-1);
  Decoder fast = load_decoder(checkpoint, torch::kCPU), exact = load_decoder(checkpoint, torch::kCPU);
  exact->to(torch::kDouble);
  std::vector<torch::Tensor> losses;
  for (Decoder* decoder : {&fast, &exact}) {
    const torch::Tensor hidden = (*decoder)->hidden(ids);
    losses.push_back(
        cross_entropy_loss(hidden.view({-1, hidden.size(-1)}), (*decoder)->output_head(), targets, 1.0, nullptr));
    losses.back().backward();
  }
  EXPECT_NEAR(losses[0].item<double>(), losses[1].item<double>(), 1e-4 * losses[1].item<double>());
  for (const TensorSpec& spec : checkpoint.tensors()) {
    const torch::Tensor a = fast->tensor(spec.name).grad(), b = exact->tensor(spec.name).grad();
    ASSERT_EQ(a.defined(), b.defined()) << spec.name;
    if (!a.defined()) continue;  // an expert that no token chose
    // A bias of keys that do not rotate moves all scores of a query alike: its gradient is 0, and rounding remains.
    const double floor = b.norm().item<double>() < 1e-12 ? 1e-5 : 1e-6;
    EXPECT_LT((a.to(torch::kDouble) - b).norm().item<double>(), 2e-4 * b.norm().item<double>() + floor) << spec.name;
  }
}

// The calibration walk sees the stages one by one; together they are the block.
TEST_P(FamilyGolden, StagesTogetherAreTheBlock) {
  const torch::NoGradGuard no_grad;
  const Checkpoint checkpoint(folder_ / "model");
  const FamilyText text = family_texts(golden_).back();
  Decoder decoder = load_decoder(checkpoint, torch::kCPU);
  torch::Tensor hidden =
      decoder->embed(torch::tensor(std::vector<std::int64_t>(text.ids.begin(), text.ids.end())).unsqueeze(0));
  const RopeTables& rope = decoder->rope(hidden.size(1));
  for (int layer = 0; layer < decoder->config().num_layers; ++layer) {
    DecoderBlock block = load_block(checkpoint, layer, torch::kCPU);
    const torch::Tensor middle =
        block->attention_output(hidden, block->attention_mix(block->attention_input(hidden), rope));
    const torch::Tensor wide = block->mlp_input(block->parallel_residual() ? hidden : middle);
    const torch::Tensor out =
        block->has_experts() ? block->expert_output(middle, wide) : block->mlp_output(middle, block->mlp_mix(wide));
    EXPECT_TRUE(torch::equal(out, decoder->block(layer)->forward(hidden, rope))) << layer;
    hidden = out;
  }
}

TEST_P(FamilyGolden, NoTextIsLongerThanLearnedPositions) {
  const Checkpoint checkpoint(folder_ / "model");
  if (!checkpoint.config().learned_positions) return;
  Decoder decoder = load_decoder(checkpoint, torch::kCPU);
  const std::int64_t most = checkpoint.config().max_position_embeddings;
  EXPECT_EQ(decoder->forward(torch::zeros({1, most}, torch::kLong)).size(1), most);
  try {
    decoder->forward(torch::zeros({1, most + 1}, torch::kLong));
    ADD_FAILURE() << "computed";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInput);
    EXPECT_NE(std::string(error.what()).find(std::to_string(most) + " positions"), std::string::npos) << error.what();
  }
}

INSTANTIATE_TEST_SUITE_P(Goldens, FamilyGolden, ::testing::ValuesIn(testing::family_names()),
                         [](const auto& info) { return info.param; });

TEST(FamilyTable, EveryFamilyHasTwoGoldens) {
  std::map<std::string, int> counted;
  for (const std::string& name : testing::family_names())
    ++counted[read_json(testing::golden_families() / (name + ".json"))["config"]["model_type"].get<std::string>()];
  for (const Family* family : families()) EXPECT_GE(counted[family->name], 2) << family->name;
}

}  // namespace
}  // namespace pare
