// Byte-level BPE training (Sennrich et al. 2016, GPT-2's bytes and pattern). Merges equal those of `tokenizers`
// BpeTrainer: most frequent pair first, ties to the smaller pair of ids, the same bookkeeping of stale counts.
#include <xxhash.h>

#include <algorithm>
#include <map>
#include <queue>
#include <unordered_map>

#include "core/error.h"
#include "core/tokenizer.h"
#include "core/tokenizer_regex.h"
#include "core/tokenizer_text.h"

namespace pare {
namespace {

using Pair = std::pair<std::int32_t, std::int32_t>;

std::uint64_t pack(const Pair& pair) {
  return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(pair.first)) << 32) |
         static_cast<std::uint32_t>(pair.second);
}
Pair unpack(std::uint64_t key) {
  return {static_cast<std::int32_t>(key >> 32), static_cast<std::int32_t>(key & 0xFFFFFFFFu)};
}

struct KeyHash {
  std::size_t operator()(std::uint64_t key) const {
    key *= 0x9E3779B97F4A7C15ull;
    return key ^ (key >> 29);
  }
};
struct TextHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const { return XXH3_64bits(text.data(), text.size()); }
};
using WordCounts = std::unordered_map<std::string, std::int64_t, TextHash, std::equal_to<>>;

struct Word {
  std::vector<std::int32_t> symbols;
  std::int64_t count = 0;
};

// Replaces pair by `merged` in the word; change(pair, +-1) tells which neighbouring pairs came and went.
template <class Change>
void merge_in_word(std::vector<std::int32_t>& symbols, const Pair& pair, std::int32_t merged, Change&& change) {
  std::size_t out = 0;
  const std::size_t n = symbols.size();
  for (std::size_t i = 0; i < n; ++i) {
    if (i + 1 < n && symbols[i] == pair.first && symbols[i + 1] == pair.second) {
      if (out > 0) {
        change({symbols[out - 1], pair.first}, -1);
        change({symbols[out - 1], merged}, +1);
      }
      if (i + 2 < n) {
        change({pair.second, symbols[i + 2]}, -1);
        change({merged, symbols[i + 2]}, +1);
      }
      symbols[out++] = merged;
      ++i;
    } else {
      symbols[out++] = symbols[i];
    }
  }
  symbols.resize(out);
}

struct Candidate {
  std::int64_t count;
  Pair pair;
  std::vector<std::uint32_t> words;  // where the pair may stand, ascending
};
struct Before {  // heap order: the top has the largest count, then the smallest pair
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.count != b.count ? a.count < b.count : a.pair > b.pair;
  }
};

class Trainer {
 public:
  explicit Trainer(const TokenizerTraining& options) : options_(options) {
    for (const std::string& token : options.special_tokens) add_token(token);
    // The 256 bytes in the order of their stand-in characters.
    std::map<char32_t, int> alphabet;
    for (int byte = 0; byte < 256; ++byte) {
      std::size_t i = 0;
      alphabet[tok::next_char(tok::byte_to_piece(static_cast<unsigned char>(byte)), i)] = byte;
    }
    for (const auto& [code, byte] : alphabet)
      byte_id_[byte] = add_token(std::string(tok::byte_to_piece(static_cast<unsigned char>(byte))));
  }

  void learn(const WordCounts& counts) {
    words_.reserve(counts.size());
    for (const auto& [text, count] : counts) {
      Word word;
      word.count = count;
      word.symbols.reserve(text.size());
      for (const char c : text) word.symbols.push_back(byte_id_[static_cast<unsigned char>(c)]);
      words_.push_back(std::move(word));
    }
    count_pairs();
    while (static_cast<std::int64_t>(pieces_.size()) < options_.vocab_size && !queue_.empty()) {
      Candidate top = std::move(const_cast<Candidate&>(queue_.top()));
      queue_.pop();
      const std::int64_t current = pair_counts_[pack(top.pair)];
      if (top.count != current) {
        top.count = current;
        queue_.push(std::move(top));
        continue;
      }
      if (top.count < 1 || top.count < options_.min_frequency) break;
      merge(top);
    }
  }

  const std::vector<std::string>& pieces() const { return pieces_; }
  const std::vector<Pair>& merges() const { return merges_; }

 private:
  std::int32_t add_token(const std::string& piece) {
    const auto [at, fresh] = ids_.emplace(piece, static_cast<std::int32_t>(pieces_.size()));
    if (fresh) pieces_.push_back(piece);
    return at->second;
  }

  void count_pairs() {
    std::unordered_map<std::uint64_t, std::vector<std::uint32_t>, KeyHash> where;
    for (std::uint32_t w = 0; w < words_.size(); ++w) {
      const Word& word = words_[w];
      for (std::size_t i = 0; i + 1 < word.symbols.size(); ++i) {
        const std::uint64_t key = pack({word.symbols[i], word.symbols[i + 1]});
        pair_counts_[key] += word.count;
        auto& list = where[key];
        if (list.empty() || list.back() != w) list.push_back(w);
      }
    }
    for (auto& [key, list] : where) queue_.push({pair_counts_[key], unpack(key), std::move(list)});
  }

  void merge(const Candidate& top) {
    const std::string piece = pieces_[static_cast<std::size_t>(top.pair.first)] +
                              pieces_[static_cast<std::size_t>(top.pair.second)];
    const std::int32_t merged = add_token(piece);
    merges_.push_back(top.pair);
    std::unordered_map<std::uint64_t, std::vector<std::uint32_t>, KeyHash> where;
    for (const std::uint32_t w : top.words) {
      Word& word = words_[w];
      merge_in_word(word.symbols, top.pair, merged, [&](const Pair& pair, int sign) {
        const std::uint64_t key = pack(pair);
        pair_counts_[key] += sign * word.count;
        if (sign < 0) return;
        auto& list = where[key];
        if (list.empty() || list.back() != w) list.push_back(w);
      });
    }
    for (auto& [key, list] : where) {
      const std::int64_t count = pair_counts_[key];
      if (count > 0) queue_.push({count, unpack(key), std::move(list)});
    }
  }

  const TokenizerTraining& options_;
  std::vector<std::string> pieces_;
  std::unordered_map<std::string, std::int32_t> ids_;
  std::int32_t byte_id_[256] = {};
  std::vector<Word> words_;
  std::unordered_map<std::uint64_t, std::int64_t, KeyHash> pair_counts_;
  std::priority_queue<Candidate, std::vector<Candidate>, Before> queue_;
  std::vector<Pair> merges_;
};

std::string quoted(const std::string& text) { return Json(text).dump(); }

// Written by hand, line by line: a JSON object with ordered keys would look every key up linearly.
std::string render(const Trainer& trainer, std::size_t specials) {
  const auto& pieces = trainer.pieces();
  std::string out = "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n  \"added_tokens\": [";
  for (std::size_t id = 0; id < specials; ++id) {
    out += std::string(id ? "," : "") + "\n    {\"id\": " + std::to_string(id) + ", \"content\": " + quoted(pieces[id]) +
           ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": false, \"special\": true}";
  }
  const std::string byte_level = "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, ";
  out += std::string(specials ? "\n  " : "") + "],\n  \"normalizer\": null,\n";
  out += "  \"pre_tokenizer\": " + byte_level + "\"use_regex\": true},\n";
  out += "  \"post_processor\": " + byte_level + "\"use_regex\": true},\n";
  out += "  \"decoder\": " + byte_level + "\"use_regex\": true},\n";
  out += "  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": null,\n"
         "    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n    \"fuse_unk\": false,\n"
         "    \"byte_fallback\": false,\n    \"ignore_merges\": false,\n    \"vocab\": {";
  for (std::size_t id = 0; id < pieces.size(); ++id)
    out += std::string(id ? "," : "") + "\n      " + quoted(pieces[id]) + ": " + std::to_string(id);
  out += "\n    },\n    \"merges\": [";
  for (std::size_t i = 0; i < trainer.merges().size(); ++i) {
    const auto& [a, b] = trainer.merges()[i];
    out += std::string(i ? "," : "") + "\n      " +
           quoted(pieces[static_cast<std::size_t>(a)] + " " + pieces[static_cast<std::size_t>(b)]);
  }
  out += "\n    ]\n  }\n}\n";
  return out;
}

}  // namespace

std::string train_tokenizer(const std::vector<std::string>& texts, const TokenizerTraining& options) {
  std::vector<std::string> specials;
  for (const std::string& token : options.special_tokens) {
    if (token.empty() || !tok::is_valid_utf8(token))
      throw usage_error("special tokens", "non-empty UTF-8 texts", token.empty() ? "an empty one" : "invalid UTF-8");
    if (std::find(specials.begin(), specials.end(), token) != specials.end())
      throw usage_error("special tokens", "different texts", "\"" + token + "\" twice");
    std::size_t i = 0;
    if (tok::char_to_byte(tok::next_char(token, i)) >= 0 && i == token.size())
      throw usage_error("special tokens", "texts of more than one character", "\"" + token + "\"",
                        "single characters stand for the 256 bytes");
    specials.push_back(token);
  }
  const auto floor = static_cast<std::int64_t>(256 + specials.size());
  if (options.vocab_size < floor)
    throw usage_error("vocabulary size", "at least " + std::to_string(floor) + " (256 bytes and the special tokens)",
                      std::to_string(options.vocab_size));
  const tok::Regex pattern = tok::Regex::compile(tok::kGpt2Pattern, "GPT-2 pattern");
  WordCounts counts;
  std::string repaired;
  for (const std::string& original : texts) {
    std::string_view text = original;
    if (!tok::is_valid_utf8(text)) text = repaired = tok::replace_invalid_utf8(text);
    pattern.for_each(text, [&](std::size_t begin, std::size_t end) {
      const std::string_view word = text.substr(begin, end - begin);
      const auto at = counts.find(word);
      if (at != counts.end()) ++at->second;
      else counts.emplace(word, 1);
    });
  }
  if (counts.empty()) throw input_error("training text", "some text", "nothing");
  TokenizerTraining checked = options;
  checked.special_tokens = specials;
  Trainer trainer(checked);
  trainer.learn(counts);
  return render(trainer, specials.size());
}

}  // namespace pare
