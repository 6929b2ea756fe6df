#include "eval/logit_cache.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <random>

#include "core/error.h"
#include "eval/divergence.h"
#include "tests/eval/fake_logits.h"

namespace pare {
namespace {

class LogitCacheTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("pare_cache_" + std::to_string(::getpid()) + "_" +
                                           ::testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::create_directories(folder_);
    file_ = folder_ / "cache.h5";
  }
  void TearDown() override { fs::remove_all(folder_); }

  LogitCacheInfo info(std::int64_t vocab, std::int64_t k, const std::vector<Window>& windows) const {
    return {vocab, 64, k, windows_hash(windows), "0123456789abcdef"};
  }

  void write(FakeLogits& model, const std::vector<Window>& windows, std::int64_t k) {
    LogitCacheWriter writer(file_, info(model.vocab_size(), k, windows));
    for (const Window& window : windows) {
      std::vector<float> rows(window.ids.size() * static_cast<std::size_t>(model.vocab_size()));
      model.begin(window.ids);
      model.logits(0, static_cast<std::int64_t>(window.ids.size()), rows.data());
      writer.append(window.ids, rows.data());
    }
    writer.finish();
  }

  static void expect_refused(const fs::path& file, const std::string& what, const LogitCacheInfo& expected = {}) {
    try {
      LogitCacheReader reader(file, expected);
      for (std::int64_t w = 0; w < reader.windows(); ++w) reader.read(w);
      FAIL() << "accepted: " << what;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput) << error.what();
      EXPECT_NE(std::string(error.what()).find(what), std::string::npos) << error.what();
    }
  }

  fs::path folder_, file_;
};

TEST_F(LogitCacheTest, RoundTripKeepsOrderAndValues) {
  for (const std::int64_t vocab : {std::int64_t{37}, std::int64_t{70001}}) {  // u16 and u32 ids in the file
    FakeLogits model(vocab, 3, 3.0);
    const auto windows = random_windows(vocab, {{20, 0}, {1, 0}, {33, 2}}, 4);
    write(model, windows, 64);
    EXPECT_TRUE(LogitCacheReader::is_cache(file_));
    LogitCacheReader reader(file_, info(vocab, 64, windows));
    ASSERT_EQ(reader.windows(), 3);
    const std::int64_t k = std::min<std::int64_t>(64, vocab);
    EXPECT_EQ(reader.info().top_k, k);
    EXPECT_EQ(reader.info().context, 64);
    std::vector<float> row(static_cast<std::size_t>(vocab));
    for (const std::int64_t w : {2, 0, 1}) {
      const CachedWindow cached = reader.read(w);
      const auto& ids = windows[static_cast<std::size_t>(w)].ids;
      ASSERT_EQ(cached.ids, ids);
      ASSERT_EQ(cached.index.size(), ids.size() * static_cast<std::size_t>(k));
      model.begin(ids);
      for (std::size_t t = 0; t < ids.size(); ++t) {
        model.row(static_cast<std::int64_t>(t), row.data());
        const auto lp = exact_log_softmax(row);
        std::vector<std::uint32_t> order(row.size());
        for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::uint32_t>(i);
        std::stable_sort(order.begin(), order.end(), [&](auto x, auto y) { return row[x] > row[y]; });
        for (std::size_t i = 0; i < static_cast<std::size_t>(k); ++i) {
          const std::size_t at = t * static_cast<std::size_t>(k) + i;
          ASSERT_EQ(cached.index[at], order[i]);
          const double exact = static_cast<double>(lp[order[i]]);
          ASSERT_NEAR(cached.log_prob[at], exact, 0.0005 * std::abs(exact) + 1e-7);
        }
        EXPECT_NEAR(row[order[0]] - static_cast<double>(lp[order[0]]), cached.log_sum_exp[t], 1e-5);
        const double target = t + 1 < ids.size() ? static_cast<double>(lp[static_cast<std::size_t>(ids[t + 1])]) : 0.0;
        EXPECT_NEAR(cached.target_log_prob[t], target, 1e-6 * (1 + std::abs(target)));
      }
    }
    EXPECT_THROW(reader.read(3), Error);
    EXPECT_THROW(reader.read(-1), Error);
  }
}

TEST_F(LogitCacheTest, TiesAreOrderedById) {
  LogitCacheWriter writer(file_, {9, 8, 4, "c", "m"});
  const std::vector<std::int32_t> ids = {1};
  const std::vector<float> row = {0, 2, 1, 2, 1, 1, 0, 2, 1};
  writer.append(ids, row.data());
  writer.finish();
  EXPECT_EQ(LogitCacheReader(file_).read(0).index, (std::vector<std::uint32_t>{1, 3, 7, 2}));
}

TEST_F(LogitCacheTest, ComparesAsTheModelItselfUpToHalfPrecision) {
  FakeLogits a(500, 1, 2.0), b(500, 2, 2.0), same(500, 1, 2.0);
  const auto windows = random_windows(500, {{60, 0}, {64, 0}, {33, 2}}, 4);
  Progress quiet(true);
  DivergenceResult exact;
  {
    LogitCacheWriter writer(file_, info(500, 64, windows));
    CompareOptions options;
    options.record = &writer;
    options.rows_per_block = 13;
    exact = compare(a, &b, windows, options, quiet);
    writer.finish();
  }
  EXPECT_EQ(exact.predictions, 59 + 63 + 32);
  const DivergenceResult plain = compare(a, &b, windows, {}, quiet);
  EXPECT_EQ(plain.kl.value, exact.kl.value);  // recording changes nothing
  LogitCacheReader reader(file_);
  const DivergenceResult cached = compare_cached(reader, "a", b, windows, {}, quiet);
  EXPECT_EQ(cached.top1.value, exact.top1.value);
  EXPECT_NEAR(cached.original.loss.value, exact.original.loss.value, 1e-6);
  EXPECT_LE(cached.kl.value, exact.kl.value + 1e-3);
  EXPECT_GT(cached.kl.value, 0.5 * exact.kl.value);
  const DivergenceResult self = compare_cached(reader, "a", same, windows, {}, quiet);
  EXPECT_LT(self.kl.value, 1e-6);
  EXPECT_EQ(self.top1.value, 1.0);
}

TEST_F(LogitCacheTest, OtherModelCorpusContextOrVocabularyIsRefused) {
  FakeLogits model(37, 3, 3.0);
  const auto windows = random_windows(37, {{20, 0}, {33, 2}}, 4);
  write(model, windows, 8);
  LogitCacheInfo wrong = info(37, 8, windows);
  wrong.model_hash = "another";
  expect_refused(file_, "made with model another", wrong);
  wrong = info(37, 8, random_windows(37, {{20, 0}, {33, 2}}, 5));
  expect_refused(file_, "made with corpus", wrong);
  wrong = info(37, 8, windows);
  wrong.context = 65;
  expect_refused(file_, "made with context 65", wrong);
  wrong = info(38, 8, windows);
  expect_refused(file_, "made with vocabulary 38", wrong);
}

TEST_F(LogitCacheTest, HashSeesIdsAndBoundaries) {
  auto windows = random_windows(37, {{20, 0}, {20, 1}}, 4);
  const std::string hash = windows_hash(windows);
  auto moved = windows;
  moved[1].ids.insert(moved[1].ids.begin(), moved[0].ids.back());
  moved[0].ids.pop_back();
  EXPECT_NE(windows_hash(moved), hash);
  moved = windows;
  moved[1].ids[3] ^= 1;
  EXPECT_NE(windows_hash(moved), hash);
  EXPECT_EQ(windows_hash(windows), hash);
}

TEST_F(LogitCacheTest, TruncationIsRefused) {
  FakeLogits model(37, 3, 3.0);
  write(model, random_windows(37, {{20, 0}, {33, 2}}, 4), 8);
  const std::size_t whole = fs::file_size(file_);
  std::vector<std::size_t> sizes = {whole - 1};
  for (std::size_t i = 40; i-- > 0;) sizes.push_back(2048 + (whole - 2048) * i / 40);
  for (std::size_t i = 20; i-- > 0;) sizes.push_back(i * 97);
  for (const std::size_t size : sizes) {  // falling: the file is cut in place
    fs::resize_file(file_, size);
    expect_refused(file_, "complete logit cache");
  }
}

// The size in the first block is made to agree, so that HDF5 itself meets the damage: an error or wrong numbers in
// range, never a crash. HDF5 cannot close what it opened in such files, hence a process of its own.
TEST_F(LogitCacheTest, DamagedFilesNeverCrash) {
  FakeLogits model(37, 3, 3.0);
  write(model, random_windows(37, {{20, 0}, {33, 2}}, 4), 8);
  const auto read_damaged = [&] {
    std::ifstream in(file_, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(in)), {});
    std::mt19937_64 random(1);
    int refused = 0;
    for (int round = 0; round < 100; ++round) {
      std::string damaged = bytes;
      if (round % 3 == 0) {
        damaged.resize(512 + random() % (bytes.size() - 512));
        const std::string head = "pare-logit-cache 2 bytes " + std::to_string(damaged.size()) + "\n";
        std::fill(damaged.begin(), damaged.begin() + 512, '\0');
        std::copy(head.begin(), head.end(), damaged.begin());
      } else {
        // Most of the file is unused chunk space: the structure stands in the first kilobytes.
        for (int i = 0; i < 4; ++i) damaged[512 + random() % 8192] = static_cast<char>(random());
      }
      const fs::path path = folder_ / "damaged.h5";
      std::ofstream(path, std::ios::binary) << damaged;
      try {
        LogitCacheReader reader(path);
        for (std::int64_t w = 0; w < reader.windows(); ++w) {
          const CachedWindow window = reader.read(w);
          for (const std::uint32_t index : window.index) {
            if (static_cast<std::int64_t>(index) >= reader.info().vocab_size) std::_Exit(3);
          }
        }
      } catch (const Error& error) {
        if (error.code() != ExitCode::kInput) std::_Exit(4);
        ++refused;
      }
    }
    std::_Exit(refused > 30 ? 0 : 5);
  };
  EXPECT_EXIT(read_damaged(), ::testing::ExitedWithCode(0), "");
}

TEST_F(LogitCacheTest, ForeignFilesAreRefusedBeforeHdf5SeesThem) {
  std::ofstream(file_) << std::string(4096, 'x');
  expect_refused(file_, "no magic");
  EXPECT_FALSE(LogitCacheReader::is_cache(file_));
  expect_refused(folder_ / "missing.h5", "no such file");
  expect_refused(folder_, "no such file");
}

TEST_F(LogitCacheTest, NothingIsLeftWithoutFinish) {
  {
    LogitCacheWriter writer(file_, {9, 8, 4, "c", "m"});
    const std::vector<std::int32_t> ids = {1, 2};
    writer.begin(ids);
    const std::vector<float> row(9);
    writer.rows(1, row.data());
    EXPECT_THROW(writer.finish(), Error);            // a row is missing
    EXPECT_THROW(writer.begin(ids), Error);
    EXPECT_THROW(writer.rows(2, row.data()), Error);  // one too many
  }
  EXPECT_TRUE(fs::is_empty(folder_));
  LogitCacheWriter writer(file_, {9, 8, 4, "c", "m"});
  const std::vector<std::int32_t> ids = {9};
  EXPECT_THROW(writer.begin(ids), Error);
  EXPECT_THROW(LogitCacheWriter(folder_ / "no" / "such" / "folder.h5", {9, 8, 4, "c", "m"}), Error);
}

TEST_F(LogitCacheTest, NanIsRefused) {
  LogitCacheWriter writer(file_, {9, 8, 4, "c", "m"});
  const std::vector<std::int32_t> ids = {1};
  std::vector<float> row(9);
  row[4] = std::nanf("");
  EXPECT_THROW(writer.append(ids, row.data()), Error);
}

}  // namespace
}  // namespace pare
