// One `pare compress` run: plan, stages with skipping, export, proof, gate, final rename.
#pragma once

#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "compress/pipeline_steps.h"
#include "compress/recipe.h"
#include "compress/toolbox.h"
#include "core/error.h"

namespace pare {

struct PlanStep {
  std::string label;            // "sample", "prune", "quantize", "quantize 2", "export"
  std::string summary;          // what it does
  bool done = false;            // finished by an earlier run
  std::optional<double> seconds;
  std::uint64_t peak_bytes = 0, out_bytes = 0;
  std::string result;           // dimensions that it changes: "layers 6 -> 5, parameters ..."
  std::vector<std::string> notes;
};

struct Plan {
  std::vector<PlanStep> steps;
  ModelFacts original;
  std::uint64_t disk_bytes = 0, peak_bytes = 0;   // still to be written; largest step
  std::uint64_t disk_free = 0, memory = 0;        // of the output's file system; of the machine or its cgroup
  std::vector<std::string> loaders;               // which runtimes will load the result
  std::vector<std::string> notes;
  Json to_json() const;
  std::string text() const;
};

// Folders and keys of one run. Finished stages stand in `work` under names that carry the hash of everything they
// depend on, so a changed option, input or text is simply another name.
class Pipeline {
 public:
  Pipeline(Recipe recipe, const Toolbox& tools);

  // Checks everything that can be checked without touching weights; all problems in one error. Writes nothing.
  // Errors: exit 2 (output exists and is not this run's), 3 (model, text), 5 (disk or memory clearly too small).
  Plan plan() const;
  // The report of this very run when `out` already holds it.
  std::optional<Json> finished() const;
  // Runs what is missing. Returns the result object; all rows are in context.report. Errors: those of plan(), of the
  // stages, exit 4 on a missed gate.
  Json run(Context& context);

  const Recipe& recipe() const { return recipe_; }
  std::string run_key() const { return run_key_; }

 private:
  StageFolder stage_folder(std::size_t index, const fs::path& input, const std::vector<std::string>& text,
                           const std::string& input_hash) const;
  void plan_steps(Plan& plan, const std::function<void(const Error&)>& problem) const;
  void refuse_unused_keys() const;
  bool any_stage_takes_text() const;
  bool needs_sampled_text(bool held_out) const;
  std::int64_t sample_documents(bool held_out) const;
  std::int64_t sample_context() const;
  const Command& command(const std::string& name) const;
  Options stage_options(std::size_t index, const fs::path& input, const fs::path& out,
                        const std::vector<std::string>& text) const;
  Json keyed_options(const Command& command, const Json& resolved, bool portable) const;
  Json portable_recipe() const;
  std::string resolved_recipe() const;
  std::string label(std::size_t index) const;
  fs::path sampled_path(bool held_out) const;
  std::vector<std::string> text_or_sampled(bool held_out) const;
  std::vector<ReportRow> measured(const MeasureRequest& request, const std::string& model_hash, Context& context) const;
  MeasureRequest measure_request(const std::string& stage, const fs::path& model) const;
  void sample_missing(Context& context, std::vector<std::string>& skipped) const;
  void run_stage(std::size_t index, const fs::path& input, const StageFolder& folder,
                 const std::vector<std::string>& text, Context& context) const;
  bool is_unfinished_result(const fs::path& folder) const;
  void finish(const fs::path& last, const Plan& plan, Report report, std::chrono::steady_clock::time_point begin,
              Context& context, Json& result);
  void enforce(const Json& gates, const Report& report, const std::string& page, Context& context) const;

  Recipe recipe_;
  const Toolbox& tools_;
  fs::path model_, out_, work_;
  ModelFacts facts_;
  std::uint64_t seed_ = 0;
  std::string model_hash_, run_key_;
};

// XXH3-128 over the names and bytes of a file, or of all files below a folder (hidden ones left out), in name order.
std::string hash_path(const fs::path& path);

}  // namespace pare
