#include "runtime/team.h"

#include <algorithm>
#include <bit>

#ifdef _OPENMP
#include <omp.h>
#else
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace pare {
namespace {

// Returns when `value` is another one than `old`: looks for some microseconds, then sleeps.
template <class T>
void await_change(const std::atomic<T>& value, T old) {
  for (int spin = 0; spin < 2000; ++spin) {
    if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // waits about as long as x86's pause; most cores take yield for nothing
#endif
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

#ifndef _OPENMP
class Team {
 public:
  Team() = default;
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() {
    announce(0);
    for (std::thread& member : members_) member.join();
  }

  void run(int threads, const std::function<void(int, int)>& work) {
    threads = recruit(threads);
    if (threads > 1) {
      work_ = &work;
      busy_.store(threads - 1, std::memory_order_relaxed);
      announce(threads);
    }
    work(0, threads);
    for (int busy = busy_.load(std::memory_order_acquire); busy != 0; busy = busy_.load(std::memory_order_acquire))
      await_change(busy_, busy);
  }

 private:
  static constexpr std::uint64_t kSizes = kMaxThreads * 2;

  // As many as can be had.
  int recruit(int threads) {
    while (static_cast<int>(members_.size()) + 1 < threads) {
      const int index = static_cast<int>(members_.size()) + 1;
      const std::uint64_t seen = call_.load(std::memory_order_relaxed);
      try {
        members_.emplace_back([this, index, seen] { serve(index, seen); });
      } catch (const std::system_error&) {
        return index;
      }
    }
    return threads;
  }

  // The number of the call and its team in one value, so that a thread which is not in it reads nothing else.
  void announce(int threads) {
    const std::uint64_t number = call_.load(std::memory_order_relaxed) / kSizes + 1;
    call_.store(number * kSizes + static_cast<std::uint64_t>(threads), std::memory_order_release);
    call_.notify_all();
  }

  void serve(int index, std::uint64_t seen) {
    while (true) {
      await_change(call_, seen);
      seen = call_.load(std::memory_order_acquire);
      const int threads = static_cast<int>(seen % kSizes);
      if (threads == 0) return;
      if (index >= threads) continue;
      (*work_)(index, threads);
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_all();
    }
  }

  std::vector<std::thread> members_;
  const std::function<void(int, int)>* work_ = nullptr;
  alignas(64) std::atomic<std::uint64_t> call_{0};
  alignas(64) std::atomic<int> busy_{0};
};
#endif

}  // namespace

int processors() {
#ifdef _OPENMP
  return std::max(1, omp_get_num_procs());
#else
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
#endif
}

void run_team(int threads, const std::function<void(int, int)>& work) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num(), omp_get_num_threads());
#else
  thread_local Team team;
  team.run(threads, work);
#endif
}

void TeamBarrier::wait(int threads) {
  if (threads == 1) return;
  const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
    return;
  }
  await_change(phase_, phase);
}

std::size_t TeamChoice::size_class(std::int64_t products) {
  return static_cast<std::size_t>(std::bit_width(static_cast<std::uint64_t>(products)) - 1);
}

int TeamChoice::threads(std::int64_t products, int most) const {
  constexpr std::int64_t kWorthAThread = 1 << 18;  // a power of two, so that a size class is wholly alone or not
  const int team = static_cast<int>(std::clamp<std::int64_t>(products / kWorthAThread, 1, most));
  if (team == 1 || products >= kAlwaysTeam) return team;
  const Pace& pace = paces_[size_class(products)];
  if (pace.calls < kFirstCalls) return pace.calls % 2 == 0 ? team : 1;
  const bool team_is_faster = pace.seconds[1] <= pace.seconds[0];
  return team_is_faster == (pace.until_trial > 0) ? team : 1;
}

void TeamChoice::record(std::int64_t products, int threads, double seconds) {
  Pace& pace = paces_[size_class(products)];
  double& mine = pace.seconds[threads > 1 ? 1 : 0];
  const double now = seconds / static_cast<double>(products);
  if (pace.calls < kFirstCalls) {
    ++pace.calls;
    mine = mine == 0 ? now : std::min(mine, now);
  } else {
    mine = 0.5 * (mine + now);
    pace.until_trial = std::max(pace.until_trial - 1, -1);
  }
  if (pace.until_trial > 0 || pace.calls < kFirstCalls || pace.seconds[0] == 0 || pace.seconds[1] == 0) return;
  // A trial may cost as much more as the way is slower: space them so that all trials together cost about 3 %.
  const double ratio = std::max(pace.seconds[0], pace.seconds[1]) / std::min(pace.seconds[0], pace.seconds[1]);
  if (pace.until_trial < 0 || pace.calls == kFirstCalls) {
    pace.until_trial = static_cast<int>(std::min(1000.0, 32 * ratio));
    pace.calls = kFirstCalls + 1;
  }
}

}  // namespace pare
