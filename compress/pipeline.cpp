#include "compress/pipeline.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>

#include "compress/report_html.h"
#include "compress/report_table.h"
#include "core/error.h"
#include "core/model_card.h"

namespace pare {
namespace {

constexpr const char* kReportFile = "report.json";
constexpr const char* kPageFile = "report.html";
constexpr const char* kModelFile = "model.pare";
constexpr const char* kRecipeFile = "recipe.resolved.yaml";
constexpr const char* kCompactStage = "compact file";
constexpr std::uint64_t kHeldOutSeed = 0x68656c64;  // another stream than calibration

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// One process at a time works in a folder; the lock goes with the process, however it ends.
class WorkLock {
 public:
  explicit WorkLock(const fs::path& work) : path_(work / kLockFile) {
    fd_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd_ < 0)
      throw failure(work.string(), "a folder that can be written", "no permission", "choose another --out or --work");
    if (::flock(fd_, LOCK_EX | LOCK_NB) != 0) {
      ::close(fd_);
      throw Error(ExitCode::kResources, work.string(), "one run at a time", "another process working here",
                  "wait for it, or choose another --out");
    }
  }
  ~WorkLock() { ::close(fd_); }
  WorkLock(const WorkLock&) = delete;
  WorkLock& operator=(const WorkLock&) = delete;

 private:
  fs::path path_;
  int fd_ = -1;
};

// Files that a killed process had not renamed yet.
void remove_temporaries(const fs::path& folder) {
  std::error_code problem;
  for (fs::recursive_directory_iterator it(folder, problem), end; !problem && it != end; it.increment(problem)) {
    std::error_code ignored;
    if (it->is_regular_file(ignored) && it->path().filename().string().find(".tmp-") != std::string::npos)
      fs::remove(it->path(), ignored);
  }
}

// Hard links where the file system has them: a model folder of gigabytes need not be written twice. Not for a work
// folder that stays: editing the result must not change what later runs build on.
void link_tree(const fs::path& from, const fs::path& to, bool link) {
  fs::create_directories(to);
  for (const auto& entry : fs::directory_iterator(from)) {
    const fs::path target = to / entry.path().filename();
    if (entry.is_directory()) {
      link_tree(entry.path(), target, link);
      continue;
    }
    std::error_code problem;
    if (link) fs::create_hard_link(entry.path(), target, problem);
    if (!link || problem) copy_file_durably(entry.path(), target);
  }
}

std::string short_hash(std::string_view text) { return hash_bytes(as_bytes(text)).substr(0, 16); }

std::string file_name(const std::string& label) {
  std::string name = label;
  std::replace(name.begin(), name.end(), ' ', '-');
  return name;
}

bool calibrates_on_random_tokens(const Json& given) {
  return given.contains("random-tokens") && given["random-tokens"] == true;
}

}  // namespace

std::string hash_path(const fs::path& path) {
  std::error_code problem;
  if (!fs::is_directory(path, problem)) return hash_file(path);
  std::vector<fs::path> files;
  for (fs::recursive_directory_iterator it(path), end; it != end; ++it) {
    const bool hidden = it->path().filename().string().starts_with(".");
    if (hidden && it->is_directory()) it.disable_recursion_pending();
    if (!hidden && it->is_regular_file()) files.push_back(it->path());
  }
  std::sort(files.begin(), files.end());
  Hasher hasher;
  for (const auto& file : files) {
    hasher.update(file.lexically_relative(path).string());
    hasher.update(std::string_view("\0", 1));
    hasher.update(hash_file(file));
  }
  return hasher.hex();
}

Pipeline::Pipeline(Recipe recipe, const Toolbox& tools) : recipe_(std::move(recipe)), tools_(tools) {
  model_ = fs::path(recipe_.text("model"));
  out_ = fs::path(recipe_.text("out"));
  for (fs::path* p : {&model_, &out_})
    if (!p->has_filename()) *p = p->parent_path();  // "out/" means "out"
  work_ = recipe_.text("work").empty() ? fs::path(out_.string() + ".work") : fs::path(recipe_.text("work"));
  seed_ = recipe_.run["seed"].get<std::uint64_t>();
  std::error_code ignored;
  if (!fs::is_directory(model_, ignored))
    throw input_error(model_.string(), "a model folder", fs::exists(model_, ignored) ? "a file" : "nothing there",
                      "--model takes a Hugging Face folder with config.json and model.safetensors");
  for (const auto& list : {recipe_.list(recipe_.run, "text"), recipe_.list(recipe_.evaluation, "text")})
    for (const auto& t : list)
      if (!fs::exists(t, ignored)) throw input_error(t, "a text file or folder", "nothing there");
  facts_ = tools_.inspect(model_);
  model_hash_ = hash_path(model_);
  run_key_ = hash_bytes(as_bytes(tools_.version + portable_recipe().dump()));
}

const Command& Pipeline::command(const std::string& name) const {
  const auto found =
      std::find_if(tools_.stages.begin(), tools_.stages.end(), [&](const Command& c) { return c.name == name; });
  if (found == tools_.stages.end()) throw std::logic_error("recipe names a stage that does not exist: " + name);
  return *found;
}

std::string Pipeline::label(std::size_t index) const {
  const auto& name = recipe_.stages[index].name;
  std::size_t nth = 1;
  for (std::size_t i = 0; i < index; ++i) nth += recipe_.stages[i].name == name ? 1 : 0;
  return nth == 1 ? name : name + " " + std::to_string(nth);
}

// What the recipe says once goes to every stage that has an option of that name and does not say otherwise.
Options Pipeline::stage_options(std::size_t index, const fs::path& input, const fs::path& out,
                                const std::vector<std::string>& text) const {
  const RecipeStage& stage = recipe_.stages[index];
  Json given = stage.given;
  const bool own_text = given.contains("text");
  const auto& decls = command(stage.name).options;
  for (const auto& d : decls) {
    if (d.name == "model") given["model"] = input.string();
    if (d.name == "out") given["out"] = out.string();
    if (given.contains(d.name)) continue;
    if (d.name == "text" && !text.empty() && !calibrates_on_random_tokens(given)) {
      if (d.type == OptionType::kTextList) {
        given["text"] = text;
      } else if (text.size() == 1) {
        given["text"] = text[0];
      } else {
        throw usage_error(stage.place, "one text file for this stage",
                          std::to_string(text.size()) + " files in the recipe's text", "give the stage its own text");
      }
    }
    const bool recipe_text = !own_text && !recipe_.list(recipe_.run, "text").empty();
    if (d.name == "split" && recipe_text && !recipe_.text("split").empty()) given["split"] = recipe_.text("split");
    if (d.name == "seed") given["seed"] = seed_;
    if (d.name == "device") given["device"] = recipe_.text("device");
    if (d.name == "teacher") given["teacher"] = model_.string();
    if (d.name == "context" && d.default_value.is_number() && facts_.max_positions > 0 &&
        d.default_value.get<std::int64_t>() > facts_.max_positions)
      given["context"] = facts_.max_positions;
  }
  return Options(decls, given, stage.place);
}

// Resolved options with content hashes in place of paths: equal for equal work wherever the files lie.
// Sampled text may not exist yet when the whole recipe is keyed; it follows from keys that are part of it.
Json Pipeline::keyed_options(const Command& stage, const Json& resolved, bool portable) const {
  Json keyed = Json::object();
  for (const auto& d : stage.options) {
    if (d.name == "model" || d.name == "out") continue;
    // These decide where and when something is done, not one byte of the result.
    if (d.name == "max-ram" || d.name == "rank-timeout" || d.name == "checkpoint-minutes") continue;
    const Json& value = resolved.at(d.name);
    if (!is_path_option(d) || value.is_null()) {
      keyed[d.name] = value;
      continue;
    }
    if (d.name == "cache") {  // made by the stage itself, from what stands here anyway
      keyed[d.name] = true;
      continue;
    }
    Json hashes = Json::array();
    for (const auto& path : value.is_array() ? value : Json::array({value})) {
      std::string file = path.get<std::string>(), weight;
      std::error_code ignored;
      const auto equals = file.rfind('=');
      if (d.type == OptionType::kTextList && equals != std::string::npos &&
          !fs::exists(file, ignored)) {  // PATH=WEIGHT
        weight = file.substr(equals);
        file.resize(equals);
      }
      if (file == model_.string()) hashes.push_back(model_hash_);
      else if (portable && file == sampled_path(false).string()) hashes.push_back("sampled from the model");
      else hashes.push_back((fs::exists(file, ignored) ? hash_path(file) : "absent") + weight);
    }
    keyed[d.name] = hashes;
  }
  return keyed;
}

StageFolder Pipeline::stage_folder(std::size_t index, const fs::path& input, const std::vector<std::string>& text,
                                   const std::string& input_hash) const {
  const Command& stage = command(recipe_.stages[index].name);
  const Json keyed = keyed_options(stage, stage_options(index, input, work_ / "out", text).resolved(), false);
  const std::string key = short_hash(Json({tools_.version, stage.name, input_hash, seed_, keyed}).dump());
  const std::string name = std::to_string(index + 1) + "-" + file_name(label(index)) + "-" + key;
  return {work_ / name, work_ / (name + ".json")};
}

// Everything that decides the bytes of the result, without a path in it: embedded in the file and hashed for the run
// key.
Json Pipeline::portable_recipe() const {
  const auto hashes = [&](const std::vector<std::string>& paths) {
    Json list = Json::array();
    for (const auto& p : paths) list.push_back({{"name", fs::path(p).filename().string()}, {"hash", hash_path(p)}});
    return list;
  };
  Json portable = {{"pare", tools_.version}, {"model", {{"name", model_.filename().string()}, {"hash", model_hash_}}}};
  for (const auto& [key, value] : recipe_.run.items())
    if (key != "model" && key != "out" && key != "work" && key != "text" && !value.is_null()) portable[key] = value;
  const auto text = recipe_.list(recipe_.run, "text");
  portable["text"] = text.empty() ? Json("sampled from the model") : hashes(text);
  portable["stages"] = Json::array();
  for (std::size_t i = 0; i < recipe_.stages.size(); ++i) {
    const Command& stage = command(recipe_.stages[i].name);
    portable["stages"].push_back(
        {{stage.name,
          keyed_options(stage, stage_options(i, model_, work_ / "out", text_or_sampled(false)).resolved(), true)}});
  }
  portable["eval"] = recipe_.evaluation;
  const auto held_out = recipe_.list(recipe_.evaluation, "text");
  portable["eval"]["text"] = held_out.empty() ? Json("sampled from the model") : hashes(held_out);
  portable["export"] = recipe_.exporting;
  portable["require"] = recipe_.require;
  return portable;
}

std::string Pipeline::resolved_recipe() const {
  Recipe resolved = recipe_;
  const std::vector<std::string> text = text_or_sampled(false);
  for (std::size_t i = 0; i < resolved.stages.size(); ++i) {
    Json options = stage_options(i, model_, work_ / "out", text).resolved();
    options.erase("model");
    options.erase("out");
    if (!recipe_.stages[i].given.contains("text")) options.erase("text");  // the recipe's, or sampled again, alike
    resolved.stages[i].given = std::move(options);
  }
  return emit_recipe(resolved, {"Everything this run did, defaults included. Run it again with:",
                                "  pare compress " + std::string(kRecipeFile) + " --out ANOTHER_FOLDER",
                                "pare " + tools_.version + ", model content " + model_hash_});
}

// The recipe's text, which stands for stages that have none of their own.
bool Pipeline::any_stage_takes_text() const {
  return std::any_of(recipe_.stages.begin(), recipe_.stages.end(), [&](const RecipeStage& s) {
    const auto& options = command(s.name).options;
    return !s.given.contains("text") && !calibrates_on_random_tokens(s.given) &&
           std::any_of(options.begin(), options.end(), [](const OptionDecl& d) { return d.name == "text"; });
  });
}

bool Pipeline::needs_sampled_text(bool held_out) const {
  if (held_out) return recipe_.list(recipe_.evaluation, "text").empty();
  return recipe_.list(recipe_.run, "text").empty() && any_stage_takes_text();
}

std::int64_t Pipeline::sample_documents(bool held_out) const {
  const auto documents = recipe_.run["samples"].get<std::int64_t>();
  return held_out ? (documents + 1) / 2 : documents;
}

std::int64_t Pipeline::sample_context() const {
  const auto wanted = recipe_.run["context"].get<std::int64_t>();
  return facts_.max_positions > 0 ? std::min(wanted, facts_.max_positions) : wanted;
}

fs::path Pipeline::sampled_path(bool held_out) const {
  const std::string key = short_hash(Json({tools_.version, model_hash_, seed_, sample_documents(held_out),
                                           sample_context(), held_out}).dump());
  return work_ / ((held_out ? "held-out-" : "sampled-") + key + ".jsonl");
}

std::vector<std::string> Pipeline::text_or_sampled(bool held_out) const {
  const auto text = recipe_.list(held_out ? recipe_.evaluation : recipe_.run, "text");
  if (!text.empty()) return text;
  return needs_sampled_text(held_out) ? std::vector<std::string>{sampled_path(held_out).string()}
                                      : std::vector<std::string>{};
}

void Pipeline::sample_missing(Context& context, std::vector<std::string>& skipped) const {
  for (const bool held_out : {false, true}) {
    if (!needs_sampled_text(held_out)) continue;
    const fs::path file = sampled_path(held_out);
    const char* what = held_out ? "held-out text" : "calibration text";
    std::error_code ignored;
    if (fs::is_regular_file(file, ignored)) {
      skipped.push_back(held_out ? "sample held-out" : "sample");
      continue;
    }
    context.progress->note(std::string("No ") + (held_out ? "eval text" : "text") + " given: sampling " + what +
                           " from the model itself (" + std::to_string(sample_documents(held_out)) + " documents of " +
                           std::to_string(sample_context()) + " tokens, seed " + std::to_string(seed_) + ")");
    tools_.sample({model_, file, sample_documents(held_out), sample_context(),
                   held_out ? seed_ ^ kHeldOutSeed : seed_, work_},
                  context);
  }
}

MeasureRequest Pipeline::measure_request(const std::string& stage, const fs::path& model) const {
  const auto value = recipe_.evaluation["split"];
  const bool own = !recipe_.list(recipe_.evaluation, "text").empty();
  return {stage,
          model,
          model_,
          text_or_sampled(true),
          !own ? "" : value.is_string() ? value.get<std::string>() : recipe_.text("split"),
          recipe_.evaluation["context"].get<std::int64_t>(),
          recipe_.evaluation["max-tokens"].get<std::int64_t>(),
          recipe_.text("device")};
}

std::vector<ReportRow> Pipeline::measured(const MeasureRequest& request, const std::string& model_hash,
                                          Context& context) const {
  Json texts = Json::array();
  for (const auto& t : request.text) texts.push_back(hash_path(t));
  const std::string key = short_hash(Json({tools_.version, "measure", request.stage, model_hash, model_hash_, texts,
                                           request.split, request.context, request.max_tokens})
                                         .dump());
  const fs::path file = work_ / ("measured-" + key + ".json");
  std::error_code ignored;
  if (fs::is_regular_file(file, ignored)) return Report::from_json(read_json(file), file.string()).rows();
  context.progress->note("measuring " + request.stage);
  Report report;
  for (auto& row : tools_.measure(request, context)) report.add(std::move(row));
  write_text(file, report.to_json().dump(1) + "\n");
  return report.rows();
}

// What a killed run of compress left of its very last part: locked while it was made, complete just before its rename.
bool Pipeline::is_unfinished_result(const fs::path& folder) const {
  if (is_work_folder(folder)) return true;
  try {
    return read_json(folder / kReportFile).contains("run") && fs::is_regular_file(folder / kModelFile);
  } catch (const std::exception&) {
    return false;
  }
}

std::optional<Json> Pipeline::finished() const {
  std::error_code ignored;
  const fs::path file = out_ / kReportFile;
  if (!fs::is_regular_file(file, ignored) || !fs::is_regular_file(out_ / kModelFile, ignored)) return std::nullopt;
  try {
    Json report = read_json(file);
    if (report.value("run", "") != run_key_) return std::nullopt;
    if (report.value("file_bytes", std::uint64_t{0}) != fs::file_size(out_ / kModelFile)) return std::nullopt;
    return report;
  } catch (const std::exception&) {
    return std::nullopt;  // somebody else's report.json
  }
}

Json Pipeline::run(Context& context) {
  if (auto report = finished()) {
    std::error_code ignored;  // a run killed just after its last rename had no time to tidy up
    if (recipe_.text("work").empty() && is_work_folder(work_)) fs::remove_all(work_, ignored);
    context.progress->note("Nothing to do: " + out_.string() + " is the finished result of this recipe.");
    context.report = Report::from_json((*report)["rows"], (out_ / kReportFile).string());
    context.print(report_table(context.report));
    Json result = {{"status", "already finished"}, {"work_done", false}};
    for (const auto& [key, value] : report->items())
      if (key != "rows") result[key] = value;
    return result;
  }
  const Plan checked = plan();
  const auto begin = std::chrono::steady_clock::now();
  std::error_code problem;
  fs::create_directories(work_, problem);
  if (problem)
    throw failure(work_.string(), "a folder that can be written", problem.message(), "choose another --out or --work");
  const WorkLock lock(work_);

  std::vector<std::string> skipped;
  sample_missing(context, skipped);
  const std::vector<std::string> text = text_or_sampled(false);
  Report report;
  // A stage's own figure of a metric (what its codes will cost in the file, say) stands before a measured one.
  const auto add = [&](const std::vector<ReportRow>& rows) {
    const std::vector<ReportRow> known = report.rows();
    for (const auto& row : rows)
      if (std::none_of(known.begin(), known.end(),
                       [&](const ReportRow& k) { return k.stage == row.stage && k.metric == row.metric; }))
        report.add(row);
  };
  const bool every_stage = !recipe_.evaluation["final-only"].get<bool>();
  add(measured(measure_request("original", model_), model_hash_, context));

  fs::path input = model_;
  std::string input_hash = model_hash_;
  for (std::size_t i = 0; i < recipe_.stages.size(); ++i) {
    throw_if_interrupted(label(i), "run the same command again: finished stages are kept");
    const StageFolder folder = stage_folder(i, input, text, input_hash);
    const std::string title =
        "[" + std::to_string(i + 1) + "/" + std::to_string(recipe_.stages.size()) + "] " + label(i);
    if (folder.complete()) {
      context.progress->note(title + ": finished by an earlier run, skipped");
      skipped.push_back(label(i));
    } else {
      context.progress->note(title + ": " + command(recipe_.stages[i].name).summary);
      run_stage(i, input, folder, text, context);
    }
    const Json record = read_json(folder.record);
    add(Report::from_json(record.at("rows"), folder.record.string()).rows());
    input = folder.path;
    input_hash = hash_path(input);
    if (every_stage) add(measured(measure_request(label(i), input), input_hash, context));
  }

  throw_if_interrupted("export", "run the same command again: finished stages are kept");
  Json result = {{"status", "finished"}, {"work_done", true}, {"skipped", skipped}};
  finish(input, checked, std::move(report), begin, context, result);
  if (recipe_.text("work").empty()) fs::remove_all(work_, problem);
  return result;
}

void Pipeline::run_stage(std::size_t index, const fs::path& input, const StageFolder& folder,
                         const std::vector<std::string>& text, Context& context) const {
  std::error_code ignored;
  fs::remove_all(folder.path, ignored);  // complete but without its record, see StageFolder
  fs::remove(folder.record, ignored);
  remove_temporaries(folder.path.string() + ".partial");
  Context inner = context;
  inner.json = true;  // the run prints one table of its own
  inner.seed = seed_;
  inner.report = {};
  const auto begin = std::chrono::steady_clock::now();
  const std::string name = label(index);
  const auto write_record = [&] {
    Report rows;
    for (auto row : inner.report.rows()) {
      if (row.stage.empty() || row.stage == recipe_.stages[index].name) row.stage = name;
      rows.add(std::move(row));
    }
    if (std::none_of(rows.rows().begin(), rows.rows().end(), [](const ReportRow& r) { return r.metric == "seconds"; }))
      rows.add({name, "seconds", {}, seconds_since(begin), "s", {}, false});
    rows.add({name, "peak_memory_bytes", {}, static_cast<double>(peak_resident_bytes()), "bytes", {}, false});
    write_text(folder.record, Json{{"stage", recipe_.stages[index].name}, {"rows", rows.to_json()}}.dump(1) + "\n");
  };
  // Before the rename: a kill after it must not cost the stage.
  inner.before_commit = write_record;
  command(recipe_.stages[index].name).run(stage_options(index, input, folder.path, text), inner);
  if (!fs::is_directory(folder.path, ignored))
    throw failure(recipe_.stages[index].place, "a model folder at " + folder.path.string(), "nothing there");
  if (!fs::is_regular_file(folder.record, ignored)) write_record();
}

void Pipeline::finish(const fs::path& last, const Plan& plan, Report report,
                      std::chrono::steady_clock::time_point begin, Context& context, Json& result) {
  FolderTransaction transaction(out_);
  const WorkLock lock(transaction.work());
  struct Discard {
    FolderTransaction& transaction;
    bool armed = true;
    ~Discard() {
      if (armed) transaction.discard();
    }
  } guard{transaction};
  // Leftovers of a killed run, see is_unfinished_result: this part is short and done anew.
  for (const auto& entry : fs::directory_iterator(transaction.work()))
    if (entry.path().filename() != kLockFile) fs::remove_all(entry.path());

  if (last != model_) link_tree(last, transaction.work() / "model", recipe_.text("work").empty());
  Json gates = Json::array();
  std::uint64_t file_bytes = 0;
  context.progress->note("exporting " + std::string(kModelFile));
  ExportRequest request{last, transaction.work() / kModelFile, recipe_.exporting["codec"].get<std::string>(),
                        portable_recipe().dump(2) + "\n", {}};
  request.before_seal = [&](const fs::path& unsealed) {
    MeasureRequest measure = measure_request(kCompactStage, unsealed);
    context.progress->note("comparing the file with the model folder, measuring it with the runtime");
    MeasureRequest against = measure;
    against.model = last;
    for (auto& row : tools_.compare(unsealed, against, context)) report.add(std::move(row));
    for (auto& row : tools_.measure(measure, context))
      if (row.metric != "file_bytes") report.add(std::move(row));  // known when the report itself is inside
    return Json{{"run", run_key_}, {"rows", report.to_json(true)}}.dump(1) + "\n";
  };
  tools_.export_file(request, context);
  file_bytes = fs::file_size(request.out);
  report.add({kCompactStage, "file_bytes", {}, static_cast<double>(file_bytes), "bytes", {}, true});
  gates = check_requirements(recipe_.require, report, kCompactStage);
  const std::string recipe = resolved_recipe();
  const auto source = [&](bool held_out) {
    return needs_sampled_text(held_out) ? "sampled from the model itself" : "given";
  };
  result["text"] = source(false);
  result["eval_text"] = source(true);
  const std::string page = report_html({model_.filename().string(), tools_.version, run_key_, plan, report, gates,
                                        source(false), source(true), recipe});
  enforce(gates, report, page, context);
  write_text(transaction.work() / kRecipeFile, recipe);
  write_text(transaction.work() / kPageFile, page);
  write_model_card(transaction.work(),
                   {last, "pare compress " + std::string(kRecipeFile), report,
                    std::string(kModelFile) + " is the model in one file for pare's runtime, " + kRecipeFile +
                        " makes it again, " + kPageFile + " shows every figure."});

  result["run"] = run_key_;
  result["out"] = out_.string();
  result["file"] = (out_ / kModelFile).string();
  result["file_bytes"] = file_bytes;
  result["require"] = gates;
  result["seconds"] = seconds_since(begin);
  context.report = report;
  Json stored = result;
  stored.erase("status");
  stored.erase("work_done");
  stored["rows"] = report.to_json();
  write_text(transaction.work() / kReportFile, stored.dump(1) + "\n");
  fs::remove(transaction.work() / kLockFile);
  guard.armed = false;
  transaction.commit();

  std::string text = report_table(report);
  if (needs_sampled_text(true))
    text += "Measured on text sampled from the original itself; give --eval-text for text of your own.\n";
  for (const auto& g : gates)
    text += "required " + g["name"].get<std::string>() + " " + g["bound"].get<std::string>() + " " +
            g["required"].dump() + ": met (" + g["measured"].dump() + ")\n";
  text += (out_ / kModelFile).string() + "\n";
  context.print(text);
}

// Exit 4 with every missed figure; the table is printed and kept beside the finished stages for whoever has to decide.
void Pipeline::enforce(const Json& gates, const Report& report, const std::string& page, Context& context) const {
  std::string missed;
  for (const auto& g : gates) {
    if (g["met"].get<bool>()) continue;
    missed += (missed.empty() ? "" : "; ") + g["name"].get<std::string>() + " " + g["bound"].get<std::string>() + " " +
              g["required"].dump() + ", measured " + (g["measured"].is_null() ? "nothing" : g["measured"].dump());
  }
  if (missed.empty()) return;
  write_text(work_ / kReportFile,
             Json{{"run", run_key_}, {"require", gates}, {"rows", report.to_json()}}.dump(1) + "\n");
  write_text(work_ / kPageFile, page);
  context.print(report_table(report));
  throw Error(ExitCode::kQuality, recipe_.place + ": require", "every figure met", missed,
              "no file was left at " + out_.string() + "; finished stages and " + kReportFile + " are kept in " +
                  work_.string());
}

}  // namespace pare
