// The logit cache as an HDF5 file: what one model predicts on one corpus, so that it need not run again for
// evaluation or distillation. Layout (T = ids of all windows together, K = top_k):
//   attributes  magic "pare-logit-cache", version 1, vocab_size, context, top_k, corpus_hash, model_hash, complete 1,
//               log_prob_format "ieee-f16-bits"
//   ids         [T]    u32
//   window_end  [W]    u64   first id after each window
//   topk_idx    [T, K] u16 where vocab_size <= 65536, else u32; shuffle + deflate
//   topk_lp     [T, K] u16   bits of an IEEE half: log-probability
//   lse         [T]    f32   log-sum-exp of the logits
//   target_lp   [T]    f32   log-probability of the next id of the window, 0 in its last row
// A 512-byte user block in front carries the magic, the version and the file size, so that foreign and truncated
// files are refused before the HDF5 library sees them. h5py opens the file as it stands.
#pragma once

#include <memory>

#include "eval/cached_logits.h"

namespace pare {

// Writes through the sibling `<path>.partial`; finish() marks it complete, fsyncs and renames. Destroyed before
// finish() it leaves nothing. Errors: exit 1 for I/O, exit 3 for NaN logits.
class LogitCacheWriter : public LogitsSink {
 public:
  LogitCacheWriter(const fs::path& path, LogitCacheInfo info);
  ~LogitCacheWriter() override;
  void begin(std::span<const std::int32_t> ids) override;
  void rows(std::int64_t count, const float* logits) override;
  // One whole window: logits [ids.size(), vocab_size].
  void append(std::span<const std::int32_t> ids, const float* logits);
  void finish() override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Reads only complete caches written by this program (exit 3 otherwise). Windows may be read in any order; not
// thread-safe (HDF5 has one lock anyway).
class LogitCacheReader : public CachedLogits {
 public:
  explicit LogitCacheReader(const fs::path& path);
  // Also refuses (exit 3) a cache whose vocab_size, context, corpus_hash or model_hash differs from `expected`;
  // empty or zero fields of `expected` are not compared. top_k is taken from the file.
  LogitCacheReader(const fs::path& path, const LogitCacheInfo& expected);
  ~LogitCacheReader() override;
  const LogitCacheInfo& info() const override;
  std::int64_t windows() const override;
  CachedWindow read(std::int64_t window) override;

  static bool is_cache(const fs::path& path);  // the magic only

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace pare
