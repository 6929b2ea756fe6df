#include "model/blocks.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <map>

#include "core/error.h"
#include "model/decoder.h"
#include "tests/model/models.h"

namespace pare {
namespace {

ModelConfig walk_config() {
  ModelConfig config;
  config.family = "llama";
  config.vocab_size = 80;
  config.hidden_size = 32;
  config.intermediate_size = 56;
  config.num_layers = 3;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 8;
  config.max_position_embeddings = 64;
  config.tie_word_embeddings = true;
  return config;
}

class BlocksTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("pare-blocks-" + std::to_string(getpid()));
    fs::remove_all(folder_);
    Decoder decoder(walk_config());
    initialize(decoder, 3);
    {
      // Larger weights than the initial ones, so that attention and gates are not almost linear.
      const torch::NoGradGuard no_grad;
      for (auto& item : decoder->named_parameters()) {
        if (item.value().dim() == 2) item.value().mul_(8.0);
      }
    }
    save_decoder(decoder, "float32", {}, folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  fs::path folder_;
};

// Optionally halves the rows' odd columns of every linear; keeps all statistics.
class Recorder : public BlockVisitor {
 public:
  explicit Recorder(bool change = false, int finished_below = 0) : change_(change), finished_below_(finished_below) {}
  bool finished(int layer) override { return layer < finished_below_; }
  void restore(int layer, std::span<BlockLinear> linears) override {
    for (BlockLinear& linear : linears) alter(linear);
  }
  void compress(int layer, BlockStage stage, std::span<BlockLinear> linears, const InputStatistics& input) override {
    statistics[{layer, static_cast<int>(stage)}] = input;
    for (BlockLinear& linear : linears) {
      EXPECT_EQ(linear.cols, input.columns);
      EXPECT_EQ(linear.name, "model.layers." + std::to_string(layer) + "." + linear.module + ".weight");
      if (change_) alter(linear);
    }
  }
  void end_block(int layer, double drift) override { drifts.push_back(drift); }
  static void alter(BlockLinear& linear) {
    for (std::int64_t i = 1; i < linear.rows * linear.cols; i += 2) {
      linear.weight[static_cast<std::size_t>(i)] = 0.5f * linear.original[static_cast<std::size_t>(i)];
    }
  }
  std::map<std::pair<int, int>, InputStatistics> statistics;
  std::vector<double> drifts;

 private:
  bool change_;
  int finished_below_;
};

Recorder walk(const fs::path& folder, const CalibrationWindows& windows, WalkOptions options, Recorder recorder) {
  Context context;
  walk_blocks(Checkpoint(folder), windows, options, context, recorder);
  return recorder;
}

WalkOptions with_hessian(int threads) {
  WalkOptions options;
  options.hessian = true;
  options.threads = threads;
  return options;
}

// The inputs of every sub-stage of every block for one window, from whole modules.
std::map<std::pair<int, int>, torch::Tensor> stage_inputs(Decoder& decoder, const std::vector<std::int32_t>& ids) {
  const torch::NoGradGuard no_grad;
  std::map<std::pair<int, int>, torch::Tensor> result;
  const auto rope = rope_tables(decoder->config(), static_cast<std::int64_t>(ids.size()), torch::kCPU);
  torch::Tensor hidden = decoder->embed(torch::tensor(std::vector<std::int64_t>(ids.begin(), ids.end())).unsqueeze(0));
  for (int layer = 0; layer < decoder->config().num_layers; ++layer) {
    DecoderBlock block = decoder->block(layer);
    const torch::Tensor normed = block->attention_input(hidden), mix = block->attention_mix(normed, rope);
    const torch::Tensor middle = block->attention_output(hidden, mix), wide = block->mlp_input(middle);
    const torch::Tensor gated = block->mlp_mix(wide);
    result[{layer, 0}] = normed[0];
    result[{layer, 1}] = mix[0];
    result[{layer, 2}] = wide[0];
    result[{layer, 3}] = gated[0];
    hidden = block->mlp_output(middle, gated);
  }
  return result;
}

TEST_F(BlocksTest, StatisticsAreSumsOverTheModelsOwnInputs) {
  const CalibrationWindows windows = random_windows(80, 11, 19, 5);
  const Recorder plain = walk(folder_, windows, with_hessian(2), Recorder());
  ASSERT_EQ(plain.statistics.size(), 12u);
  for (double drift : plain.drifts) EXPECT_EQ(drift, 0.0);
  Decoder decoder = load_decoder(Checkpoint(folder_), torch::kCPU);
  std::map<std::pair<int, int>, torch::Tensor> sums;
  for (std::int64_t w = 0; w < windows.count; ++w) {
    const auto first = windows.ids.begin() + w * windows.length;
    for (auto& [key, x] : stage_inputs(decoder, {first, first + windows.length})) {
      const torch::Tensor wide = x.to(torch::kDouble), product = torch::mm(wide.t(), wide);
      sums[key] = sums.contains(key) ? sums[key] + product : product;
    }
  }
  for (const auto& [key, input] : plain.statistics) {
    EXPECT_EQ(input.tokens, 11 * 19);
    const torch::Tensor expected = sums[key] / static_cast<double>(input.tokens);
    const torch::Tensor found =
        torch::tensor(input.hessian.doubles(), torch::kDouble).view({input.columns, input.columns});
    EXPECT_LT((found - expected).abs().max().item<double>(),
              testing::statistics_tolerance() * expected.abs().max().item<double>());
    EXPECT_TRUE(torch::equal(found, found.t()));
    for (std::int64_t j = 0; j < input.columns; ++j) {
      EXPECT_EQ(input.mean_square[static_cast<std::size_t>(j)],
                input.hessian[static_cast<std::size_t>(j * input.columns + j)]);
    }
  }
  WalkOptions light;
  const Recorder diagonal = walk(folder_, windows, light, Recorder());
  for (const auto& [key, input] : diagonal.statistics) {
    EXPECT_TRUE(input.hessian.empty());
    for (std::int64_t j = 0; j < input.columns; ++j) {
      const double full = plain.statistics.at(key).mean_square[static_cast<std::size_t>(j)];
      EXPECT_NEAR(input.mean_square[static_cast<std::size_t>(j)], full, 1e-5 * full);
    }
  }
}

TEST_F(BlocksTest, HeldOutWindowsAndTokenWeights) {
  const CalibrationWindows windows = random_windows(80, 11, 19, 5);
  TokenWeights weights;
  weights.values.assign(3 * kBlockStages, std::vector<float>(static_cast<std::size_t>(windows.count * windows.length)));
  for (std::size_t i = 0; i < weights.values.size(); ++i)
    for (std::size_t t = 0; t < weights.values[i].size(); ++t)
      weights.values[i][t] = static_cast<float>((i * 7 + t * 3) % 10) * 0.25f;
  WalkOptions options = with_hessian(2);
  options.cross = options.held_out = true;
  options.token_weights = &weights;
  const Recorder found = walk(folder_, windows, options, Recorder());
  Decoder decoder = load_decoder(Checkpoint(folder_), torch::kCPU);
  std::map<std::pair<int, int>, torch::Tensor> all, held;
  for (std::int64_t w = 0; w < windows.count; ++w) {
    const auto first = windows.ids.begin() + w * windows.length;
    for (auto& [key, x] : stage_inputs(decoder, {first, first + windows.length})) {
      const auto own = weights.of(key.first, static_cast<BlockStage>(key.second))
                           .subspan(static_cast<std::size_t>(w * windows.length), 19);
      const torch::Tensor wide = x.to(torch::kDouble);
      const torch::Tensor factors = torch::tensor(std::vector<double>(own.begin(), own.end()), torch::kDouble);
      const torch::Tensor product = torch::mm((wide * factors.unsqueeze(1)).t(), wide) / 19.0;
      all[key] = all.contains(key) ? all[key] + product / 11.0 : product / 11.0;
      if (w % kHeldOutEvery == kHeldOutEvery - 1)  // two of them
        held[key] = held.contains(key) ? held[key] + product / 2.0 : product / 2.0;
    }
  }
  ASSERT_EQ(found.statistics.size(), 12u);
  for (const auto& [key, input] : found.statistics) {
    const auto differs = [&](const SquareMatrix& matrix, const torch::Tensor& expected) {
      double most = 0;
      for (std::int64_t i = 0; i < input.columns * input.columns; ++i)
        most = std::max(most, std::fabs(matrix[static_cast<std::size_t>(i)] - expected.view({-1})[i].item<double>()));
      return most / expected.abs().max().item<double>();
    };
    EXPECT_LT(differs(input.hessian, all[key]), testing::statistics_tolerance());
    EXPECT_LT(differs(input.held_hessian, held[key]), testing::statistics_tolerance());
    EXPECT_EQ(input.paired_tokens, 11 * 19);
    EXPECT_EQ(input.held_tokens, 2 * 19);
    for (std::size_t i = 0; i < static_cast<std::size_t>(input.columns * input.columns); ++i) {
      EXPECT_EQ(input.cross[i], 0.0);  // nothing was replaced: both streams are the same
      EXPECT_EQ(input.held_cross[i], 0.0);
    }
  }
}

TEST_F(BlocksTest, ReplacedWeightsReachEveryLaterInputOfBothStreams) {
  const CalibrationWindows windows = random_windows(80, 15, 64, 6);
  Decoder original = load_decoder(Checkpoint(folder_), torch::kCPU),
          altered = load_decoder(Checkpoint(folder_), torch::kCPU);
  {
    const torch::NoGradGuard no_grad;
    for (auto& item : altered->named_parameters()) {
      if (item.key().find("_proj") == std::string::npos) continue;
      torch::Tensor flat = item.value().view(-1);
      flat.slice(0, 1, flat.size(0), 2).mul_(0.5);
    }
  }
  for (const std::int64_t stride : {1, 2}) {
    WalkOptions options = with_hessian(2);
    options.cross = options.held_out = true;
    options.paired_tokens = stride == 1 ? 960 : 1;
    ASSERT_EQ(paired_stride(walk_config(), 15, 64, options.paired_tokens), stride);
    const Recorder changed = walk(folder_, windows, options, Recorder(true));
    std::map<std::pair<int, int>, torch::Tensor> own, cross, held_own, held_cross;
    std::int64_t pairs = 0, held = 0;
    for (std::int64_t w = 0; w < windows.count; ++w) {
      const auto first = windows.ids.begin() + w * windows.length;
      const std::vector<std::int32_t> ids(first, first + windows.length);
      const bool paired = w % stride == 0, apart = paired && w / stride % kHeldOutEvery == kHeldOutEvery - 1;
      pairs += paired ? 64 : 0;
      held += apart ? 64 : 0;
      auto before = stage_inputs(original, ids), after = stage_inputs(altered, ids);
      for (auto& [key, x] : after) {
        const auto add = [&](auto& sums, const torch::Tensor& left, const torch::Tensor& right) {
          const torch::Tensor product = torch::mm(left.t(), right);
          sums[key] = sums.contains(key) ? sums[key] + product : product;
        };
        const torch::Tensor wide = x.to(torch::kDouble), difference = before[key].to(torch::kDouble) - wide;
        add(own, wide, wide);
        if (paired) add(cross, difference, wide);
        if (apart) add(held_own, wide, wide);
        if (apart) add(held_cross, difference, wide);
      }
    }
    for (const auto& [key, input] : changed.statistics) {
      EXPECT_EQ(input.tokens, 15 * 64);
      EXPECT_EQ(input.paired_tokens, pairs);
      EXPECT_EQ(input.held_tokens, held);
      const double largest = own[key].abs().max().item<double>() / static_cast<double>(input.tokens);
      const auto expect_near = [&](const SquareMatrix& found, const torch::Tensor& sum, std::int64_t tokens) {
        const torch::Tensor mean = (sum / static_cast<double>(tokens)).contiguous();
        for (std::int64_t i = 0; i < input.columns * input.columns; ++i)
          ASSERT_NEAR(found[static_cast<std::size_t>(i)], mean.data_ptr<double>()[i], 1e-4 * largest);
      };
      expect_near(input.hessian, own[key], input.tokens);
      expect_near(input.cross, cross[key], pairs);
      expect_near(input.held_hessian, held_own[key], held);
      expect_near(input.held_cross, held_cross[key], held);
    }
    EXPECT_GT(changed.drifts.back(), 0.01);
  }
}

TEST_F(BlocksTest, ReplayingFinishedBlocksChangesNoBit) {
  const CalibrationWindows windows = random_windows(80, 9, 16, 7);
  const Recorder whole = walk(folder_, windows, with_hessian(1), Recorder(true));
  const Recorder resumed = walk(folder_, windows, with_hessian(2), Recorder(true, 2));
  ASSERT_EQ(resumed.statistics.size(), 4u);
  for (const auto& [key, input] : resumed.statistics) EXPECT_EQ(input.hessian, whole.statistics.at(key).hessian);
  EXPECT_EQ(resumed.drifts, whole.drifts);
}

TEST_F(BlocksTest, SameBitsAtAnyThreadCount) {
  const CalibrationWindows windows = random_windows(80, 19, 16, 8);
  const Recorder one = walk(folder_, windows, with_hessian(1), Recorder(true));
  const Recorder three = walk(folder_, windows, with_hessian(3), Recorder(true));
  for (const auto& [key, input] : one.statistics) EXPECT_EQ(input.hessian, three.statistics.at(key).hessian);
  EXPECT_EQ(one.drifts, three.drifts);
}

TEST_F(BlocksTest, ActivationsInAFileChangeNoBitAndLeaveNothing) {
  const CalibrationWindows windows = random_windows(80, 19, 16, 8);
  const Recorder memory = walk(folder_, windows, with_hessian(2), Recorder(true));
  const fs::path folder = folder_ / "spill";
  fs::create_directories(folder);
  WalkOptions options = with_hessian(2);
  options.spill = folder;
  const Recorder file = walk(folder_, windows, options, Recorder(true));
  for (const auto& [key, input] : memory.statistics) EXPECT_EQ(input.hessian, file.statistics.at(key).hessian);
  EXPECT_EQ(memory.drifts, file.drifts);
  EXPECT_TRUE(fs::is_empty(folder));
  options.spill = folder_ / "nowhere";
  EXPECT_THROW(walk(folder_, windows, options, Recorder()), Error);
}

TEST_F(BlocksTest, WideInputsHaveStatisticsInFloats) {
  const CalibrationWindows windows = random_windows(80, 11, 19, 5);
  const Recorder exact = walk(folder_, windows, with_hessian(2), Recorder());
  WalkOptions options = with_hessian(2);
  options.widest_double = 32;
  const Recorder found = walk(folder_, windows, options, Recorder());
  int narrow = 0;
  for (const auto& [key, input] : found.statistics) {
    EXPECT_EQ(input.hessian.single(), input.columns > 32);
    narrow += input.hessian.single() ? 1 : 0;
    double largest = 0;
    for (double value : exact.statistics.at(key).mean_square) largest = std::max(largest, value);
    for (std::size_t i = 0; i < static_cast<std::size_t>(input.columns * input.columns); ++i) {
      ASSERT_NEAR(input.hessian[i], exact.statistics.at(key).hessian[i], 1e-6 * largest);
    }
  }
  EXPECT_GT(narrow, 0);
}

TEST_F(BlocksTest, TheFirstTokenIsCapped) {
  CalibrationWindows windows = random_windows(80, 4, 2, 9);
  const Recorder all = walk(folder_, windows, with_hessian(1), Recorder());
  windows.prefixed = true;
  const Recorder capped = walk(folder_, windows, with_hessian(1), Recorder());
  for (const auto& [key, input] : capped.statistics) {
    // Windows of two tokens: the first may count at most four times the second.
    double trace = 0, before = 0;
    for (std::size_t j = 0; j < input.mean_square.size(); ++j) {
      trace += input.mean_square[j];
      before += all.statistics.at(key).mean_square[j];
    }
    EXPECT_LE(trace, before * (1 + 1e-6));
  }
}

TEST_F(BlocksTest, IdsOutsideTheVocabularyAreRefused) {
  CalibrationWindows windows = random_windows(80, 2, 4, 1);
  windows.ids[3] = 80;
  EXPECT_THROW(walk(folder_, windows, with_hessian(1), Recorder()), Error);
}

TEST(Windows, AreSeededPrefixedAndInsideTheText) {
  const fs::path tokenizer_file =
      fs::path(PARE_SOURCE_DIR) / ".." / "shared" / "models" / "stories260K" / "tokenizer.json";
  if (!fs::exists(tokenizer_file)) GTEST_SKIP() << "SKIPPED: no stories260K beside the source folder";
  const Tokenizer tokenizer = Tokenizer::from_file(tokenizer_file);
  const fs::path text = fs::temp_directory_path() / ("pare-windows-" + std::to_string(getpid()) + ".txt");
  std::string story;
  for (int i = 0; i < 60; ++i) story += "Once there were " + std::to_string(i) + " little birds. ";
  write_text(text, story);
  const CalibrationWindows one = sample_windows(tokenizer, {text}, 6, 24, 1),
                           same = sample_windows(tokenizer, {text}, 6, 24, 1);
  const CalibrationWindows other = sample_windows(tokenizer, {text}, 6, 24, 2);
  EXPECT_EQ(one.ids, same.ids);
  EXPECT_EQ(one.hash(), same.hash());
  EXPECT_NE(one.hash(), other.hash());
  ASSERT_EQ(one.ids.size(), 144u);
  EXPECT_TRUE(one.prefixed);
  const std::vector<std::int32_t> all = tokenizer.encode(story);
  for (std::int64_t w = 0; w < 6; ++w) {
    EXPECT_EQ(one.ids[static_cast<std::size_t>(w * 24)], 1);
    const auto body = one.ids.begin() + w * 24 + 1;
    EXPECT_NE(std::search(all.begin(), all.end(), body, body + 23), all.end());
  }
  EXPECT_THROW(sample_windows(tokenizer, {text}, 1, 100000, 1), Error);
  fs::remove(text);
}

TEST(WalkMemory, FourAndSixteenLayersDifferInNothing) {
  ModelConfig few = walk_config(), many = walk_config();
  few.num_layers = 4;
  many.num_layers = 16;
  EXPECT_EQ(walk_peak_bytes(few, 128, 64, with_hessian(2)), walk_peak_bytes(many, 128, 64, with_hessian(2)));
  EXPECT_GT(walk_peak_bytes(few, 128, 64, with_hessian(2)), 2u * 128 * 64 * 32 * 4);
}

}  // namespace
}  // namespace pare
