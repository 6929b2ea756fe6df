// Session::truncate: what is fed behind it has the bits of a session that never saw what was forgotten.
#include <gtest/gtest.h>

#include "core/error.h"
#include "runtime/engine.h"
#include "runtime/kernels.h"
#include "tests/runtime/tiny_model.h"

namespace pare {
namespace {

using namespace pare::testing;

std::vector<float> rows_of(Session& session, std::int64_t first, std::int64_t count, std::int64_t vocab) {
  std::vector<float> out(static_cast<std::size_t>(count * vocab));
  session.logits(first, count, out.data());
  return out;
}

class TruncateTest : public ::testing::Test {
 protected:
  // Two blocks; the second one sees `window` positions where that is not 0.
  std::shared_ptr<const Engine> engine(std::int64_t window, const char* kv, const std::string& kernels = "") {
    ModelConfig config = tiny_config("mistral", 32, 64, 4, 2, 8, kVocab, true);
    config.max_position_embeddings = 4000;
    if (window > 0) {
      config.sliding_window = window;
      config.layer_slides = {0, 1};
      config.family = "qwen2";  // whose windows may differ by block
      config.qkv_bias = true;
    }
    const fs::path path = scratch_.path / (std::to_string(files_++) + ".pare");
    write_tiny_model(path, config, {CodecKind::kQ8, 32}, 5);
    EngineOptions options;
    options.threads = 1;
    options.kernels = kernels;
    options.kv = kv;
    const auto opened = Engine::open(path, options);
    EXPECT_EQ(opened->config().window(1), window);
    return opened;
  }
  static constexpr std::int64_t kVocab = 40;
  ScratchFolder scratch_;
  int files_ = 0;
};

TEST_F(TruncateTest, WhatFollowsHasTheBitsOfANewSession) {
  for (const std::string& kernels : available_kernels()) {
    for (const char* kv : {"f32", "f16", "q8", "mixed"}) {
      if (kernels != available_kernels().back() && kv != std::string("mixed")) continue;
      for (const std::int64_t window : {0, 50}) {
        const auto opened = engine(window, kv, kernels);
        Session session(opened);
        std::vector<std::int32_t> text;  // what the session should hold
        std::mt19937 rng(7);
        int cuts = 0;
        for (std::uint32_t step = 0; step < 16; ++step) {
          const auto ids = random_ids(1 + static_cast<std::int64_t>(rng() % (step % 6 == 0 ? 320 : 9)), kVocab, step);
          session.feed(ids);
          text.insert(text.end(), ids.begin(), ids.end());
          const auto count = static_cast<std::int64_t>(ids.size());
          Session fresh(opened);
          fresh.feed(text);
          ASSERT_EQ(rows_of(session, 0, count, kVocab),
                    rows_of(fresh, static_cast<std::int64_t>(text.size()) - count, count, kVocab))
              << kernels << ", " << kv << ", window " << window << ", step " << step;
          const auto back = static_cast<std::int64_t>(rng() % (step % 4 == 3 ? 700 : 12));
          const std::int64_t to = std::max<std::int64_t>(1, session.position() - back);
          if (!session.can_truncate(to)) continue;
          session.truncate(to);
          text.resize(static_cast<std::size_t>(to));
          EXPECT_EQ(session.position(), to);
          ++cuts;
        }
        EXPECT_GT(cuts, 10);
      }
    }
  }
}

TEST_F(TruncateTest, WindowsKeepABatchAndRefuseMore) {
  const auto opened = engine(50, "mixed");
  const auto text = random_ids(2000, kVocab, 3);
  Session session(opened);
  session.feed(text);
  EXPECT_TRUE(session.can_truncate(2000));
  EXPECT_TRUE(session.can_truncate(1712));  // Forward::kBatch back
  EXPECT_FALSE(session.can_truncate(1000));
  EXPECT_TRUE(session.can_truncate(0));
  try {
    session.truncate(1000);
    ADD_FAILURE() << "what was overwritten came back";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("sliding windows"), std::string::npos) << error.what();
  }
  EXPECT_EQ(session.position(), 2000);
  // Two steps back reach no further than one.
  session.truncate(1712);
  EXPECT_FALSE(session.can_truncate(1000));
  session.feed(std::span(text).subspan(1712, 5));
  Session fresh(opened);
  fresh.feed(std::span(text).first(1717));
  EXPECT_EQ(rows_of(session, 4, 1, kVocab), rows_of(fresh, 1716, 1, kVocab));
  // Without windows everything stays.
  Session whole(engine(0, "mixed"));
  whole.feed(text);
  EXPECT_TRUE(whole.can_truncate(1));
}

TEST_F(TruncateTest, RefusesWhatIsNotThere) {
  Session session(engine(0, "f32"));
  session.feed(random_ids(10, kVocab, 1));
  EXPECT_THROW(session.truncate(-1), Error);
  EXPECT_THROW(session.truncate(11), Error);
  EXPECT_FALSE(session.can_truncate(-1));
  EXPECT_FALSE(session.can_truncate(11));
  session.truncate(4);
  std::vector<float> row(kVocab);
  EXPECT_THROW(session.logits(0, 1, row.data()), Error);  // rows of the last feed are gone
  session.truncate(0);
  EXPECT_EQ(session.position(), 0);
}

}  // namespace
}  // namespace pare
