// Speed of the matrix kernels: one token over weights that stream from memory (bytes/s counts what is read), and
// prefill batches over weights in cache (items are multiply and add operations, two a weight and token).
#include <benchmark/benchmark.h>
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <memory>

#include "runtime/kernels.h"

namespace pare {
namespace {

struct Free {
  void operator()(std::byte* p) const { std::free(p); }
};

// Codes of any bytes and scales of 1/64: speed does not depend on them.
struct Weights {
  Weights(const Codec& codec, std::int64_t rows, std::int64_t cols) {
    const auto size = static_cast<std::size_t>(codec.payload_bytes(rows, cols));
    memory.reset(static_cast<std::byte*>(std::aligned_alloc(64, size)));
    for (std::size_t i = 0; i < size; ++i) memory.get()[i] = static_cast<std::byte>(i * 2654435761u >> 13);
    matrix = packed_matrix(codec, rows, cols, {memory.get(), size}, "bench");
    if (codec.is_float()) {
      std::memset(memory.get(), 0, size);
    } else {
      auto* scales = const_cast<std::uint16_t*>(matrix.scales);
      for (std::int64_t i = 0; i < matrix.row_blocks() * matrix.groups * kBlockRows; ++i) scales[i] = 0x2400;
    }
    bytes = size;
  }
  std::unique_ptr<std::byte, Free> memory;
  PackedMatrix matrix;
  std::size_t bytes = 0;
};

void multiply(benchmark::State& state, const std::string& kernels, const std::string& codec, std::int64_t rows,
              std::int64_t cols, std::int64_t tokens, bool int8, int threads) {
  const Kernels& k = choose_kernels(kernels);
  const Weights w(Codec::parse(codec, "bench"), rows, cols);
  std::vector<float> x(static_cast<std::size_t>(tokens * cols)), out(static_cast<std::size_t>(tokens * rows));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) - 8.0f;
  Int8Activations q;
  q.resize(tokens, cols, w.matrix.codec.int8_inputs ? Int8Activations::Form::kToken : Int8Activations::Form::kGroup);
  for (std::int64_t tile = 0; tile < q.tiles(); ++tile) k.quantize_tile(x.data(), cols, tile, q);
  const std::int64_t blocks = w.matrix.row_blocks(), step = tokens > kActTile ? 8 : 64;
  std::vector<std::unique_ptr<std::byte, Free>> scratch;
  for (int i = 0; i < threads; ++i) {
    scratch.emplace_back(
        static_cast<std::byte*>(std::aligned_alloc(64, static_cast<std::size_t>(64 * round_up(cols, 16)))));
  }
  for (auto _ : state) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (std::int64_t b = 0; b < blocks; b += step) {
      const std::int64_t end = std::min(blocks, b + step);
      if (int8) {
        k.matmul_int8(w.matrix, q, 0, q.tiles(), b, end, out.data(), rows, false);
      } else {
        k.matmul_float(w.matrix, x.data(), cols, tokens, b, end, out.data(), rows, false,
                       reinterpret_cast<float*>(scratch[static_cast<std::size_t>(omp_get_thread_num())].get()));
      }
    }
    benchmark::DoNotOptimize(out.data());
  }
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations() * w.bytes));
  state.SetItemsProcessed(state.iterations() * 2 * rows * cols * tokens);
}

void register_all() {
  for (const std::string& kernels : available_kernels()) {
    for (const char* codec : {"q4", "q4g128", "q4a", "q4m", "q8", "q8c", "w8a8", "q3", "q3g128", "q2", "bf16", "f32"}) {
      for (const bool int8 : {true, false}) {
        if (int8 && Codec::parse(codec, "bench").is_float()) continue;
        for (const int threads : {1, 2}) {
          const std::string tail = std::string("/") + kernels + "/" + codec + (int8 ? "/int8" : "/float") +
                                   "/threads:" + std::to_string(threads);
          benchmark::RegisterBenchmark(
              ("decode" + tail).c_str(),
              [=](benchmark::State& s) { multiply(s, kernels, codec, 131072, 2048, 1, int8, threads); })
              ->UseRealTime()
              ->Unit(benchmark::kMillisecond);
          benchmark::RegisterBenchmark(
              ("prefill" + tail).c_str(),
              [=](benchmark::State& s) { multiply(s, kernels, codec, 1536, 768, 288, int8, threads); })
              ->UseRealTime()
              ->Unit(benchmark::kMillisecond);
        }
      }
    }
  }
}

}  // namespace
}  // namespace pare

int main(int argc, char** argv) {
  pare::register_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
