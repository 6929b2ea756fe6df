#include "core/model_card.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <optional>

#include "core/compact.h"
#include "core/error.h"
#include "core/gguf_file.h"
#include "core/options.h"
#include "core/tokenizer_text.h"
#include "core/transformers.h"

namespace pare {
namespace {

constexpr const char* kCard = "README.md";
constexpr std::string_view kOpen = "<!-- pare: ", kClose = " -->";  // what the next step reads
constexpr std::size_t kMostBytes = 1 << 20, kMostFigures = 40;
constexpr std::array kLicenceKeys = {"license", "license_name", "license_link"};

// One line of printable text, whatever a file said.
std::string line_of(const std::string& text, std::size_t most = 200) {
  std::string out;
  for (const char c : text.substr(0, most)) out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? ' ' : c;
  for (int cut = 0; cut < 4 && !out.empty() && !tok::is_valid_utf8(out); ++cut) out.pop_back();
  return tok::is_valid_utf8(out) ? out : "?";
}

// Inside of a code span, and of an HTML comment.
std::string plain(std::string text) {
  text = line_of(text);
  std::replace(text.begin(), text.end(), '`', '\'');
  std::replace(text.begin(), text.end(), '>', ' ');
  return text;
}

// "key: value" lines of the front matter; lists and nested values are not of interest here.
void read_front_matter(const std::string& text, ModelOrigin& origin) {
  if (!text.starts_with("---\n")) return;
  const std::size_t end = text.find("\n---", 3);
  if (end == std::string::npos) return;
  for (std::size_t at = 4; at < end;) {
    const std::size_t stop = std::min(text.find('\n', at), end);
    const std::string line = text.substr(at, stop - at);
    at = stop + 1;
    for (const char* key : kLicenceKeys) {
      const std::string begin = std::string(key) + ":";
      if (!line.starts_with(begin)) continue;
      std::string value = line.substr(begin.size());
      value.erase(0, value.find_first_not_of(" \t\"'"));
      value.erase(value.find_last_not_of(" \t\r\"'") + 1);
      if (!value.empty()) origin.licence.emplace_back(key, line_of(value));
    }
  }
}

// What an earlier step of ours left for this one; nothing where the card is another's or was changed.
void read_own(const std::string& text, ModelOrigin& origin) {
  const std::size_t open = text.rfind(kOpen);
  if (open == std::string::npos) return;
  const std::size_t close = text.find(kClose, open);
  if (close == std::string::npos) return;
  try {
    const Json own = parse_json(text.substr(open + kOpen.size(), close - open - kOpen.size()), kCard);
    std::vector<std::string> steps;
    for (const Json& step : own.at("steps")) steps.push_back(plain(step.get<std::string>()));
    origin.base = line_of(own.at("base").get<std::string>());
    origin.steps = std::move(steps);
  } catch (const std::exception&) {
  }
}

std::string named(const fs::path& path) {
  const fs::path whole = fs::absolute(path).lexically_normal();
  return (whole.has_filename() ? whole : whole.parent_path()).filename().string();
}

void read_card(const std::string& text, ModelOrigin& origin) {
  if (text.size() > kMostBytes) return;
  read_front_matter(text, origin);
  read_own(text, origin);
}

// Of the model that is written: what a search tried on the way begins with "trial: ".
bool describes_a_model(const ReportRow& row) {
  static constexpr std::array kShown = {"perplexity", "mean_kl", "kl", "top1", "accuracy", "bits_per_byte", "held_out",
                                        "tensor_bytes", "file_bytes", "parameters", "bits_per_weight", "tuning_kl",
                                        "sparsity", "acc", "calibration ", "blocks", "heads", "neurons", "channels",
                                        "experts"};
  return row.deterministic && std::any_of(kShown.begin(), kShown.end(), [&](const char* shown) {
    return row.metric.starts_with(shown);
  });
}

std::string number(const std::optional<double>& value) {
  return value ? fmt::format("{:.5g}", *value) : std::string();
}

std::string figures_of(const Report& report) {
  std::vector<ReportRow> rows;
  std::copy_if(report.rows().begin(), report.rows().end(), std::back_inserter(rows), describes_a_model);
  if (rows.empty()) return "";
  // Where there are too many, those of the whole model stay.
  std::stable_partition(rows.begin(), rows.end(), [](const ReportRow& row) {
    return row.metric.find(" of block ") == std::string::npos;
  });
  std::string text = "| stage | figure | before | after | standard error | unit |\n|---|---|---|---|---|---|\n";
  for (std::size_t i = 0; i < std::min(rows.size(), kMostFigures); ++i)
    text += fmt::format("| {} | {} | {} | {} | {} | {} |\n", rows[i].stage, rows[i].metric, number(rows[i].before),
                        number(rows[i].after), number(rows[i].standard_error), rows[i].unit);
  if (rows.size() > kMostFigures) text += fmt::format("\n{} further rows are left out.\n", rows.size() - kMostFigures);
  return text;
}

// Why transformers does not load what was written; nullopt too where no config.json lies there.
std::optional<std::string> loading_obstacle(const fs::path& folder) {
  for (const fs::path& file : {folder / "config.json", folder / "model" / "config.json"})
    if (fs::is_regular_file(file)) return transformers_obstacle(parse_config(read_json(file), nullptr, file.string()));
  return std::nullopt;
}

// The last name of a path, others as they are.
std::string without_place(const Json& value) {
  if (value.is_string()) {
    const auto text = value.get<std::string>();
    return text.find('/') == std::string::npos ? text : named(text);
  }
  if (value.is_array()) {
    std::string all;
    for (const Json& item : value) all += (all.empty() ? "" : " ") + without_place(item);
    return all;
  }
  return value.dump();
}

}  // namespace

std::string gguf_key(const std::string& licence_key) {
  return licence_key == "license" ? "general.license" : "general.license." + licence_key.substr(8);
}

ModelOrigin origin_of(const fs::path& from) {
  ModelOrigin origin;
  if (from.empty()) return origin;
  if (GgufFile::is_gguf(from)) {
    const GgufFile file(from);
    for (const char* key : kLicenceKeys)
      if (const auto value = file.text(gguf_key(key))) origin.licence.emplace_back(key, line_of(*value));
    if (const auto base = file.text("general.base_model.0.name")) origin.base = line_of(*base);
    if (origin.base.empty()) origin.base = line_of(file.text("general.name").value_or(""));
  }
  if (CompactFile::is_compact(from)) read_card(CompactFile(from).embedded(kCard).value_or(""), origin);
  if (fs::is_regular_file(from / kCard)) read_card(read_text(from / kCard), origin);
  if (origin.base.empty() && fs::is_regular_file(from / "config.json")) {
    const Json config = read_json(from / "config.json");
    const auto said = config.find("_name_or_path");  // "org/name", or a folder on the machine of whoever saved it
    if (said != config.end() && said->is_string()) {
      const auto name = said->get<std::string>();
      if (std::count(name.begin(), name.end(), '/') == 1 && name.front() != '/' && name.front() != '.')
        origin.base = line_of(name);
    }
  }
  if (origin.base.empty()) origin.base = line_of(named(from));
  return origin;
}

std::string command_of(const std::string& verb, const Options& options) {
  static constexpr std::array kUnsaid = {"model", "out", "threads", "quiet", "json", "restart", "max-ram", "device",
                                        "checkpoint-minutes", "rank-timeout"};
  std::string command = "pare " + verb;
  for (const auto& [name, value] : options.resolved().items()) {
    if (!options.changed(name) || std::find(kUnsaid.begin(), kUnsaid.end(), name) != kUnsaid.end()) continue;
    command += " --" + name;
    if (!value.is_boolean()) command += " " + without_place(value);
  }
  return plain(command);
}

void write_model_card(const fs::path& folder, const CardStep& step) {
  ModelOrigin origin = origin_of(step.from);
  origin.steps.push_back(plain(step.command));
  const auto any = [&](const char* verb) {
    return std::any_of(origin.steps.begin(), origin.steps.end(), [&](const std::string& command) {
      return command.starts_with(std::string("pare ") + verb);
    });
  };
  const bool quantized = any("quantize") || any("compress");
  std::string text = "---\n";
  for (const auto& [key, value] : origin.licence) text += fmt::format("{}: {}\n", key, Json(value).dump());
  if (!origin.base.empty())
    text += fmt::format("base_model: {}\nbase_model_relation: {}\n", Json(origin.base).dump(),
                        quantized ? "quantized" : "finetune");
  const auto obstacle = loading_obstacle(folder);
  text += fmt::format("library_name: {}\ntags:\n- pare\n---\n\n", obstacle ? "pare" : "transformers");
  if (origin.base.empty()) {
    text += "# A model made by pare\n\nTrained from nothing but text.\n";
  } else {
    text += fmt::format("# {0}\n\nMade by pare from `{0}`. ", plain(origin.base));
    text += origin.licence.empty() ? "The original states no licence where pare looks for one (the front matter of its "
                                     "README.md); its terms hold for this model too.\n"
                                   : "Its licence, above, holds for this model too.\n";
  }
  if (fs::exists(folder / "LICENSE")) text += "The original's LICENSE file lies beside this one.\n";
  if (obstacle) text += fmt::format("\npare loads this model, transformers does not: {}.\n", plain(*obstacle));
  if (!step.files.empty()) text += "\n" + step.files + "\n";
  text += "\n## How it was made\n\n";
  for (std::size_t i = 0; i < origin.steps.size(); ++i) text += fmt::format("{}. `{}`\n", i + 1, origin.steps[i]);
  const std::string figures = figures_of(step.figures);
  text += "\n## Evaluation\n\n";
  text += figures.empty() ? "Nothing was measured in the last step; `pare eval` measures it.\n" : figures;
  text += fmt::format("\n{}{}{}\n", kOpen, Json{{"base", plain(origin.base)}, {"steps", origin.steps}}.dump(), kClose);
  write_text(folder / kCard, text);
}

}  // namespace pare
