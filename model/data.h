// Token batches from text and jsonl: documents -> streams of fixed windows, drawn by a seeded, resumable schedule.
// Include only from .cpp files (LibTorch headers).
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/context.h"
#include "core/corpus.h"
#include "core/examples.h"

namespace pare {

// "path" or "path=weight": weight is the share of the tokens drawn from there.
struct TextSpec {
  fs::path path;
  std::optional<double> weight;
  std::string name() const { return path.filename().empty() ? path.parent_path().filename() : path.filename(); }
};
// Errors: exit 2, weight not a positive number, or given for some sources only.
std::vector<TextSpec> parse_text_specs(const std::vector<std::string>& texts, const std::string& option);

// One source as one long row of ids. Plain documents are joined with the end-of-text id and cut into windows anywhere;
// examples (core/examples.h) are packed whole into windows, in each of which they do not see one another.
struct TokenSource {
  std::string name;
  double weight = 1;
  std::vector<std::int32_t> ids;
  std::vector<std::uint8_t> scored;           // empty: every id is predicted
  std::vector<std::int64_t> document_begin;   // of examples: the first id of each
  std::vector<std::int64_t> window_begin;     // not empty: these windows and no others, each up to the next begin
  std::int64_t documents = 0;
  ExampleCounts counts = {};                  // of examples
};

// Examples laid out in windows of at most context + 1 ids (the last one is only predicted), the fullest fit first
// (best-fit decreasing); a source without window stays as it is.
void pack_examples(TokenSource& source, std::vector<Example> examples, std::int64_t context);

// The id that ends a document: the config's eos, else the tokenizer's <|endoftext|> or </s>. Error: exit 3.
std::int32_t end_of_text(const Tokenizer& tokenizer, const ModelConfig& config);

// How documents become ids: what all texts of a run share.
struct TextForm {
  std::optional<std::string> split = {};
  std::int32_t end_id = 0;
  std::int64_t context = 0;
  bool always_examples = false;  // plain documents too; else a source without responses is a stream
  TooLong too_long = TooLong::kCut;
  bool last_reply_only = false;
  fs::path chat_folder = {};     // whose chat template conversations take; empty: they are refused
};
std::vector<TokenSource> read_sources(const std::vector<TextSpec>& specs, const TextForm& form,
                                      const Tokenizer& tokenizer, Context& run);
// The examples of one source, or nothing where it is a stream. Errors: exit 3 with file and line.
std::optional<std::vector<Example>> read_examples(const std::vector<Document>& documents, const TextForm& form,
                                                  const Tokenizer& tokenizer, ExampleCounts& counts);

struct Batch {
  torch::Tensor ids, targets;  // [sequences, context] int64; target -1: nothing predicted there
  std::int64_t counted = 0;    // targets >= 0
  std::vector<std::int64_t> windows;  // sources with fixed windows: the window of each sequence, else -1
  // [sequences, context] int64: where in its sequence the document of each id begins. Undefined: at 0, everywhere.
  torch::Tensor starts = {};
};

// Sequence k goes to the source that is furthest behind its share; each source runs through its windows in a new
// seeded order, from a new seeded offset, every epoch. State is one counter per source.
class BatchStream {
 public:
  BatchStream(std::vector<TokenSource> sources, std::int64_t context, std::uint64_t seed);
  Batch next(std::int64_t sequences);
  const std::vector<std::int64_t>& taken() const { return taken_; }
  void restore(const std::vector<std::int64_t>& taken);
  const std::vector<TokenSource>& sources() const { return sources_; }
  std::int64_t tokens() const;  // of all sources together
  // Sequences after which every source of examples was seen `passes` times where no weights were given.
  std::int64_t sequences(double passes) const;

 private:
  struct Epoch {
    std::int64_t number = -1;
    std::vector<std::int64_t> begin, end;  // of each window, in the order drawn; the window's ids are [begin, end)
    std::vector<std::size_t> order;        // their places before the shuffle
  };
  // The fixed window drawn, or -1. starts may be null.
  std::int64_t draw(std::size_t source, std::int64_t* ids, std::int64_t* targets, std::int64_t* starts);
  void start_epoch(std::size_t source, std::int64_t number);
  std::int64_t windows(std::size_t source) const;

  std::vector<TokenSource> sources_;
  std::int64_t context_;
  std::uint64_t seed_;
  std::vector<std::int64_t> taken_;
  std::vector<Epoch> epochs_;
};

}  // namespace pare
