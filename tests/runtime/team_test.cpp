#include "runtime/team.h"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

namespace pare {
namespace {

// Teams of changing sizes, called by several threads at once: every member works once a call, with the barrier between
// its two halves.
TEST(TeamTest, EveryMemberWorksOnceACall) {
  const auto use = [] {
    for (int round = 0; round < 50; ++round) {
      for (const int wanted : {1, 3, 2, 5, 1, 4}) {
        std::vector<int> first(static_cast<std::size_t>(wanted)), second(first);
        int size = 0;
        TeamBarrier barrier;
        run_team(wanted, [&](int thread, int threads) {
          if (thread == 0) size = threads;
          ++first[static_cast<std::size_t>(thread)];
          barrier.wait(threads);
          int all = 0;
          for (int i = 0; i < threads; ++i) all += first[static_cast<std::size_t>(i)];
          second[static_cast<std::size_t>(thread)] = all;
        });
        ASSERT_GE(size, 1);
        ASSERT_LE(size, wanted);
        for (int i = 0; i < wanted; ++i) {
          ASSERT_EQ(first[static_cast<std::size_t>(i)], i < size ? 1 : 0);
          ASSERT_EQ(second[static_cast<std::size_t>(i)], i < size ? size : 0);
        }
      }
    }
  };
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back(use);
  use();
  for (std::thread& caller : callers) caller.join();
  EXPECT_GE(processors(), 1);
}

}  // namespace
}  // namespace pare
