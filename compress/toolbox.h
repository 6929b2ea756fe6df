// What the pipeline can do to models, as functions: the real ones are assembled in toolbox.cpp, tests bring their own.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "core/context.h"
#include "core/file.h"
#include "core/json.h"
#include "core/options.h"
#include "core/report.h"
#include "core/stage_plan.h"

namespace pare {

struct ModelFacts {
  std::string family;
  std::int64_t parameters = 0;         // tied weights once
  std::uint64_t tensor_bytes = 0;      // as stored
  std::int64_t max_positions = 0;      // 0: no limit known
  PlannedModel planned;                // what a stage on it would read
  Json details = Json::object();       // layers, hidden size, ... for the plan
};

struct SampleRequest {
  fs::path model, out;                 // model folder -> jsonl, one {"text"} per line
  std::int64_t documents = 0, context = 0;
  std::uint64_t seed = 0;
  fs::path scratch;                    // folder for a temporary compact file, removed again
};

struct MeasureRequest {
  std::string stage;                   // label of the rows
  fs::path model;                      // folder, or compact file (scored by the runtime)
  fs::path original;
  std::vector<std::string> text;
  std::string split;                   // "" : none
  std::int64_t context = 0, max_tokens = 0;
  std::string device;
};

struct ExportRequest {
  fs::path model, out;
  std::string codec;                   // of tensors that are not quantized
  std::string recipe;                  // embedded, with hashes in place of paths
  // Called with the complete unsealed file; returns the deterministic report to embed. Throwing leaves no file.
  std::function<std::string(const fs::path& unsealed)> before_seal;
};

struct Toolbox {
  std::vector<Command> stages;                                             // commands a recipe may name
  std::function<ModelFacts(const fs::path& model)> inspect;                // exit 3 on an invalid folder
  std::function<void(const std::vector<std::string>& text, const std::string& split)> check_text;  // exit 3 when empty
  std::function<void(const SampleRequest&, Context&)> sample;
  // Rows with the metric names of kTableMetrics (report_table.h) and whatever else was measured.
  std::function<std::vector<ReportRow>(const MeasureRequest&, Context&)> measure;
  std::function<void(const ExportRequest&, Context&)> export_file;
  // Estimate for the plan: the compact file of a model with the side files of `folder`.
  std::function<std::uint64_t(const PlannedModel& model, const fs::path& folder, const std::string& codec)>
      export_bytes;
  // Runtime on the compact file against LibTorch on the folder's unpacked weights; throws (exit 1) when they differ.
  std::function<std::vector<ReportRow>(const fs::path& compact, const MeasureRequest&, Context&)> compare;
  std::string version;                                                     // part of every stage key
};

Toolbox real_toolbox();

}  // namespace pare
