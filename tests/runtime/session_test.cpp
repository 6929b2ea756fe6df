// What a session goes through besides feeding: requests to stop, states that come and go, other engines beside it.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <new>
#include <thread>

#include "core/context.h"
#include "core/error.h"
#include "runtime/engine.h"
#include "runtime/export.h"
#include "tests/families.h"
#include "tests/runtime/tiny_model.h"
#include "tests/scratch.h"

namespace pare {
namespace {

using testing::random_ids;
using Bytes = std::vector<std::byte>;

constexpr std::int64_t kVocab = 64;  // of the golden models

std::vector<float> last_row(Session& session) {
  std::vector<float> out(static_cast<std::size_t>(kVocab));
  session.logits(session.rows() - 1, 1, out.data());
  return out;
}

std::vector<float> feed_row(Session& session, const std::vector<std::int32_t>& ids) {
  session.feed(ids);
  return last_row(session);
}

Bytes state_of(const Session& session) {
  Bytes state;
  session.save([&](std::span<const std::byte> bytes) { state.insert(state.end(), bytes.begin(), bytes.end()); });
  EXPECT_EQ(state.size(), session.state_bytes());
  return state;
}

// Wherever a pass finds no memory, it is an error that can be caught: threads of a team take none.
TEST(SessionMemory, WhatIsMissingIsAnErrorAtEveryPoint) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "reserves more than there is";
#endif
  const testing::Scratch scratch("memory");
  const std::vector<std::int32_t> ids = random_ids(40, kVocab, 3);
  for (const char* codec : {"w8a8", "q4"}) {
    const fs::path file = scratch / (std::string(codec) + ".pare");
    testing::write_tiny_model(file, testing::tiny_config("llama", 32, 8192, 2, 2, 16, kVocab, false),
                              Codec::parse(codec, ""), 3);
    rlimit before{};
    ::getrlimit(RLIMIT_AS, &before);
    std::uint64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    int failures = 0;
    bool fed = false;
    for (std::uint64_t more = 0; !fed && more < std::uint64_t{64} << 20; more += std::uint64_t{192} << 10) {
      rlimit now = before;
      now.rlim_cur = pages * 4096 + more;
      ASSERT_EQ(::setrlimit(RLIMIT_AS, &now), 0);
      try {
        EngineOptions options;
        options.threads = 1;
        Session session(Engine::open(file, options));
        session.feed(ids);
        fed = true;
      } catch (const std::bad_alloc&) {
        ++failures;
      } catch (const Error&) {  // the file could not be mapped
        ++failures;
      }
      ::setrlimit(RLIMIT_AS, &before);
    }
    EXPECT_TRUE(fed) << codec;
    EXPECT_GT(failures, 3) << codec;
  }
}

// Models without a window, with windows in all or some blocks, with LongRoPE (whose switch lies at 24), with experts.
class Sessions : public ::testing::TestWithParam<const char*> {
 protected:
  Sessions() : scratch_("session") {
    const Json golden = read_json(testing::golden_families() / (std::string(GetParam()) + ".json"));
    testing::make_family_folder(golden.at("config"), scratch_ / "model");
    Progress progress(true);
    Context context;
    context.progress = &progress;
    ExportOptions options;
    options.out = scratch_ / "model.pare";
    options.codec = "q8";
    export_compact(Checkpoint(scratch_ / "model"), options, context);
  }
  std::shared_ptr<const Engine> engine(const std::string& kv = "", int threads = 2) const {
    EngineOptions options;
    options.threads = threads;
    options.kv = kv;
    return Engine::open(scratch_ / "model.pare", options);
  }
  testing::Scratch scratch_;
};

// A stopped call leaves its session where it was, however many batches it had run: what is fed next gets the bits of a
// session that never saw the stopped one.
TEST_P(Sessions, StoppedCallsLeaveThemWhereTheyWere) {
  const auto opened = engine();
  const auto before = random_ids(30, kVocab, 1), next = random_ids(3, kVocab, 2);
  const auto prompt = random_ids(900, kVocab, 3);
  Session clean(opened, 2000);
  const auto row_before = feed_row(clean, before), row_next = feed_row(clean, next);

  Session timed(opened, 2000);
  const auto begun = std::chrono::steady_clock::now();
  timed.feed(prompt);
  const auto whole = std::chrono::steady_clock::now() - begun;
  int stopped = 0;
  for (int attempt = 0; attempt < 200 && stopped < 4; ++attempt) {  // a request may come too late
    Session session(opened, 2000);
    session.feed(before);
    std::atomic<bool> go{false};
    std::thread other([&] {
      go.wait(false);
      const auto at = std::chrono::steady_clock::now() + whole * (attempt % 7) / 8;
      while (std::chrono::steady_clock::now() < at) {
      }
      session.cancel();
    });
    bool failed = false;
    go = true;
    go.notify_one();
    try {
      session.feed(prompt);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInterrupted);
      failed = true;
    }
    other.join();
    session.clear_cancel();
    if (!failed) continue;
    ++stopped;
    EXPECT_EQ(session.position(), 30);
    EXPECT_EQ(session.ids().size(), before.size());
    ASSERT_EQ(session.rows(), 1);
    EXPECT_EQ(last_row(session), row_before);
    EXPECT_EQ(feed_row(session, next), row_next) << attempt;
  }
  EXPECT_GT(stopped, 0);
}

TEST_P(Sessions, ARequestToStopFailsOneCall) {
  const auto opened = engine();
  Session a(opened), b(opened);
  a.feed(random_ids(5, kVocab, 1));
  const auto row = last_row(a);
  a.cancel();
  EXPECT_THROW(a.feed(random_ids(2, kVocab, 2)), Error);
  EXPECT_EQ(a.position(), 5);
  EXPECT_EQ(last_row(a), row);
  b.cancel();
  Session* both[] = {&a, &b};
  EXPECT_THROW(Session::feed_each(both, random_ids(2, kVocab, 3)), Error);
  EXPECT_EQ(a.position(), 5);
  EXPECT_EQ(b.position(), 0);
  EXPECT_EQ(b.rows(), 0);
  EXPECT_EQ(last_row(a), row);
  Session::feed_each(both, random_ids(2, kVocab, 3));
  EXPECT_EQ(a.position(), 6);
  EXPECT_EQ(b.position(), 1);
  a.cancel();
  a.clear_cancel();
  a.feed(random_ids(1, kVocab, 4));
}

TEST_P(Sessions, GoOnFromTheirStateWithTheSameBits) {
  const auto next = random_ids(40, kVocab, 2);
  for (const char* kv : {"f32", "f16", "q8", "mixed"}) {
    const auto opened = engine(kv);
    for (const std::int64_t length : {0, 1, 23, 150, 530}) {
      Session first(opened, 700);
      first.feed(random_ids(length, kVocab, 1));
      const Bytes state = state_of(first);
      Session fresh(opened, 700), used(engine(kv, 1), 1000);
      used.feed(random_ids(600, kVocab, 9));
      for (Session* const session : {&fresh, &used}) {
        session->load(state, "state");
        EXPECT_EQ(state_of(*session), state) << kv << ", " << length;
        ASSERT_EQ(session->position(), length);
        ASSERT_EQ(session->rows(), length > 0 ? 1 : 0);
        if (length > 0) {
          EXPECT_EQ(last_row(*session), last_row(first));
        }
      }
      const auto want = feed_row(first, next);
      EXPECT_EQ(feed_row(fresh, next), want) << kv << ", " << length;
      EXPECT_EQ(feed_row(used, next), want) << kv << ", " << length;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Goldens, Sessions,
                         ::testing::Values("llama_gqa", "mistral_window", "gemma2", "phi3_long", "mixtral_window"),
                         [](const auto& given) { return std::string(given.param); });

class States : public ::testing::Test {
 protected:
  States() : scratch_("state") {
    write("a.pare", 1);
    write("b.pare", 2);
  }
  void write(const std::string& name, std::uint32_t seed) {
    testing::write_tiny_model(scratch_ / name, testing::tiny_config("llama", 32, 64, 4, 2, 8, kVocab, true),
                              {CodecKind::kQ8, 32}, seed);
  }
  std::shared_ptr<const Engine> engine(const std::string& name, const std::string& kv = "mixed") const {
    EngineOptions options;
    options.threads = 1;
    options.kv = kv;
    return Engine::open(scratch_ / name, options);
  }
  // A session of `opened` refuses the state, says `what` and is as before.
  static void refused(const std::shared_ptr<const Engine>& opened, std::span<const std::byte> state,
                      const std::string& what, std::int64_t most = 300) {
    Session session(opened, most);
    const auto ids = random_ids(7, kVocab, 5);
    session.feed(ids);
    const auto row = last_row(session);
    try {
      session.load(state, "there");
      ADD_FAILURE() << "accepted: " << what;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput) << error.what();
      EXPECT_EQ(error.place(), "there");
      EXPECT_NE(std::string(error.what()).find(what), std::string::npos) << error.what();
    }
    EXPECT_EQ(session.position(), 7);
    EXPECT_EQ(last_row(session), row);
  }
  testing::Scratch scratch_;
};

TEST_F(States, ForeignOnesAreRefused) {
  Session session(engine("a.pare"));
  session.feed(random_ids(60, kVocab, 1));
  const Bytes state = state_of(session);
  refused(engine("b.pare"), state, "another model");
  refused(engine("a.pare", "q8"), state, "mixed");
  refused(engine("a.pare"), state, "at most 50 positions", 50);
  const std::string text = "something else that is long enough to be a state: " + std::string(200, 'x');
  refused(engine("a.pare"), as_bytes(text), "other bytes");
  refused(engine("a.pare"), {}, "other bytes");
}

TEST_F(States, DamagedOnesAreRefused) {
  const auto opened = engine("a.pare");
  Session session(opened);
  session.feed(random_ids(20, kVocab, 1));
  const Bytes state = state_of(session);
  for (std::size_t length = 0; length < state.size(); length += length < 300 ? 7 : 101)
    refused(opened, std::span(state).first(length), "expected");
  Bytes longer = state;
  longer.push_back({});
  refused(opened, longer, "cut short or changed");
  for (std::size_t at = 0; at < state.size(); at += at < 300 ? 5 : 97) {
    Bytes changed = state;
    changed[at] ^= std::byte{4};
    refused(opened, changed, "expected");
  }
}

// Numbers that a damaged state could not have, behind a hash that fits them.
TEST_F(States, ImpossibleNumbersAreRefused) {
  const auto opened = engine("a.pare");
  Session session(opened);
  session.feed(random_ids(20, kVocab, 1));
  const Bytes state = state_of(session);
  const auto with = [&](std::size_t at, auto value) {
    Bytes changed = state;
    std::memcpy(changed.data() + at, &value, sizeof value);
    const std::string hash = hash_bytes(std::span(changed).first(changed.size() - 32));
    std::memcpy(changed.data() + changed.size() - 32, hash.data(), 32);
    return changed;
  };
  refused(opened, with(8, std::uint32_t{2}), "version 2");
  refused(opened, with(12, std::uint32_t{9}), "kind 9");
  refused(opened, with(48, std::int64_t{3}), "3 layers");
  for (const std::int64_t positions : {std::int64_t{-1}, std::int64_t{21}, std::int64_t{1} << 40, INT64_MAX, INT64_MIN})
    refused(opened, with(88, positions), "cut short or changed");
  for (const std::int64_t cached : {std::int64_t{-1}, std::int64_t{19}, std::int64_t{21}, INT64_MAX, INT64_MIN})
    refused(opened, with(96, cached), "cut short or changed");
  refused(opened, with(104, std::int64_t{0}), "cut short or changed");
  refused(opened, with(128, static_cast<std::int32_t>(kVocab)), "token ids from 0 to 63");
  refused(opened, with(132, std::int32_t{-1}), "token ids from 0 to 63");
}

TEST_F(States, GoThroughFiles) {
  const auto opened = engine("a.pare");
  Session session(opened), other(opened);
  session.feed(random_ids(20, kVocab, 1));
  const fs::path file = scratch_ / "state";
  session.save(file);
  session.feed(random_ids(1, kVocab, 2));
  session.save(file);  // replaces it
  other.load(file);
  EXPECT_EQ(other.position(), 21);
  EXPECT_EQ(last_row(other), last_row(session));
  EXPECT_THROW(other.load(scratch_ / "absent"), Error);
  EXPECT_THROW(other.load(scratch_.path()), Error);
  EXPECT_THROW(session.save(scratch_.path()), Error);
  EXPECT_THROW(session.save(scratch_ / "no such folder" / "state"), Error);
  EXPECT_EQ(other.position(), 21);
}

// Two engines, and two sessions of each, at the same time: nobody sees the others.
TEST_F(States, EnginesBesideEachOtherAreAlone) {
  const auto work = [&](const std::string& name, std::uint32_t seed) {
    EngineOptions options;
    options.threads = 2;
    Session session(Engine::open(scratch_ / name, options));
    std::vector<float> all;
    for (std::uint32_t step = 0; step < 12; ++step) {
      const auto row = feed_row(session, random_ids(1 + step * 3, kVocab, seed + step));
      all.insert(all.end(), row.begin(), row.end());
    }
    return all;
  };
  const auto a = work("a.pare", 10), b = work("b.pare", 20);
  EXPECT_NE(a, b);
  std::vector<std::vector<float>> got(4);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < got.size(); ++i)
    threads.emplace_back([&, i] { got[i] = work(i % 2 == 0 ? "a.pare" : "b.pare", i % 2 == 0 ? 10 : 20); });
  for (std::thread& thread : threads) thread.join();
  for (std::size_t i = 0; i < got.size(); ++i) EXPECT_EQ(got[i], i % 2 == 0 ? a : b) << i;
}

}  // namespace
}  // namespace pare
