// A random model folder, and the stage run on it. Include only from .cpp files (LibTorch headers).
#pragma once

#include <string>

#include "core/context.h"
#include "model/decoder.h"
#include "quantize/quantize.h"
#include "tests/scratch.h"

namespace pare::testing {

inline ModelConfig tiny_config(std::int64_t layers = 3, bool tied = true) {
  ModelConfig config;
  config.family = "llama";
  config.vocab_size = 96;
  config.hidden_size = 64;
  config.intermediate_size = 96;
  config.num_layers = layers;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 16;
  config.max_position_embeddings = 64;
  config.tie_word_embeddings = tied;
  return config;
}

using ScratchFolder = Scratch;

inline void write_tiny(const fs::path& folder, const ModelConfig& config, const std::string& dtype = "float32",
                       const std::function<void(Decoder&)>& change = {}) {
  Decoder decoder(config);
  initialize(decoder, 7);
  if (change) {
    const torch::NoGradGuard no_grad;
    change(decoder);
  }
  save_decoder(decoder, dtype, {}, folder);
}

inline Json run_quantize(const Json& given, int threads = 2, std::uint64_t seed = 0) {
  Progress progress(true);
  Context context;
  context.json = true;
  context.progress = &progress;
  context.threads = threads;
  context.seed = seed;
  const Command command = quantize_command();
  return command.run(Options(command.options, given, "test"), context);
}

// Every file of a folder by name and content.
inline std::string folder_hash(const fs::path& folder) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file()) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  Hasher hasher;
  for (const fs::path& file : files) hasher.update(fs::relative(file, folder).string() + "\n" + hash_file(file) + "\n");
  return hasher.hex();
}

}  // namespace pare::testing
