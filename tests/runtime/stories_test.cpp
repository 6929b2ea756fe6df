#include <gtest/gtest.h>

#include <algorithm>

#include "runtime/engine.h"
#include "runtime/kernels.h"
#include "tests/runtime/stories.h"

namespace pare {
namespace {

using namespace pare::testing;

TEST(StoriesTest, GreedyContinuationIsTheRecordedOne) {
  const auto folder = stories_folder();
  if (!folder) GTEST_SKIP() << "SKIPPED: ../shared/models/stories260K is not beside the checkout";
  const ScratchFolder scratch;
  const fs::path path = scratch.path / "stories.pare";
  write_stories(*folder, path, {CodecKind::kF32, 0});
  const std::string want = recorded_story(*folder);
  ASSERT_GT(want.size(), 300u);
  for (const std::string& kernels : available_kernels()) {
    EngineOptions options;
    options.kernels = kernels;
    const auto engine = Engine::open(path, options);
    Session session(engine);
    Sampler sampler(SamplerOptions{});
    const Tokenizer& tokenizer = engine->tokenizer();
    std::vector<std::int32_t> ids = tokenizer.encode("");
    ASSERT_EQ(ids, std::vector<std::int32_t>{1});  // BOS
    StreamDecoder decoder(tokenizer);
    decoder.push(1);
    std::string text;
    std::vector<float> logits(static_cast<std::size_t>(engine->config().vocab_size));
    for (int i = 0; i < 60; ++i) {
      session.feed({&ids.back(), 1});
      session.logits(0, 1, logits.data());
      ids.push_back(sampler(logits));
      text += decoder.push(ids.back());
    }
    EXPECT_GT(text.size(), 120u);
    EXPECT_EQ(text, want.substr(0, text.size())) << kernels;
  }
}

}  // namespace
}  // namespace pare
