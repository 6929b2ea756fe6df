#include <gtest/gtest.h>

#include <cmath>

#include "runtime/engine.h"
#include "runtime/kernels.h"
#include "tests/runtime/stories.h"

namespace pare {
namespace {

using namespace pare::testing;

struct Loss {
  double mean = 0;
  std::int64_t predictions = 0;
};

// ../shared/README.md: the first 200 stories of the sample, split at <|endoftext|>, surrounding blanks and newlines
// stripped, BOS + story, each cut at 512 tokens.
Loss mean_loss(const fs::path& file, const EngineOptions& options) {
  const auto engine = Engine::open(file, options);
  const auto source = runtime_logits(engine);
  const std::string text = read_text(shared_folder() / "data" / "text" / "tinystories_sample.txt");
  const std::string mark = "<|endoftext|>";
  std::size_t at = 0;
  double total = 0;
  Loss loss;
  std::vector<float> logits;
  for (int story = 0; story < 200; ++story) {
    const std::size_t end = std::min(text.find(mark, at), text.size());
    std::string one = text.substr(at, end - at);
    at = end + mark.size();
    const char* blank = " \t\r\n";
    one.erase(0, std::min(one.find_first_not_of(blank), one.size()));
    one.erase(one.find_last_not_of(blank) + 1);
    std::vector<std::int32_t> ids = engine->tokenizer().encode(one, true, false);
    if (ids.size() > 512) ids.resize(512);
    const auto rows = static_cast<std::int64_t>(ids.size()), vocab = source->vocab_size();
    logits.resize(static_cast<std::size_t>(rows * vocab));
    source->begin(ids);
    source->logits(0, rows, logits.data());
    for (std::int64_t t = 0; t + 1 < rows; ++t) {
      const float* row = logits.data() + t * vocab;
      double sum = 0;
      const double peak = *std::max_element(row, row + vocab);
      for (std::int64_t i = 0; i < vocab; ++i) sum += std::exp(row[i] - peak);
      total += peak + std::log(sum) - row[ids[static_cast<std::size_t>(t + 1)]];
      ++loss.predictions;
    }
  }
  loss.mean = total / static_cast<double>(loss.predictions);
  return loss;
}

TEST(StoriesSlowTest, MeanLossIsTheRecordedOne) {
  const auto folder = stories_folder();
  if (!folder) GTEST_SKIP() << "SKIPPED: ../shared/models/stories260K is not beside the checkout";
  const ScratchFolder scratch;
  const fs::path path = scratch.path / "stories.pare";
  write_stories(*folder, path, {CodecKind::kF32, 0});
  for (const std::string& kernels : available_kernels()) {
    EngineOptions options;
    options.kernels = kernels;
    options.threads = 1;  // the bits are the same with more
    const Loss loss = mean_loss(path, options);
    EXPECT_EQ(loss.predictions, 79255) << kernels;
    EXPECT_NEAR(loss.mean, 1.4779, 0.0005) << kernels;
    RecordProperty("mean_loss_" + kernels, std::to_string(loss.mean));
  }
}

TEST(StoriesSlowTest, Int8ActivationsCostLittle) {
  const auto folder = stories_folder();
  if (!folder) GTEST_SKIP() << "SKIPPED: ../shared/models/stories260K is not beside the checkout";
  const ScratchFolder scratch;
  const fs::path path = scratch.path / "stories_q8.pare";
  write_stories(*folder, path, {CodecKind::kQ8, Codec::kPerRow});
  EngineOptions options;
  options.threads = 1;
  const Loss int8 = mean_loss(path, options);
  options.int8_activations = false;
  const Loss exact = mean_loss(path, options);
  EXPECT_EQ(int8.predictions, 79255);
  EXPECT_NEAR(exact.mean, 1.4779, 0.005);
  EXPECT_NEAR(int8.mean, exact.mean, 0.002);
  RecordProperty("mean_loss_int8", std::to_string(int8.mean));
  RecordProperty("mean_loss_float", std::to_string(exact.mean));
}

}  // namespace
}  // namespace pare
