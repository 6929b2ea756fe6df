// The steps around the model: added tokens, normalizers, pre-tokenizers, post-processors, decoders. Nested Sequences
// are flattened; each step is a row of data that one switch executes.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/tokenizer_bpe.h"
#include "core/tokenizer_file.h"
#include "core/tokenizer_regex.h"

namespace pare::tok {

class Normalizer {
 public:
  void load(const Node& node);  // null: nothing happens
  bool empty() const { return steps_.empty(); }
  // front_kept becomes false when characters at the beginning were removed: what is left then no longer begins where
  // the original text begins (Metaspace "first" asks).
  std::string apply(std::string_view text, bool* front_kept = nullptr) const;

 private:
  enum class Kind { kPrepend, kReplace, kNfc, kNfd, kNfkc, kNfkd, kLowercase, kStrip, kStripAccents, kByteLevel };
  struct Step {
    Kind kind;
    std::string content;
    Regex pattern = Regex::literal({});
    bool left = false, right = false;
  };
  void add(const Node& node, int depth);
  std::vector<Step> steps_;
};

// A pattern is {"String": literal} or {"Regex": Oniguruma}.
Regex load_pattern(const Node& node);

class PreTokenizer {
 public:
  void load(const Node& node);
  bool bytes() const { return bytes_; }  // words are raw text whose bytes the model looks up (ByteLevel comes last)
  // Calls sink for each word. at_start: the piece begins where the original text begins.
  template <class Sink>
  void apply(std::string_view piece, bool at_start, Sink&& sink) const {
    const std::function<void(std::string_view)> call = std::ref(sink);
    run(0, piece, at_start, call);
  }

 private:
  enum class Kind { kByteLevel, kSplit, kDigits, kMetaspace, kWhitespaceSplit, kPunctuation };
  enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };
  enum class Prepend { kAlways, kFirst, kNever };
  struct Step {
    Kind kind;
    Behavior behavior = Behavior::kIsolated;
    bool invert = false;
    Regex pattern = Regex::literal({});
    bool split = true;         // Metaspace; ByteLevel: use_regex
    bool add_prefix_space = false;
    bool map = false;          // ByteLevel that is not the last step
    std::string replacement;   // Metaspace
    Prepend prepend = Prepend::kNever;
  };
  using Sink = std::function<void(std::string_view)>;
  void add(const Node& node, int depth);
  void run(std::size_t step, std::string_view piece, bool at_start, const Sink& sink) const;
  template <class Matches>
  void split(const Step& step, std::size_t index, std::string_view piece, bool at_start, const Sink& sink,
             Matches&& matches) const;
  std::vector<Step> steps_;
  bool bytes_ = false;
};

struct AddedToken {
  std::string content;
  std::int32_t id = -1;
  bool single_word = false, lstrip = false, rstrip = false, normalized = true, special = false;
};

class AddedTokens {
 public:
  // Ids must be those the reference gives: the vocabulary's, or the next free one in file order.
  void load(const Node& list, const PieceTable& pieces, const Normalizer& normalizer);
  const AddedToken* find(std::int32_t id) const;
  const AddedToken* find(std::string_view content) const;
  std::int32_t largest_id() const { return largest_id_; }

  // on_text(piece, begins_at_0) and on_token(id) from left to right. `normalized`: the tokens that are looked for in
  // normalized text. Special tokens are left as text unless parse_special.
  template <class OnText, class OnToken>
  void split(std::string_view text, bool normalized, bool parse_special, OnText&& on_text, OnToken&& on_token) const {
    const Matcher& matcher = normalized ? normalized_ : raw_;
    std::size_t start_offset = 0, from = 0, begin = 0, end = 0;
    std::size_t index = 0;
    while (matcher.find(text, from, begin, end, index)) {
      from = end;
      const AddedToken& token = tokens_[index];
      if (token.special && !parse_special) continue;
      if (!widen(token, text, start_offset, begin, end)) continue;
      if (start_offset < begin) on_text(text.substr(start_offset, begin - start_offset), start_offset == 0);
      on_token(token.id);
      start_offset = end;
    }
    if (start_offset < text.size()) on_text(text.substr(start_offset), start_offset == 0);
  }
  bool any(bool normalized) const { return !(normalized ? normalized_ : raw_).empty(); }

 private:
  // Leftmost-longest search for many literals.
  class Matcher {
   public:
    void add(std::string_view text, std::size_t index);
    bool empty() const { return nodes_.empty(); }
    bool find(std::string_view text, std::size_t from, std::size_t& begin, std::size_t& end, std::size_t& index) const;

   private:
    struct TrieNode {
      std::vector<std::pair<unsigned char, std::uint32_t>> children;  // sorted
      std::int64_t index = -1;
    };
    std::vector<TrieNode> nodes_;
    std::uint32_t first_[256] = {};  // child of the root, 0: none
  };
  // single_word, lstrip, rstrip; false: the match does not count.
  bool widen(const AddedToken& token, std::string_view text, std::size_t start_offset, std::size_t& begin,
             std::size_t& end) const;

  std::vector<AddedToken> tokens_;
  std::unordered_map<std::string, std::size_t> by_content_;
  std::unordered_map<std::int32_t, std::size_t> by_id_;
  Matcher raw_, normalized_;
  std::int32_t largest_id_ = -1;
};

// What the post-processor puts around one text.
struct Template {
  std::vector<std::int32_t> before, after;
  void load(const Node& node);
};

class Decoder {
 public:
  void load(const Node& node);
  std::string apply(std::vector<std::string> pieces) const;
  // Streaming: may text already decoded from these pieces change when more pieces follow?
  bool open_end(const std::vector<std::string>& pieces) const;
  // False: something at the end is cut off (Strip with stop > 0) or patterns span pieces; text is certain only at the end.
  bool can_stream() const;

 private:
  enum class Kind { kByteLevel, kReplace, kByteFallback, kFuse, kStrip, kMetaspace };
  struct Step {
    Kind kind;
    Regex pattern = Regex::literal({});
    std::string content;
    char32_t code = 0;
    std::size_t start = 0, stop = 0;
    bool drop_first = false;  // Metaspace: no space before the first piece
    bool regex = false;
  };
  void add(const Node& node, int depth);
  std::vector<Step> steps_;
  bool none_ = true;
};

}  // namespace pare::tok
