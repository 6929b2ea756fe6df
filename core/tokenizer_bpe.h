// The BPE model: words -> ids.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/tokenizer_file.h"

namespace pare::tok {

// Piece <-> id, all pieces in one buffer.
class PieceTable {
 public:
  // Errors (exit 3): an id twice, a piece twice.
  void build(const std::vector<std::pair<std::string, std::int32_t>>& vocab, const std::string& place);
  std::int32_t find(std::string_view piece) const;  // -1: absent
  bool has(std::int32_t id) const;
  std::string_view piece(std::int32_t id) const;    // empty for ids that are not used
  std::int32_t size() const { return static_cast<std::int32_t>(spans_.size()); }  // largest id + 1
  std::int64_t count() const { return count_; }

 private:
  struct Span {
    std::uint32_t begin = 0, length = kUnused;
  };
  static constexpr std::uint32_t kUnused = 0xFFFFFFFFu;
  std::string buffer_;
  std::vector<Span> spans_;            // by id
  std::vector<std::int32_t> slots_;    // open addressing, -1 empty
  std::int64_t count_ = 0;
};

// What one running encode call needs for itself: working lists and a direct-mapped cache of short words.
class BpeScratch {
 public:
  BpeScratch();
  ~BpeScratch();
  BpeScratch(const BpeScratch&) = delete;
  BpeScratch& operator=(const BpeScratch&) = delete;

 private:
  friend class Bpe;
  struct Entry;
  Entry* cache_ = nullptr;
  std::vector<std::int32_t> symbols_, next_, previous_;
  struct Candidate {
    std::uint32_t rank;
    std::int32_t position, merged;
  };
  std::vector<Candidate> heap_;
  std::string mapped_;
};

class Bpe {
 public:
  void load(TokenizerFile& file);
  const PieceTable& pieces() const { return pieces_; }

  // Appends the ids of one word (the output of the pre-tokenizer). With `bytes` the word is still raw text and each
  // byte stands for its ByteLevel character.
  void encode_word(std::string_view word, bool bytes, BpeScratch& scratch, std::vector<std::int32_t>& out) const;

 private:
  struct Merge {
    std::uint64_t pair;
    std::uint32_t rank;
    std::int32_t merged;
  };
  const Merge* find_merge(std::int32_t left, std::int32_t right) const;
  void encode_segment(std::string_view word, bool bytes, BpeScratch& scratch, std::vector<std::int32_t>& out) const;
  void uncached(std::string_view word, bool bytes, BpeScratch& scratch, std::vector<std::int32_t>& out) const;
  void char_symbols(std::string_view word, std::vector<std::int32_t>& symbols) const;
  void merge_short(BpeScratch& scratch, std::vector<std::int32_t>& out) const;
  void merge_long(BpeScratch& scratch, std::vector<std::int32_t>& out) const;

  PieceTable pieces_;
  std::vector<Merge> merges_;   // open addressing
  std::int32_t byte_ids_[256];  // id of the ByteLevel character of each byte, -1: absent
  std::int32_t fallback_[256];  // id of <0xHH>, -1: absent
  bool all_bytes_ = false;
  std::int32_t unk_ = -1;
  bool fuse_unk_ = false, byte_fallback_ = false, ignore_merges_ = false;
  // No merge joins a character with a following U+2581: a long text may be cut before each run of them.
  bool cut_at_blocks_ = false;
};

}  // namespace pare::tok
