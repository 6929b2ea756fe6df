// The LibTorch-free runtime: opens a compact file by mmap and runs prefill and incremental decoding.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/compact.h"
#include "core/tokenizer.h"
#include "eval/logits_source.h"

namespace pare {

struct EngineOptions {
  int threads = 0;                 // 0: all cores
  std::string kernels;             // "" = best of this machine, or one of available_kernels(); PARE_KERNELS overrides ""
  bool int8_activations = true;    // false: float activations (exact against the unpacked weights to rounding)
  // Keys and values: "f32", "f16" or "q8" (int8, one scale per position and head); "" = f16 beside int8 activations,
  // f32 beside float ones.
  std::string kv = {};
};

// Weights, shared by any number of sessions. Thread-compatible: one session per thread.
class Engine {
 public:
  // A compact file, or a GGUF file, which is taken through a temporary compact one (in TMPDIR, gone when this returns).
  static std::shared_ptr<const Engine> open(const fs::path& file, const EngineOptions& options = {});
  virtual ~Engine() = default;
  virtual const fs::path& path() const = 0;  // what was opened
  virtual const CompactFile& file() const = 0;  // of a GGUF file: the temporary one, whose name is gone
  virtual const ModelConfig& config() const = 0;
  virtual const EngineOptions& options() const = 0;   // resolved: threads and kernels as chosen
  virtual const Tokenizer& tokenizer() const = 0;      // exit 3 if the file carries none; built on first use
};

// One sequence with its KV cache, grown on demand up to `max_positions` (0: max_position_embeddings); blocks with a
// sliding window keep no more than it needs.
class Session {
 public:
  explicit Session(std::shared_ptr<const Engine> engine, std::int64_t max_positions = 0);
  ~Session();
  Session(Session&&) noexcept;

  // Appends ids; keeps the hidden states of this call's positions for logits(). Errors: context full (exit 3).
  void feed(std::span<const std::int32_t> ids);
  // Rows of the last feed() call: out [count, vocab_size].
  void logits(std::int64_t first, std::int64_t count, float* out);

  // Appends ids[i] to sessions[i], of all in one pass that reads the weights once; the bits are those of a feed() each.
  // The sessions are different ones of one engine. Errors as for feed(), before anything is appended.
  static void feed_each(std::span<Session* const> sessions, std::span<const std::int32_t> ids);
  // The last row of each session's last call: out [sessions, vocab_size].
  static void logits_each(std::span<Session* const> sessions, float* out);
  std::int64_t position() const;
  std::uint64_t cache_bytes() const;  // what the keys and values hold in memory
  void reset();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct SamplerOptions {
  double temperature = 0;   // 0: greedy, ties to the lowest id
  double top_p = 1;
  std::uint64_t seed = 0;
};
class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options);
  std::int32_t operator()(std::span<const float> logits);

 private:
  SamplerOptions options_;
  std::uint64_t state_[4];
  std::vector<std::pair<float, std::int32_t>> scratch_;
};

// The runtime as seen by the evaluator.
std::unique_ptr<LogitsSource> runtime_logits(std::shared_ptr<const Engine> engine);

}  // namespace pare
