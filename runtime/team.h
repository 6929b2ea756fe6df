// Threads that work through one forward pass together: how they wait for each other, and how many they should be.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace pare {

constexpr int kMaxThreads = 1024;  // the OpenMP runtime ends the program when it cannot start a thread

// Cores that this process may use; at least 1.
int processors();

// Calls work(thread, threads) in every thread of a team and returns when all are done; the caller is thread 0. A team
// is smaller than asked where the system has no more threads. `work` must neither throw nor run a team of its own.
// The threads are OpenMP's, or without OpenMP our own; either way they belong to the calling thread and stay with it.
void run_team(int threads, const std::function<void(int thread, int threads)>& work);

// Waits for a few microseconds, then sleeps: where other programs want the cores too, a thread that spins for its
// partner takes away the time that the partner needs.
class TeamBarrier {
 public:
  void wait(int threads);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};
};

// Chooses between one thread and the whole team for calls of about the same size. Waking and waiting cost
// microseconds, so tiny calls stay alone; and where other programs hold the cores, a team waits at every barrier for
// the thread that was put aside, which can cost far more than a second thread brings. So both ways are timed, the
// faster one is used, and the other is tried again now and then. The bits are the same either way.
class TeamChoice {
 public:
  // products: multiplications and additions between two barriers.
  int threads(std::int64_t products, int most) const;
  void record(std::int64_t products, int threads, double seconds);

 private:
  struct Pace {
    double seconds[2] = {0, 0};  // a product: alone, as a team; 0: not known
    int calls = 0;
    int until_trial = 0;  // calls before the slower way is timed again
  };
  // A good part of a millisecond between two barriers: a thread that comes late finds less left to do.
  static constexpr std::int64_t kAlwaysTeam = std::int64_t{1} << 26;
  static constexpr int kFirstCalls = 6;  // taken in turn; the best of each counts, as the first may read from disk
  static std::size_t size_class(std::int64_t products);
  Pace paces_[64];
};

}  // namespace pare
