#include "eval/divergence.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <limits>
#include <map>

#include "core/error.h"
#include "eval/perplexity.h"
#include "tests/eval/fake_logits.h"

namespace pare {
namespace {

// Everything again, in long double, straight from the definitions.
struct BruteForce {
  std::vector<double> loss_a, loss_b, kl, same;
  std::vector<std::int64_t> document, window;
  BruteForce(FakeLogits& a, FakeLogits& b, const std::vector<Window>& windows, std::int64_t first_row = 0) {
    const auto vocab = static_cast<std::size_t>(a.vocab_size());
    std::vector<float> pa(vocab), pb(vocab);
    for (std::size_t w = 0; w < windows.size(); ++w) {
      a.begin(windows[w].ids);
      b.begin(windows[w].ids);
      const auto n = static_cast<std::int64_t>(windows[w].ids.size());
      for (std::int64_t t = std::max(windows[w].first_scored - 1, first_row); t < n - 1; ++t) {
        a.logits(t, 1, pa.data());
        b.logits(t, 1, pb.data());
        const auto target = static_cast<std::size_t>(windows[w].ids[static_cast<std::size_t>(t + 1)]);
        loss_a.push_back(static_cast<double>(-exact_log_softmax(pa)[target]));
        loss_b.push_back(static_cast<double>(-exact_log_softmax(pb)[target]));
        kl.push_back(static_cast<double>(exact_kl(pa, pb)));
        same.push_back(std::max_element(pa.begin(), pa.end()) - pa.begin() == std::max_element(pb.begin(), pb.end()) - pb.begin());
        document.push_back(windows[w].document);
        window.push_back(static_cast<std::int64_t>(w));
      }
    }
  }
};

double mean(const std::vector<double>& x) {
  long double sum = 0;
  for (const double v : x) sum += v;
  return static_cast<double>(sum / x.size());
}

double cluster_error(const std::vector<double>& x, const std::vector<std::int64_t>& label) {
  const double m = mean(x);
  std::map<std::int64_t, long double> residual;
  for (std::size_t i = 0; i < x.size(); ++i) residual[label[i]] += x[i] - m;
  long double squares = 0;
  for (const auto& [key, r] : residual) squares += r * r;
  const auto g = static_cast<long double>(residual.size());
  return static_cast<double>(sqrtl(g / (g - 1) * squares) / x.size());
}

TEST(Divergence, EqualsBruteForceWithDocumentsAsClusters) {
  FakeLogits a(61, 1, 2.0), b(61, 2, 2.0);
  const auto windows = random_windows(61, {{9, 4}, {30, 4}, {2, 7}, {17, 9}, {25, 9}, {1, 11}}, 8);
  Progress quiet(true);
  CompareOptions options;
  options.rows_per_block = 7;  // blocks that do not divide the windows
  const DivergenceResult r = compare(a, &b, windows, options, quiet);
  EXPECT_EQ(a.largest_block, 7);
  const BruteForce expected(a, b, windows);
  EXPECT_EQ(r.predictions, 8 + 29 + 1 + 16 + 24);
  EXPECT_EQ(r.windows, 5);  // the window of one id predicts nothing
  EXPECT_EQ(r.documents, 3);
  EXPECT_EQ(r.clusters, "documents");
  EXPECT_NEAR(r.kl.value, mean(expected.kl), 1e-12);
  EXPECT_NEAR(r.original.loss.value, mean(expected.loss_a), 1e-12);
  EXPECT_NEAR(r.compressed->loss.value, mean(expected.loss_b), 1e-12);
  EXPECT_NEAR(r.original.perplexity.value, std::exp(mean(expected.loss_a)), 1e-9);
  EXPECT_NEAR(r.top1.value, mean(expected.same), 1e-15);
  EXPECT_NEAR(*r.kl.standard_error, cluster_error(expected.kl, expected.document), 1e-12);
  EXPECT_NEAR(*r.top1.standard_error, cluster_error(expected.same, expected.document), 1e-12);
  std::vector<double> difference;
  for (std::size_t i = 0; i < expected.kl.size(); ++i) difference.push_back(expected.loss_b[i] - expected.loss_a[i]);
  EXPECT_NEAR(r.log_perplexity_ratio.value, mean(difference), 1e-12);
  EXPECT_NEAR(*r.log_perplexity_ratio.standard_error, cluster_error(difference, expected.document), 1e-12);
  EXPECT_NEAR(*r.original.perplexity.standard_error,
              std::exp(mean(expected.loss_a)) * cluster_error(expected.loss_a, expected.document), 1e-9);
  std::vector<double> sorted = expected.kl;
  std::sort(sorted.begin(), sorted.end());
  EXPECT_NEAR(r.kl_median, (sorted[38] + sorted[39]) / 2 * (sorted.size() == 78), 1e-12);
  EXPECT_NEAR(r.kl_maximum, sorted.back(), 1e-12);
}

TEST(Divergence, OneDocumentMeansWindowsAsClusters) {
  FakeLogits a(23, 1, 1.0), b(23, 2, 1.0);
  const auto windows = random_windows(23, {{12, 3}, {12, 3}, {5, 3}}, 8);
  Progress quiet(true);
  const DivergenceResult r = compare(a, &b, windows, {}, quiet);
  const BruteForce expected(a, b, windows);
  EXPECT_EQ(r.clusters, "windows");
  EXPECT_NEAR(*r.kl.standard_error, cluster_error(expected.kl, expected.window), 1e-12);
  const DivergenceResult one = compare(a, &b, std::span(windows).first(1), {}, quiet);
  EXPECT_FALSE(one.kl.standard_error.has_value());  // one cluster says nothing about its spread
}

TEST(Divergence, IdenticalModelsAreExactlyEqual) {
  FakeLogits a(50, 7, 3.0), b(50, 7, 3.0);
  Progress quiet(true);
  const DivergenceResult r = compare(a, &b, random_windows(50, {{40, 0}, {40, 1}}, 2), {}, quiet);
  EXPECT_EQ(r.kl.value, 0.0);
  EXPECT_EQ(r.kl_maximum, 0.0);
  EXPECT_EQ(r.top1.value, 1.0);
  EXPECT_EQ(r.log_perplexity_ratio.value, 0.0);
}

TEST(Divergence, SecondHalfScoresWhatLlamaCppScores) {
  FakeLogits a(31, 1, 1.5), b(31, 2, 1.5);
  const auto windows = random_windows(31, {{16, 0}, {16, 0}, {15, 0}}, 4);
  Progress quiet(true);
  CompareOptions options;
  options.score = ScoreRule::kSecondHalf;
  options.context = 16;
  const DivergenceResult r = compare(a, &b, windows, options, quiet);
  // Rows 8..14 predict ids 9..15: n_ctx - 1 - n_ctx / 2 of each whole window, none of the short one.
  EXPECT_EQ(r.predictions, 2 * 7);
  EXPECT_EQ(r.windows, 2);
  const BruteForce expected(a, b, {windows[0], windows[1]}, 8);
  EXPECT_NEAR(r.kl.value, mean(expected.kl), 1e-12);
  EXPECT_NEAR(r.original.loss.value, mean(expected.loss_a), 1e-12);
  options.context = 20;
  EXPECT_THROW(compare(a, &b, windows, options, quiet), Error);
}

TEST(Divergence, FirstScoredKeepsThePrefixOut) {
  FakeLogits a(31, 1, 1.5);
  auto windows = random_windows(31, {{10, 0}, {10, 1}}, 4);
  windows[0].first_scored = windows[1].first_scored = 4;
  Progress quiet(true);
  EXPECT_EQ(compare(a, nullptr, windows, {}, quiet).predictions, 12);
}

TEST(Divergence, SameBitsAtAnyBlockSizeAndThreadCount) {
  FakeLogits a(1021, 1, 2.0), b(1021, 2, 2.0);
  const auto windows = random_windows(1021, {{60, 0}, {130, 1}}, 4);
  Progress quiet(true);
  std::vector<DivergenceResult> results;
  const int before = omp_get_max_threads();
  for (const auto& [threads, rows] : {std::pair{1, 3}, std::pair{3, 512}, std::pair{2, 128}}) {
    omp_set_num_threads(threads);
    CompareOptions options;
    options.rows_per_block = rows;
    results.push_back(compare(a, &b, windows, options, quiet));
  }
  omp_set_num_threads(before);
  for (const DivergenceResult& r : results) {
    EXPECT_EQ(r.kl.value, results[0].kl.value);
    EXPECT_EQ(r.original.loss.value, results[0].original.loss.value);
    EXPECT_EQ(*r.kl.standard_error, *results[0].kl.standard_error);
    EXPECT_EQ(r.kl_999, results[0].kl_999);
  }
}

TEST(Divergence, CommonPrefixOfPaddedVocabularies) {
  FakeLogits a(40, 1, 1.0);
  class Padded : public FakeLogits {
   public:
    Padded() : FakeLogits(48, 1, 1.0), inner_(40, 1, 1.0) {}
    void begin(std::span<const std::int32_t> ids) override { inner_.begin(ids); }
    void row(std::int64_t t, float* out) const override {
      inner_.row(t, out);
      for (int i = 40; i < 48; ++i) out[i] = 9.0f;  // padding rows that would win every argmax
    }

   private:
    FakeLogits inner_;
  } b;
  const auto windows = random_windows(40, {{20, 0}, {20, 1}}, 4);
  Progress quiet(true);
  EXPECT_THROW(compare(a, &b, windows, {}, quiet), Error);
  CompareOptions options;
  options.vocab = 40;
  const DivergenceResult r = compare(a, &b, windows, options, quiet);
  EXPECT_EQ(r.kl.value, 0.0);
  EXPECT_EQ(r.top1.value, 1.0);
  options.vocab = 41;
  EXPECT_THROW(compare(a, &b, windows, options, quiet), Error);
}

TEST(Divergence, NanNamesTheModelAndThePlace) {
  class Broken : public FakeLogits {
   public:
    Broken() : FakeLogits(40, 5, 1.0) {}
    void row(std::int64_t t, float* out) const override {
      FakeLogits::row(t, out);
      if (t == 6) out[39] = std::nanf("");
    }
  } broken;
  FakeLogits a(40, 1, 1.0);
  const auto windows = random_windows(40, {{5, 0}, {20, 1}}, 4);
  Progress quiet(true);
  try {
    compare(a, &broken, windows, {}, quiet);
    FAIL() << "NaN logits were scored";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kFailure);
    EXPECT_EQ(error.place(), "fake 5");
    EXPECT_NE(error.found().find("window 1, position 6"), std::string::npos) << error.found();
  }
  try {
    compare(broken, &a, windows, {}, quiet);
    FAIL() << "NaN logits were scored";
  } catch (const Error& error) {
    EXPECT_EQ(error.place(), "fake 5");
  }
}

TEST(Divergence, NothingToScoreAndForeignIdsAreInputErrors) {
  FakeLogits a(40, 1, 1.0);
  Progress quiet(true);
  for (const std::vector<Window>& windows : {std::vector<Window>{}, random_windows(40, {{1, 0}}, 1), random_windows(400, {{30, 0}}, 1)}) {
    try {
      compare(a, nullptr, windows, {}, quiet);
      FAIL();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput);
    }
  }
}

TEST(Divergence, PerplexityIsTheFirstHalfOfCompare) {
  FakeLogits a(40, 1, 1.0), b(40, 2, 1.0);
  const auto windows = random_windows(40, {{20, 0}, {20, 1}}, 4);
  Progress quiet(true);
  const PerplexityResult alone = perplexity(a, windows, {}, quiet);
  const DivergenceResult pair = compare(a, &b, windows, {}, quiet);
  EXPECT_EQ(alone.score.loss.value, pair.original.loss.value);
  EXPECT_EQ(alone.predictions, pair.predictions);
}

TEST(Divergence, UnitsAddUpToTheTotals) {
  FakeLogits a(61, 1, 2.0), b(61, 2, 2.0);
  const auto windows = random_windows(61, {{9, 4}, {30, 4}, {2, 7}, {1, 8}, {17, 9}, {25, 9}}, 8);
  Progress quiet(true);
  const BruteForce expected(a, b, windows);
  CompareOptions options;
  EXPECT_TRUE(compare(a, &b, windows, options, quiet).units.empty());
  for (const Unit per : {Unit::kDocument, Unit::kWindow}) {
    options.per = per;
    const DivergenceResult r = compare(a, &b, windows, options, quiet);
    ASSERT_EQ(r.units.size(), per == Unit::kDocument ? 3u : 5u);
    EXPECT_EQ(r.units[0].document, 4);
    EXPECT_EQ(r.units[0].predictions, per == Unit::kDocument ? 37 : 8);
    EXPECT_EQ(r.units[1].window, per == Unit::kDocument ? 2 : 1);
    UnitFigures sum;
    std::size_t at = 0;
    std::vector<double> tail;
    for (const UnitFigures& unit : r.units) {
      double kl = 0, loss = 0;
      const std::size_t end = at + static_cast<std::size_t>(unit.predictions);
      for (; at < end; ++at) {
        ASSERT_EQ((per == Unit::kDocument ? expected.document : expected.window)[at],
                  per == Unit::kDocument ? unit.document : unit.window);
        kl += expected.kl[at];
        loss += expected.loss_b[at];
      }
      EXPECT_NEAR(unit.kl, kl, 1e-11);
      EXPECT_NEAR(unit.compressed_loss, loss, 1e-11);
      EXPECT_TRUE(std::is_sorted(unit.kl_tail.begin(), unit.kl_tail.end()));
      tail.insert(tail.end(), unit.kl_tail.begin(), unit.kl_tail.end());
      sum.predictions += unit.predictions;
      sum.kl += unit.kl;
      sum.original_loss += unit.original_loss;
      sum.compressed_loss += unit.compressed_loss;
      sum.same_top1 += unit.same_top1;
    }
    const auto n = static_cast<double>(r.predictions);
    EXPECT_EQ(sum.predictions, r.predictions);
    EXPECT_NEAR(sum.kl / n, r.kl.value, 1e-13);
    EXPECT_NEAR(sum.original_loss / n, r.original.loss.value, 1e-13);
    EXPECT_NEAR((sum.compressed_loss - sum.original_loss) / n, r.log_perplexity_ratio.value, 1e-13);
    EXPECT_NEAR(static_cast<double>(sum.same_top1) / n, r.top1.value, 1e-15);
    // 78 predictions: the largest lies above the interpolated 99 % quantile, the next below.
    EXPECT_EQ(tail, (std::vector<double>{r.kl_maximum}));
    const Json json = to_json(r);
    const char* key = per == Unit::kDocument ? "per_document" : "per_window";
    ASSERT_EQ(json.at(key).size(), r.units.size());
    EXPECT_EQ(json[key][1]["kl"].get<double>(), r.units[1].kl);
    EXPECT_EQ(json[key][1]["same_top1"].get<std::int64_t>(), r.units[1].same_top1);
  }
  const DivergenceResult alone = compare(a, nullptr, windows, options, quiet);
  ASSERT_EQ(alone.units.size(), 5u);
  EXPECT_GT(alone.units[0].original_loss, 0);
  EXPECT_FALSE(to_json(alone)["per_window"][0].contains("kl"));
}

TEST(Divergence, InfinityReachesTheReportAsText) {
  const float inf = std::numeric_limits<float>::infinity();
  TableLogits a({{0, 0, 0}, {0, 0, 0}, {0, 0, 0}}), b({{0, 0, -inf}, {0, 0, 0}, {0, 0, 0}});
  Window window;
  window.ids = {0, 1, 1};
  Progress quiet(true);
  const DivergenceResult r = compare(a, &b, std::span(&window, 1), {}, quiet);
  EXPECT_EQ(to_json(r)["max_kl"], "inf");
  EXPECT_EQ(to_json(r)["mean_kl"]["value"], "inf");
  EXPECT_EQ(r.kl_median, std::numeric_limits<double>::infinity());
}

// Lists for the cached comparison without a file.
class MemoryCache : public CachedLogits {
 public:
  MemoryCache(FakeLogits& model, const std::vector<Window>& windows, std::int64_t k) {
    info_.vocab_size = model.vocab_size();
    info_.top_k = k;
    std::vector<float> row(static_cast<std::size_t>(model.vocab_size()));
    for (const Window& window : windows) {
      CachedWindow cached;
      cached.top_k = k;
      cached.ids = window.ids;
      model.begin(window.ids);
      for (std::size_t t = 0; t < window.ids.size(); ++t) {
        model.logits(static_cast<std::int64_t>(t), 1, row.data());
        const auto lp = exact_log_softmax(row);
        std::vector<std::uint32_t> order(row.size());
        for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::uint32_t>(i);
        std::stable_sort(order.begin(), order.end(), [&](auto x, auto y) { return row[x] > row[y]; });
        for (std::int64_t i = 0; i < k; ++i) {
          cached.index.push_back(order[static_cast<std::size_t>(i)]);
          cached.log_prob.push_back(static_cast<float>(lp[order[static_cast<std::size_t>(i)]]));
        }
        cached.target_log_prob.push_back(t + 1 < window.ids.size() ? static_cast<float>(lp[static_cast<std::size_t>(window.ids[t + 1])]) : 0);
        cached.log_sum_exp.push_back(0);
      }
      windows_.push_back(cached);
    }
  }
  const LogitCacheInfo& info() const override { return info_; }
  std::int64_t windows() const override { return static_cast<std::int64_t>(windows_.size()); }
  CachedWindow read(std::int64_t window) override { return windows_[static_cast<std::size_t>(window)]; }

 private:
  LogitCacheInfo info_;
  std::vector<CachedWindow> windows_;
};

TEST(CachedDivergence, TailBucketBoundsTheExactKlFromBelowAndGrowsWithK) {
  FakeLogits a(200, 1, 2.5), b(200, 2, 2.5);
  const auto windows = random_windows(200, {{40, 0}, {40, 1}, {25, 2}}, 4);
  Progress quiet(true);
  const DivergenceResult exact = compare(a, &b, windows, {}, quiet);
  double previous = 0;
  for (const std::int64_t k : {1, 4, 16, 64, 199, 200}) {
    MemoryCache cache(a, windows, k);
    const DivergenceResult r = compare_cached(cache, "fake 1", b, windows, {}, quiet);
    EXPECT_TRUE(r.from_cache);
    EXPECT_EQ(r.top_k, k);
    EXPECT_LE(r.kl.value, exact.kl.value + 1e-6) << k;
    EXPECT_GE(r.kl.value, previous - 1e-6) << k;
    EXPECT_EQ(r.top1.value, exact.top1.value);
    EXPECT_NEAR(r.original.loss.value, exact.original.loss.value, 1e-6);
    EXPECT_EQ(r.compressed->loss.value, exact.compressed->loss.value);
    previous = r.kl.value;
  }
  EXPECT_NEAR(previous, exact.kl.value, 1e-5);  // every id: nothing is hidden in the bucket
  EXPECT_GT(exact.kl.value, 1.0);
}

TEST(CachedDivergence, BucketEqualsBruteForce) {
  FakeLogits a(50, 1, 2.0), b(50, 2, 2.0);
  const auto windows = random_windows(50, {{30, 0}}, 4);
  MemoryCache cache(a, windows, 5);
  Progress quiet(true);
  const DivergenceResult r = compare_cached(cache, "fake 1", b, windows, {}, quiet);
  std::vector<float> pa(50), pb(50);
  long double total = 0;
  a.begin(windows[0].ids);
  b.begin(windows[0].ids);
  for (std::int64_t t = 0; t < 29; ++t) {
    a.logits(t, 1, pa.data());
    b.logits(t, 1, pb.data());
    const auto lp = exact_log_softmax(pa), lq = exact_log_softmax(pb);
    std::vector<int> order(50);
    for (int i = 0; i < 50; ++i) order[static_cast<std::size_t>(i)] = i;
    std::sort(order.begin(), order.end(), [&](int x, int y) { return lp[static_cast<std::size_t>(x)] > lp[static_cast<std::size_t>(y)]; });
    long double p_tail = 0, q_tail = 0;
    for (std::size_t i = 0; i < 50; ++i) {
      const auto id = static_cast<std::size_t>(order[i]);
      if (i < 5) {
        total += expl(lp[id]) * (lp[id] - lq[id]);
      } else {
        p_tail += expl(lp[id]);
        q_tail += expl(lq[id]);
      }
    }
    total += p_tail * logl(p_tail / q_tail);
  }
  EXPECT_NEAR(r.kl.value, static_cast<double>(total / 29), 1e-6);
}

TEST(CachedDivergence, OtherTextIsRefused) {
  FakeLogits a(50, 1, 2.0), b(50, 2, 2.0);
  const auto windows = random_windows(50, {{30, 0}}, 4), other = random_windows(50, {{30, 0}}, 5);
  MemoryCache cache(a, windows, 5);
  Progress quiet(true);
  EXPECT_THROW(compare_cached(cache, "fake 1", b, other, {}, quiet), Error);
  EXPECT_THROW(compare_cached(cache, "fake 1", b, random_windows(50, {{30, 0}, {4, 1}}, 4), {}, quiet), Error);
  FakeLogits wide(51, 2, 2.0);
  EXPECT_THROW(compare_cached(cache, "fake 1", wide, windows, {}, quiet), Error);
}

TEST(Statistics, QuantilesAreNumpysDefault) {
  const std::vector<double> x = {1, 2, 4, 8};  // numpy.quantile(x, q)
  EXPECT_DOUBLE_EQ(quantile(x, 0), 1);
  EXPECT_DOUBLE_EQ(quantile(x, 0.5), 3);
  EXPECT_DOUBLE_EQ(quantile(x, 0.25), 1.75);
  EXPECT_DOUBLE_EQ(quantile(x, 0.99), 7.88);
  EXPECT_DOUBLE_EQ(quantile(x, 1), 8);
  EXPECT_DOUBLE_EQ(quantile(std::vector<double>{5}, 0.999), 5);
}

TEST(Statistics, SingletonClustersGiveTheUsualStandardError) {
  const std::vector<double> x = {1, 2, 4, 8, -3};
  const std::vector<std::int64_t> each = {0, 1, 2, 3, 4}, one(5, 0);
  // numpy: std(x, ddof=1) / sqrt(5)
  EXPECT_NEAR(*clustered_mean(x, each, 5).standard_error, 1.8055470085267789, 1e-12);
  EXPECT_NEAR(*plain_mean(x).standard_error, 1.8055470085267789, 1e-12);
  EXPECT_FALSE(clustered_mean(x, one, 1).standard_error.has_value());
  EXPECT_FALSE(clustered_mean(x, one, 3).standard_error.has_value());  // empty clusters do not count
  EXPECT_EQ(clustered_mean({}, {}, 0).value, 0);
}

}  // namespace
}  // namespace pare
