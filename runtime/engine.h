// The LibTorch-free runtime: opens a compact file by mmap and runs prefill and incremental decoding.
#pragma once

#include <cstdint>
#include <exception>
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
  // Keys and values: "f32", "f16", "mixed" (keys f16, values bf16) or "q8" (int8, one scale per position and head);
  // "" = mixed beside int8 activations, f32 beside float ones.
  std::string kv = {};
};

// Weights, shared by any number of sessions. Thread-compatible: one session per thread.
class Engine {
 public:
  // A compact file, or a GGUF file, which is taken through a temporary compact one (in TMPDIR, gone when this returns).
  static std::shared_ptr<const Engine> open(const fs::path& file, const EngineOptions& options = {});
  // A compact file; what it takes is all that an embedded runtime carries. `origin`: what messages name in its place;
  // `no_tokenizer`: why it carries none, thrown where one is asked for.
  static std::shared_ptr<const Engine> open_compact(const fs::path& file, const EngineOptions& options = {},
                                                    const fs::path& origin = {},
                                                    std::exception_ptr no_tokenizer = nullptr);
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

  // Appends ids; keeps the hidden states of this call's positions for logits(). Errors: context full (exit 3), stopped
  // by cancel() (exit 130). Whatever the error, the session stands where it stood; of the rows of the feed() before,
  // the last one alone may be left.
  void feed(std::span<const std::int32_t> ids);
  // Rows of the last feed() call: out [count, vocab_size].
  void logits(std::int64_t first, std::int64_t count, float* out);

  // Appends ids[i] to sessions[i], of all in one pass that reads the weights once; the bits are those of a feed() each.
  // The sessions are different ones of one engine. Errors as for feed(), before anything is appended.
  static void feed_each(std::span<Session* const> sessions, std::span<const std::int32_t> ids);
  // The same with texts of any length above 0, kMostFedTogether ids in all: sessions[i] gets texts[i].
  static void feed_each(std::span<Session* const> sessions, std::span<const std::span<const std::int32_t>> texts);
  static constexpr std::int64_t kMostFedTogether = 288;
  // The last row of each session's last call: out [sessions, vocab_size].
  static void logits_each(std::span<Session* const> sessions, float* out);
  std::int64_t position() const;
  // Forgets the positions from `position` on; what is fed next gets the bits that it would get in a new session. A block
  // with a sliding window has overwritten what lies far back: up to Forward::kBatch positions can always be forgotten.
  // Errors: exit 1 where that is not so, and beyond position().
  void truncate(std::int64_t position);
  bool can_truncate(std::int64_t position) const;
  std::int64_t rows() const;                  // that logits() knows
  std::span<const std::int32_t> ids() const;  // all that were fed, position() of them
  std::uint64_t cache_bytes() const;          // what the keys and values hold in memory
  void reset();

  // From any thread: stops the feed() or feed_each() that this session is in, before its next block of the model, or
  // else the next one. The request stands until a call has failed by it or clear_cancel().
  void cancel() noexcept;
  void clear_cancel() noexcept;

  // All that a session of the same file and kind of cache needs to go on from here, its last row of logits included
  // (runtime/FORMAT.md section 8). write() may be called many times, state_bytes() in all.
  std::uint64_t state_bytes() const;
  void save(const std::function<void(std::span<const std::byte>)>& write) const;
  void save(const fs::path& file) const;  // through AtomicFile
  // Errors: exit 3 for the state of another model, cache or version, longer than this session may become, cut short or
  // changed; the session is then as before. `place` names where the bytes come from.
  void load(std::span<const std::byte> state, const std::string& place);
  void load(const fs::path& file);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct SamplerOptions {
  double temperature = 0;   // 0: greedy, ties to the lowest id
  double top_p = 1;
  std::uint64_t seed = 0;
};
// Tokens with a chance above 0, after temperature and top-p.
struct Choices {
  struct Choice {
    double weight;
    float logit;
    std::int32_t id;
  };
  std::vector<Choice> all;
  double total = 0;  // of the weights, with those too small for `all`

  static Choices certain(std::int32_t id) { return {{{1.0, 0.0f, id}}, 1.0}; }
  double probability(std::int32_t id) const;  // 0 where it is none of them
};
class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options);
  std::int32_t operator()(std::span<const float> logits);  // draws from weigh()
  // Errors: no logits, one that is NaN or plus infinity, all minus infinity (exit 1).
  void weigh(std::span<const float> logits, Choices& out) const;
  std::int32_t draw(const Choices& choices);  // takes a random number only where there is a choice
  double uniform();                           // in [0, 1)

 private:
  SamplerOptions options_;
  bool greedy_ = false;
  std::uint64_t state_[4];
  Choices choices_;
};

// The runtime as seen by the evaluator.
std::unique_ptr<LogitsSource> runtime_logits(std::shared_ptr<const Engine> engine);

}  // namespace pare
