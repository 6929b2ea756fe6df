#include "runtime/roofline.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "core/error.h"
#include "runtime/kernels.h"
#include "runtime/team.h"

namespace pare {
namespace {

using Clock = std::chrono::steady_clock;

// Anonymous memory, in large pages where the system gives them.
class Buffer {
 public:
  explicit Buffer(std::int64_t bytes) : bytes_(static_cast<std::size_t>(bytes)) {
    data_ = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) {
      throw Error(ExitCode::kResources, "roofline", std::to_string(bytes) + " bytes to read from", "no memory",
                  "leave out --roofline");
    }
    ::madvise(data_, bytes_, MADV_HUGEPAGE);  // a refusal costs speed alone
  }
  ~Buffer() { ::munmap(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  void* data_;
  std::size_t bytes_;
};

Peak peak_of(std::vector<double> rates) {
  std::sort(rates.begin(), rates.end());
  return {rates[rates.size() / 2], rates.back()};
}

// Units per second of the whole team: `work` does `units` in every thread.
template <class Work>
Peak measure(int threads, double units, const std::function<void()>& step, Work work) {
  std::vector<double> rates;
  for (int run = 0; run < kRooflineRuns; ++run) {
    if (step) step();
    TeamBarrier barrier;
    Clock::time_point begin, end;
    run_team(threads, [&](int thread, int team) {
      barrier.wait(team);
      if (thread == 0) begin = Clock::now();
      work(thread);
      barrier.wait(team);
      if (thread == 0) end = Clock::now();
    });
    rates.push_back(units * threads / std::chrono::duration<double>(end - begin).count());
  }
  return peak_of(std::move(rates));
}

// Rounds that take about `seconds`.
template <class Loop>
std::int64_t rounds_for(double seconds, Loop loop) {
  for (std::int64_t rounds = 1 << 10;; rounds *= 4) {
    const auto begin = Clock::now();
    loop(rounds);
    const double taken = std::chrono::duration<double>(Clock::now() - begin).count();
    if (taken > seconds / 8)
      return std::max<std::int64_t>(1, static_cast<std::int64_t>(static_cast<double>(rounds) * seconds / taken));
  }
}

}  // namespace

const PeakLoops& peak_loops(const std::string& kernels) {
#if defined(__x86_64__)
  [[maybe_unused]] const auto with_products = [](PeakLoops loops, const char* name, const Int8Products& products) {
    loops.name = name;
    loops.int8 = products.peak;
    loops.int8_operations = products.peak_operations;
    return loops;
  };
#endif
#ifdef PARE_AVXVNNI
  if (kernels == "avxvnni") {
    static const PeakLoops loops = with_products(kAvx2Peaks, "avxvnni", avxvnni_products());
    return loops;
  }
#endif
#ifdef PARE_AMX
  if (kernels == "amx") {
    choose_kernels(kernels);  // asks for the tiles
    static const PeakLoops loops = with_products(kAvx512VnniPeaks, "amx", kAmx);
    return loops;
  }
#endif
  static constexpr const PeakLoops* kAll[] = {
      &kPlainPeaks,
#if defined(__x86_64__)
      &kAvx2Peaks, &kAvx512VnniPeaks,
#elif defined(__aarch64__)
      &kNeonPeaks, &kDotprodPeaks, &kI8mmPeaks,
#endif
  };
  for (const PeakLoops* loops : kAll)
    if (kernels == loops->name) return *loops;
  throw usage_error("roofline", "kernels with loops of their own", "\"" + kernels + "\"");
}

Roofline measure_roofline(const std::string& kernels, int threads, std::int64_t buffer_bytes,
                          const std::function<void()>& step, std::span<const std::byte> file) {
  const PeakLoops& loops = peak_loops(kernels);
  Roofline roof;
  roof.threads = threads;
  std::atomic<std::uint64_t> kept{0};  // the results, so that no loop is idle
  {
    const std::int64_t lines = buffer_bytes / 64 / threads;
    const Buffer buffer(lines * threads * 64);
    const auto share = [&](int thread) { return buffer.data() + thread * lines * 64; };
    run_team(threads, [&](int thread, int) { std::memset(share(thread), 1, static_cast<std::size_t>(lines) * 64); });
    roof.read_bytes = measure(threads, static_cast<double>(lines) * 64, step,
                              [&](int thread) { kept += loops.read(share(thread), lines); });
  }
  const std::int64_t lines = std::min(buffer_bytes, static_cast<std::int64_t>(file.size())) / 64 / threads;
  if (lines > 0) {
    roof.file_bytes = measure(threads, static_cast<double>(lines) * 64, step,
                              [&](int thread) { kept += loops.read(file.data() + thread * lines * 64, lines); });
  }
  constexpr double kRunSeconds = 0.01;
  const std::int64_t int8 =
      rounds_for(kRunSeconds, [&](std::int64_t rounds) { kept += static_cast<std::uint64_t>(loops.int8(rounds)); });
  roof.int8_ops = measure(threads, static_cast<double>(int8 * loops.int8_operations), step,
                          [&](int) { kept += static_cast<std::uint64_t>(loops.int8(int8)); });
  const std::int64_t fma =
      rounds_for(kRunSeconds, [&](std::int64_t rounds) { kept += loops.fma(rounds) > 0 ? 1 : 0; });
  roof.float_ops = measure(threads, static_cast<double>(fma * loops.fma_operations), step,
                           [&](int) { kept += loops.fma(fma) > 0 ? 1 : 0; });
  return roof;
}

}  // namespace pare
