// Results of tasks in the form of lm-evaluation-harness's results_*.json (result_schema.py of its version 0.4.13),
// which its own tools and leaderboards read.
#pragma once

#include <span>

#include "eval/tasks.h"

namespace pare {

struct LmEvalRun {
  std::string model;         // as it was named; model_name_sanitized is made of its last part
  Json model_args;           // whatever says how it was scored
  std::int64_t limit = 0;    // 0: none
  std::int64_t context = 0;
  double begun = 0;          // seconds since 1970
  double seconds = 0;        // the whole run
};

// Standard errors are those of means; of perplexities of continuations by the delta method, where the harness draws
// random samples; of texts none ("N/A").
Json lm_eval_results(std::span<const TaskResult> results, const LmEvalRun& run);

// Where they are written: `where` itself if it ends in .json, else where/MODEL/results_DATE.json, as the harness does.
fs::path lm_eval_file(const fs::path& where, const LmEvalRun& run);

}  // namespace pare
