// A model's predictions kept as the largest k log-probabilities of each position. No HDF5 here: the file form is
// logit_cache.h.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/corpus.h"

namespace pare {

// What a cache was made from. All fields must agree before one is read.
struct LogitCacheInfo {
  std::int64_t vocab_size = 0;
  std::int64_t context = 0;  // most ids in a window, BOS included
  std::int64_t top_k = 64;   // clamped to vocab_size
  std::string corpus_hash;   // windows_hash()
  std::string model_hash;    // CompactFile::file_hash() or Checkpoint::content_hash()
  std::int64_t samples = 0;  // draws from what the top k leave out (tail_samples.h), at most 255; then top_k may be 0
  double temperature = 1;    // everything kept is of softmax(logits / temperature)
  std::uint64_t seed = 0;    // of the draws
  std::string tokenizer_hash = {};  // of the tokenizer.json text; "" where nobody said
};

// XXH3-128 over the ids of every window and their boundaries, in order.
std::string windows_hash(std::span<const Window> windows);

// The cached predictions of one window of n ids. Row t is the distribution over id t + 1, as in LogitsSource.
struct CachedWindow {
  std::int64_t top_k = 0;
  std::vector<std::int32_t> ids;            // [n]
  std::vector<std::uint32_t> index;         // [n, top_k], by falling logit, ties by lowest id: index[t * top_k] is the top-1
  std::vector<float> log_prob;              // [n, top_k], natural log, normalised over the whole vocabulary, f16 precision
  std::vector<float> log_sum_exp;           // [n]: logit = log_prob + log_sum_exp
  std::vector<float> target_log_prob;       // [n]: of ids[t + 1], f32; 0 in the last row, which has no target
  // Empty in files of version 1.
  std::vector<float> entropy;               // [n], nats
  std::vector<std::uint32_t> argmax;        // [n]
  std::vector<float> tail;                  // [n]: probability outside the top k
  std::int64_t samples = 0;
  std::vector<std::uint32_t> sample_index;  // [n, samples], in each row the distinct ids drawn, rising, then zeros
  std::vector<std::uint8_t> sample_count;   // [n, samples]: how often each was drawn; 0: no more ids
};

class CachedLogits {
 public:
  virtual ~CachedLogits() = default;
  virtual const LogitCacheInfo& info() const = 0;
  virtual std::int64_t windows() const = 0;
  virtual CachedWindow read(std::int64_t window) = 0;  // in the order written
};

// Takes the logits of whole windows, row block by row block.
class LogitsSink {
 public:
  virtual ~LogitsSink() = default;
  virtual void begin(std::span<const std::int32_t> ids) = 0;
  // The next `count` rows [count, vocab_size] of the window; all n rows of it must arrive before the next begin().
  virtual void rows(std::int64_t count, const float* logits) = 0;
  virtual void finish() = 0;  // makes the result durable; without it nothing is left
};

}  // namespace pare
