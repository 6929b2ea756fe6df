// What a run will do, checked and estimated from headers alone.
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <thread>

#include "compress/pipeline.h"
#include "compress/pipeline_steps.h"
#include "core/error.h"
#include "core/transformers.h"

namespace pare {
namespace {

fs::path existing_ancestor(fs::path path) {
  std::error_code ignored;
  while (!path.empty() && !fs::exists(path, ignored) && path != path.parent_path()) path = path.parent_path();
  return path.empty() ? fs::path(".") : path;
}

std::uint64_t free_bytes(const fs::path& path) {
  std::error_code problem;
  const auto space = fs::space(existing_ancestor(path), problem);
  return problem ? UINT64_MAX : space.available;
}

// Physical memory, or the limit of the control group this process runs in.
std::uint64_t machine_memory() {
  std::uint64_t bytes =
      static_cast<std::uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  for (const char* file : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    std::ifstream in(file);
    std::uint64_t limit = 0;
    if (in >> limit && limit > 0) bytes = std::min(bytes, limit);
  }
  return bytes;
}

std::string duration(double seconds) {
  char text[64];
  if (seconds < 90) std::snprintf(text, sizeof text, "%.0f s", std::max(seconds, 1.0));
  else if (seconds < 5400) std::snprintf(text, sizeof text, "%.0f min", seconds / 60);
  else std::snprintf(text, sizeof text, "%.1f h", seconds / 3600);
  return text;
}

// What a stage changes about the model's dimensions, "" where they stay.
std::string shape_text(const ModelConfig& before, const ModelConfig& after) {
  std::string text;
  const auto compare = [&](const char* what, std::int64_t a, std::int64_t b) {
    if (a != b)
      text += (text.empty() ? "" : ", ") + std::string(what) + " " + std::to_string(a) + " -> " + std::to_string(b);
  };
  compare("layers", before.num_layers, after.num_layers);
  compare("ffn", before.intermediate_size, after.intermediate_size);
  compare("parameters", parameter_count(before), parameter_count(after));
  return text;
}

bool inside(const fs::path& inner, const fs::path& outer) {
  const auto relative = inner.lexically_relative(outer);
  return !relative.empty() && *relative.begin() != "..";
}

// Collects problems so that all of them are told at once; the first decides the exit code.
class Problems {
 public:
  template <class F>
  void check(F&& f) {
    try {
      f();
    } catch (const Error& e) {
      add(e);
    }
  }
  void add(const Error& e) { errors_.push_back(e); }
  void report() const {
    if (errors_.empty()) return;
    if (errors_.size() == 1) throw errors_[0];
    std::string text = std::to_string(errors_.size()) + " problems:";
    for (const auto& e : errors_) text += "\n- " + std::string(e.what());
    throw Error(errors_[0].code(), text, "", "");
  }

 private:
  std::vector<Error> errors_;
};

}  // namespace

std::string bytes_text(std::uint64_t bytes) {
  char text[64];
  const auto value = static_cast<double>(bytes);
  if (value >= 1e9) std::snprintf(text, sizeof text, "%.2f GB", value / 1e9);
  else if (value >= 1e6) std::snprintf(text, sizeof text, "%.1f MB", value / 1e6);
  else std::snprintf(text, sizeof text, "%.1f kB", value / 1e3);
  return text;
}

Json Plan::to_json() const {
  Json list = Json::array();
  double seconds = 0;
  for (const auto& s : steps) {
    if (!s.done) seconds += s.seconds.value_or(0);
    list.push_back({{"step", s.label},
                    {"summary", s.summary},
                    {"done", s.done},
                    {"seconds", s.seconds ? Json(*s.seconds) : Json(nullptr)},
                    {"peak_bytes", s.peak_bytes},
                    {"out_bytes", s.out_bytes},
                    {"result", s.result},
                    {"notes", s.notes}});
  }
  return {{"status", "planned"},
          {"original",
           {{"family", original.family},
            {"parameters", original.parameters},
            {"tensor_bytes", original.tensor_bytes},
            {"details", original.details}}},
          {"steps", list},
          {"seconds", seconds},
          {"peak_bytes", peak_bytes},
          {"memory", memory},
          {"disk_bytes", disk_bytes},
          {"disk_free", disk_free},
          {"loaders", loaders},
          {"notes", notes}};
}

std::string Plan::text() const {
  std::string out = "model: " + original.family + ", " + std::to_string(original.parameters) + " parameters, " +
                    bytes_text(original.tensor_bytes) + "\n";
  std::size_t width = 4;
  for (const auto& s : steps) width = std::max(width, s.label.size());
  double seconds = 0;
  char line[256];
  std::snprintf(line, sizeof line, "%-*s  %10s  %11s  %8s\n", static_cast<int>(width), "step", "leaves", "peak memory",
                "time");
  out += line;
  for (const auto& s : steps) {
    if (!s.done) seconds += s.seconds.value_or(0);
    std::snprintf(line, sizeof line, "%-*s  %10s  %11s  %8s  ", static_cast<int>(width), s.label.c_str(),
                  s.out_bytes ? bytes_text(s.out_bytes).c_str() : "-",
                  s.peak_bytes ? bytes_text(s.peak_bytes).c_str() : "-",
                  s.done      ? "done"
                  : s.seconds ? duration(*s.seconds).c_str()
                              : "?");
    out += line + s.summary + "\n";
    if (!s.result.empty()) out += std::string(width + 2, ' ') + s.result + "\n";
    for (const auto& note : s.notes) out += std::string(width + 2, ' ') + "note: " + note + "\n";
  }
  out += "about " + duration(seconds) + "; " + bytes_text(disk_bytes) + " to write (" + bytes_text(disk_free) +
         " free); peak memory " + bytes_text(peak_bytes) + " (machine: " + bytes_text(memory) +
         "). Times are estimates.\n";
  out += "will load the result:\n";
  for (const auto& l : loaders) out += "  " + l + "\n";
  for (const auto& n : notes) out += "note: " + n + "\n";
  return out;
}

Plan Pipeline::plan() const {
  Plan plan;
  Problems problems;
  std::error_code ignored;

  if (fs::exists(fs::symlink_status(out_)) && !finished())
    problems.add(usage_error(out_.string(), "an output that does not exist yet, or this recipe's own run",
                             "something that is not this run's", "remove it or choose another --out"));
  for (const auto& [inner, outer] :
       {std::pair{out_, model_}, {model_, out_}, {work_, model_}, {model_, work_}, {work_, out_}, {out_, work_}})
    if (inner == outer || inside(inner, outer)) {
      problems.add(usage_error(inner.string(), "a folder outside " + outer.string(), "one inside it",
                               "model, out and work must not contain each other"));
      break;
    }
  if (recipe_.text("work").empty() && fs::exists(work_, ignored) && !is_work_folder(work_))
    problems.add(usage_error(work_.string(), "no such folder, or an unfinished run's", "files of something else",
                             "it would be removed at the end: move it, or name another folder with --work"));
  const fs::path partial = out_.string() + ".partial";
  if (fs::exists(partial, ignored) && !is_unfinished_result(partial))
    problems.add(usage_error(partial.string(), "no such folder, or an unfinished run's", "files of something else",
                             "finish the command it belongs to, remove it, or choose another --out"));
  const fs::path parent = existing_ancestor(out_.parent_path());
  if (!fs::is_directory(parent, ignored))
    problems.add(
        failure(out_.string(), "a folder to create it in", parent.string() + " is a file", "choose another --out"));
  else if (::access(parent.c_str(), W_OK) != 0)
    problems.add(failure(out_.string(), "a place that can be written", "no permission to write in " + parent.string(),
                         "choose another --out"));

  plan.original = facts_;
  problems.check([&] { refuse_unused_keys(); });
  const auto check_text = [&](const std::vector<std::string>& text, const std::string& split) {
    if (!text.empty()) problems.check([&] { tools_.check_text(text, split); });
  };
  check_text(recipe_.list(recipe_.run, "text"), recipe_.text("split"));
  check_text(recipe_.list(recipe_.evaluation, "text"), measure_request("", model_).split);

  const auto calibration = recipe_.list(recipe_.run, "text");
  for (const auto& t : recipe_.list(recipe_.evaluation, "text"))
    if (std::find(calibration.begin(), calibration.end(), t) != calibration.end())
      plan.notes.push_back(t + " is calibration text as well: the figures are not of held-out text");

  plan_steps(plan, [&](const Error& e) { problems.add(e); });

  plan.disk_free = std::min(free_bytes(out_), free_bytes(work_));
  plan.memory = machine_memory();
  for (const auto& s : plan.steps) {
    if (s.done) continue;
    plan.disk_bytes += s.out_bytes;
    plan.peak_bytes = std::max(plan.peak_bytes, s.peak_bytes);
  }
  if (plan.disk_bytes > plan.disk_free)
    problems.add(Error(ExitCode::kResources, parent.string(), bytes_text(plan.disk_bytes) + " of free disk space",
                       bytes_text(plan.disk_free), "free space or choose another --out or --work"));
  for (const auto& s : plan.steps)
    if (!s.done && s.peak_bytes > plan.memory)
      problems.add(Error(ExitCode::kResources, s.label, "a machine with " + bytes_text(s.peak_bytes) + " of memory",
                         bytes_text(plan.memory), "use a larger machine, or a method that needs less"));
  problems.report();
  return plan;
}

// Keys and flags that nothing in this recipe reads.
void Pipeline::refuse_unused_keys() const {
  const Options run(recipe_options(), recipe_.run, recipe_.place);
  const Options evaluation(eval_options(), recipe_.evaluation, recipe_.place + ": eval");
  const bool text = !recipe_.list(recipe_.run, "text").empty(),
             eval_text = !recipe_.list(recipe_.evaluation, "text").empty();
  if (!any_stage_takes_text()) refuse_unused(run, {"text"}, "where no stage reads it", recipe_.place);
  if (!needs_sampled_text(false) && !needs_sampled_text(true))
    refuse_unused(run, {"samples", "context"}, "where no text is sampled from the model", recipe_.place);
  if (!text && !(eval_text && evaluation.resolved().at("split").is_null()))
    refuse_unused(run, {"split"}, "without text", recipe_.place);
  if (!eval_text) refuse_unused(evaluation, {"split"}, "without eval text", recipe_.place + ": eval");
}

// Walks the stages in order. Where a stage's input does not exist yet, it is planned on what the stage before it
// announced.
void Pipeline::plan_steps(Plan& plan, const std::function<void(const Error&)>& problem) const {
  std::error_code ignored;
  const double tokens = static_cast<double>(sample_documents(false)) * static_cast<double>(sample_context());
  const auto sampled = [&](bool held_out) {
    PlanStep s;
    s.label = held_out ? "sample held-out" : "sample";
    s.summary = std::string(held_out ? "held-out text" : "calibration text") +
                " sampled from the model itself: " + std::to_string(sample_documents(held_out)) + " documents of " +
                std::to_string(sample_context()) + " tokens, temperature 1";
    s.done = fs::exists(sampled_path(held_out), ignored);
    const double bytes = 4.0 * static_cast<double>(plan.original.parameters);
    s.seconds = 1 + (held_out ? 0.5 : 1) * tokens * bytes / 4e9;  // one read of the weights per token at 4 GB/s
    s.out_bytes = static_cast<std::uint64_t>(bytes + tokens * 6);  // the f32 compact file is removed again
    s.peak_bytes = static_cast<std::uint64_t>(bytes * 1.1) + (64u << 20);
    plan.steps.push_back(s);
  };
  if (needs_sampled_text(false)) sampled(false);
  if (needs_sampled_text(true)) sampled(true);

  // A measurement holds the original and the model at hand in float32 and costs two forward passes of 2 flops a weight.
  const auto measuring = [&](const PlannedModel& model) {
    const double weights = static_cast<double>(plan.original.parameters + parameter_count(model.config));
    return std::pair{static_cast<std::uint64_t>(4 * weights) + (64u << 20),
                     1 + recipe_.evaluation["max-tokens"].get<double>() * 2 * weights / 2e10};
  };
  const bool every_stage = !recipe_.evaluation["final-only"].get<bool>();

  fs::path input = model_;
  PlannedModel model = plan.original.planned;
  bool input_exists = true, known = true;  // known: `model` is what the next stage will read
  std::string input_hash = model_hash_;
  const std::vector<std::string> text = text_or_sampled(false);
  bool text_exists = true;
  for (const auto& t : text) text_exists = text_exists && fs::exists(t, ignored);
  // Text that is not sampled yet is stood in for by a text that every model has: a plan looks at no more than its being
  // there.
  const std::vector<std::string> plan_text =
      text_exists ? text : std::vector<std::string>{(model_ / "config.json").string()};
  for (std::size_t i = 0; i < recipe_.stages.size(); ++i) {
    const Command& stage = command(recipe_.stages[i].name);
    PlanStep s;
    s.label = label(i);
    s.summary = stage.summary;
    bool checked = false;
    if (!stage.plan || !known) {
      s.notes.push_back("checked when the stage before it has run");
      known = false;
    } else {
      try {
        const Options options = stage_options(i, input_exists ? input : model_, work_ / s.label, plan_text);
        StagePlan estimate = stage.plan(options, model);
        s.seconds = estimate.seconds;
        s.peak_bytes = estimate.peak_bytes;
        s.out_bytes = estimate.out_bytes;
        s.notes = std::move(estimate.notes);
        s.result = shape_text(model.config, estimate.result.config);
        model = std::move(estimate.result);
        checked = true;
      } catch (const Error& e) {
        problem(Error(e.code(), recipe_.stages[i].place + ": " + e.place(), e.expected(), e.found(), e.hint()));
        known = false;
      }
    }
    if (every_stage && checked) {
      const auto [bytes, seconds] = measuring(model);
      s.peak_bytes = std::max(s.peak_bytes, bytes);
      *s.seconds += seconds;
    }

    if (checked && input_exists && text_exists) {
      const StageFolder folder = stage_folder(i, input, text, input_hash);
      s.done = folder.complete();
      input_exists = s.done;
      if (s.done) {
        input = folder.path;
        input_hash = hash_path(input);
        model = tools_.inspect(input).planned;
      }
    } else {
      input_exists = false;
    }
    plan.steps.push_back(std::move(s));
  }

  PlanStep last;
  last.label = "export";
  last.summary = "model.pare, reopened by the runtime, compared with the folder and measured on held-out text";
  last.out_bytes = tools_.export_bytes(model, model_, recipe_.exporting["codec"].get<std::string>());
  const auto [bytes, seconds] = measuring(model);
  last.seconds = seconds + 1 + static_cast<double>(last.out_bytes) / 2e8;
  last.peak_bytes = bytes + last.out_bytes;
  plan.steps.push_back(last);
  if (finished())
    for (auto& s : plan.steps) s.done = true;

  const bool quantized =
      plan.original.planned.quantized || std::any_of(recipe_.stages.begin(), recipe_.stages.end(),
                                                     [](const RecipeStage& s) { return s.name == "quantize"; });
  plan.loaders.push_back("model.pare: pare " + tools_.version + " (LibTorch-free runtime, C API)");
  if (recipe_.stages.empty()) return;
  auto obstacle = transformers_obstacle(model.config);
  // A stage that has not run yet is planned with blocks that are all alike.
  if (!obstacle && std::any_of(recipe_.stages.begin(), recipe_.stages.end(), [](const RecipeStage& s) {
        return s.given.contains("per-layer") && s.given.at("per-layer") == true;
      }))
    obstacle = "blocks of different widths";
  plan.loaders.push_back(obstacle    ? "model/: pare; transformers does not load it: " + *obstacle
                         : quantized ? "model/: transformers with compressed-tensors, in float32 for exactly these weights"
                                     : "model/: transformers");
}

}  // namespace pare
