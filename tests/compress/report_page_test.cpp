// The page of `pare report`: what it shows, what it refuses, and that nothing of its input is markup.
#include "compress/report_verb.h"

#include <gtest/gtest.h>

#include <cmath>

#include "compress/html.h"
#include "core/context.h"
#include "core/error.h"
#include "tests/scratch.h"

namespace pare {
namespace {

std::size_t count(const std::string& text, const std::string& piece) {
  std::size_t n = 0;
  for (std::size_t at = text.find(piece); at != std::string::npos; at = text.find(piece, at + piece.size())) ++n;
  return n;
}

std::string curve() {
  std::string lines;
  for (int step = 1; step <= 20; ++step) {
    Json point{{"step", step},
               {"tokens", 100 * step},
               {"lr", 0.1 / step},
               {"loss", 4.0 / step},
               {"gradient_norm", 1.0 * step},
               {"tokens_per_second", 1000 + step},
               {"resident_bytes", 1 << 20}};
    if (step % 5 == 0) point["held_out"] = {{"<script>alert(1)</script>", 5.0 / step}, {"b & \"c\"", 3.0}};
    lines += point.dump() + "\n";
  }
  return lines +
         R"({"step": 20, "tokens": 2000, "final": true, "held_out": {"<b>": {"loss": 0.25, "standard_error": 0.01, "tokens": 77}}})"
         "\n";
}

TEST(ReportPage, ShowsCurvesAndRowsAndEscapesEverything) {
  const testing::Scratch scratch;
  const fs::path run = scratch.path() / "run <i>";
  fs::create_directories(run / "model");
  write_text(run / "train.jsonl", curve());
  write_text(run / "report.json",
             R"({"command": "x", "rows": [{"stage": "<u>s</u>", "metric": "mean_kl", "before": null,
    "after": 0.125, "unit": "nats", "stderr": 0.5}, {"stage": "s", "metric": "seconds", "after": 3, "unit": "s", "deterministic": false}]})");
  write_text(run / "model" / "quantize.json", R"({"options": {"codec": "<q4>", "bits": null}})");
  write_text(run / "model" / "config.json", R"({"rows": "of another kind"})");
  write_text(run / "harness.json", R"({"results": {"arc": {"acc,none": 0.375, "acc_stderr,none": 0.0625}}})");
  const std::string page = run_page(run);
  EXPECT_EQ(count(page, "<svg"), 5u);  // loss, learning rate, gradient norm, speed, memory
  EXPECT_EQ(count(page, "<polyline"), 7u);
  EXPECT_EQ(count(page, "<circle"), 8u);  // four held-out losses of two texts
  for (const char* markup : {"<script", "<i>", "<u>", "<q4>", "<b>", "src=", "href=", "url("})
    EXPECT_EQ(count(page, markup), 0u) << markup;
  for (const char* shown : {"&lt;script&gt;alert(1)&lt;/script&gt;", "b &amp; &quot;c&quot;", "0.125", "&lt;q4&gt;",
                            "0.375", "0.0625", "model/quantize.json", "prefers-color-scheme:dark"})
    EXPECT_NE(page.find(shown), std::string::npos) << shown;
  EXPECT_EQ(page, run_page(run));
  EXPECT_EQ(count(run_page(run / "train.jsonl"), "<svg"), 5u);  // one file alone
}

// Neighbouring doubles, the largest and the smallest: a chart has few ticks and is drawn at once.
TEST(ReportPage, AnyFiniteValuesHaveFewTicks) {
  const std::vector<std::pair<double, double>> ranges = {
      {1e17, 1e17 + 16}, {-1e17 - 16, -1e17}, {9007199254740992.0, 9007199254740994.0}, {1, std::nextafter(1, 2)},
      {-1e299, 1e299}, {5e-324, 1e-323}, {5e-324, 1}};
  for (const auto& [low, high] : ranges)
    for (const bool logarithmic : {false, true}) {
      const std::string chart = line_chart("t", "x", "y", {{"s", {low, high}, {low, high}, false}}, logarithmic);
      EXPECT_EQ(count(chart, "<polyline"), 1u) << low;
      EXPECT_LE(count(chart, "<line class=g"), 20u + (logarithmic ? 1000u : 20u)) << low << " to " << high;
    }
  EXPECT_EQ(count(line_chart("t", "x", "y", {{"s", {0, 10}, {0, 10}, false}}, false), "<line class=g"), 12u);
}

TEST(ReportPage, WhatCannotBeReadIsNamed) {
  const testing::Scratch scratch;
  const auto place_of = [&](const fs::path& run) -> std::string {
    try {
      run_page(run);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput);
      return error.place();
    }
    return "";
  };
  const fs::path file = scratch.path() / "train.jsonl";
  EXPECT_EQ(place_of(scratch.path()), scratch.path().string());
  EXPECT_NE(place_of(scratch.path() / "absent"), "");
  for (const char* bad :
       {"{\"step\": 2", "{\"loss\": 1}", "[]", "{\"step\": \"x\"}", "{\"step\": 2, \"held_out\": 3}"}) {
    write_text(file, std::string("{\"step\": 1, \"loss\": 2}\n\n") + bad + "\n");
    EXPECT_EQ(place_of(scratch.path()).substr(0, file.string().size() + 2), file.string() + ":3") << bad;
  }
  fs::remove(file);
  write_text(scratch.path() / "report.json", "{\"rows\": [3]}");
  EXPECT_EQ(place_of(scratch.path()), (scratch.path() / "report.json").string());
}

TEST(ReportPage, WritesBesideTheRunAndOverItsOwnPagesAlone) {
  const testing::Scratch scratch;
  const auto run = [&](const Json& given) {
    Progress progress{true};
    Context context;
    context.quiet = context.json = true;
    context.progress = &progress;
    const Command command = report_command();
    return command.run(Options(command.options, given, "test"), context).at("page").get<std::string>();
  };
  fs::create_directories(scratch.path() / "a.partial");
  write_text(scratch.path() / "a.partial" / "train.jsonl", curve());
  EXPECT_EQ(run({{"run", (scratch.path() / "a").string()}}),
            (scratch.path() / "a.partial.html").string());  // still running
  fs::rename(scratch.path() / "a.partial", scratch.path() / "a");
  EXPECT_EQ(run({{"run", (scratch.path() / "a/").string()}}), (scratch.path() / "a.html").string());
  EXPECT_EQ(run({{"run", (scratch.path() / "a").string()}}), (scratch.path() / "a.html").string());
  EXPECT_EQ(run({{"run", (scratch.path() / "a/.").string()}}), (scratch.path() / "a.html").string());
  EXPECT_EQ(run({{"run", (scratch.path() / "a/../a").string()}}), (scratch.path() / "a.html").string());
  EXPECT_FALSE(fs::exists(scratch.path() / "a" / "..html"));
  write_text(scratch.path() / "mine.html", "my own");
  EXPECT_THROW(run({{"run", (scratch.path() / "a").string()}, {"out", (scratch.path() / "mine.html").string()}}),
               Error);
  EXPECT_EQ(read_text(scratch.path() / "mine.html"), "my own");
}

TEST(Html, ChartsOfLittleOrNothing) {
  EXPECT_EQ(line_chart("t", "x", "y", {{"a", {}, {}}}), "");
  EXPECT_EQ(line_chart("t", "x", "y", {{"a", {1, 1}, {2, 3}}}), "");
  EXPECT_EQ(line_chart("t", "x", "y", {{"a", {1, 2}, {std::nan(""), std::nan("")}}}), "");
  const std::string flat = line_chart("t", "x", "y", {{"a", {1, 2}, {7, 7}}});
  EXPECT_NE(flat.find("<polyline"), std::string::npos);
  EXPECT_EQ(flat.find("nan"), std::string::npos);
  const std::string gap = line_chart("t", "x", "y", {{"a", {1, 2, 3}, {7, std::nan(""), 9}}});
  EXPECT_EQ(count(gap, ","), 2u);  // two points
  EXPECT_EQ(line_chart("t", "x", "y", {{"a", {1, 2}, {1e-8, 1e8}}}, true).find("inf"), std::string::npos);
}

}  // namespace
}  // namespace pare
