// What this program was built with and what it finds on this machine: the first thing a bug report needs.
#include <ATen/Version.h>
#include <hdf5.h>
#include <omp.h>
#include <torch/cuda.h>
#include <torch/version.h>
#include <unistd.h>

#include <thread>

#include "compress/compress.h"
#include "core/file.h"
#include "core/processor.h"
#include "core/tokenizer_sentencepiece.h"
#include "core/version.h"
#include "model/ranks.h"
#include "runtime/kernels.h"

namespace pare {
namespace {

Json cpu_features() {
  Json features = Json::array();
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) features.push_back("avx2");
  if (__builtin_cpu_supports("fma")) features.push_back("fma");
  if (__builtin_cpu_supports("avx512f")) features.push_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) features.push_back("avx512bw");
  if (__builtin_cpu_supports("avx512vnni")) features.push_back("avx512vnni");
#elif defined(__aarch64__)
  features.push_back("neon");
#endif
  return features;
}

// The word after `key` in LibTorch's own description of its build.
std::string build_setting(const std::string& config, const std::string& key) {
  const auto at = config.find(key + "=");
  if (at == std::string::npos) return "unknown";
  const auto begin = at + key.size() + 1;
  return config.substr(begin, config.find_first_of(", \n", begin) - begin);
}

}  // namespace

Command doctor_command() {
  Command command;
  command.name = "doctor";
  command.summary =
      "Show versions of the libraries, processor features, the kernels chosen and the memory of this machine";
  command.example = "pare doctor --json";
  command.run = [](const Options&, Context& context) -> Json {
    unsigned major = 0, minor = 0, release = 0;
    H5get_libversion(&major, &minor, &release);
    const std::string config = at::show_config();
    const auto pages = static_cast<std::uint64_t>(sysconf(_SC_PHYS_PAGES));
    Json result = {
        {"pare", kVersion},
        {"libtorch", TORCH_VERSION},
        {"blas", build_setting(config, "BLAS_INFO")},
        {"lapack", build_setting(config, "LAPACK_INFO")},
        {"cuda_devices", torch::cuda::is_available() ? static_cast<int>(torch::cuda::device_count()) : 0},
        {"ranks", rank_backend()},
        {"hdf5", std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(release)},
        {"sentencepiece", tok::reads_sentencepiece() ? "yes" : "no: tokenizer.model cannot be read"},
        {"compiler", __VERSION__},
        {"processor", processor_name()},
        {"cpu_features", cpu_features()},
        {"kernels_available", available_kernels()},
        {"kernels_chosen", choose_kernels("").name},
        {"cores", std::thread::hardware_concurrency()},
        {"threads", context.threads > 0 ? context.threads : omp_get_max_threads()},
        {"memory_bytes", pages * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE))},
    };
    std::string text;
    for (const auto& [key, value] : result.items()) {
      std::string shown;
      if (value.is_array())
        for (const auto& item : value) shown += (shown.empty() ? "" : " ") + item.get<std::string>();
      else
        shown = value.is_string() ? value.get<std::string>() : value.dump();
      text += key + std::string(key.size() < 20 ? 20 - key.size() : 1, ' ') + shown + "\n";
    }
    context.print(text);
    return result;
  };
  return command;
}

}  // namespace pare
