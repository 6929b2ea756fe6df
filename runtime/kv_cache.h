// Keys and values of one sequence, and attention over them.
#pragma once

#include <cstdint>
#include <vector>

#include "core/config.h"
#include "runtime/kernels.h"
#include "runtime/weights.h"

namespace pare {

// Pages of kPage positions that are never moved or copied. Page of one block: for every kv head [head_dim][kPage] keys,
// then [kPage][value_width()] values, with kMixed in pairs of rows (KvPlane); behind all heads, with kQ8,
// [kv head][2][kPage] scales. A block with a window keeps a ring of pages: as many as the window and one call may touch.
class KvCache {
 public:
  // most_tokens: positions of one call at most.
  KvCache(const ModelConfig& config, KvType type, std::int64_t most_tokens);
  // Room for positions below `positions`, which will be stored.
  void reserve(std::int64_t positions);
  KvPlane keys(std::int64_t block, std::int64_t page, std::int64_t kv_head);
  KvPlane values(std::int64_t block, std::int64_t page, std::int64_t kv_head);
  // Stores what attention will read at `position`: keys already rotated. x: head_dim floats each.
  void store(const AttentionKernels& kernels, std::int64_t block, std::int64_t position, std::int64_t kv_head,
             const float* key, const float* value);
  KvType type() const { return type_; }
  std::int64_t value_width() const { return value_width_; }  // head_dim rounded up to 16
  std::uint64_t bytes() const;

  // Whether keys and values of all positions that a token at `position` sees are here: a ring drops old ones, also for
  // a call that was not finished.
  bool holds(std::int64_t position) const;
  void restart();

  // What a token at `end` sees in a block: positions [first_seen(), end). A record is one position of a block: of every
  // kv head key [head_dim], value [head_dim] and, with kQ8, the scales of both.
  std::int64_t first_seen(std::int64_t block, std::int64_t end) const;
  std::int64_t record_bytes(std::int64_t block) const;
  void copy_out(std::int64_t block, std::int64_t first, std::int64_t count, std::byte* records);
  // Takes positions [first_seen(), end) of every block to be all there is, and room for them; then copy_in() them.
  void begin_copy(std::int64_t end);
  void copy_in(std::int64_t block, std::int64_t first, std::int64_t count, const std::byte* records);

 private:
  std::byte* page(std::int64_t block, std::int64_t page);
  template <class Move>
  void each_piece(std::int64_t block, std::int64_t first, std::int64_t count, Move move);
  KvType type_;
  std::int64_t head_dim_, value_width_;
  std::vector<std::int64_t> kv_heads_, page_floats_;  // by block
  std::int64_t reached_ = 0;                  // positions that were reserved since restart()
  std::vector<std::int64_t> begin_;           // by block: the first position that copy_in() brought
  std::vector<std::int64_t> windows_;         // by block, 0: all
  std::vector<std::int64_t> ring_;            // by block: pages at most, 0: no end
  std::vector<FloatBuffer> memory_;           // the pages of all blocks that were added together
  std::vector<std::vector<float*>> pages_;    // [block][page of the ring]
};

// Query rows that read the same kv head, of `heads` heads (kRowHeads at most) and `count` tokens (kMostRowTokens): that
// of token i is q + i * stride, of the next head head_stride further, scaled already, and sees the last `window` (0: all)
// of seen + i * step positions. With step 0 what is counted are heads of one token.
struct QueryRows {
  const float* q = nullptr;
  float* out = nullptr;
  std::int64_t stride = 0, count = 0;
  std::int64_t seen = 0, step = 0;
  std::int64_t heads = 1, head_stride = 0;
};
// Tokens and heads whose rows are multiplied together, and tokens of a call of attend_rows().
constexpr std::int64_t kRowTokens = 16, kRowHeads = kMaxQueries / kRowTokens, kMostRowTokens = 64;
struct AttentionScratch {
  FloatBuffer queries, scores, accumulator;
  void reserve(std::int64_t head_dim);
};
// out = softmax(q keys) values, page by page with a running softmax: no more than one page of scores exists. Pages that
// no row sees are passed over.
void attend_rows(const Kernels& kernels, const ModelConfig& config, KvCache& cache, std::int64_t block,
                 std::int64_t kv_head, const QueryRows& rows, AttentionScratch& scratch);

}  // namespace pare
