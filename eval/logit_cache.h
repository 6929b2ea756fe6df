// The logit cache as an HDF5 file: what one model predicts on one corpus, so that it need not run again for
// evaluation or distillation. Layout (T = ids of all windows together, K = top_k):
//   attributes  magic "pare-logit-cache", version 2, vocab_size, context, top_k, corpus_hash, model_hash, complete 1,
//               log_prob_format "ieee-f16-bits", samples (N), temperature, seed, tokenizer_hash
//   ids         [T]    u32
//   window_end  [W]    u64   first id after each window
//   check       [W]    u64   hash of all rows of the window
//   topk_idx    [T, K] u16 where vocab_size <= 65536, else u32; shuffle + deflate. Not where K is 0
//   topk_lp     [T, K] u16   bits of an IEEE half: log-probability. Not where K is 0
//   lse         [T]    f32   log-sum-exp of the logits over the temperature
//   target_lp   [T]    f32   log-probability of the next id of the window, 0 in its last row
//   entropy     [T]    f32   nats
//   argmax      [T]    as topk_idx
//   tail        [T]    f32   probability outside the top k
//   sample_idx  [T, N] as topk_idx: ids drawn from the tail, rising, then zeros. Not where N is 0
//   sample_n    [T, N] u8    draws of each, 0 after the last; an id's estimated probability is tail * n / N
// Version 1 has neither check, entropy, argmax, tail nor samples and is still read.
// A 512-byte user block in front carries the magic, the version and the file size, so that foreign and truncated
// files are refused before the HDF5 library sees them. h5py opens the file as it stands.
#pragma once

#include <memory>

#include "eval/cached_logits.h"

namespace pare {

// Writes through the sibling `<path>.partial`; finish() marks it complete, fsyncs and renames. Windows reach the file
// every 4,096 ids in an order that leaves it readable whenever the process ends. Destroyed before finish() it leaves
// nothing, or with `resumable` the partial file, which the next writer of the same `info` goes on with.
// Errors: exit 1 for I/O, exit 3 for NaN logits or a partial file made from something else.
class LogitCacheWriter : public LogitsSink {
 public:
  LogitCacheWriter(const fs::path& path, LogitCacheInfo info, bool resumable = false);
  ~LogitCacheWriter() override;
  std::int64_t windows_done() const;  // found in a partial file: the caller goes on with the next
  void begin(std::span<const std::int32_t> ids) override;
  void rows(std::int64_t count, const float* logits) override;
  // One whole window: logits [ids.size(), vocab_size].
  void append(std::span<const std::int32_t> ids, const float* logits);
  void append(const CachedWindow& window);  // of cached_window
  void finish() override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// What a cache keeps of a window with these logits [ids.size(), vocab_size]: the same bits in whatever process.
// first_id: ids of all windows before it. Error: exit 3 for NaN logits.
CachedWindow cached_window(const LogitCacheInfo& info, std::span<const std::int32_t> ids, const float* logits,
                           std::uint64_t first_id);
// As bytes for another process of this program, and back.
std::string packed(const CachedWindow& window);
CachedWindow unpacked_window(const std::string& bytes);

// Reads only complete caches written by this program (exit 3 otherwise); a window that its check contradicts is exit 3.
// Windows may be read in any order; not thread-safe (HDF5 has one lock anyway).
class LogitCacheReader : public CachedLogits {
 public:
  explicit LogitCacheReader(const fs::path& path);
  // Also refuses (exit 3) a cache whose vocab_size, context, corpus_hash or model_hash differs from `expected`;
  // empty or zero fields of `expected` are not compared, nor are seeds; the temperature always is. top_k is taken from
  // the file, but a file without any is refused where `expected` has one.
  LogitCacheReader(const fs::path& path, const LogitCacheInfo& expected);
  LogitCacheReader(LogitCacheReader&&) noexcept;
  ~LogitCacheReader() override;
  const LogitCacheInfo& info() const override;
  std::int64_t windows() const override;
  CachedWindow read(std::int64_t window) override;

  static bool is_cache(const fs::path& path);  // the magic only
  static fs::path partial_path(const fs::path& path) { return path.string() + ".partial"; }
  // What a writer of `path` has left: the whole windows up to the first that the check contradicts.
  static LogitCacheReader of_partial(const fs::path& path);

 private:
  struct State;
  explicit LogitCacheReader(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace pare
