// kill -9 at many points, then the same command: the bytes of an uninterrupted run. All work happens in child
// processes, so that no thread pool is ever forked.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>

#include <array>
#include <chrono>
#include <random>
#include <thread>

#include "core/error.h"
#include "tests/quantize/tiny_model.h"

namespace pare {
namespace {

using testing::folder_hash;
using testing::ScratchFolder;

pid_t start(const std::function<void()>& work) {
  const pid_t child = fork();
  if (child != 0) return child;
  int code = 1;
  try {
    work();
    code = 0;
  } catch (const Error& error) {
    code = static_cast<int>(error.code());
  } catch (...) {
  }
  _exit(code);
}

int wait_for(pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

// What a run does besides rounding, and how often it is tried.
struct Kind {
  Json more;
  int rounds = 20;
};

class QuantizeResume : public ::testing::TestWithParam<Kind> {};

TEST_P(QuantizeResume, KilledAnywhereTheBytesAreTheSame) {
  ScratchFolder scratch;
  const fs::path in = scratch / "in", whole = scratch / "whole", out = scratch / "out";
  ASSERT_EQ(wait_for(start([&] { testing::write_tiny(in, testing::tiny_config(6)); })), 0);
  const auto quantize = [&](const fs::path& to) {
    Json given = {
        {"model", in.string()}, {"out", to.string()}, {"random-tokens", true}, {"samples", 24}, {"context", 64}};
    given.update(GetParam().more);
    testing::run_quantize(given);
  };
  const auto begin = std::chrono::steady_clock::now();
  ASSERT_EQ(wait_for(start([&] { quantize(whole); })), 0);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const std::string expected = folder_hash(whole);

  std::mt19937_64 random(11);
  int killed = 0, resumed_with_blocks = 0;
  for (int round = 0; round < GetParam().rounds; ++round) {
    fs::remove_all(out);
    for (int attempt = 0; !fs::exists(out); ++attempt) {
      ASSERT_LT(attempt, 60) << "never finishes";
      const pid_t child = start([&] { quantize(out); });
      const double share = attempt < 3 ? static_cast<double>(random() % 1000) / 1000.0 : 100.0;
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(share * seconds);
      int status = 0;
      while (waitpid(child, &status, WNOHANG) == 0) {
        if (std::chrono::steady_clock::now() > deadline) {
          kill(child, SIGKILL);
          waitpid(child, &status, 0);
          break;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      if (WIFSIGNALED(status)) {
        ++killed;
        resumed_with_blocks += fs::exists(fs::path(out.string() + ".partial") / "quantize.rows" / "block-0.json");
      } else {
        ASSERT_EQ(WEXITSTATUS(status), 0);
      }
    }
    ASSERT_EQ(folder_hash(out), expected) << "round " << round;
    ASSERT_FALSE(fs::exists(out.string() + ".partial"));
  }
  EXPECT_GT(killed, GetParam().rounds / 2);
  EXPECT_GT(resumed_with_blocks, GetParam().rounds / 7) << "the kills came too early to prove anything";
}

INSTANTIATE_TEST_SUITE_P(Kinds, QuantizeResume,
                         ::testing::Values(Kind{Json::object()},
                                           Kind{{{"retarget", true}, {"fisher", true}, {"bits", 5.0}}, 8},
                                           Kind{{{"tune-codes", 6}, {"tune", 4}, {"tune-batch", 4}}, 8},
                                           Kind{{{"equalize", "awq"}, {"tune", 4}, {"tune-batch", 4}}, 8}),
                         [](const auto& info) {
                           return std::string(std::array{"Rounding", "Allocation", "Tuning", "Scaling"}[info.index]);
                         });

TEST(QuantizeInterrupt, AnInterruptionIsExit130AndResumable) {
  ScratchFolder scratch;
  const fs::path in = scratch / "in", whole = scratch / "whole", out = scratch / "out";
  ASSERT_EQ(wait_for(start([&] { testing::write_tiny(in, testing::tiny_config(6)); })), 0);
  const auto quantize = [&](const fs::path& to) {
    install_interrupt_handler();
    testing::run_quantize(
        {{"model", in.string()}, {"out", to.string()}, {"random-tokens", true}, {"samples", 64}, {"context", 64}});
  };
  ASSERT_EQ(wait_for(start([&] { quantize(whole); })), 0);
  const pid_t child = start([&] { quantize(out); });
  while (!fs::exists(fs::path(out.string() + ".partial") / "quantize.rows" / "block-1.json")) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ASSERT_FALSE(fs::exists(out));
  }
  kill(child, SIGINT);
  EXPECT_EQ(wait_for(child), 130);
  EXPECT_FALSE(fs::exists(out));
  ASSERT_EQ(wait_for(start([&] { quantize(out); })), 0);
  EXPECT_EQ(folder_hash(out), folder_hash(whole));
}

}  // namespace
}  // namespace pare
