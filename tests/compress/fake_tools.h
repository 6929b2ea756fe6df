// A toolbox without models: stages copy files and count their calls, measurements are given numbers.
#pragma once

#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

#include "compress/toolbox.h"
#include "core/error.h"
#include "tests/scratch.h"

namespace pare::testing {

class Files : public Scratch {
 public:
  fs::path write(const std::string& name, const std::string& content) const {
    fs::create_directories((path() / name).parent_path());
    std::ofstream(path() / name, std::ios::binary) << content;
    return path() / name;
  }
  // Names and contents of everything below, as one text.
  std::string snapshot(const std::string& below = "") const {
    std::vector<std::string> lines;
    if (!fs::exists(path() / below)) return "absent";
    for (const auto& entry : fs::recursive_directory_iterator(path() / below))
      lines.push_back(entry.path().string() + (entry.is_regular_file() ? " " + hash_file(entry.path()) : ""));
    std::sort(lines.begin(), lines.end());
    std::string all;
    for (const auto& l : lines) all += l + "\n";
    return all;
  }
};

struct FakeCounts {
  int sampled = 0, stages = 0, measured = 0, exported = 0, compared = 0;
  std::vector<Json> stage_options;
};

struct FakeTools {
  FakeCounts counts;
  StagePlan stage_plan{2.0, 1000, 100, {"fallback: one tensor in q8c"}, {}};
  std::vector<double> kl = {0.01};        // of the compact file
  std::string fail_stage;                 // this stage writes half its folder and throws
  std::string die_after;                  // this stage throws when its folder has its name

  Command stage(const std::string& name) {
    Command c;
    c.name = name;
    c.summary = "fake " + name;
    c.is_stage = true;
    auto option = [](std::string key, OptionType type, Json value = nullptr) {
      OptionDecl d;
      d.name = std::move(key);
      d.type = type;
      d.help = "help";
      d.default_value = std::move(value);
      return d;
    };
    c.options = {option("model", OptionType::kPath),
                 option("out", OptionType::kPath),
                 option("text", OptionType::kTextList),
                 option("split", OptionType::kText),
                 option("group-size", OptionType::kInteger, 32),
                 option("codec", OptionType::kText, "q4"),
                 option("sparsity", OptionType::kNumber, 0.5),
                 option("seed", OptionType::kInteger),
                 option("per-layer", OptionType::kFlag, false),
                 option("rank-timeout", OptionType::kInteger, 600)};
    c.options[0].required = c.options[1].required = true;
    c.options[4].minimum = 1;
    c.options[5].choices = {"q4", "q8", "q4a"};
    c.plan = [this](const Options&, const PlannedModel&) { return stage_plan; };
    c.run = [this, name](const Options& options, Context& context) -> Json {
      ++counts.stages;
      counts.stage_options.push_back(options.resolved());
      FolderTransaction folder(options.get<std::string>("out"));
      for (const auto& entry : fs::directory_iterator(options.get<std::string>("model")))
        fs::copy_file(entry.path(), folder.work() / entry.path().filename(), fs::copy_options::overwrite_existing);
      if (fail_stage == name) throw failure(name, "luck", "none");
      std::ofstream(folder.work() / "log.txt", std::ios::app)
          << name << " " << options.get<std::string>("codec") << "\n";
      context.report.add({name, "layer_error", 2.0, 1.0, "", {}, true});
      context.print("a stage of a run prints nothing on stdout");
      if (context.before_commit) context.before_commit();
      folder.commit();
      if (die_after == name) throw failure(name, "luck", "none");
      return {{"stage", name}};
    };
    return c;
  }

  Toolbox toolbox() {
    Toolbox t;
    t.version = "test-1";
    t.stages = {stage("quantize"), stage("prune"), stage("distill")};
    t.inspect = [](const fs::path& model) {
      if (!fs::exists(model / "config.json")) throw input_error(model.string(), "config.json", "none");
      ModelFacts facts;
      facts.family = "fake";
      facts.parameters = 100;
      facts.tensor_bytes = 400;
      return facts;
    };
    t.check_text = [](const std::vector<std::string>& text, const std::string&) {
      for (const auto& file : text)
        if (fs::file_size(file) == 0) throw input_error(file, "text", "an empty file");
    };
    t.sample = [this](const SampleRequest& r, Context&) {
      ++counts.sampled;
      write_text(r.out, "{\"text\": \"seed " + std::to_string(r.seed) + "\"}\n");
    };
    t.measure = [this](const MeasureRequest& r, Context&) {
      ++counts.measured;
      const bool original = r.model == r.original;
      std::vector<ReportRow> rows = {{r.stage, "perplexity", {}, original ? 5.0 : 5.5, "", {}, true},
                                     {r.stage, "file_bytes", {}, original ? 400.0 : 100.0, "bytes", {}, true},
                                     {r.stage, "tokens_per_second", {}, 123.0, "tokens/s", {}, false}};
      if (!original) rows.push_back({r.stage, "mean_kl", {}, kl[0], "nats", 0.001, true});
      return rows;
    };
    t.export_bytes = [](const PlannedModel&, const fs::path&, const std::string&) { return std::uint64_t{100}; };
    t.compare = [this](const fs::path& file, const MeasureRequest& r, Context&) {
      ++counts.compared;
      EXPECT_TRUE(fs::exists(file));
      return std::vector<ReportRow>{{r.stage, "runtime_kl", {}, 1e-9, "nats", {}, true}};
    };
    t.export_file = [this](const ExportRequest& r, Context&) {
      ++counts.exported;
      AtomicFile file(r.out);
      file.write("weights of " + read_text(r.model / "config.json") + r.recipe);
      file.flush();
      file.write(r.before_seal(file.temporary()));
      file.commit();
    };
    return t;
  }
};

}  // namespace pare::testing
