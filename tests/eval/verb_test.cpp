// `pare eval` of the torch-free program on a random model, through its option table.
#include "runtime/verbs/eval.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <set>

#include "core/compact.h"
#include "core/error.h"
#include "runtime/export.h"
#include "runtime/verbs/cli.h"
#include "tests/compress/tiny_model.h"

namespace pare {
namespace {

class EvalVerb : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = fs::temp_directory_path() / ("pare_eval_verb_" + std::to_string(::getpid()));
    fs::create_directories(folder_);
    testing::TinyModel tiny;
    testing::make_tiny_model(folder_ / "model", tiny);
    tiny.vocab = 384;
    testing::make_tiny_model(folder_ / "other", tiny);
    write_text(folder_ / "text.txt", testing::tiny_text(3, 6));
    write_text(folder_ / "empty.txt", "<|endoftext|> \n");
    write_text(folder_ / "pairs.jsonl",
               "{\"sentence_good\": \"The river opens the last page\", \"sentence_bad\": \"page The opens\"}\n"
               "{\"sentence_good\": \"Nobody paints\", \"sentence_bad\": \"paints Nobody\"}\n");
    write_text(folder_ / "choices.jsonl",
               "{\"query\": \"The river\", \"choices\": [\"opens\", \"its own shadow\"], \"gold\": 0}\n");
    Progress quiet(true);
    Context context;
    context.quiet = true;
    context.progress = &quiet;
    for (const char* codec : {"f32", "q8"}) {
      ExportOptions options;
      options.out = folder_ / (std::string(codec) + ".pare");
      options.codec = codec;
      export_compact(Checkpoint(folder_ / "model"), options, context);
    }
  }
  static void TearDownTestSuite() { fs::remove_all(folder_); }

  static std::string path(const std::string& name) { return (folder_ / name).string(); }

  static Json run(Json given, Report* report = nullptr) {
    Progress quiet(true);
    Context context;
    context.quiet = context.json = true;
    context.progress = &quiet;
    const Command command = eval_command_runtime();
    Json result = command.run(Options(command.options, given, "eval"), context);
    if (report) *report = context.report;
    return result;
  }

  static void expect_error(const Json& given, ExitCode code, const std::string& what) {
    try {
      run(given);
      FAIL() << "accepted: " << given.dump();
    } catch (const Error& error) {
      EXPECT_EQ(static_cast<int>(error.code()), static_cast<int>(code)) << error.what();
      EXPECT_NE(std::string(error.what()).find(what), std::string::npos) << error.what();
    }
  }

  static fs::path folder_;
};
fs::path EvalVerb::folder_;

TEST_F(EvalVerb, FloatFileEqualsItsFolderExactly) {
  Report report;
  const Json r = run({{"model", path("f32.pare")}, {"against", path("model")}, {"text", {path("text.txt")}},
                      {"split", "<|endoftext|>"}, {"ctx", 64}}, &report);
  EXPECT_EQ(r["text"]["mean_kl"]["value"].get<double>(), 0.0);
  EXPECT_EQ(r["text"]["top1_agreement"]["value"].get<double>(), 1.0);
  EXPECT_EQ(r["text"]["documents"].get<int>(), 6);
  EXPECT_EQ(r["text"]["standard_errors_over"], "documents");
  EXPECT_EQ(r["text"]["context"].get<int>(), 64);
  EXPECT_NEAR(r["size"]["bits_per_weight"].get<double>(), 32.0, 0.2);
  EXPECT_GT(r["speed"]["tokens_per_second"].get<double>(), 0);
  std::set<std::string> stages, timed;
  for (const ReportRow& row : report.rows()) {
    stages.insert(row.stage);
    if (!row.deterministic) timed.insert(row.metric);
  }
  EXPECT_EQ(stages, (std::set<std::string>{"original", "f32.pare"}));
  EXPECT_EQ(timed, (std::set<std::string>{"tokens_per_second", "prefill_tokens_per_second", "seconds_per_token_p95",
                                          "time_to_first_token", "peak_memory_bytes"}));
}

TEST_F(EvalVerb, QuantizedFileIsNearAndItsSizeCountsScales) {
  const Json r = run({{"model", path("q8.pare")},
                      {"against", path("model")},
                      {"text", {path("text.txt")}},
                      {"speed", false},
                      {"split", "<|endoftext|>"},
                      {"limit", 5}});
  const double kl = r["text"]["mean_kl"]["value"].get<double>();
  EXPECT_GT(kl, 1e-8);
  EXPECT_LT(kl, 0.05);
  EXPECT_LE(r["text"]["windows"].get<int>(), 5);
  EXPECT_FALSE(r.contains("speed"));
  const CompactFile file(folder_ / "q8.pare");
  EXPECT_DOUBLE_EQ(r["size"]["bits_per_weight"].get<double>(), 8.0 * static_cast<double>(file.tensor_bytes()) /
                                                                   static_cast<double>(parameter_count(file.config())));
  EXPECT_GT(r["size"]["bits_per_weight"].get<double>(), 8.5);
}

TEST_F(EvalVerb, PerplexityAloneAndWindowRules) {
  const Json all = run({{"model", path("f32.pare")}, {"text", {path("text.txt")}}, {"ctx", 32}, {"speed", false}});
  EXPECT_FALSE(all["text"].contains("mean_kl"));
  EXPECT_EQ(all["text"]["standard_errors_over"], "windows");  // one file without --split is one document
  const Json half = run({{"model", path("f32.pare")},
                         {"text", {path("text.txt")}},
                         {"ctx", 32},
                         {"score", "second-half"},
                         {"speed", false}});
  const auto whole_windows = half["text"]["windows"].get<int>();
  EXPECT_GE(whole_windows, all["text"]["windows"].get<int>() - 1);
  EXPECT_EQ(half["text"]["predictions"].get<int>(), whole_windows * 15);  // 32 - 1 - 16
  const Json one = run({{"model", path("f32.pare")},
                        {"text", {path("text.txt")}},
                        {"ctx", 8},
                        {"split", "<|endoftext|>"},
                        {"documents", 3},
                        {"one-window-per-document", true},
                        {"speed", false}});
  EXPECT_EQ(one["text"]["windows"].get<int>(), 3);
  EXPECT_EQ(one["text"]["predictions"].get<int>(), 3 * 7);
}

TEST_F(EvalVerb, SumsOfEveryDocumentOnRequest) {
  Json given = {{"model", path("q8.pare")}, {"against", path("model")}, {"text", {path("text.txt")}},
                {"split", "<|endoftext|>"}, {"ctx", 16},                {"speed", false}};
  EXPECT_FALSE(run(given)["text"].contains("per_document"));
  given["per"] = "document";
  const Json text = run(given)["text"];
  ASSERT_EQ(text["per_document"].size(), 6u);
  double kl = 0;
  std::int64_t predictions = 0;
  for (const Json& unit : text["per_document"]) {
    kl += unit["kl"].get<double>();
    predictions += unit["predictions"].get<std::int64_t>();
  }
  EXPECT_EQ(predictions, text["predictions"].get<std::int64_t>());
  EXPECT_NEAR(kl / static_cast<double>(predictions), text["mean_kl"]["value"].get<double>(), 1e-13);
  given["per"] = "window";
  EXPECT_EQ(run(given)["text"]["per_window"].size(), text["windows"].get<std::size_t>());
}

TEST_F(EvalVerb, TasksOfBothModelsAgree) {
  const Json r = run({{"model", path("f32.pare")},
                      {"against", path("model")},
                      {"tasks", {path("pairs.jsonl"), path("choices.jsonl")}},
                      {"speed", false}});
  ASSERT_EQ(r["tasks"].size(), 2u);
  EXPECT_EQ(r["tasks"][0]["kind"], "minimal_pair");
  EXPECT_EQ(r["tasks"][0]["items"].get<int>(), 2);
  EXPECT_EQ(r["tasks"][0]["agreement"]["value"].get<double>(), 1.0);
  EXPECT_EQ(r["tasks"][0]["acc"], r["tasks"][0]["original"]["acc"]);
  EXPECT_TRUE(r["tasks"][1].contains("acc_norm"));
  EXPECT_TRUE(r.contains("mean_acc"));
}

TEST_F(EvalVerb, WritesItsResult) {
  Json given = {{"model", path("q8.pare")}, {"tasks", {path("pairs.jsonl"), path("choices.jsonl")}},
                {"speed", false},           {"output", path("result.json")}};
  const Json plain = run(given);
  Json written = read_json(folder_ / "result.json");
  written["output"] = path("result.json");
  for (Json& task : written["tasks"]) {
    EXPECT_EQ(task["picks"].size(), task["items"].get<std::size_t>());
    task.erase("picks");
  }
  EXPECT_EQ(written, plain);
  given["output-format"] = "lm-eval";
  given["output"] = path("harness");
  const Json named = run(given);
  const fs::path file = named["output"].get<std::string>();
  EXPECT_EQ(file.parent_path(), folder_ / "harness" / "q8.pare");
  const Json harness = read_json(file);
  EXPECT_EQ(harness["results"]["pairs"]["acc,none"], plain["tasks"][0]["acc"]["value"]);
  EXPECT_EQ(harness["results"]["choices"]["acc_norm,none"], plain["tasks"][1]["acc_norm"]["value"]);
  EXPECT_EQ(harness["model_source"], "pare");
  Json wrong = {
      {"model", path("q8.pare")}, {"text", {path("text.txt")}}, {"speed", false}, {"output-format", "lm-eval"}};
  expect_error(wrong, ExitCode::kUsage, "--output");
  wrong["output"] = path("x.json");
  expect_error(wrong, ExitCode::kUsage, "--tasks");
  wrong["tasks"] = {path("pairs.jsonl")};
  expect_error(wrong, ExitCode::kUsage, "--text");
  wrong.erase("text");
  wrong["against"] = path("q8.pare");
  expect_error(wrong, ExitCode::kUsage, "--against");
  Json nowhere = {{"model", path("q8.pare")}, {"tasks", {path("pairs.jsonl")}}, {"speed", false}};
  nowhere["output"] = path("none/x.json");
  expect_error(nowhere, ExitCode::kUsage, "a folder that exists");
  nowhere["output"] = fs::path(path("q8.pare")).parent_path().string();
  expect_error(nowhere, ExitCode::kUsage, "a file");
  nowhere.erase("output");
  fs::create_directories(path("again"));
  fs::copy_file(path("pairs.jsonl"), path("again/pairs.jsonl"), fs::copy_options::overwrite_existing);
  nowhere["tasks"].push_back(path("again/pairs.jsonl"));
  expect_error(nowhere, ExitCode::kUsage, "different names");
}

TEST_F(EvalVerb, FolderLeavesNoTemporaryFile) {
  const auto count = [] {
    int n = 0;
    for (const auto& entry : fs::directory_iterator(fs::temp_directory_path()))
      n += entry.path().filename().string().starts_with("pare-eval-");
    return n;
  };
  const int before = count();
  const Json r = run({{"model", path("model")}, {"text", {path("text.txt")}}, {"limit", 1}});
  EXPECT_EQ(count(), before);
  EXPECT_FALSE(r.contains("speed"));
}

TEST_F(EvalVerb, TemporaryFoldersOfKilledProcessesAreRemoved) {
  const fs::path temporary = folder_ / "temporary";
  const auto abandoned = [&](const std::string& name) {
    fs::create_directories(temporary / name);
    write_text(temporary / name / "model.pare.tmp-1", "half");
    fs::last_write_time(temporary / name, fs::file_time_type::clock::now() - std::chrono::hours(2));
    return temporary / name;
  };
  const fs::path left = abandoned("pare-eval-killed"), used = abandoned("pare-eval-in-use"),
                 foreign = abandoned("photos");
  const int lock = ::open(used.c_str(), O_RDONLY | O_DIRECTORY);
  ASSERT_EQ(::flock(lock, LOCK_EX), 0);
  const char* before = std::getenv("TMPDIR");
  const std::string old = before ? before : "";
  ::setenv("TMPDIR", temporary.c_str(), 1);
  run({{"model", path("model")}, {"text", {path("text.txt")}}, {"limit", 1}});
  EXPECT_FALSE(fs::exists(left));
  EXPECT_TRUE(fs::exists(used / "model.pare.tmp-1"));
  EXPECT_TRUE(fs::exists(foreign));
  ::close(lock);
  ::setenv("TMPDIR", (folder_ / "nowhere").c_str(), 1);
  EXPECT_ANY_THROW(run({{"model", path("model")}, {"text", {path("text.txt")}}, {"limit", 1}}));
  before ? ::setenv("TMPDIR", old.c_str(), 1) : ::unsetenv("TMPDIR");
}

TEST_F(EvalVerb, OptionsThatDoNothingAreRefused) {
  const std::string model = path("f32.pare"), text = path("text.txt"), pairs = path("pairs.jsonl");
  const Json tasks = {{"model", model}, {"tasks", {pairs}}, {"speed", false}};
  const auto with = [](Json given, const char* key, Json value) {
    given[key] = std::move(value);
    return given;
  };
  expect_error(with(tasks, "split", "x"), ExitCode::kUsage, "--split has no use without --text");
  expect_error(with(tasks, "score", "second-half"), ExitCode::kUsage, "--score has no use");
  expect_error(with(tasks, "per", "window"), ExitCode::kUsage, "--per has no use");
  expect_error(with(tasks, "documents", 2), ExitCode::kUsage, "--documents has no use");
  expect_error(with(tasks, "one-window-per-document", true), ExitCode::kUsage, "--one-window-per-document has no use");
  expect_error(with(with(tasks, "split", "x"), "documents", 2), ExitCode::kUsage, "--split, --documents have no use");
  expect_error({{"model", path("model")}, {"text", {text}}, {"act", "float"}}, ExitCode::kUsage, "--act has no use");
}

TEST_F(EvalVerb, RefusesWhatCannotBeMeasured) {
  const std::string model = path("f32.pare"), text = path("text.txt");
  expect_error({{"model", model}}, ExitCode::kUsage, "--text or --tasks");
  expect_error({{"model", model}, {"text", {path("empty.txt")}}, {"split", "<|endoftext|>"}}, ExitCode::kInput,
               "no text");
  expect_error({{"model", model}, {"text", {path("missing.txt")}}}, ExitCode::kInput, "missing.txt");
  expect_error({{"model", path("missing.pare")}, {"text", {text}}}, ExitCode::kInput, "missing.pare");
  expect_error({{"model", text}, {"text", {text}}}, ExitCode::kInput, "text.txt");
  expect_error({{"model", model}, {"text", {text}}, {"ctx", 513}}, ExitCode::kInput, "512");
  expect_error({{"model", model}, {"text", {text}}, {"ctx", 500}, {"split", "<|endoftext|>"}, {"score", "second-half"}},
               ExitCode::kInput, "exactly 500");
  expect_error({{"model", model}, {"against", path("other")}, {"text", {text}}}, ExitCode::kInput, "token");
  expect_error({{"model", model}, {"tasks", {text}}}, ExitCode::kInput, "text.txt:1");
  EXPECT_THROW(run({{"model", model}, {"text", {text}}, {"cache", "x.h5"}}), Error);  // not an option of this program
}

}  // namespace
}  // namespace pare
