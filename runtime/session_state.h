// The state of a session as bytes (runtime/FORMAT.md section 8).
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "runtime/kv_cache.h"

namespace pare {

// What a session must be like to take a state.
struct StateShape {
  std::string model_hash;  // CompactFile::file_hash()
  KvType kv = KvType::kF32;
  std::int64_t layers = 0, kv_heads = 0, head_dim = 0, hidden = 0, vocab = 0;
};

struct StateContent {
  std::span<const std::int32_t> ids;  // of all positions
  std::int64_t cached = 0;            // positions whose keys and values the cache holds
  const float* row = nullptr;         // [hidden] of the last position; null: none
};

std::uint64_t state_bytes(const StateShape& shape, const KvCache& cache, const StateContent& content);
void write_state(const StateShape& shape, KvCache& cache, const StateContent& content,
                 const std::function<void(std::span<const std::byte>)>& write);

// Checks everything on construction and keeps a view of `state`. Errors: exit 3, with `place`.
class StateReader {
 public:
  StateReader(std::span<const std::byte> state, const StateShape& shape, const KvCache& cache, std::string place);
  std::int64_t positions() const { return static_cast<std::int64_t>(ids_.size()); }
  std::vector<std::int32_t> take_ids() { return std::move(ids_); }
  std::int64_t cached() const { return cached_; }
  bool has_row() const { return !row_.empty(); }
  void row(float* out) const;       // [hidden]
  void fill(KvCache& cache) const;  // which has room for cached() positions

 private:
  std::vector<std::int32_t> ids_;
  std::int64_t cached_ = 0, layers_ = 0;
  std::span<const std::byte> row_, records_;
};

}  // namespace pare
