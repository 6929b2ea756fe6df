#include "compress/report_verb.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "compress/html.h"
#include "compress/report_table.h"
#include "core/checkpoint.h"
#include "core/context.h"
#include "core/error.h"
#include "core/version.h"

namespace pare {
namespace {

constexpr int kDepth = 3;
constexpr const char* kCurveFile = "train.jsonl";
constexpr const char* kGenerator = "<meta name=generator content=\"pare report\">";

double number(const Json& point, const char* key) {
  const auto found = point.find(key);
  return found != point.end() && found->is_number() ? found->get<double>() : std::nan("");
}

std::string shown(const Json& value) {
  return value.is_string() ? value.get<std::string>() : value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// One line of train.jsonl: {"step", "tokens", "loss", "lr", "gradient_norm", "tokens_per_second", "resident_bytes",
// "held_out": {name: loss}}; the last one {"final": true, "held_out": {name: {"loss", "standard_error", "tokens"}}}.
std::string curves(const fs::path& file) {
  const std::string text = read_text(file);
  Series loss{"training", {}, {}};
  std::map<std::string, Series> held_out;
  std::vector<std::pair<const char*, Series>> others = {
      {"lr", {}}, {"gradient_norm", {}}, {"tokens_per_second", {}}, {"resident_bytes", {}}};
  std::string final_table;
  std::size_t number_of_line = 0;
  double steps = 0, tokens = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string line = text.substr(begin, end - begin);
    ++number_of_line;
    begin = end + 1;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const std::string place = file.string() + ":" + std::to_string(number_of_line);
    const Json point = parse_json(line, place);
    if (!point.is_object() || !point.contains("step") || !point["step"].is_number())
      throw input_error(place, "a point of a training curve, with \"step\"",
                        point.is_object() ? "none" : point.type_name());
    const double step = number(point, "step");
    steps = std::max(steps, step);
    if (point.contains("tokens")) tokens = std::max(tokens, number(point, "tokens"));
    const Json held = point.value("held_out", Json::object());
    if (!held.is_object()) throw input_error(place, "losses by name in \"held_out\"", held.type_name());
    if (point.contains("final")) {
      final_table = "<p>Held-out loss of what was written:</p>\n<table>\n" +
                    table_line({"text", "loss, nats/token", "±", "tokens"}, "th", 1);
      for (const auto& [name, value] : held.items())
        if (value.is_object())
          final_table +=
              table_line({name, number_text(number(value, "loss")), number_text(number(value, "standard_error")),
                          number_text(number(value, "tokens"))},
                         "td", 1);
      final_table += "</table>\n";
      continue;
    }
    loss.x.push_back(step);
    loss.y.push_back(number(point, "loss"));
    for (auto& [key, series] : others) {
      series.x.push_back(step);
      series.y.push_back(number(point, key) / (std::string(key) == "resident_bytes" ? 1048576 : 1));
    }
    for (const auto& [name, value] : held.items()) {
      Series& series = held_out[name];
      series.name = name;
      series.marks = true;
      series.x.push_back(step);
      series.y.push_back(value.is_number() ? value.get<double>() : std::nan(""));
    }
  }
  std::vector<Series> losses = {loss};
  for (auto& [name, series] : held_out) losses.push_back(std::move(series));
  std::string out = "<p>" + number_text(steps) + " steps" + (tokens > 0 ? ", " + number_text(tokens) + " tokens" : "") +
                    "</p>\n" + line_chart("Loss", "step", "nats/token", losses);
  const std::pair<const char*, const char*> names[] = {
      {"Learning rate", ""}, {"Gradient norm", ""}, {"Speed", "tokens/s"}, {"Resident memory", "MiB"}};
  for (std::size_t i = 0; i < others.size(); ++i)
    out += line_chart(names[i].first, "step", names[i].second, {others[i].second}, i == 1);
  return out + final_table;
}

std::string settings_table(const Json& settings) {
  std::string out = "<table>\n" + table_line({"setting", "value"}, "th", 2);
  for (const auto& [key, value] : settings.items())
    if (!value.is_null()) out += table_line({key, shown(value)}, "td", 2);
  return out + "</table>\n";
}

std::string tables_of_rows(const Json& json, const std::string& place) {
  const Report report = Report::from_json(json, place);
  std::string out;
  Report lasting;
  bool volatile_rows = false;
  for (const ReportRow& row : report.rows()) {
    if (row.deterministic)
      lasting.add(row);
    else
      volatile_rows = true;
  }
  if (const auto cells = report_cells(lasting); cells.size() > 1) {
    out += "<table>\n";
    for (std::size_t i = 0; i < cells.size(); ++i) out += table_line(cells[i], i == 0 ? "th" : "td", 1);
    out += "</table>\n";
  }
  if (!lasting.rows().empty()) out += rows_table(lasting, true);
  if (volatile_rows) out += "<p>Times and memory:</p>\n" + rows_table(report, false);
  return out;
}

// lm-evaluation-harness: {"results": {task: {"acc,none": value, "acc_stderr,none": value, ..}}}.
std::string harness_table(const Json& results) {
  std::string out = "<table>\n" + table_line({"task", "figure", "value", "±"}, "th", 2);
  for (const auto& [task, figures] : results.items()) {
    if (!figures.is_object()) continue;
    for (const auto& [name, value] : figures.items()) {
      if (!value.is_number() || name.find("_stderr") != std::string::npos) continue;
      const std::size_t comma = std::min(name.find(','), name.size());
      const double error = number(figures, (name.substr(0, comma) + "_stderr" + name.substr(comma)).c_str());
      out += table_line({task, name, number_text(value.get<double>()), std::isnan(error) ? "" : number_text(error)},
                        "td", 2);
    }
  }
  return out + "</table>\n";
}

// "" for a JSON file that is none of a run's.
std::string of_json(const fs::path& file) {
  const Json json = read_json(file);
  const std::string name = file.filename().string();
  if (name == "prune.json" || name == "quantize.json") {
    if (!json.is_object() || !json.contains("options") || !json["options"].is_object())
      throw input_error(file.string(), "what a stage was asked to do, in \"options\"", "none");
    return settings_table(json["options"]);
  }
  if (!json.is_object()) return "";
  for (const char* key : {"rows", "report"})  // "report": in what `pare eval --output` writes
    if (json.contains(key) && json[key].is_array()) return tables_of_rows(json[key], file.string());
  if (json.contains("results") && json["results"].is_object()) return harness_table(json["results"]);
  return "";
}

bool belongs_to_models(const std::string& name) {
  static const std::vector<std::string> others = {"config.json", "tokenizer.json", "architecture.json",
                                                  "adapter_config.json"};
  const auto& side = side_file_names();
  return std::find(side.begin(), side.end(), name) != side.end() ||
         std::find(others.begin(), others.end(), name) != others.end() || name.ends_with(".index.json");
}

void add_file(const fs::path& root, const fs::path& file, std::string& out) {
  const std::string name = file.filename().string();
  std::string section;
  if (file.extension() == ".jsonl")
    section = curves(file);
  else if (!belongs_to_models(name))
    section = of_json(file);
  if (section.empty()) return;
  const fs::path shown_as = file == root ? file.filename() : file.lexically_relative(root);
  out += "<h2>" + escaped(shown_as.string()) + "</h2>\n" + section;
}

void add_folder(const fs::path& root, const fs::path& folder, int depth, std::string& out) {
  std::vector<fs::path> files, folders;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.is_directory() && !entry.is_symlink()) folders.push_back(entry.path());
    const std::string name = entry.path().filename().string();
    if (entry.is_regular_file() && (name == kCurveFile || entry.path().extension() == ".json"))
      files.push_back(entry.path());
  }
  // Curves first, then the rows, then what was asked for.
  const auto rank = [](const fs::path& file) {
    const std::string name = file.filename().string();
    return name == kCurveFile ? 0 : name == "report.json" ? 1 : 2;
  };
  std::sort(files.begin(), files.end(),
            [&](const fs::path& a, const fs::path& b) { return std::pair(rank(a), a) < std::pair(rank(b), b); });
  std::sort(folders.begin(), folders.end());
  for (const fs::path& file : files) add_file(root, file, out);
  if (depth < kDepth)
    for (const fs::path& inside : folders) add_folder(root, inside, depth + 1, out);
}

Json run_report(const Options& options, Context& context) {
  fs::path run = fs::absolute(options.get<std::string>("run")).lexically_normal();  // ".": the page lies beside it
  if (run.filename().empty()) run = run.parent_path();  // "folder/"
  fs::path unfinished = run;
  unfinished += ".partial";
  if (!fs::exists(run) && fs::is_directory(unfinished)) run = unfinished;
  fs::path file = run;
  file += ".html";
  file = options.get_or<std::string>("out", file.string());
  if (fs::exists(file) && read_text(file).find(kGenerator) == std::string::npos)
    throw usage_error(file.string(), "a page of pare report, or nothing", "another file",
                      "name another one with --out");
  write_text(file, run_page(run));
  context.print("written: " + file.string());
  return {{"page", file.string()}};
}

}  // namespace

std::string run_page(const fs::path& run) {
  std::string sections;
  if (fs::is_directory(run))
    add_folder(run, run, 0, sections);
  else if (fs::exists(run))
    add_file(run, run, sections);
  if (sections.empty())
    throw input_error(run.string(), "train.jsonl, or a JSON file with rows (report.json), prune.json or quantize.json",
                      "none of them", "name the output folder of a run");
  std::string out = page_begin(fs::absolute(run).filename().string());
  const std::size_t head = out.find("<title>");
  out.insert(head, std::string(kGenerator) + "\n");
  return out + sections + "<p><small>pare " + escaped(kVersion) + "</small></p>\n" + page_end();
}

Command report_command() {
  Command command;
  command.name = "report";
  command.summary = "Draw the curves and tables of a run as one HTML page";
  command.options = {
      {.name = "run",
       .type = OptionType::kPath,
       .help = "output folder of any verb, also of one that is still running; or a file",
       .required = true,
       .positional = true},
      {.name = "out", .type = OptionType::kPath, .help = "page to write; default: RUN.html"},
  };
  command.run = run_report;
  command.example = "pare report tuned";
  return command;
}

}  // namespace pare
