// The C interface under what an embedding program may meet: damaged files, prompts without end, threads that stop each
// other. Nothing may crash, and what is intact keeps its results.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <thread>

#include "runtime/pare.h"
#include "tests/runtime/tiny_model.h"

namespace pare {
namespace {

using namespace pare::testing;

constexpr const char* kText = "once upon a time, h\xc3\xa4nsel";

class Robust : public ::testing::Test {
 protected:
  void SetUp() override {
    TokenizerTraining training;
    training.vocab_size = 280;
    tokenizer_ = train_tokenizer({"once upon a time there was a time, once upon a hill"}, training);
    write("a.pare", 5);
    write("b.pare", 6);
  }
  void write(const char* name, std::uint32_t seed) {
    write_tiny_model(scratch_.path / name, tiny_config("llama", 32, 64, 4, 2, 8, 290, true), {CodecKind::kQ4, 32}, seed,
                     {{"tokenizer.json", tokenizer_}});
  }
  pare_model* open(const fs::path& path, int threads) const {
    pare_options options = PARE_OPTIONS_INIT;
    options.threads = threads;
    return pare_open(path.c_str(), &options);
  }
  // Opens, tokenizes, feeds and generates; false where that was refused. Refusals have a status and a text.
  bool use(const fs::path& path) {
    const auto refused = [&](std::int64_t result) {
      if (result >= 0) return false;
      EXPECT_TRUE(result == -PARE_INPUT || result == -PARE_FAILURE || result == -PARE_RESOURCES) << pare_last_error();
      EXPECT_STRNE(pare_last_error(), "");
      return true;
    };
    pare_model* model = open(path, 1);
    if (model == nullptr) return !refused(-pare_last_status());
    std::vector<std::int32_t> ids(100);
    const std::int64_t count = pare_tokenize(model, kText, std::strlen(kText), 1, ids.data(), 100);
    bool good = !refused(count);
    if (!good || count == 0 || count > 100) ids = {1, 2, 3};
    else ids.resize(static_cast<std::size_t>(count));
    pare_session* session = pare_session_open(model, 0);
    pare_sampler* sampler = pare_sampler_open(0, 1, 0);
    const int fed = pare_feed(session, ids.data(), static_cast<std::int64_t>(ids.size()));
    good = session != nullptr && !refused(-fed) && good;
    if (good) good = !refused(pare_generate(session, sampler, 3, nullptr, nullptr));
    pare_verify(model);
    pare_sampler_close(sampler);
    pare_session_close(session);
    pare_close(model);
    return good;
  }
  ScratchFolder scratch_;
  std::string tokenizer_;
};

TEST_F(Robust, DamagedFilesAreRefusedOrRun) {
  const fs::path bad = scratch_.path / "bad.pare";
  const std::string good = read_text(scratch_.path / "a.pare");
  const auto survives = [&](const std::string& bytes) {
    std::ofstream out(bad, std::ios::binary | std::ios::trunc);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    out.close();
    return use(bad);
  };
  ASSERT_TRUE(survives(good));
  std::uint64_t header = 0;
  std::memcpy(&header, good.data(), 8);
  const std::size_t data = 8 + static_cast<std::size_t>(header);
  const std::size_t config = good.find("{\"architectures\""), tokenizer = good.find(tokenizer_.substr(0, 40));
  ASSERT_NE(config, std::string::npos);
  ASSERT_NE(tokenizer, std::string::npos);
  for (std::size_t length = 0; length < good.size(); length += length < 64 ? 1 : 211)
    EXPECT_FALSE(survives(good.substr(0, length))) << length;

  std::mt19937 rng(1);
  int refused = 0, tried = 0;
  const auto each = [&](int rounds, const auto& damage) {
    for (int round = 0; round < rounds; ++round) {
      std::string bytes = good;
      for (std::uint32_t times = 1 + rng() % 3; times > 0; --times) damage(bytes);
      refused += !survives(bytes);
      ++tried;
    }
  };
  const auto flip = [&](std::string& bytes, std::size_t begin, std::size_t end) {
    bytes[begin + rng() % (end - begin)] ^= static_cast<char>(1 << rng() % 8);
  };
  // The digits of one number, so that lengths stay: shapes, offsets, sizes of the model.
  const auto renumber = [&](std::string& bytes, std::size_t begin, std::size_t end) {
    std::size_t at = begin + rng() % (end - begin);
    while (at < end && (bytes[at] < '0' || bytes[at] > '9')) ++at;
    static constexpr char kWith[] = "0123456789999e-.";
    for (const bool wild = rng() % 4 == 0; at < end && bytes[at] >= '0' && bytes[at] <= '9'; ++at)
      bytes[at] = kWith[rng() % (wild ? 16 : 10)];
  };
  each(400, [&](std::string& bytes) { flip(bytes, 0, data); });
  each(400, [&](std::string& bytes) { renumber(bytes, 8, data); });
  each(600, [&](std::string& bytes) { renumber(bytes, config, tokenizer > config ? tokenizer : good.size()); });
  each(300, [&](std::string& bytes) { flip(bytes, config, config + 900); });
  each(400, [&](std::string& bytes) { flip(bytes, tokenizer, tokenizer + tokenizer_.size()); });
  each(200, [&](std::string& bytes) { renumber(bytes, tokenizer, tokenizer + tokenizer_.size()); });
  each(200, [&](std::string& bytes) { flip(bytes, data, good.size()); });
  EXPECT_GT(refused, tried / 4);
  EXPECT_LT(refused, tried);
}

TEST_F(Robust, TheContextEndsWhatIsTooLong) {
  pare_model* model = open(scratch_.path / "a.pare", 2);
  ASSERT_NE(model, nullptr) << pare_last_error();
  pare_session* session = pare_session_open(model, 100);
  pare_sampler* sampler = pare_sampler_open(1, 1, 4);
  const auto ids = random_ids(101, 290, 1);
  std::vector<float> logits(290), again(290);
  EXPECT_EQ(pare_feed(session, ids.data(), 101), PARE_INPUT);
  EXPECT_NE(std::string(pare_last_error()).find("context full"), std::string::npos) << pare_last_error();
  EXPECT_EQ(pare_session_position(session), 0);
  EXPECT_EQ(pare_feed(session, ids.data(), 100), PARE_OK);
  EXPECT_EQ(pare_logits(session, 99, 1, logits.data()), PARE_OK);
  EXPECT_EQ(pare_feed(session, ids.data(), 1), PARE_INPUT);
  EXPECT_EQ(pare_feed(session, ids.data(), INT64_MAX), PARE_INPUT);
  EXPECT_EQ(pare_feed_each(&session, ids.data(), 1), PARE_INPUT);
  EXPECT_EQ(pare_logits(session, 99, 1, again.data()), PARE_OK);
  EXPECT_EQ(logits, again);
  EXPECT_LE(pare_generate(session, sampler, 10, nullptr, nullptr), 1);  // a token for which there is no place
  EXPECT_EQ(pare_session_position(session), 100);
  EXPECT_EQ(pare_session_open(model, -1), nullptr);
  pare_sampler_close(sampler);
  pare_session_close(session);
  pare_close(model);
}

// Threads that tokenize and generate with two models, all at once, while others stop them again and again: whoever was
// stopped goes on, and all come to what they say alone.
TEST_F(Robust, ThreadsDoNotDisturbEachOther) {
  pare_model* models[] = {open(scratch_.path / "a.pare", 2), open(scratch_.path / "b.pare", 2)};
  ASSERT_TRUE(models[0] != nullptr && models[1] != nullptr) << pare_last_error();
  std::atomic<int> stops{0};
  const auto work = [&](std::size_t which, bool disturbed) {
    std::vector<std::int32_t> ids(100);
    pare_model* const model = models[which];
    const std::int64_t count = pare_tokenize(model, kText, std::strlen(kText), 1, ids.data(), 100);
    ids.resize(static_cast<std::size_t>(count));
    pare_session* session = pare_session_open(model, 0);
    std::atomic<bool> done{false};
    if (disturbed) pare_cancel(session);
    std::thread other([&] {
      while (disturbed && !done) {
        pare_cancel(session);
        std::this_thread::sleep_for(std::chrono::microseconds(300));
      }
    });
    const auto feed = [&](const std::int32_t* from, std::int64_t n) {
      int status = PARE_CANCELLED;
      while ((status = pare_feed(session, from, n)) == PARE_CANCELLED) {
        ++stops;
        std::this_thread::sleep_for(std::chrono::microseconds(200));
      }
      EXPECT_EQ(status, PARE_OK) << pare_last_error();
    };
    feed(ids.data(), count);
    pare_sampler* sampler = pare_sampler_open(0, 1, 0);
    std::vector<float> logits(290);
    for (int i = 0; i < 60; ++i) {
      EXPECT_EQ(pare_logits(session, i == 0 ? count - 1 : 0, 1, logits.data()), PARE_OK) << pare_last_error();
      ids.push_back(pare_sample(sampler, logits.data(), 290));
      feed(&ids.back(), 1);
    }
    done = true;
    other.join();
    std::string text(1000, '\0');
    text.resize(static_cast<std::size_t>(
        pare_detokenize(model, ids.data(), static_cast<std::int64_t>(ids.size()), text.data(), 1000)));
    pare_sampler_close(sampler);
    pare_session_close(session);
    return std::pair(ids, text);
  };
  const std::pair<std::vector<std::int32_t>, std::string> want[] = {work(0, false), work(1, false)};
  EXPECT_NE(want[0].first, want[1].first);
  EXPECT_EQ(stops, 0);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < 6; ++i)
    threads.emplace_back([&, i] { EXPECT_EQ(work(i % 2, i >= 2), want[i % 2]) << i; });
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(stops, 0);
  pare_close(models[0]);
  pare_close(models[1]);
}

}  // namespace
}  // namespace pare
