// Peak memory does not grow with the depth of a model: one block is resident at a time. Runs happen in child processes,
// whose peaks the kernel reports.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "core/error.h"
#include "tests/quantize/tiny_model.h"

namespace pare {
namespace {

using testing::ScratchFolder;

constexpr std::uint64_t kMiB = 1 << 20;

// Peak resident bytes of a process that does `work`; 0 when it fails.
std::uint64_t peak_of(const std::function<void()>& work) {
  const pid_t child = fork();
  if (child == 0) {
    int code = 1;
    try {
      work();
      code = 0;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
    }
    _exit(code);
  }
  int status = 0;
  rusage usage{};
  wait4(child, &status, 0, &usage);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? static_cast<std::uint64_t>(usage.ru_maxrss) * 1024 : 0;
}

ModelConfig wide_config(std::int64_t layers) {
  ModelConfig config = testing::tiny_config(layers);
  config.hidden_size = 256;
  config.intermediate_size = 1024;
  config.head_dim = 64;
  return config;
}

class QuantizeMemory : public ::testing::TestWithParam<const char*> {};

TEST_P(QuantizeMemory, DoesNotGrowWithTheNumberOfBlocks) {
  ScratchFolder scratch;
  constexpr std::int64_t kSamples = 8, kContext = 64;
  std::uint64_t peak[2], weights[2];
  int i = 0;
  for (const std::int64_t layers : {4, 16}) {
    const std::string name = std::to_string(layers);
    const fs::path in = scratch / ("in" + name), out = scratch / ("out" + name);
    ASSERT_GT(peak_of([&] { testing::write_tiny(in, wide_config(layers)); }), 0u);
    const std::string kind = GetParam();
    Json given = {{"model", in.string()}, {"out", out.string()}, {"method", kind == "rtn" ? "rtn" : "gptq"}};
    if (kind != "rtn") given.update({{"random-tokens", true}, {"samples", kSamples}, {"context", kContext}});
    if (kind == "equalized") given["equalize"] = "least-noise";
    peak[i] = peak_of([&] { testing::run_quantize(given, 1); });
    weights[i++] = fs::file_size(in / "model.safetensors");
    ASSERT_GT(peak[i - 1], 0u);
  }
  // Activations depend on the calibration tokens alone: nothing of the difference is theirs. Heaps scatter a little.
  const std::uint64_t slack = 11 * kMiB;
  ASSERT_GT(weights[1] - weights[0], 4 * slack) << "the models are too alike to prove anything";
  std::printf("%s: peak %.1f MiB with 4 blocks, %.1f MiB with 16, whose float32 weights are %.1f MiB more\n",
              GetParam(), static_cast<double>(peak[0]) / kMiB, static_cast<double>(peak[1]) / kMiB,
              static_cast<double>(weights[1] - weights[0]) / kMiB);
  RecordProperty("peak_4", std::to_string(peak[0]));
  RecordProperty("peak_16", std::to_string(peak[1]));
  EXPECT_LT(peak[1], peak[0] + slack);
}

INSTANTIATE_TEST_SUITE_P(Methods, QuantizeMemory, ::testing::Values("gptq", "rtn", "equalized"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace pare
