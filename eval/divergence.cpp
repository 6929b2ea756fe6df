#include "eval/divergence.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>

#include "core/error.h"
#include "eval/rows.h"

namespace pare {
namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Predictions of the window: rows [first, last), row t predicting id t + 1.
struct RowRange {
  std::int64_t first = 0, last = 0;
};

RowRange scored_rows(const Window& window, const CompareOptions& options) {
  const auto n = static_cast<std::int64_t>(window.ids.size());
  std::int64_t first = std::max<std::int64_t>(window.first_scored, 1) - 1;
  if (options.score == ScoreRule::kSecondHalf) {
    if (n != options.context) return {};
    first = std::max(first, options.context / 2);
  }
  return first < n - 1 ? RowRange{first, n - 1} : RowRange{};
}

std::int64_t block_rows(const CompareOptions& options, std::int64_t vocab) {
  if (options.rows_per_block > 0) return options.rows_per_block;
  return std::clamp<std::int64_t>((std::int64_t{4} << 20) / std::max<std::int64_t>(vocab, 1), 16, 512);
}

// One entry per prediction; index order is window order.
struct Tally {
  std::vector<double> original_loss, compressed_loss, kl, same;
  std::vector<std::int64_t> document, window;
  std::int64_t windows = 0;

  void resize(std::size_t n, bool pair) {
    original_loss.resize(n);
    document.resize(n);
    window.resize(n);
    if (!pair) return;
    compressed_loss.resize(n);
    kl.resize(n);
    same.resize(n);
  }
};

Tally plan_tally(std::span<const Window> windows, const CompareOptions& options, bool pair) {
  Tally tally;
  std::size_t n = 0;
  for (const Window& window : windows) {
    const RowRange rows = scored_rows(window, options);
    n += static_cast<std::size_t>(rows.last - rows.first);
  }
  if (n == 0) {
    throw input_error("text", "at least one token to predict",
                      options.score == ScoreRule::kSecondHalf
                          ? "no window of exactly " + std::to_string(options.context) + " tokens"
                          : "no window of two tokens or more",
                      options.score == ScoreRule::kSecondHalf ? "give more text, a smaller --ctx or --score all"
                                                              : "give a text that is not empty");
  }
  tally.resize(n, pair);
  return tally;
}

[[noreturn]] void refuse_row(const std::string& name, std::size_t window, std::int64_t row) {
  throw failure(name, "finite logits", "NaN or infinite logits in window " + std::to_string(window) + ", position " +
                                           std::to_string(row), "the model is broken: check how it was made");
}

void check_id(std::int32_t id, std::int64_t vocab, std::size_t window) {
  if (id >= 0 && id < vocab) return;
  throw input_error("window " + std::to_string(window), "ids below the vocabulary size " + std::to_string(vocab),
                    "id " + std::to_string(id), "the text was tokenized for another model");
}

void check_ids(const Window& window, std::int64_t vocab, std::size_t index) {
  for (const std::int32_t id : window.ids) check_id(id, vocab, index);
}

// Documents as clusters when there are at least two of them, else windows; renumbered densely.
struct Clusters {
  std::vector<std::int64_t> of;
  std::int64_t count = 0, documents = 0;
  std::string name;
};

std::vector<std::int64_t> dense(const std::vector<std::int64_t>& labels, std::int64_t& count) {
  std::vector<std::int64_t> sorted = labels;
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  count = static_cast<std::int64_t>(sorted.size());
  std::vector<std::int64_t> result(labels.size());
  for (std::size_t i = 0; i < labels.size(); ++i) {
    result[i] = std::lower_bound(sorted.begin(), sorted.end(), labels[i]) - sorted.begin();
  }
  return result;
}

Clusters choose_clusters(const Tally& tally) {
  Clusters clusters;
  clusters.of = dense(tally.document, clusters.count);
  clusters.documents = clusters.count;
  clusters.name = "documents";
  if (clusters.count < 2) {
    clusters.of = dense(tally.window, clusters.count);
    clusters.name = "windows";
  }
  return clusters;
}

ModelScore model_score(std::string name, const std::vector<double>& loss, const Clusters& clusters, double seconds) {
  ModelScore score;
  score.name = std::move(name);
  score.loss = clustered_mean(loss, clusters.of, clusters.count);
  score.perplexity.value = std::exp(score.loss.value);
  if (score.loss.standard_error) score.perplexity.standard_error = score.perplexity.value * *score.loss.standard_error;
  score.seconds = seconds;
  return score;
}

// Windows of one document follow each other, so a unit is a run of equal labels.
std::vector<UnitFigures> sum_units(const Tally& tally, Unit per, double tail, bool pair) {
  std::vector<UnitFigures> units;
  const std::vector<std::int64_t>& label = per == Unit::kDocument ? tally.document : tally.window;
  for (std::size_t i = 0; i < label.size(); ++i) {
    if (i == 0 || label[i] != label[i - 1]) units.push_back({.document = tally.document[i], .window = tally.window[i]});
    UnitFigures& unit = units.back();
    ++unit.predictions;
    unit.original_loss += tally.original_loss[i];
    if (!pair) continue;
    unit.compressed_loss += tally.compressed_loss[i];
    unit.kl += tally.kl[i];
    unit.same_top1 += tally.same[i] > 0 ? 1 : 0;
    if (tally.kl[i] >= tail) unit.kl_tail.push_back(tally.kl[i]);
  }
  for (UnitFigures& unit : units) std::sort(unit.kl_tail.begin(), unit.kl_tail.end());
  return units;
}

DivergenceResult summarize(const Tally& tally, Unit per, const std::string& original_name,
                           const std::string* compressed_name, double original_seconds, double compressed_seconds) {
  DivergenceResult result;
  const Clusters clusters = choose_clusters(tally);
  result.windows = tally.windows;
  result.documents = clusters.documents;
  result.predictions = static_cast<std::int64_t>(tally.original_loss.size());
  result.clusters = clusters.name;
  result.original = model_score(original_name, tally.original_loss, clusters, original_seconds);
  result.per = per;
  if (!compressed_name) {
    if (per != Unit::kNone) result.units = sum_units(tally, per, 0, false);
    return result;
  }
  result.compressed = model_score(*compressed_name, tally.compressed_loss, clusters, compressed_seconds);
  result.kl = clustered_mean(tally.kl, clusters.of, clusters.count);
  result.top1 = clustered_mean(tally.same, clusters.of, clusters.count);
  std::vector<double> difference(tally.original_loss.size());
  for (std::size_t i = 0; i < difference.size(); ++i) difference[i] = tally.compressed_loss[i] - tally.original_loss[i];
  result.log_perplexity_ratio = clustered_mean(difference, clusters.of, clusters.count);
  std::vector<double> sorted = tally.kl;
  std::sort(sorted.begin(), sorted.end());
  result.kl_median = quantile(sorted, 0.5);
  result.kl_99 = quantile(sorted, 0.99);
  result.kl_999 = quantile(sorted, 0.999);
  result.kl_maximum = sorted.back();
  if (per != Unit::kNone) result.units = sum_units(tally, per, result.kl_99, true);
  return result;
}

// Rows [0, count) of a block of `stride` columns, moved together to `width` columns.
void narrow(std::vector<float>& block, std::int64_t count, std::int64_t stride, std::int64_t width) {
  if (stride == width) return;
  for (std::int64_t row = 1; row < count; ++row) {
    std::copy_n(block.begin() + row * stride, width, block.begin() + row * width);
  }
}

// Running means for the progress line; the result is computed from the whole tally.
class Running {
 public:
  void show(Progress& progress, std::size_t done_windows, std::size_t filled, const Tally& tally, bool pair) {
    for (; seen_ < filled; ++seen_) {
      loss_ += pair ? tally.compressed_loss[seen_] : tally.original_loss[seen_];
      if (pair) kl_ += tally.kl[seen_];
    }
    char text[96];
    const double n = static_cast<double>(std::max<std::size_t>(filled, 1));
    if (pair) {
      std::snprintf(text, sizeof text, "loss %.4f, KL %.5f", loss_ / n, kl_ / n);
    } else {
      std::snprintf(text, sizeof text, "loss %.4f", loss_ / n);
    }
    progress.update(static_cast<std::int64_t>(done_windows), text);
  }

 private:
  std::size_t seen_ = 0;
  double loss_ = 0, kl_ = 0;
};

// KL of a cached row (top k + tail) against full logits coarsened the same way.
double bucket_divergence(const CachedWindow& cached, std::int64_t row, const float* q_row, const RowSoftmax& q,
                         std::int64_t vocab) {
  const std::int64_t k = cached.top_k;
  const std::uint32_t* index = cached.index.data() + row * k;
  const float* log_prob = cached.log_prob.data() + row * k;
  double p_sum = 0;
  for (std::int64_t i = 0; i < k; ++i) p_sum += std::exp(static_cast<double>(log_prob[i]));
  // Half precision may lift the sum above one (or, with every id present, leave it off one): normalise then.
  const bool normalise = p_sum > 1 || k == vocab;
  const double log_norm = normalise ? std::log(p_sum) : 0.0;
  const double p_tail = normalise ? 0.0 : 1.0 - p_sum;
  double q_sum = 0, kl = 0;
  for (std::int64_t i = 0; i < k; ++i) {
    const double lp = static_cast<double>(log_prob[i]) - log_norm;
    const double lq = q.log_prob(q_row, index[i]);
    const double p = std::exp(lp);
    q_sum += std::exp(lq);
    if (p > 0) kl += p * (lp - lq);
  }
  if (p_tail > 0) {
    // 1 - q_sum carries rounding of about 1e-16; a larger tail only lowers the bound.
    const double q_tail = std::max(1.0 - q_sum, std::numeric_limits<double>::epsilon());
    kl += p_tail * (std::log(p_tail) - std::log(q_tail));
  }
  return std::max(0.0, kl);
}

}  // namespace

ScoreRule parse_score_rule(std::string_view name) {
  if (name == "all") return ScoreRule::kAll;
  if (name == "second-half") return ScoreRule::kSecondHalf;
  throw usage_error("--score", "all or second-half", std::string(name));
}

Unit parse_unit(std::string_view name) {
  if (name == "document") return Unit::kDocument;
  if (name == "window") return Unit::kWindow;
  throw usage_error("--per", "document or window", std::string(name));
}

DivergenceResult compare(LogitsSource& original, LogitsSource* compressed, std::span<const Window> windows,
                         const CompareOptions& options, Progress& progress) {
  const auto start = Clock::now();
  const std::int64_t a_vocab = original.vocab_size();
  const std::int64_t b_vocab = compressed ? compressed->vocab_size() : a_vocab;
  if (options.vocab == 0 && a_vocab != b_vocab) {
    throw input_error(compressed->name(), "the original's vocabulary of " + std::to_string(a_vocab),
                      std::to_string(b_vocab));
  }
  const std::int64_t vocab = options.vocab > 0 ? options.vocab : a_vocab;
  if (vocab > a_vocab || vocab > b_vocab) {
    throw input_error("vocabulary", "at most " + std::to_string(std::min(a_vocab, b_vocab)) + " ids",
                      std::to_string(vocab));
  }
  if (options.record && vocab != a_vocab) {
    throw input_error("cache", "the original's whole vocabulary of " + std::to_string(a_vocab), std::to_string(vocab));
  }
  Tally tally = plan_tally(windows, options, compressed != nullptr);
  const std::int64_t rows_per_block = block_rows(options, std::max(a_vocab, b_vocab));
  std::vector<float> a(static_cast<std::size_t>(rows_per_block * a_vocab));
  std::vector<float> b(compressed ? static_cast<std::size_t>(rows_per_block * b_vocab) : 0);
  double a_seconds = 0, b_seconds = 0;
  std::size_t filled = 0;
  Running running;
  progress.begin(compressed ? "comparing" : "scoring", static_cast<std::int64_t>(windows.size()));
  for (std::size_t w = 0; w < windows.size(); ++w) {
    throw_if_interrupted("eval", "run the same command again");
    const Window& window = windows[w];
    const RowRange scored = scored_rows(window, options);
    const auto n = static_cast<std::int64_t>(window.ids.size());
    // A cache holds every row of every window: distillation uses them all.
    const RowRange wanted = options.record ? RowRange{0, n} : scored;
    if (wanted.first == wanted.last) continue;
    check_ids(window, vocab, w);
    if (scored.first < scored.last) ++tally.windows;
    auto lap = Clock::now();
    original.begin(window.ids);
    a_seconds += since(lap);
    if (compressed && scored.first < scored.last) {
      lap = Clock::now();
      compressed->begin(window.ids);
      b_seconds += since(lap);
    }
    if (options.record) options.record->begin(window.ids);
    for (std::int64_t first = wanted.first; first < wanted.last;) {
      // Blocks break at the edges of the scored range, so that a block is scored whole or not at all.
      std::int64_t last = std::min(wanted.last, first + rows_per_block);
      if (first < scored.first) last = std::min(last, scored.first);
      if (first < scored.last) last = std::min(last, scored.last);
      const std::int64_t count = last - first;
      const bool in_score = first >= scored.first && last <= scored.last;
      lap = Clock::now();
      original.logits(first, count, a.data());
      a_seconds += since(lap);
      if (options.record) options.record->rows(count, a.data());
      if (in_score) {
        narrow(a, count, a_vocab, vocab);
        if (compressed) {
          lap = Clock::now();
          compressed->logits(first, count, b.data());
          b_seconds += since(lap);
          narrow(b, count, b_vocab, vocab);
        }
        std::int64_t bad = -1;
#pragma omp parallel for schedule(static) if (count * vocab > 65536) reduction(max : bad)
        for (std::int64_t r = 0; r < count; ++r) {
          const std::size_t at = filled + static_cast<std::size_t>(r);
          const std::int32_t target = window.ids[static_cast<std::size_t>(first + r + 1)];
          const float* a_row = a.data() + r * vocab;
          RowSoftmax pa, pb;
          tally.document[at] = window.document;
          tally.window[at] = static_cast<std::int64_t>(w);
          if (!compressed) {
            if (!row_softmax(a_row, vocab, pa)) bad = std::max(bad, 2 * r);
            tally.original_loss[at] = -pa.log_prob(a_row, target);
            continue;
          }
          const float* b_row = b.data() + r * vocab;
          double kl = 0;
          if (!row_divergence(a_row, b_row, vocab, pa, pb, kl)) {
            RowSoftmax unused;
            bad = std::max(bad, 2 * r + (row_softmax(a_row, vocab, unused) ? 1 : 0));
            continue;
          }
          tally.original_loss[at] = -pa.log_prob(a_row, target);
          tally.compressed_loss[at] = -pb.log_prob(b_row, target);
          tally.kl[at] = kl;
          tally.same[at] = pa.argmax == pb.argmax ? 1.0 : 0.0;
        }
        if (bad >= 0) refuse_row(bad % 2 ? compressed->name() : original.name(), w, first + bad / 2);
        filled += static_cast<std::size_t>(count);
      }
      first = last;
    }
    running.show(progress, w + 1, filled, tally, compressed != nullptr);
  }
  progress.end();
  const std::string compressed_name = compressed ? compressed->name() : "";
  DivergenceResult result =
      summarize(tally, options.per, original.name(), compressed ? &compressed_name : nullptr, a_seconds, b_seconds);
  result.seconds = since(start);
  return result;
}

DivergenceResult compare_cached(CachedLogits& original, const std::string& original_name, LogitsSource& compressed,
                                std::span<const Window> windows, const CompareOptions& options, Progress& progress) {
  const auto start = Clock::now();
  const std::int64_t b_vocab = compressed.vocab_size();
  const std::int64_t vocab = original.info().vocab_size;
  if (b_vocab != vocab && options.vocab == 0) {
    throw input_error(compressed.name(), "the cache's vocabulary of " + std::to_string(vocab), std::to_string(b_vocab));
  }
  if (options.vocab != 0 && options.vocab != vocab) {
    throw input_error("cache", "a vocabulary of " + std::to_string(options.vocab), std::to_string(vocab),
                      "a cache cannot be cut to fewer ids: compare without --cache");
  }
  if (original.windows() != static_cast<std::int64_t>(windows.size())) {
    throw input_error("cache", std::to_string(windows.size()) + " windows", std::to_string(original.windows()));
  }
  Tally tally = plan_tally(windows, options, true);
  const std::int64_t rows_per_block = block_rows(options, b_vocab);
  std::vector<float> b(static_cast<std::size_t>(rows_per_block * b_vocab));
  double a_seconds = 0, b_seconds = 0;
  std::size_t filled = 0;
  Running running;
  progress.begin("comparing with the cache", static_cast<std::int64_t>(windows.size()));
  for (std::size_t w = 0; w < windows.size(); ++w) {
    throw_if_interrupted("eval", "run the same command again");
    const Window& window = windows[w];
    const RowRange scored = scored_rows(window, options);
    if (scored.first == scored.last) continue;
    check_ids(window, vocab, w);
    ++tally.windows;
    auto lap = Clock::now();
    const CachedWindow cached = original.read(static_cast<std::int64_t>(w));
    a_seconds += since(lap);
    if (cached.ids != window.ids) {
      throw input_error("cache", "the ids of the text in window " + std::to_string(w), "other ids");
    }
    lap = Clock::now();
    compressed.begin(window.ids);
    b_seconds += since(lap);
    for (std::int64_t first = scored.first; first < scored.last;) {
      const std::int64_t last = std::min(scored.last, first + rows_per_block);
      const std::int64_t count = last - first;
      lap = Clock::now();
      compressed.logits(first, count, b.data());
      b_seconds += since(lap);
      narrow(b, count, b_vocab, vocab);
      std::int64_t bad = -1;
#pragma omp parallel for schedule(static) if (count * vocab > 65536) reduction(max : bad)
      for (std::int64_t r = 0; r < count; ++r) {
        const std::size_t at = filled + static_cast<std::size_t>(r);
        const std::int64_t row = first + r;
        const float* b_row = b.data() + r * vocab;
        RowSoftmax q;
        if (!row_softmax(b_row, vocab, q)) {
          bad = std::max(bad, r);
          continue;
        }
        tally.document[at] = window.document;
        tally.window[at] = static_cast<std::int64_t>(w);
        tally.original_loss[at] = -static_cast<double>(cached.target_log_prob[static_cast<std::size_t>(row)]);
        tally.compressed_loss[at] = -q.log_prob(b_row, window.ids[static_cast<std::size_t>(row + 1)]);
        tally.kl[at] = bucket_divergence(cached, row, b_row, q, vocab);
        const std::uint32_t top = cached.index[static_cast<std::size_t>(row * cached.top_k)];
        tally.same[at] = top == static_cast<std::uint32_t>(q.argmax) ? 1.0 : 0.0;
      }
      if (bad >= 0) refuse_row(compressed.name(), w, first + bad);
      filled += static_cast<std::size_t>(count);
      first = last;
    }
    running.show(progress, w + 1, filled, tally, true);
  }
  progress.end();
  const std::string compressed_name = compressed.name();
  DivergenceResult result = summarize(tally, options.per, original_name, &compressed_name, a_seconds, b_seconds);
  result.from_cache = true;
  result.top_k = original.info().top_k;
  result.seconds = since(start);
  return result;
}

}  // namespace pare
