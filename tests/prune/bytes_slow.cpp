// The same bytes whatever the thread count, and after a kill.
#include <gtest/gtest.h>
#include <signal.h>

#include <thread>

#include "tests/prune/small_model.h"

namespace pare {
namespace {

using testing::Folder;
using testing::base;
using testing::failing_code;
using testing::make_model;
using testing::run_prune;
using testing::with_text;

TEST(PruneBytes, SameAtOneTwoAndThreeThreads) {
  const Folder folder("bytes");
  make_model(folder / "m", {.hidden = 64, .mlp_bias = true, .dtype = "float16"});
  for (const auto& [method, more] : std::vector<std::pair<std::string, Json>>{
           {"wanda", {{"sparsity", 0.5}}},
           {"wanda", {{"sparsity", 0.5}, {"reconstruct", true}, {"allocation", "owl"}}},
           {"sparsegpt", {{"sparsity", 0.5}}},
           {"sparsegpt", {{"pattern", "2:4"}, {"reconstruct", true}}},
           {"random", {{"sparsity", 0.5}}},
           {"shape", {{"layers", 2}}},
           {"shape", {{"hidden", 32}}}}) {
    std::vector<std::string> hashes, reports;
    for (const int threads : {1, 2, 3}) {
      const fs::path out = folder / "out";
      Json options = with_text(base(folder / "m", out, method), folder / "text.txt");
      options.update(more);
      reports.push_back(run_prune(options, threads).report.to_json().dump());
      hashes.push_back(hash_file(out / "model.safetensors"));
      fs::remove_all(out);
    }
    EXPECT_EQ(hashes[0], hashes[1]) << method;
    EXPECT_EQ(hashes[1], hashes[2]) << method;
    EXPECT_EQ(reports[0], reports[1]) << method;
    EXPECT_EQ(reports[1], reports[2]) << method;
  }
}

// Runs the command and kills the process once `pieces` blocks are durable.
void run_and_die(const Json& options, std::size_t pieces) {
  std::thread watcher([&] {
    const fs::path folder = options["out"].get<std::string>() + ".partial/pieces";
    for (;;) {
      std::error_code ignored;
      std::size_t found = 0;
      for (fs::directory_iterator at(folder, ignored), end; !ignored && at != end; at.increment(ignored))
        found += at->path().extension() == ".piece" ? 1 : 0;
      if (found >= pieces) kill(getpid(), SIGKILL);
      std::this_thread::yield();
    }
  });
  run_prune(options, 2);
  _exit(0);
}

class PruneResume : public ::testing::TestWithParam<std::tuple<std::string, std::string, Json>> {};  // name, method

TEST_P(PruneResume, AKilledRunContinuesToTheSameBytes) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto& [name, method, more] = GetParam();
  // The child of a thread-safe death test runs this test from its top: same names, same bytes.
  const fs::path folder = fs::temp_directory_path() / ("pare-prune-resume-" + name);
  fs::remove_all(folder);
  fs::create_directories(folder);
  make_model(folder / "m", {.hidden = 64, .intermediate = 192, .layers = 6, .dtype = "bfloat16"});
  Json options = with_text(base(folder / "m", folder / "out", method), folder / "text.txt");
  options.update(more);
  EXPECT_EXIT(run_and_die(options, 2), ::testing::KilledBySignal(SIGKILL), "");
  ASSERT_TRUE(fs::exists(folder / "out.partial"));
  ASSERT_FALSE(fs::exists(folder / "out"));
  Json other = options;
  other["samples"] = 11;  // another command may not continue it
  EXPECT_EQ(failing_code(other), ExitCode::kUsage);
  ASSERT_TRUE(fs::exists(folder / "out.partial" / "pieces"));
  const auto resumed = run_prune(options);
  options["out"] = (folder / "whole").string();
  const auto whole = run_prune(options);
  EXPECT_EQ(hash_file(folder / "out" / "model.safetensors"), hash_file(folder / "whole" / "model.safetensors"));
  EXPECT_EQ(read_text(folder / "out" / "config.json"), read_text(folder / "whole" / "config.json"));
  EXPECT_EQ(resumed.report.to_json(), whole.report.to_json());
  EXPECT_FALSE(fs::exists(folder / "out.partial"));
  fs::remove_all(folder);
}

INSTANTIATE_TEST_SUITE_P(
    Methods, PruneResume,
    ::testing::Values(std::tuple{"magnitude", "magnitude", Json{{"sparsity", 0.5}}},
                      std::tuple{"wanda", "wanda", Json{{"sparsity", 0.5}}},
                      std::tuple{"owl", "wanda", Json{{"sparsity", 0.5}, {"allocation", "owl"}, {"reconstruct", true}}},
                      std::tuple{"sparsegpt", "sparsegpt", Json{{"pattern", "4:8"}}},
                      std::tuple{"depth", "shape", Json{{"layers", 4}}},
                      std::tuple{"width", "shape", Json{{"hidden", 32}}}),
    [](const auto& info) { return std::get<0>(info.param); });

}  // namespace
}  // namespace pare
