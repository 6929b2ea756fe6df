// Every family against transformers: LibTorch, the runtime, incremental decoding, saving. The goldens name the models.
#include "tests/model/families.h"

#include "core/arch/arch.h"
#include "model/logits.h"
#include "runtime/engine.h"
#include "runtime/export.h"
#include "tests/model/models.h"

namespace pare {
namespace {

using testing::Folder;

struct Text {
  std::vector<std::int32_t> ids;
  std::vector<std::int64_t> rows;
  std::vector<std::vector<double>> logits;
};

std::vector<Text> texts_of(const Json& golden) {
  std::vector<Text> texts;
  for (const Json& text : golden.at("texts"))
    texts.push_back({text.at("ids").get<std::vector<std::int32_t>>(), text.at("rows").get<std::vector<std::int64_t>>(),
                     text.at("logits").get<std::vector<std::vector<double>>>()});
  return texts;
}

double largest_difference(LogitsSource& source, const Text& text) {
  source.begin(text.ids);
  std::vector<float> logits(static_cast<std::size_t>(source.vocab_size()));
  double largest = 0;
  for (std::size_t r = 0; r < text.rows.size(); ++r) {
    source.logits(text.rows[r], 1, logits.data());
    EXPECT_EQ(logits.size(), text.logits[r].size());
    for (std::size_t i = 0; i < logits.size(); ++i)
      largest = std::max(largest, std::abs(static_cast<double>(logits[i]) - text.logits[r][i]));
  }
  return largest;
}

class FamilyGolden : public ::testing::TestWithParam<std::string> {
 protected:
  FamilyGolden()
      : folder_("family-" + GetParam()), golden_(read_json(testing::golden_families() / (GetParam() + ".json"))) {
    testing::make_family_folder(golden_.at("config"), folder_ / "model");
  }
  fs::path exported(const fs::path& model, const std::string& codec = "f32") {
    ExportOptions options;
    options.out = folder_ / (model.filename().string() + "-" + codec + ".pare");
    options.codec = codec;
    testing::QuietRun run;
    export_compact(Checkpoint(model), options, run.context);
    return options.out;
  }
  // The largest of a test, for the table of tests/bench/families_table.py.
  void record(double difference) {
    largest_ = std::max(largest_, difference);
    RecordProperty("difference", std::to_string(largest_ * 1e6));
  }
  Folder folder_;
  Json golden_;
  double largest_ = 0;
};

std::shared_ptr<const Engine> exact_engine(const fs::path& file, int threads = 1) {
  EngineOptions options;
  options.threads = threads;
  options.int8_activations = false;
  return Engine::open(file, options);
}

TEST_P(FamilyGolden, LibTorchLogitsAreThoseOfTransformers) {
  const auto source = torch_logits(Checkpoint(folder_ / "model"), "cpu");
  for (const Text& text : texts_of(golden_)) {
    const double difference = largest_difference(*source, text);
    EXPECT_LT(difference, 1e-4) << text.ids.size() << " tokens";
    record(difference);
  }
}

TEST_P(FamilyGolden, RuntimeLogitsAreThoseOfTransformers) {
  for (const int threads : {1, 2}) {
    const auto source = runtime_logits(exact_engine(exported(folder_ / "model"), threads));
    for (const Text& text : texts_of(golden_)) {
      const double difference = largest_difference(*source, text);
      EXPECT_LT(difference, 1e-3) << text.ids.size() << " tokens, " << threads << " threads";
      record(difference);
    }
    fs::remove(folder_ / "model-f32.pare");
  }
}

// Whatever the pieces in which a text is fed, and also where a sliding window or LongRoPE's switch lies inside it.
TEST_P(FamilyGolden, IncrementalDecodingEqualsPrefill) {
  const auto engine = exact_engine(exported(folder_ / "model"));
  const auto vocab = static_cast<std::size_t>(engine->config().vocab_size);
  const Text text = texts_of(golden_).back();
  const auto count = static_cast<std::int64_t>(text.ids.size());
  std::vector<float> step(vocab), whole(vocab);
  for (const std::int64_t piece : {1, 5}) {
    Session session(engine), reference(engine);
    for (std::int64_t at = 0; at < count; at += piece) {
      const auto n = static_cast<std::size_t>(std::min(piece, count - at));
      session.feed(std::span(text.ids).subspan(static_cast<std::size_t>(at), n));
      session.logits(static_cast<std::int64_t>(n) - 1, 1, step.data());
      reference.reset();
      reference.feed(std::span(text.ids).first(static_cast<std::size_t>(at) + n));
      reference.logits(at + static_cast<std::int64_t>(n) - 1, 1, whole.data());
      double largest = 0;
      for (std::size_t i = 0; i < vocab; ++i)
        largest = std::max(largest, static_cast<double>(std::abs(step[i] - whole[i])));
      ASSERT_GT(std::abs(*std::max_element(whole.begin(), whole.end())), 1e-2f) << "logits were written";
      ASSERT_LT(largest, 1e-3) << "position " << at << ", pieces of " << piece;
      record(largest);
    }
  }
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
  for (const Text& text : texts_of(golden_)) EXPECT_LT(largest_difference(*source, text), 1e-4);
  // For tests/interop/families.py, which loads them in transformers.
  if (const char* keep = std::getenv("PARE_KEEP_FAMILIES"); keep != nullptr)
    fs::copy(folder_ / "saved", fs::path(keep) / GetParam(), fs::copy_options::recursive);
}

// Gradients of every parameter against float64, where the same operations are composed of LibTorch's own.
TEST_P(FamilyGolden, GradientsAgreeWithFloat64) {
  const Checkpoint checkpoint(folder_ / "model");
  const Text text = texts_of(golden_).back();
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
    EXPECT_LT((a.to(torch::kDouble) - b).norm().item<double>(), 2e-4 * b.norm().item<double>() + 1e-6) << spec.name;
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
