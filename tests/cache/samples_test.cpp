// Samples of the tail: without bias, at the promised size, still readable after kill -9, and files of version 1.
#include <gtest/gtest.h>
#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <fstream>
#include <numeric>

#include "core/error.h"
#include "eval/hdf5_handle.h"
#include "eval/logit_cache.h"
#include "eval/rows.h"
#include "eval/tail_samples.h"
#include "tests/eval/fake_logits.h"

namespace pare {
namespace {

TEST(TailSamples, EveryIdIsExpectedInProportion) {
  const std::vector<double> p = {0.3, 0.002, 0.1, 0.25, 0.05, 0.0, 0.2, 0.098};
  const std::vector<std::uint32_t> listed = {3, 0};
  for (const std::int64_t draws : {1, 3, 12, 255}) {
    std::vector<double> mean(p.size());
    constexpr int kPlaces = 20000;
    for (int i = 0; i < kPlaces; ++i) {
      const TailSamples s = sample_tail(p, listed, draws, (i + 0.5) / kPlaces);
      EXPECT_NEAR(s.mass, 0.45, 1e-12);
      std::int64_t total = 0;
      for (std::size_t j = 0; j < s.index.size(); ++j) {
        mean[s.index[j]] += static_cast<double>(s.count[j]) / kPlaces;
        total += s.count[j];
        EXPECT_TRUE(j == 0 || s.index[j - 1] < s.index[j]);
      }
      ASSERT_EQ(total, draws);
    }
    EXPECT_EQ(mean[0] + mean[3] + mean[5], 0);
    for (const std::size_t i : {1, 2, 4, 6, 7})
      EXPECT_NEAR(mean[i], static_cast<double>(draws) * p[i] / 0.45, 2.0 / kPlaces + 1e-9) << draws << " " << i;
  }
}

TEST(TailSamples, NothingLeftOut) {
  const std::vector<double> p = {0.5, 0.0, 0.5};
  const TailSamples all = sample_tail(p, std::vector<std::uint32_t>{0, 2}, 5, 0.3);
  EXPECT_EQ(all.mass, 0);
  EXPECT_TRUE(all.index.empty());
  const TailSamples one = sample_tail(std::vector<double>{0, 1, 0}, {}, 255, 1 - 1e-12);
  EXPECT_EQ(one.index, std::vector<std::uint32_t>{1});
  EXPECT_EQ(one.count, std::vector<std::uint8_t>{255});
}

class SampledCacheTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("pare_samples_" + std::to_string(::getpid()) + "_" +
                                           ::testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::create_directories(folder_);
    file_ = folder_ / "cache.h5";
  }
  void TearDown() override { fs::remove_all(folder_); }

  // `windows` windows of `length` rows, all of these logits.
  void write(const std::vector<float>& logits, std::int64_t windows, std::int64_t length, LogitCacheInfo info) {
    LogitCacheWriter writer(file_, info);
    std::vector<float> rows;
    for (std::int64_t t = 0; t < length; ++t) rows.insert(rows.end(), logits.begin(), logits.end());
    const std::vector<std::int32_t> ids(static_cast<std::size_t>(length), 1);
    for (std::int64_t w = 0; w < windows; ++w) writer.append(ids, rows.data());
    writer.finish();
  }

  fs::path folder_, file_;
};

std::vector<float> some_logits(std::int64_t vocab, double scale) {
  FakeLogits model(vocab, 5, scale);
  std::vector<float> row(static_cast<std::size_t>(vocab));
  const std::vector<std::int32_t> ids = {1};
  model.begin(ids);
  model.row(0, row.data());
  return row;
}

std::vector<double> softmax(const std::vector<float>& logits, double temperature) {
  double sum = 0;
  std::vector<double> p;
  for (const float z : logits) sum += p.emplace_back(std::exp(static_cast<double>(z) / temperature));
  for (double& x : p) x /= sum;
  return p;
}

// The mean of each id's estimate over many rows of one distribution stands within its standard error of the truth, with
// the listed ids and without, at another temperature too; estimates that leave the tail's mass out, or spread it evenly
// over the ids that were drawn, do not.
TEST_F(SampledCacheTest, EstimatesHaveNoBias) {
  constexpr std::int64_t kVocab = 60, kWindows = 80, kLength = 50;
  const auto logits = some_logits(kVocab, 1.5);
  struct Case {
    std::int64_t k, n;
    double temperature;
  };
  for (const Case& c : {Case{4, 6, 1}, Case{0, 12, 1}, Case{8, 3, 2}}) {
    const auto p = softmax(logits, c.temperature);
    write(logits, kWindows, kLength, {kVocab, kLength, c.k, "c", "m", c.n, c.temperature, 3});
    LogitCacheReader reader(file_);
    std::vector<double> sum(kVocab), squares(kVocab), no_mass(kVocab), even(kVocab);
    for (std::int64_t w = 0; w < kWindows; ++w) {
      const CachedWindow window = reader.read(w);
      for (std::int64_t t = 0; t < kLength; ++t) {
        std::vector<double> estimate(kVocab);
        double mass = 0;
        int distinct = 0;
        for (std::int64_t i = 0; i < c.k; ++i) {
          const auto at = static_cast<std::size_t>(t * c.k + i);
          estimate[window.index[at]] = std::exp(static_cast<double>(window.log_prob[at]));
        }
        for (std::int64_t i = 0; i < c.n; ++i)
          distinct += window.sample_count[static_cast<std::size_t>(t * c.n + i)] > 0;
        mass = static_cast<double>(window.tail[static_cast<std::size_t>(t)]);
        for (std::int64_t i = 0; i < c.n; ++i) {
          const auto at = static_cast<std::size_t>(t * c.n + i);
          if (window.sample_count[at] == 0) continue;
          const std::uint32_t id = window.sample_index[at];
          ASSERT_EQ(estimate[id], 0);  // not listed too
          const double share = static_cast<double>(window.sample_count[at]) / static_cast<double>(c.n);
          estimate[id] = mass * share;
          no_mass[id] += share;
          even[id] += mass / distinct;
        }
        for (std::size_t i = 0; i < kVocab; ++i) {
          sum[i] += estimate[i];
          squares[i] += estimate[i] * estimate[i];
        }
        double exact_entropy = 0;
        for (const double x : p) exact_entropy -= x * std::log(x);
        ASSERT_NEAR(window.entropy[static_cast<std::size_t>(t)], exact_entropy, 1e-5);
        ASSERT_EQ(window.argmax[static_cast<std::size_t>(t)],
                  static_cast<std::uint32_t>(std::max_element(p.begin(), p.end()) - p.begin()));
      }
    }
    constexpr double kRows = kWindows * kLength;
    double worst = 0, worst_even = 0, worst_no_mass = 0;
    for (std::size_t i = 0; i < kVocab; ++i) {
      const double mean = sum[i] / kRows, variance = std::max(0.0, squares[i] / kRows - mean * mean);
      if (variance < 1e-9) {  // listed: half precision
        EXPECT_NEAR(mean, p[i], 1e-3 * p[i]) << i;
        continue;
      }
      const double error = std::sqrt(variance / kRows);
      worst = std::max(worst, std::abs(mean - p[i]) / error);
      worst_even = std::max(worst_even, std::abs(even[i] / kRows - p[i]) / error);
      worst_no_mass = std::max(worst_no_mass, std::abs(no_mass[i] / kRows - p[i]) / error);
    }
    EXPECT_LT(worst, 4) << c.k;                                 // of up to 60 ids
    EXPECT_GT(c.k > 0 ? worst_no_mass : worst_even, 8) << c.k;  // alone, some ids are drawn more than once
  }
}

TEST_F(SampledCacheTest, ATokenTakesSixtyToThreeHundredBytes) {
  constexpr std::int64_t kVocab = 2048, kLength = 512, kWindows = 8;
  FakeLogits model(kVocab, 3, 3.0);
  LogitCacheWriter writer(file_, {kVocab, kLength, 12, "c", "m", 12});
  for (const Window& window :
       random_windows(kVocab, std::vector(kWindows, std::pair<std::int64_t, std::int64_t>{kLength, 0}), 4)) {
    std::vector<float> rows(static_cast<std::size_t>(kLength * kVocab));
    std::mt19937_64 random(static_cast<std::uint64_t>(window.ids[0]));
    for (float& z : rows) z = static_cast<float>(random() % 1000) * 0.008f;
    writer.append(window.ids, rows.data());
  }
  writer.finish();
  const double bytes = static_cast<double>(fs::file_size(file_)) / static_cast<double>(kLength * kWindows);
  EXPECT_GE(bytes, 60);
  EXPECT_LE(bytes, 140);
  RecordProperty("bytes_per_token", std::to_string(bytes));
}

bool equal(const CachedWindow& a, const CachedWindow& b) {
  return a.ids == b.ids && a.index == b.index && a.log_prob == b.log_prob && a.log_sum_exp == b.log_sum_exp &&
         a.target_log_prob == b.target_log_prob && a.entropy == b.entropy && a.argmax == b.argmax && a.tail == b.tail &&
         a.sample_index == b.sample_index && a.sample_count == b.sample_count;
}

// A writer is killed at any moment, over and over; each time what it left is whole windows, the next goes on after
// them, and the end is what an uninterrupted writer makes.
TEST_F(SampledCacheTest, GoesOnAfterKill) {
  constexpr std::int64_t kVocab = 60;
  const LogitCacheInfo info{kVocab, 64, 5, "c", "m", 7, 1.0, 11, "t"};
  FakeLogits model(kVocab, 3, 3.0);
  std::vector<std::pair<std::int64_t, std::int64_t>> shapes;
  for (std::int64_t w = 0; w < 400; ++w) shapes.push_back({40 + w % 25, w});
  const auto windows = random_windows(kVocab, shapes, 4);
  const auto append = [&](LogitCacheWriter& writer, std::size_t w) {
    std::vector<float> rows(windows[w].ids.size() * kVocab);
    std::mt19937_64 random(w);
    for (float& z : rows) z = static_cast<float>(random() % 4096) * 0.002f;
    writer.append(windows[w].ids, rows.data());
  };
  const fs::path whole = folder_ / "whole.h5";
  {
    LogitCacheWriter writer(whole, info);
    for (std::size_t w = 0; w < windows.size(); ++w) append(writer, w);
    writer.finish();
  }
  LogitCacheReader expected(whole);
  std::int64_t before = 0;
  int grown = 0;
  for (int round = 0; round < 8; ++round) {
    const pid_t child = ::fork();
    if (child == 0) {
      omp_set_num_threads(1);  // the parent's pool of threads is not here
      LogitCacheWriter writer(file_, info, true);
      auto w = static_cast<std::size_t>(writer.windows_done());
      // Half of the kills come where the child is, half at an exact place between two flushes.
      const std::size_t stop = round % 2 ? w + 85 : windows.size();
      for (; w < stop && w < windows.size(); ++w) append(writer, w);
      ::raise(SIGKILL);
    }
    if (round % 2 == 0) {
      ::usleep(5000 + static_cast<useconds_t>(round) * 5000);
      ::kill(child, SIGKILL);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status));
    EXPECT_FALSE(fs::exists(file_));
    if (!fs::exists(LogitCacheReader::partial_path(file_))) continue;
    std::int64_t found = 0;
    try {
      LogitCacheReader partial = LogitCacheReader::of_partial(file_);
      found = partial.windows();
      for (std::int64_t w = 0; w < found; ++w)
        ASSERT_TRUE(equal(partial.read(w), expected.read(w))) << round << " " << w;
    } catch (const Error&) {
      EXPECT_EQ(before, 0) << "what had been readable no longer is";
    }
    EXPECT_GE(found, before);
    grown += found > before;
    before = found;
  }
  EXPECT_GE(grown, 3);
  // Another's leavings are not continued.
  LogitCacheInfo other = info;
  other.seed = 12;
  EXPECT_THROW(LogitCacheWriter(file_, other, true), Error);
  {
    LogitCacheWriter writer(file_, info, true);
    EXPECT_EQ(writer.windows_done(), before);
    for (auto w = static_cast<std::size_t>(before); w < windows.size(); ++w) append(writer, w);
    writer.finish();
  }
  LogitCacheReader again(file_, info);
  ASSERT_EQ(again.windows(), expected.windows());
  for (std::int64_t w = 0; w < again.windows(); ++w) ASSERT_TRUE(equal(again.read(w), expected.read(w))) << w;
  EXPECT_FALSE(fs::exists(LogitCacheReader::partial_path(file_)));
}

TEST_F(SampledCacheTest, StoppedInOrderItIsKeptWhereItCanGoOn) {
  const LogitCacheInfo info{9, 8, 2, "c", "m", 2};
  const std::vector<std::int32_t> ids = {1, 2};
  const std::vector<float> rows(18);
  for (const bool resumable : {true, false}) {
    {
      LogitCacheWriter writer(file_, info, resumable);
      EXPECT_EQ(writer.windows_done(), 0);
      writer.append(ids, rows.data());
    }
    EXPECT_EQ(fs::exists(LogitCacheReader::partial_path(file_)), resumable);
    if (!resumable) continue;
    {
      LogitCacheWriter writer(file_, info, true);
      EXPECT_EQ(writer.windows_done(), 1);
    }
    EXPECT_EQ(LogitCacheReader::of_partial(file_).windows(), 1);
  }
}

TEST_F(SampledCacheTest, AnotherTemperatureTokenizerOrKindIsRefused) {
  const LogitCacheInfo info{9, 8, 0, "c", "m", 4, 2.0, 0, "t"};
  write(some_logits(9, 1), 2, 3, info);
  EXPECT_NO_THROW(LogitCacheReader(file_, info));
  const auto refused = [&](auto change, const std::string& what) {
    LogitCacheInfo wrong = info;
    change(wrong);
    try {
      LogitCacheReader reader(file_, wrong);
      ADD_FAILURE() << what;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput);
      EXPECT_NE(std::string(error.what()).find(what), std::string::npos) << error.what();
    }
  };
  refused([](auto& i) { i.temperature = 1; }, "temperature 1");
  refused([](auto& i) { i.tokenizer_hash = "u"; }, "tokenizer u");
  refused([](auto& i) { i.samples = 5; }, "samples per id 5");
  refused([](auto& i) { i.top_k = 5; }, "most likely ids");
  for (const LogitCacheInfo& bad : {LogitCacheInfo{9, 8, 0, "c", "m"}, LogitCacheInfo{9, 8, 1, "c", "m", 256},
                                    LogitCacheInfo{9, 8, 1, "c", "m", 1, 0.0}})
    EXPECT_THROW(LogitCacheWriter(folder_ / "bad.h5", bad), Error);
}

TEST_F(SampledCacheTest, ValuesChangedInTheFileAreSeen) {
  write(some_logits(9, 1), 2, 3, {9, 8, 2, "c", "m", 4});
  {
    const QuietHdf5 quiet;
    Hdf5Handle file(H5Fopen(file_.c_str(), H5F_ACC_RDWR, H5P_DEFAULT), H5Fclose);
    Hdf5Handle set(H5Dopen2(file, "tail", H5P_DEFAULT), H5Dclose);
    std::vector<float> tail(6);
    H5Dread(set, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, tail.data());
    tail[4] += 0.001f;
    H5Dwrite(set, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, tail.data());
  }
  std::fstream head(file_, std::ios::in | std::ios::out | std::ios::binary);
  head << "pare-logit-cache 2 bytes " << fs::file_size(file_) << "\n";
  head.close();
  LogitCacheReader reader(file_);
  EXPECT_NO_THROW(reader.read(0));
  EXPECT_THROW(reader.read(1), Error);
}

template <class T>
void put(hid_t file, const char* name, hid_t stored, hid_t memory, std::vector<hsize_t> shape,
         const std::vector<T>& values) {
  Hdf5Handle space(H5Screate_simple(static_cast<int>(shape.size()), shape.data(), nullptr), H5Sclose);
  Hdf5Handle set(H5Dcreate2(file, name, stored, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT), H5Dclose);
  ASSERT_GE(H5Dwrite(set, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()), 0);
}

// As version 1 was laid out: no samples, entropy, argmax, tail or check.
TEST_F(SampledCacheTest, FilesOfVersionOneAreRead) {
  {
    Hdf5Handle list(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
    H5Pset_userblock(list, 512);
    Hdf5Handle file(H5Fcreate(file_.c_str(), H5F_ACC_TRUNC, list, H5P_DEFAULT), H5Fclose);
    const auto text = [&](const char* name, const std::string& value) {
      Hdf5Handle type(H5Tcopy(H5T_C_S1), H5Tclose), space(H5Screate(H5S_SCALAR), H5Sclose);
      H5Tset_size(type, value.size());
      Hdf5Handle attribute(H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
      ASSERT_GE(H5Awrite(attribute, type, value.data()), 0);
    };
    const auto integer = [&](const char* name, std::int64_t value) {
      Hdf5Handle space(H5Screate(H5S_SCALAR), H5Sclose);
      Hdf5Handle attribute(H5Acreate2(file, name, H5T_STD_I64LE, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
      ASSERT_GE(H5Awrite(attribute, H5T_NATIVE_INT64, &value), 0);
    };
    text("magic", "pare-logit-cache");
    text("corpus_hash", "c");
    text("model_hash", "m");
    text("log_prob_format", "ieee-f16-bits");
    for (const auto& [name, value] :
         {std::pair{"version", 1}, {"vocab_size", 9}, {"context", 8}, {"top_k", 2}, {"complete", 1}})
      integer(name, value);
    put<std::uint32_t>(file, "ids", H5T_STD_U32LE, H5T_NATIVE_UINT32, {3}, {1, 2, 8});
    put<std::uint64_t>(file, "window_end", H5T_STD_U64LE, H5T_NATIVE_UINT64, {2}, {2, 3});
    put<std::uint32_t>(file, "topk_idx", H5T_STD_U16LE, H5T_NATIVE_UINT32, {3, 2}, {4, 0, 1, 2, 8, 7});
    put<std::uint16_t>(file, "topk_lp", H5T_STD_U16LE, H5T_NATIVE_UINT16, {3, 2},
                       {0xb800, 0xc000, 0xbc00, 0xbc00, 0xbc00, 0xc400});
    put<float>(file, "lse", H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, {3}, {1, 2, 3});
    put<float>(file, "target_lp", H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, {3}, {-1, 0, 0});
  }
  std::string head =
      "pare-logit-cache 1 bytes " + std::to_string(fs::file_size(file_)) + "\n(HDF5 begins at byte 512)\n";
  std::fstream(file_, std::ios::in | std::ios::out | std::ios::binary) << head;
  LogitCacheReader reader(file_, {9, 8, 2, "c", "m", 0, 1.0, 5, "any tokenizer"});
  ASSERT_EQ(reader.windows(), 2);
  const CachedWindow window = reader.read(0);
  EXPECT_EQ(window.index, (std::vector<std::uint32_t>{4, 0, 1, 2}));
  EXPECT_EQ(window.log_prob, (std::vector<float>{-0.5f, -2, -1, -1}));
  EXPECT_EQ(window.log_sum_exp, (std::vector<float>{1, 2}));
  EXPECT_TRUE(window.entropy.empty());
  EXPECT_THROW(LogitCacheReader(file_, {9, 8, 2, "c", "m", 4}), Error);  // it has no samples
}

}  // namespace
}  // namespace pare
