#include "core/tokenizer_bpe.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <new>

#include "core/error.h"
#include "core/tokenizer_text.h"

namespace pare::tok {
namespace {

constexpr std::string_view kBlock = "\xE2\x96\x81";  // U+2581, SentencePiece's space
constexpr std::size_t kShortWord = 32;               // symbols; above it a heap is faster than scanning
constexpr std::size_t kCacheSlots = 1u << 15;        // 2 MiB a running call

std::uint64_t hash(std::string_view text) { return XXH3_64bits(text.data(), text.size()); }

std::uint64_t pack(std::int32_t left, std::int32_t right) {
  return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) | static_cast<std::uint32_t>(right);
}

std::uint64_t mix(std::uint64_t key) {
  key *= 0x9E3779B97F4A7C15ull;
  return key ^ (key >> 32);
}

constexpr std::uint64_t kNoPair = ~0ull;  // ids are never negative
constexpr std::uint32_t kNoRank = 0xFFFFFFFFu;

}  // namespace

void PieceTable::build(const std::vector<std::pair<std::string, std::int32_t>>& vocab, const std::string& place) {
  std::size_t bytes = 0;
  std::int32_t largest = -1;
  for (const auto& [piece, id] : vocab) {
    bytes += piece.size();
    largest = std::max(largest, id);
  }
  buffer_.reserve(bytes);
  spans_.assign(static_cast<std::size_t>(largest + 1), {});
  slots_.assign(std::bit_ceil(std::max<std::size_t>(vocab.size() * 2, 16)), -1);
  const std::size_t mask = slots_.size() - 1;
  for (const auto& [piece, id] : vocab) {
    Span& span = spans_[static_cast<std::size_t>(id)];
    if (span.length != kUnused)
      throw input_error(place + ": model.vocab", "every id once",
                        "id " + std::to_string(id) + " for \"" + std::string(this->piece(id)) + "\" and \"" + piece + "\"");
    std::size_t slot = hash(piece) & mask;
    for (; slots_[slot] >= 0; slot = (slot + 1) & mask)
      if (this->piece(slots_[slot]) == piece)
        throw input_error(place + ": model.vocab", "every piece once", "\"" + piece + "\" twice");
    span = {static_cast<std::uint32_t>(buffer_.size()), static_cast<std::uint32_t>(piece.size())};
    buffer_ += piece;
    slots_[slot] = id;
  }
  count_ = static_cast<std::int64_t>(vocab.size());
}

std::int32_t PieceTable::find(std::string_view piece) const {
  if (slots_.empty()) return -1;
  const std::size_t mask = slots_.size() - 1;
  for (std::size_t slot = hash(piece) & mask; slots_[slot] >= 0; slot = (slot + 1) & mask)
    if (this->piece(slots_[slot]) == piece) return slots_[slot];
  return -1;
}

bool PieceTable::has(std::int32_t id) const {
  return id >= 0 && id < size() && spans_[static_cast<std::size_t>(id)].length != kUnused;
}

std::string_view PieceTable::piece(std::int32_t id) const {
  if (!has(id)) return {};
  const Span& span = spans_[static_cast<std::size_t>(id)];
  return {buffer_.data() + span.begin, span.length};
}

// One cache line: a word of up to 26 bytes and its up to 9 ids.
struct BpeScratch::Entry {
  static constexpr std::size_t kWord = 26, kIds = 9;
  std::uint8_t length, count;
  char word[kWord];
  std::int32_t ids[kIds];
};

BpeScratch::BpeScratch() {
  static_assert(sizeof(Entry) == 64);
  // calloc: pages that are never used cost nothing.
  cache_ = static_cast<Entry*>(std::calloc(kCacheSlots, sizeof(Entry)));
  if (!cache_) throw std::bad_alloc();
}
BpeScratch::~BpeScratch() { std::free(cache_); }

void Bpe::load(TokenizerFile& file) {
  const Node root(file.rest, file.place);
  const Node model(root.at("model").json(), file.place + ": model");
  if (!model.json().is_object()) model.refuse("an object", model.json().type_name());
  if (model.has("type") ? model.type() != "BPE" : !file.has_merges)
    model.refuse("type BPE", model.has("type") ? model.type() : "no type and no merges",
                 "WordPiece, Unigram and WordLevel models are not supported");
  if (!file.has_vocab) model.refuse("the key \"vocab\"", "none");
  if (!file.has_merges) model.refuse("the key \"merges\"", "none");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const Node node = model.at_or_null(key);
    if (!node.is_null() && !node.text().empty()) node.refuse("nothing (not supported)", "\"" + node.text() + "\"");
  }
  const Node dropout = model.at_or_null("dropout");
  if (!dropout.is_null() && !(dropout.json().is_number() && dropout.json().get<double>() == 0.0))
    dropout.refuse("none: encoding must not be random", dropout.json().dump());
  fuse_unk_ = model.flag_or("fuse_unk", false);
  byte_fallback_ = model.flag_or("byte_fallback", false);
  ignore_merges_ = model.flag_or("ignore_merges", false);

  pieces_.build(file.vocab, file.place);
  const Node unk = model.at_or_null("unk_token");
  if (!unk.is_null()) {
    unk_ = pieces_.find(unk.text());
    if (unk_ < 0) unk.refuse("a piece of the vocabulary", "\"" + unk.text() + "\"");
  }
  static constexpr char kHex[] = "0123456789ABCDEF";
  all_bytes_ = true;
  for (int b = 0; b < 256; ++b) {
    byte_ids_[b] = pieces_.find(byte_to_piece(static_cast<unsigned char>(b)));
    all_bytes_ = all_bytes_ && byte_ids_[b] >= 0;
    const char name[] = {'<', '0', 'x', kHex[b >> 4], kHex[b & 15], '>'};
    fallback_[b] = pieces_.find({name, sizeof name});
  }

  merges_.assign(std::bit_ceil(std::max<std::size_t>(file.merges.size() * 2, 16)), {kNoPair, 0, 0});
  const std::size_t mask = merges_.size() - 1;
  cut_at_blocks_ = !ignore_merges_ && pieces_.find(kBlock) >= 0;
  std::uint32_t rank = 0;
  std::string joined;
  for (const auto& [left, right] : file.merges) {
    joined.assign(left).append(right);
    const std::int32_t a = pieces_.find(left), b = pieces_.find(right), merged = pieces_.find(joined);
    if (a < 0 || b < 0 || merged < 0)
      throw input_error(file.place + ": model.merges[" + std::to_string(rank) + "]", "pieces of the vocabulary",
                        "\"" + (a < 0 ? left : b < 0 ? right : joined) + "\"");
    if (right.starts_with(kBlock) && !left.ends_with(kBlock)) cut_at_blocks_ = false;
    const std::uint64_t pair = pack(a, b);
    std::size_t slot = mix(pair) & mask;
    while (merges_[slot].pair != kNoPair && merges_[slot].pair != pair) slot = (slot + 1) & mask;
    merges_[slot] = {pair, rank++, merged};  // of a repeated pair the last rank counts, as in the reference
  }
}

const Bpe::Merge* Bpe::find_merge(std::int32_t left, std::int32_t right) const {
  const std::uint64_t pair = pack(left, right);
  const std::size_t mask = merges_.size() - 1;
  for (std::size_t slot = mix(pair) & mask;; slot = (slot + 1) & mask) {
    const Merge& merge = merges_[slot];
    if (merge.pair == pair) return &merge;
    if (merge.pair == kNoPair) return nullptr;
  }
}

void Bpe::encode_word(std::string_view word, bool bytes, BpeScratch& scratch, std::vector<std::int32_t>& out) const {
  if (word.empty()) return;
  if (bytes || !cut_at_blocks_) return encode_segment(word, bytes, scratch, out);
  std::size_t begin = 0;
  for (std::size_t at = word.find(kBlock, 1); at != std::string_view::npos; at = word.find(kBlock, at + kBlock.size())) {
    if (at == begin || word.substr(0, at).ends_with(kBlock)) continue;
    encode_segment(word.substr(begin, at - begin), false, scratch, out);
    begin = at;
  }
  encode_segment(word.substr(begin), false, scratch, out);
}

void Bpe::encode_segment(std::string_view word, bool bytes, BpeScratch& scratch, std::vector<std::int32_t>& out) const {
  if (word.size() > BpeScratch::Entry::kWord) return uncached(word, bytes, scratch, out);
  BpeScratch::Entry& entry = scratch.cache_[hash(word) & (kCacheSlots - 1)];
  if (entry.length == word.size() && std::memcmp(entry.word, word.data(), word.size()) == 0) {
    out.insert(out.end(), entry.ids, entry.ids + entry.count);
    return;
  }
  const std::size_t before = out.size();
  uncached(word, bytes, scratch, out);
  const std::size_t count = out.size() - before;
  if (count > BpeScratch::Entry::kIds) return;
  entry.length = static_cast<std::uint8_t>(word.size());
  entry.count = static_cast<std::uint8_t>(count);
  std::memcpy(entry.word, word.data(), word.size());
  std::copy(out.begin() + static_cast<std::ptrdiff_t>(before), out.end(), entry.ids);
}

void Bpe::uncached(std::string_view word, bool bytes, BpeScratch& scratch, std::vector<std::int32_t>& out) const {
  if (bytes && (ignore_merges_ || !all_bytes_)) {
    scratch.mapped_.clear();
    for (const char c : word) scratch.mapped_ += byte_to_piece(static_cast<unsigned char>(c));
    word = scratch.mapped_;
    bytes = false;
  }
  if (ignore_merges_) {
    const std::int32_t whole = pieces_.find(word);
    if (whole >= 0) {
      out.push_back(whole);
      return;
    }
  }
  std::vector<std::int32_t>& symbols = scratch.symbols_;
  symbols.clear();
  if (bytes) {
    for (const char c : word) symbols.push_back(byte_ids_[static_cast<unsigned char>(c)]);
  } else {
    char_symbols(word, symbols);
  }
  if (symbols.size() <= kShortWord) merge_short(scratch, out);
  else merge_long(scratch, out);
}

// One symbol per character. The order of pending unknowns and fallback bytes is the reference's (merge_word in
// models/bpe/model.rs): an unknown is flushed only by the next character of the vocabulary.
void Bpe::char_symbols(std::string_view word, std::vector<std::int32_t>& symbols) const {
  bool pending = false;
  for (std::size_t i = 0; i < word.size();) {
    const std::size_t length = std::min(char_length(word[i]), word.size() - i);
    const std::string_view character = word.substr(i, length);
    i += length;
    const std::int32_t id = pieces_.find(character);
    if (id >= 0) {
      if (pending) symbols.push_back(unk_);
      pending = false;
      symbols.push_back(id);
      continue;
    }
    if (byte_fallback_ && std::all_of(character.begin(), character.end(), [&](char c) {
          return fallback_[static_cast<unsigned char>(c)] >= 0;
        })) {
      for (const char c : character) symbols.push_back(fallback_[static_cast<unsigned char>(c)]);
      continue;
    }
    if (unk_ < 0) continue;  // dropped, as the reference does
    if (pending && !fuse_unk_) symbols.push_back(unk_);
    pending = true;
  }
  if (pending) symbols.push_back(unk_);
}

void Bpe::merge_short(BpeScratch& scratch, std::vector<std::int32_t>& out) const {
  std::vector<std::int32_t>& symbols = scratch.symbols_;
  std::size_t n = symbols.size();
  std::array<std::uint32_t, kShortWord> ranks;
  std::array<std::int32_t, kShortWord> merged{};
  const auto look = [&](std::size_t i) {
    const Merge* merge = i + 1 < n ? find_merge(symbols[i], symbols[i + 1]) : nullptr;
    ranks[i] = merge ? merge->rank : kNoRank;
    if (merge) merged[i] = merge->merged;
  };
  for (std::size_t i = 0; i < n; ++i) look(i);
  while (n > 1) {
    std::size_t best = 0;
    for (std::size_t i = 1; i + 1 < n; ++i)
      if (ranks[i] < ranks[best]) best = i;
    if (ranks[best] == kNoRank) break;
    symbols[best] = merged[best];
    for (std::size_t i = best + 1; i + 1 < n; ++i) {
      symbols[i] = symbols[i + 1];
      ranks[i] = ranks[i + 1];
      merged[i] = merged[i + 1];
    }
    --n;
    look(best);
    if (best > 0) look(best - 1);
  }
  out.insert(out.end(), symbols.begin(), symbols.begin() + static_cast<std::ptrdiff_t>(n));
}

// Lowest rank first, ties leftmost: a heap over a linked list. An entry is stale when its two symbols no longer make
// the same piece.
void Bpe::merge_long(BpeScratch& scratch, std::vector<std::int32_t>& out) const {
  std::vector<std::int32_t>& symbols = scratch.symbols_;
  auto& next = scratch.next_;
  auto& previous = scratch.previous_;
  auto& heap = scratch.heap_;
  const auto n = static_cast<std::int32_t>(symbols.size());
  next.resize(symbols.size());
  previous.resize(symbols.size());
  heap.clear();
  const auto later = [](const BpeScratch::Candidate& a, const BpeScratch::Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
  };
  const auto offer = [&](std::int32_t at, bool ordered) {
    const Merge* merge = find_merge(symbols[static_cast<std::size_t>(at)],
                                    symbols[static_cast<std::size_t>(next[static_cast<std::size_t>(at)])]);
    if (!merge) return;
    heap.push_back({merge->rank, at, merge->merged});
    if (ordered) std::push_heap(heap.begin(), heap.end(), later);
  };
  for (std::int32_t i = 0; i < n; ++i) {
    next[static_cast<std::size_t>(i)] = i + 1 < n ? i + 1 : -1;
    previous[static_cast<std::size_t>(i)] = i - 1;
  }
  for (std::int32_t i = 0; i + 1 < n; ++i) offer(i, false);
  std::make_heap(heap.begin(), heap.end(), later);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const BpeScratch::Candidate top = heap.back();
    heap.pop_back();
    const auto at = static_cast<std::size_t>(top.position);
    if (symbols[at] < 0 || next[at] < 0) continue;
    const auto right = static_cast<std::size_t>(next[at]);
    const Merge* merge = find_merge(symbols[at], symbols[right]);
    if (!merge || merge->merged != top.merged) continue;
    symbols[at] = top.merged;
    symbols[right] = -1;
    next[at] = next[right];
    if (next[at] >= 0) previous[static_cast<std::size_t>(next[at])] = top.position;
    if (previous[at] >= 0) offer(previous[at], true);
    if (next[at] >= 0) offer(top.position, true);
  }
  for (std::int32_t i = n > 0 ? 0 : -1; i >= 0; i = next[static_cast<std::size_t>(i)])
    out.push_back(symbols[static_cast<std::size_t>(i)]);
}

}  // namespace pare::tok
