#include "model/data.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"

namespace pare {
namespace {

std::uint64_t mix(std::uint64_t z) {  // SplitMix64 finalizer
  z += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t below(std::uint64_t bound) {  // multiply-shift: bias below 2^-32 for the sizes here
    state_ += 0x9e3779b97f4a7c15ull;
    return static_cast<std::uint64_t>((static_cast<unsigned __int128>(mix(state_)) * bound) >> 64);
  }

 private:
  std::uint64_t state_;
};

}  // namespace

std::vector<TextSpec> parse_text_specs(const std::vector<std::string>& texts, const std::string& option) {
  std::vector<TextSpec> specs;
  std::size_t weighted = 0;
  for (const std::string& text : texts) {
    const std::size_t equals = text.rfind('=');
    if (equals == std::string::npos || fs::exists(text)) {
      specs.push_back({text, std::nullopt});
      continue;
    }
    double weight = 0;
    std::size_t used = 0;
    const std::string number = text.substr(equals + 1);
    try {
      weight = std::stod(number, &used);
    } catch (const std::exception&) {
      used = 0;
    }
    if (used == 0 || used != number.size() || !(weight > 0) || !std::isfinite(weight))
      throw usage_error(option, "path or path=weight with a positive weight", text);
    specs.push_back({text.substr(0, equals), weight});
    ++weighted;
  }
  if (weighted != 0 && weighted != specs.size())
    throw usage_error(option, "a weight for every text or for none", std::to_string(weighted) + " of " +
                      std::to_string(specs.size()) + " have one");
  return specs;
}

std::int32_t end_of_text(const Tokenizer& tokenizer, const ModelConfig& config) {
  if (!config.eos_ids.empty()) return static_cast<std::int32_t>(config.eos_ids.front());
  for (const char* piece : {"<|endoftext|>", "</s>"})
    if (const std::int32_t id = tokenizer.id(piece); id >= 0) return id;
  throw input_error("config.json: eos_token_id", "the id that ends a document",
                    "none, and the tokenizer has neither <|endoftext|> nor </s>");
}

std::vector<TokenSource> read_sources(const std::vector<TextSpec>& specs, const std::optional<std::string>& split,
                                      const Tokenizer& tokenizer, std::int32_t end_id, std::int64_t context,
                                      Context& run) {
  std::vector<TokenSource> sources;
  for (const TextSpec& spec : specs) {
    const auto documents = read_documents({spec.path}, split);
    TokenSource source;
    source.name = spec.name();
    source.documents = static_cast<std::int64_t>(documents.size());
    const bool responses =
        std::any_of(documents.begin(), documents.end(), [](const Document& d) { return d.response_begin > 0; });
    run.progress->begin("tokenize " + source.name, source.documents);
    for (std::size_t i = 0; i < documents.size(); ++i) {
      throw_if_interrupted("tokenize " + source.name, "nothing was written; run the same command again");
      const Document& document = documents[i];
      const auto begin = static_cast<std::int64_t>(source.ids.size());
      if (document.response_begin > 0) {
        // Prompt and response are encoded apart, so that the response begins on a token of its own.
        const auto prompt = encode_document(tokenizer, {document.text.substr(0, document.response_begin), 0});
        const auto response = tokenizer.encode(std::string_view(document.text).substr(document.response_begin),
                                               /*add_special=*/false, /*parse_special=*/false);
        source.ids.insert(source.ids.end(), prompt.begin(), prompt.end());
        source.ids.insert(source.ids.end(), response.begin(), response.end());
        source.scored.resize(static_cast<std::size_t>(begin) + prompt.size(), 0);
        source.scored.resize(source.ids.size(), 1);
      } else {
        const auto ids = encode_document(tokenizer, document);
        source.ids.insert(source.ids.end(), ids.begin(), ids.end());
        if (responses) source.scored.resize(source.ids.size(), 1);
      }
      source.ids.push_back(end_id);
      if (responses) {
        source.scored.push_back(1);
        source.document_begin.push_back(begin);
        if (static_cast<std::int64_t>(source.ids.size()) - begin > context + 1) ++source.too_long;
      }
      run.progress->update(static_cast<std::int64_t>(i + 1));
    }
    run.progress->end(std::to_string(source.ids.size()) + " tokens");
    if (source.too_long > 0)
      run.progress->note(source.name + ": " + std::to_string(source.too_long) + " of " +
                         std::to_string(source.documents) + " examples are longer than the context and are cut there");
    source.weight = spec.weight.value_or(static_cast<double>(source.ids.size()));
    sources.push_back(std::move(source));
  }
  return sources;
}

BatchStream::BatchStream(std::vector<TokenSource> sources, std::int64_t context, std::uint64_t seed)
    : sources_(std::move(sources)), context_(context), seed_(seed), taken_(sources_.size()), epochs_(sources_.size()) {
  double total = 0;
  for (const TokenSource& source : sources_) {
    if (source.ids.size() < 2) throw input_error(source.name, "at least two tokens of text", "fewer");
    total += source.weight;
  }
  for (TokenSource& source : sources_) source.weight /= total;
}

std::int64_t BatchStream::tokens() const {
  std::int64_t total = 0;
  for (const TokenSource& source : sources_) total += static_cast<std::int64_t>(source.ids.size());
  return total;
}

// The count of windows is the same in every epoch (needed to find the epoch from the counter alone).
std::int64_t BatchStream::windows(std::size_t index) const {
  const TokenSource& source = sources_[index];
  if (!source.window_begin.empty()) return static_cast<std::int64_t>(source.window_begin.size());
  if (!source.scored.empty()) return static_cast<std::int64_t>(epochs_[index].begin.size());
  const auto pairs = static_cast<std::int64_t>(source.ids.size()) - 1;
  return pairs >= 2 * context_ ? (pairs - context_) / context_ : 1;
}

void BatchStream::start_epoch(std::size_t index, std::int64_t number) {
  const TokenSource& source = sources_[index];
  Epoch& epoch = epochs_[index];
  epoch.number = number;
  epoch.begin.clear();
  epoch.end.clear();
  const auto size = static_cast<std::int64_t>(source.ids.size());
  Random random(mix(seed_ ^ mix(index + 1)) ^ mix(static_cast<std::uint64_t>(number)));
  if (!source.window_begin.empty()) {
    epoch.begin = source.window_begin;
    epoch.end.assign(source.window_begin.begin() + 1, source.window_begin.end());
    epoch.end.push_back(size);
  } else if (source.scored.empty()) {
    const std::int64_t count = windows(index);
    const bool single = size - 1 < 2 * context_;
    const std::int64_t offset = single ? 0 : static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(context_)));
    for (std::int64_t i = 0; i < count; ++i) {
      epoch.begin.push_back(offset + i * context_);
      epoch.end.push_back(std::min(size, offset + (i + 1) * context_ + 1));
    }
    if (single && size - 1 > context_) {  // between one and two windows of text: start anywhere
      epoch.begin[0] = static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(size - context_)));
      epoch.end[0] = epoch.begin[0] + context_ + 1;
    }
  } else {
    std::int64_t begin = 0;
    for (std::size_t d = 0; d < source.document_begin.size(); ++d) {
      const std::int64_t end = d + 1 < source.document_begin.size() ? source.document_begin[d + 1] : size;
      if (end - begin > context_ + 1 && source.document_begin[d] > begin) {
        epoch.begin.push_back(begin);
        epoch.end.push_back(source.document_begin[d]);
        begin = source.document_begin[d];
      }
      if (end - begin > context_ + 1) {
        epoch.begin.push_back(begin);
        epoch.end.push_back(begin + context_ + 1);
        begin = end;
      }
    }
    if (begin < size) {
      epoch.begin.push_back(begin);
      epoch.end.push_back(size);
    }
  }
  std::vector<std::size_t> order(epoch.begin.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  Epoch shuffled{number, {}, {}, order};
  for (const std::size_t i : order) {
    shuffled.begin.push_back(epoch.begin[i]);
    shuffled.end.push_back(epoch.end[i]);
  }
  epoch = std::move(shuffled);
}

std::int64_t BatchStream::draw(std::size_t index, std::int64_t* ids, std::int64_t* targets) {
  if (epochs_[index].number < 0) start_epoch(index, 0);
  const std::int64_t count = windows(index), number = taken_[index] / count;
  if (epochs_[index].number != number) start_epoch(index, number);
  const auto at = static_cast<std::size_t>(taken_[index] % count);
  const TokenSource& source = sources_[index];
  const std::int64_t begin = epochs_[index].begin[at], end = epochs_[index].end[at];
  for (std::int64_t i = 0; i < context_; ++i) {
    const bool inside = begin + i + 1 < end;
    const auto next = static_cast<std::size_t>(begin + i + 1);
    ids[i] = begin + i < end ? source.ids[next - 1] : 0;
    targets[i] = inside && (source.scored.empty() || source.scored[next] != 0) ? source.ids[next] : -1;
  }
  ++taken_[index];
  return source.window_begin.empty() ? -1 : static_cast<std::int64_t>(epochs_[index].order[at]);
}

Batch BatchStream::next(std::int64_t sequences) {
  Batch batch{torch::empty({sequences, context_}, torch::kLong), torch::empty({sequences, context_}, torch::kLong), 0, {}};
  for (std::int64_t i = 0; i < sequences; ++i) {
    const auto drawn = std::accumulate(taken_.begin(), taken_.end(), std::int64_t{0});
    std::size_t chosen = 0;
    double most = -1e300;
    for (std::size_t s = 0; s < sources_.size(); ++s) {
      const double behind = sources_[s].weight * static_cast<double>(drawn + 1) - static_cast<double>(taken_[s]);
      if (behind > most) {
        most = behind;
        chosen = s;
      }
    }
    batch.windows.push_back(draw(chosen, batch.ids.data_ptr<std::int64_t>() + i * context_,
                                 batch.targets.data_ptr<std::int64_t>() + i * context_));
  }
  batch.counted = (batch.targets >= 0).sum().item<std::int64_t>();
  return batch;
}

void BatchStream::restore(const std::vector<std::int64_t>& taken) { taken_ = taken; }

}  // namespace pare
