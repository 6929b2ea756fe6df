#include "eval/lm_eval_results.h"

#include <fmt/format.h>

#include <cmath>
#include <ctime>

#include "core/version.h"
#include "eval/divergence.h"

namespace pare {
namespace {

std::string sanitized(const std::string& model) {
  std::string name = fs::path(model).lexically_normal().filename().string();
  if (name.empty()) name = fs::path(model).lexically_normal().parent_path().filename().string();
  for (char& c : name)
    if (std::string_view("\"<>:/\\|?* ").find(c) != std::string_view::npos) c = '_';
  return name;
}

const char* output_type(TaskKind kind) {
  return kind == TaskKind::kText           ? "loglikelihood_rolling"
         : kind == TaskKind::kContinuation ? "loglikelihood"
                                           : "multiple_choice";
}

}  // namespace

Json lm_eval_results(std::span<const TaskResult> results, const LmEvalRun& run) {
  Json of_tasks = Json::object(), configs = Json::object(), versions = Json::object(), shots = Json::object(),
       higher = Json::object(), samples = Json::object();
  for (const TaskResult& result : results) {
    Json& one = of_tasks[result.name] = {
        {"name", result.name}, {"alias", result.name}, {"sample_len", result.items}};
    Json& better = higher[result.name] = Json::object();
    each_metric(result, [&](const char* name, const std::optional<Estimate>& value, const char*) {
      const std::string metric = name;
      if (!value || metric == "agreement") return;
      one[metric + ",none"] = json_number(value->value);
      const bool has_error = value->standard_error && result.kind != TaskKind::kText;
      one[metric + "_stderr,none"] = has_error ? json_number(*value->standard_error) : Json("N/A");
      better[metric] = metric.starts_with("acc");
    });
    configs[result.name] = {{"task", result.name},
                            {"dataset_path", "json"},
                            {"dataset_kwargs", {{"data_files", {{"test", result.file.string()}}}}},
                            {"test_split", "test"},
                            {"output_type", output_type(result.kind)},
                            {"target_delimiter", " "},
                            {"num_fewshot", 0}};
    versions[result.name] = nullptr;
    shots[result.name] = 0;
    samples[result.name] = {{"original", result.items_in_file}, {"effective", result.items}};
  }
  return {{"results", of_tasks},
          {"group_subtasks", Json::object()},
          {"configs", configs},
          {"versions", versions},
          {"n-shot", shots},
          {"higher_is_better", higher},
          {"n-samples", samples},
          {"config",
           {{"model", "pare"},
            {"model_args", run.model_args},
            {"batch_size", "1"},
            {"batch_sizes", Json::array()},
            {"device", "cpu"},
            {"use_cache", nullptr},
            {"limit", run.limit > 0 ? Json(run.limit) : Json(nullptr)},
            {"bootstrap_iters", 0},
            {"gen_kwargs", Json::object()}}},
          {"git_hash", nullptr},
          {"date", run.begun},
          {"pare_version", kVersion},
          {"max_length", run.context},
          {"task_hashes", Json::object()},
          {"model_source", "pare"},
          {"model_name", run.model},
          {"model_name_sanitized", sanitized(run.model)},
          {"system_instruction", nullptr},
          {"system_instruction_sha", nullptr},
          {"fewshot_as_multiturn", nullptr},
          {"chat_template", nullptr},
          {"chat_template_sha", nullptr},
          {"total_evaluation_time_seconds", fmt::format("{}", run.seconds)}};
}

fs::path lm_eval_file(const fs::path& where, const LmEvalRun& run) {
  if (where.extension() == ".json") return where;
  const auto seconds = static_cast<std::time_t>(run.begun);
  std::tm local{};
  localtime_r(&seconds, &local);
  char date[32];
  std::strftime(date, sizeof(date), "%Y-%m-%dT%H-%M-%S", &local);
  const auto micros = static_cast<int>((run.begun - std::floor(run.begun)) * 1e6);
  return where / sanitized(run.model) / fmt::format("results_{}.{:06}.json", date, micros);
}

}  // namespace pare
