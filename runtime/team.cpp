#include "runtime/team.h"

#include <algorithm>
#include <bit>

namespace pare {

void TeamBarrier::wait(int threads) {
  if (threads == 1) return;
  const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
    return;
  }
  for (int spin = 0; spin < 2000; ++spin) {
    if (phase_.load(std::memory_order_acquire) != phase) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // waits about as long as x86's pause; most cores take yield for nothing
#endif
  }
  while (phase_.load(std::memory_order_acquire) == phase) phase_.wait(phase, std::memory_order_acquire);
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
