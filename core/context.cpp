#include "core/context.h"

#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <mutex>

#include "core/error.h"

namespace pare {
namespace {

std::atomic<int> g_interrupts{0};
static_assert(std::atomic<int>::is_always_lock_free);

extern "C" void on_signal(int) {
  // The second signal is a demand: leave at once, the last checkpoint stands.
  if (g_interrupts.fetch_add(1) >= 1) _exit(static_cast<int>(ExitCode::kInterrupted));
}

using Clock = std::chrono::steady_clock;
double seconds_between(Clock::time_point a, Clock::time_point b) { return std::chrono::duration<double>(b - a).count(); }

std::string duration_text(double seconds) {
  const auto s = static_cast<std::int64_t>(seconds + 0.5);
  if (s < 60) return fmt::format("{}s", s);
  if (s < 3600) return fmt::format("{}m{:02}s", s / 60, s % 60);
  return fmt::format("{}h{:02}m", s / 3600, s / 60 % 60);
}

constexpr double kTerminalInterval = 0.1;  // seconds between rewrites
constexpr double kLogInterval = 5.0;       // seconds between plain lines

}  // namespace

struct Progress::State {
  bool quiet = false, terminal = false, active = false, shown = false;
  std::mutex mutex;
  std::string title;
  std::int64_t total = 0;
  Clock::time_point begun, printed;

  void clear_line() {
    if (terminal && shown) std::fputs("\r\033[K", stderr);
    shown = false;
  }
};

Progress::Progress(bool quiet) : state_(new State) {
  state_->quiet = quiet;
  const char* term = std::getenv("TERM");
  state_->terminal = isatty(STDERR_FILENO) == 1 && !(term != nullptr && std::string_view(term) == "dumb");
}

Progress::~Progress() {
  state_->clear_line();
  delete state_;
}

void Progress::begin(std::string title, std::int64_t total) {
  const std::lock_guard lock(state_->mutex);
  state_->title = std::move(title);
  state_->total = total;
  state_->active = true;
  state_->begun = state_->printed = Clock::now();
}

void Progress::update(std::int64_t done, std::string_view detail) {
  if (state_->quiet) return;
  const std::lock_guard lock(state_->mutex);
  if (!state_->active) return;
  const auto now = Clock::now();
  if (seconds_between(state_->printed, now) < (state_->terminal ? kTerminalInterval : kLogInterval)) return;
  state_->printed = now;
  const double elapsed = seconds_between(state_->begun, now);
  std::string line = state_->title;
  if (state_->total > 0) {
    line += fmt::format(" {}/{} {:.0f}%", done, state_->total, 100.0 * static_cast<double>(done) / static_cast<double>(state_->total));
    if (done > 0 && done < state_->total)
      line += fmt::format(" ETA {}", duration_text(elapsed * static_cast<double>(state_->total - done) / static_cast<double>(done)));
  } else {
    line += fmt::format(" {}", done);
  }
  if (!detail.empty()) line += fmt::format("  {}", detail);
  line += fmt::format("  {} MiB", resident_bytes() >> 20);
  state_->clear_line();
  std::fputs(line.c_str(), stderr);
  if (state_->terminal) state_->shown = true;
  else std::fputc('\n', stderr);
  std::fflush(stderr);
}

void Progress::end(std::string_view summary) {
  const std::lock_guard lock(state_->mutex);
  if (!state_->active) return;
  state_->active = false;
  state_->clear_line();
  if (state_->quiet) return;
  const double elapsed = seconds_between(state_->begun, Clock::now());
  if (summary.empty() && elapsed < 2) return;
  std::fputs(fmt::format("{} {} in {}\n", state_->title, summary.empty() ? "done" : summary, duration_text(elapsed)).c_str(), stderr);
  std::fflush(stderr);
}

void Progress::note(std::string_view line) {
  if (state_->quiet) return;
  const std::lock_guard lock(state_->mutex);
  state_->clear_line();
  std::fputs(fmt::format("{}\n", line).c_str(), stderr);
  std::fflush(stderr);
}

void Context::print(std::string_view text) const {
  if (json || rank > 0) return;
  std::fwrite(text.data(), 1, text.size(), stdout);
  if (text.empty() || text.back() != '\n') std::fputc('\n', stdout);
  std::fflush(stdout);
}

void install_interrupt_handler() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

bool interrupt_requested() { return g_interrupts.load(std::memory_order_relaxed) > 0; }

void throw_if_interrupted(const std::string& place, const std::string& how_to_resume) {
  if (interrupt_requested()) throw Error(ExitCode::kInterrupted, place, "", "interrupted", how_to_resume);
}

std::uint64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  std::uint64_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
}

std::uint64_t peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::uint64_t>(usage.ru_maxrss) * 1024;
}

}  // namespace pare
