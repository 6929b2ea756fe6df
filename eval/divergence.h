// How far one model's predictions are from another's, and the perplexity of both, in one pass over a corpus. Row
// blocks of both models are held side by side; nothing the size of windows x vocabulary ever exists.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/context.h"
#include "core/corpus.h"
#include "eval/cached_logits.h"
#include "eval/logits_source.h"
#include "eval/statistics.h"

namespace pare {

enum class ScoreRule {
  kAll,         // every id from Window::first_scored on is predicted and scored
  kSecondHalf,  // llama.cpp's rule: only windows of exactly `context` ids, only ids after position context / 2
};
ScoreRule parse_score_rule(std::string_view name);  // "all" | "second-half"

// What DivergenceResult::units are sums over: paired comparisons and resampling need more than totals.
enum class Unit { kNone, kDocument, kWindow };
Unit parse_unit(std::string_view name);  // "document" | "window"

struct CompareOptions {
  ScoreRule score = ScoreRule::kAll;
  Unit per = Unit::kNone;           // fills DivergenceResult::units
  std::int64_t context = 0;         // needed by kSecondHalf and recorded
  std::int64_t vocab = 0;           // 0: both sources must agree; else both are cut to these first ids
  std::int64_t rows_per_block = 0;  // 0: chosen so that a block of logits is about 16 MiB
  LogitsSink* record = nullptr;     // receives every row of the original (cache)
};

struct ModelScore {
  std::string name;
  Estimate loss;              // nats per token
  Estimate perplexity;        // exp(loss), standard error by the delta method
  double seconds = 0;         // time spent in this source
};

// Sums over the predictions of one document or one window, in the order of the text. What predicts nothing is left out.
struct UnitFigures {
  std::int64_t document = 0;                   // Window::document
  std::int64_t window = 0;                     // index; of a document, of its first window
  std::int64_t predictions = 0;
  double original_loss = 0, compressed_loss = 0, kl = 0;  // nats
  std::int64_t same_top1 = 0;
  std::vector<double> kl_tail;                 // every KL at or above DivergenceResult::kl_99, ascending
};

struct DivergenceResult {
  std::int64_t windows = 0, documents = 0, predictions = 0;
  std::string clusters;                   // what the standard errors are over: "documents" or "windows"
  ModelScore original;
  std::optional<ModelScore> compressed;   // the rest is meaningful only with it
  bool from_cache = false;                // true: kl is the top-k + tail-bucket lower bound
  std::int64_t top_k = 0;                 // of the cache
  Estimate kl;                            // KL(original || compressed), nats per prediction
  double kl_median = 0, kl_99 = 0, kl_999 = 0, kl_maximum = 0;
  Estimate top1;                          // share of predictions with the same argmax (ties: lowest id)
  Estimate log_perplexity_ratio;          // loss(compressed) - loss(original), paired
  Unit per = Unit::kNone;
  std::vector<UnitFigures> units;         // see CompareOptions::per
  double seconds = 0;                     // whole pass
};

// Streams all windows through `original` and, if not null, `compressed`. KL uses log-softmax in double at temperature
// 1. Sums are made in the order of the windows, whatever the number of threads.
// Errors: exit 3 when vocabularies differ (see CompareOptions::vocab) or nothing is left to score; exit 1 when a model
// gives NaN or infinite logits.
DivergenceResult compare(LogitsSource& original, LogitsSource* compressed, std::span<const Window> windows,
                         const CompareOptions& options, Progress& progress);

// The same against a cache of the original. KL of the distributions coarsened to the original's top k ids plus one
// bucket for all others: never above the full KL (log-sum inequality) up to the half precision of the cached values.
// Perplexity and top-1 are those of the full distributions.
DivergenceResult compare_cached(CachedLogits& original, const std::string& original_name, LogitsSource& compressed,
                                std::span<const Window> windows, const CompareOptions& options, Progress& progress);

// Rows "loss", "perplexity", "mean_kl" (or "mean_topk_kl"), ... ; stage "original" and `stage`.
void add_rows(const DivergenceResult& result, const std::string& stage, Report& report);
Json to_json(const DivergenceResult& result);
Json to_json(const Estimate& estimate);
// NaN and infinities, which JSON numbers cannot say, become the texts "nan", "inf", "-inf".
Json json_number(double value);

}  // namespace pare
