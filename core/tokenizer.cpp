#include "core/tokenizer.h"

#include <algorithm>
#include <mutex>

#include "core/error.h"
#include "core/tokenizer_bpe.h"
#include "core/tokenizer_pipeline.h"
#include "core/tokenizer_text.h"

namespace pare {

// Read-only after loading, apart from the pool of scratch memory that concurrent calls borrow from.
struct Tokenizer::Impl {
  tok::Bpe model;
  tok::AddedTokens added;
  tok::Normalizer normalizer;
  tok::PreTokenizer pre_tokenizer;
  tok::Template around;
  tok::Decoder decoder;
  std::int32_t size = 0;

  mutable std::mutex mutex;
  mutable std::vector<std::unique_ptr<tok::BpeScratch>> pool;

  std::unique_ptr<tok::BpeScratch> borrow() const {
    const std::lock_guard lock(mutex);
    if (pool.empty()) return std::make_unique<tok::BpeScratch>();
    auto scratch = std::move(pool.back());
    pool.pop_back();
    return scratch;
  }
  void give_back(std::unique_ptr<tok::BpeScratch> scratch) const {
    const std::lock_guard lock(mutex);
    pool.push_back(std::move(scratch));
  }

  // The piece as decoders see it: added tokens go before the vocabulary.
  bool piece_of(std::int32_t id, std::string& piece, bool& special) const {
    if (const tok::AddedToken* token = added.find(id)) {
      piece = token->content;
      special = token->special;
      return true;
    }
    special = false;
    if (!model.pieces().has(id)) return false;
    piece = model.pieces().piece(id);
    return true;
  }

  std::vector<std::string> pieces_of(std::span<const std::int32_t> ids, bool skip_special) const {
    std::vector<std::string> pieces;
    pieces.reserve(ids.size());
    std::string piece;
    bool special = false;
    for (const std::int32_t id : ids)
      if (piece_of(id, piece, special) && !(special && skip_special)) pieces.push_back(piece);
    return pieces;
  }
};

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::from_json(const Json& json, const std::string& place) { return from_text(json.dump(), place); }

// "truncation" and "padding" are left aside: they belong to batches of a training run, and transformers resets them.
Tokenizer Tokenizer::from_text(std::string_view text, const std::string& place) {
  tok::TokenizerFile file = tok::parse_tokenizer_file(text, place);
  auto impl = std::make_unique<Impl>();
  const auto component = [&](const char* key) {
    const tok::Node root(file.rest, place);
    return tok::Node(root.at_or_null(key).json(), place + ": " + key);
  };
  impl->model.load(file);
  impl->normalizer.load(component("normalizer"));
  impl->pre_tokenizer.load(component("pre_tokenizer"));
  impl->decoder.load(component("decoder"));
  impl->added.load(component("added_tokens"), impl->model.pieces(), impl->normalizer);
  impl->around.load(component("post_processor"));
  impl->size = std::max(impl->model.pieces().size(), impl->added.largest_id() + 1);
  for (const auto* ids : {&impl->around.before, &impl->around.after})
    for (const std::int32_t id : *ids)
      if (!impl->added.find(id) && !impl->model.pieces().has(id))
        throw input_error(place + ": post_processor", "ids of the vocabulary", "id " + std::to_string(id));
  return Tokenizer(std::move(impl));
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool add_special, bool parse_special) const {
  const Impl& impl = *impl_;
  std::string repaired;
  if (!tok::is_valid_utf8(text)) text = repaired = tok::replace_invalid_utf8(text);
  std::vector<std::int32_t> ids;
  ids.reserve(text.size() / 4 + 8);
  if (add_special) ids = impl.around.before;

  std::unique_ptr<tok::BpeScratch> scratch = impl.borrow();
  const bool bytes = impl.pre_tokenizer.bytes();
  const auto on_word = [&](std::string_view word) { impl.model.encode_word(word, bytes, *scratch, ids); };
  const auto on_token = [&](std::int32_t id) { ids.push_back(id); };
  impl.added.split(
      text, false, parse_special,
      [&](std::string_view raw, bool at_start) {
        std::string normal;
        if (!impl.normalizer.empty()) raw = normal = impl.normalizer.apply(raw, &at_start);
        impl.added.split(
            raw, true, parse_special,
            [&](std::string_view piece, bool first) { impl.pre_tokenizer.apply(piece, at_start && first, on_word); },
            on_token);
      },
      on_token);
  impl.give_back(std::move(scratch));

  if (add_special) ids.insert(ids.end(), impl.around.after.begin(), impl.around.after.end());
  return ids;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special) const {
  return impl_->decoder.apply(impl_->pieces_of(ids, skip_special));
}

std::int64_t Tokenizer::size() const { return impl_->size; }

std::string Tokenizer::token(std::int32_t id) const {
  std::string piece;
  bool special = false;
  impl_->piece_of(id, piece, special);
  return piece;
}

std::int32_t Tokenizer::id(std::string_view piece) const {
  if (const tok::AddedToken* token = impl_->added.find(piece)) return token->id;
  return impl_->model.pieces().find(piece);
}

bool Tokenizer::is_special(std::int32_t id) const {
  const tok::AddedToken* token = impl_->added.find(id);
  return token && token->special;
}

std::vector<std::int32_t> Tokenizer::prefix_ids() const { return impl_->around.before; }

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special)
    : tokenizer_(tokenizer), skip_special_(skip_special) {}

// ids_ holds the last stretch that gave text (so that what depends on standing first is settled) and everything
// after it; emitted_ counts the bytes of its text that were already returned.
std::string StreamDecoder::push(std::int32_t id) {
  const Tokenizer::Impl& impl = *tokenizer_.impl_;
  std::string piece;
  bool special = false;
  if (!impl.piece_of(id, piece, special) || (special && skip_special_)) return {};  // it is in no text
  ids_.push_back(id);
  if (!impl.decoder.can_stream()) return {};
  std::vector<std::string> pieces = impl.pieces_of(ids_, skip_special_);
  if (impl.decoder.open_end(pieces)) return {};
  const std::string text = impl.decoder.apply(std::move(pieces));
  if (text.size() <= emitted_) return {};
  std::string fresh = text.substr(emitted_);
  // The stretch that was returned now is the context of the next one.
  ids_.erase(ids_.begin(), ids_.begin() + static_cast<std::ptrdiff_t>(settled_));
  settled_ = ids_.size();
  emitted_ = tokenizer_.decode(ids_, skip_special_).size();
  return fresh;
}

std::string StreamDecoder::finish() {
  const std::string text = tokenizer_.decode(ids_, skip_special_);
  std::string rest = text.size() > emitted_ ? text.substr(emitted_) : std::string();
  ids_.clear();
  emitted_ = settled_ = 0;
  return rest;
}

}  // namespace pare
