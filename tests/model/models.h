// Small models, folders and runs shared by the tests of model and distill. Include only with LibTorch at hand.
#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "core/context.h"
#include "core/error.h"
#include "core/tokenizer.h"
#include "model/decoder.h"
#include "model/split_products.h"

namespace pare::testing {

// What sums over inputs of a walk may be off, relative to the largest: split products lose more than float32.
inline double statistics_tolerance() { return has_split_products() ? 4e-5 : 1e-5; }

class Folder {  // removed with the test
 public:
  explicit Folder(const std::string& name)
      : path_(fs::temp_directory_path() / ("pare-model-" + name + "-" + std::to_string(getpid()))) {
    fs::remove_all(path_);
    fs::create_directories(path_);
  }
  ~Folder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  fs::path operator/(const std::string& name) const { return path_ / name; }

 private:
  fs::path path_;
};

struct QuietRun {
  Progress progress{true};
  Context context;
  QuietRun() {
    context.quiet = true;
    context.json = true;
    context.threads = 1;  // two threads that wait for each other crawl on a busy machine
    context.seed = 7;
    context.progress = &progress;
  }
};

inline ModelConfig small_config() {
  ModelConfig c;
  c.family = "llama";
  c.vocab_size = 300;
  c.hidden_size = 32;
  c.intermediate_size = 48;
  c.num_layers = 3;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 10;
  c.max_position_embeddings = 64;
  c.tie_word_embeddings = true;
  c.eos_ids = {0};
  return c;
}

// Weights large enough that attention and gates are far from linear.
inline Decoder small_decoder(std::uint64_t seed, const ModelConfig& config = small_config(), double factor = 5) {
  Decoder decoder(config);
  initialize(decoder, seed);
  const torch::NoGradGuard no_grad;
  for (torch::Tensor& p : decoder->parameters())
    if (p.dim() == 2) p.mul_(factor);
  return decoder;
}

inline std::string sample_text() {
  std::string text;
  const char* subjects[] = {"the compiler", "a linker", "one small model", "every target", "this folder"};
  const char* verbs[] = {"reads", "writes", "finds", "keeps", "forgets"};
  unsigned state = 12345;
  for (int i = 0; i < 400; ++i) {
    state = state * 1664525u + 1013904223u;
    text += std::string(subjects[(state >> 8) % 5]) + " " + verbs[(state >> 16) % 5] + " " + subjects[(state >> 24) % 5];
    text += i % 7 == 0 ? ".\n\n" : ".\n";
  }
  return text;
}

inline void write_file(const fs::path& path, const std::string& text) {
  fs::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

// tokenizer.json with 300 ids and a text file beside it.
inline void write_tokenizer(const fs::path& folder) {
  TokenizerTraining training;
  training.vocab_size = 300;
  write_file(folder / "tokenizer.json", train_tokenizer({sample_text()}, training));
}

inline std::string bytes_of(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// train.jsonl without what differs from run to run.
inline std::string curve_of(const fs::path& folder) {
  std::istringstream lines(bytes_of(folder / "train.jsonl"));
  std::string line, out;
  while (std::getline(lines, line)) {
    Json point = parse_json(line, "train.jsonl");
    for (const char* key : {"tokens_per_second", "resident_bytes"}) point.erase(key);
    out += point.dump() + "\n";
  }
  return out;
}

}  // namespace pare::testing
