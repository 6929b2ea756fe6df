#include "model/data.h"

#include <algorithm>
#include <cmath>
#include <map>
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

void pack_examples(TokenSource& source, std::vector<Example> examples, std::int64_t context) {
  std::vector<std::size_t> order(examples.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return examples[a].ids.size() > examples[b].ids.size();
  });
  std::vector<std::vector<std::size_t>> packs;
  std::multimap<std::size_t, std::size_t> room;  // ids that still fit -> pack
  for (const std::size_t i : order) {
    const std::size_t size = examples[i].ids.size();
    auto place = room.lower_bound(size);
    if (place == room.end()) {
      packs.emplace_back();
      place = room.emplace(static_cast<std::size_t>(context) + 1, packs.size() - 1);
    }
    const auto [left, pack] = *place;
    room.erase(place);
    packs[pack].push_back(i);
    room.emplace(left - size, pack);
  }
  for (const auto& pack : packs) {
    source.window_begin.push_back(static_cast<std::int64_t>(source.ids.size()));
    for (const std::size_t i : pack) {
      source.document_begin.push_back(static_cast<std::int64_t>(source.ids.size()));
      source.ids.insert(source.ids.end(), examples[i].ids.begin(), examples[i].ids.end());
      source.scored.insert(source.scored.end(), examples[i].scored.begin(), examples[i].scored.end());
    }
  }
}

std::optional<std::vector<Example>> read_examples(const std::vector<Document>& documents, const TextForm& form,
                                                  const Tokenizer& tokenizer, ExampleCounts& counts) {
  const auto has_reply = [](const Document& d) { return d.response_begin > 0 || !d.messages.is_null(); };
  if (!form.always_examples && std::none_of(documents.begin(), documents.end(), has_reply)) return std::nullopt;
  const bool chats = std::any_of(documents.begin(), documents.end(), [](const Document& d) { return !d.messages.is_null(); });
  const auto chat = chats && !form.chat_folder.empty() ? folder_chat_template(form.chat_folder) : std::nullopt;
  const ExampleForm example_form{&tokenizer, form.end_id, form.context + 1, form.too_long, form.last_reply_only,
                                 chat ? &*chat : nullptr};
  std::vector<Example> examples;
  for (const Document& document : documents) {
    throw_if_interrupted("tokenize", "nothing was written; run the same command again");
    add_examples(document, example_form, examples, counts);
  }
  return examples;
}

std::vector<TokenSource> read_sources(const std::vector<TextSpec>& specs, const TextForm& form,
                                      const Tokenizer& tokenizer, Context& run) {
  std::vector<TokenSource> sources;
  for (const TextSpec& spec : specs) {
    const auto documents = read_documents({spec.path}, form.split, /*conversations=*/true);
    TokenSource source;
    source.name = spec.name();
    source.documents = static_cast<std::int64_t>(documents.size());
    run.progress->begin("tokenize " + source.name, source.documents);
    if (auto examples = read_examples(documents, form, tokenizer, source.counts)) {
      if (examples->empty())
        throw input_error(spec.path.string(), "an example with something to learn within the context", "none",
                          "raise --context");
      pack_examples(source, std::move(*examples), form.context);
    } else {
      for (std::size_t i = 0; i < documents.size(); ++i) {
        throw_if_interrupted("tokenize " + source.name, "nothing was written; run the same command again");
        const auto ids = encode_document(tokenizer, documents[i]);
        source.ids.insert(source.ids.end(), ids.begin(), ids.end());
        source.ids.push_back(form.end_id);
        run.progress->update(static_cast<std::int64_t>(i + 1));
      }
    }
    run.progress->end(std::to_string(source.ids.size()) + " tokens");
    const ExampleCounts& counts = source.counts;
    if (counts.documents > 0)
      run.progress->note(source.name + ": " + std::to_string(counts.documents) + " examples in " +
                         std::to_string(source.window_begin.size()) + " windows, " + std::to_string(counts.learned) +
                         " ids to learn; " + std::to_string(counts.cut) + " longer than the context were cut, " +
                         std::to_string(counts.dropped) + " dropped");
    // What one pass draws, so that no source is seen more often than another.
    source.weight = spec.weight.value_or(
        static_cast<double>(source.window_begin.empty() ? static_cast<std::int64_t>(source.ids.size())
                                                        : static_cast<std::int64_t>(source.window_begin.size()) * form.context));
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
  } else {
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

std::int64_t BatchStream::sequences(double passes) const {
  std::int64_t all = 0;
  for (std::size_t i = 0; i < sources_.size(); ++i) all += windows(i);
  return static_cast<std::int64_t>(std::ceil(passes * static_cast<double>(all)));
}

std::int64_t BatchStream::draw(std::size_t index, std::int64_t* ids, std::int64_t* targets, std::int64_t* starts) {
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
  if (starts != nullptr) {
    std::fill(starts, starts + context_, 0);
    const auto& documents = source.document_begin;
    for (auto d = std::lower_bound(documents.begin(), documents.end(), begin); d != documents.end() && *d < end; ++d)
      std::fill(starts + std::min(context_, *d - begin), starts + context_, *d - begin);
    if (end - begin < context_) std::fill(starts + (end - begin), starts + context_, end - begin);
  }
  ++taken_[index];
  return source.window_begin.empty() ? -1 : static_cast<std::int64_t>(epochs_[index].order[at]);
}

Batch BatchStream::next(std::int64_t sequences) {
  Batch batch{torch::empty({sequences, context_}, torch::kLong), torch::empty({sequences, context_}, torch::kLong), 0, {}};
  if (std::any_of(sources_.begin(), sources_.end(), [](const TokenSource& s) { return !s.document_begin.empty(); }))
    batch.starts = torch::empty({sequences, context_}, torch::kLong);
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
                                 batch.targets.data_ptr<std::int64_t>() + i * context_,
                                 batch.starts.defined() ? batch.starts.data_ptr<std::int64_t>() + i * context_ : nullptr));
  }
  batch.counted = (batch.targets >= 0).sum().item<std::int64_t>();
  return batch;
}

void BatchStream::restore(const std::vector<std::int64_t>& taken) { taken_ = taken; }

}  // namespace pare
