#include "core/model_card.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <iterator>
#include <optional>

#include "core/compact.h"
#include "core/error.h"
#include "core/gguf_file.h"
#include "core/notices.h"
#include "core/options.h"
#include "core/tokenizer_text.h"
#include "core/transformers.h"

namespace pare {
namespace {

constexpr const char* kCard = kModelCard;
constexpr std::string_view kOpen = "<!-- pare: ", kClose = " -->";  // what the next step reads
constexpr std::size_t kMostBytes = 1 << 20, kMostFigures = 40, kMostCommand = 4000;
constexpr std::array kLicenceKeys = {"license", "license_name", "license_link"};

// One line of printable text, whatever a file said.
std::string line_of(const std::string& text, std::size_t most = 200) {
  std::string out;
  for (const char c : text.substr(0, most)) out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? ' ' : c;
  for (int cut = 0; cut < 4 && !out.empty() && !tok::is_valid_utf8(out); ++cut) out.pop_back();
  return tok::is_valid_utf8(out) ? out : "?";
}

// The first statement counts, as the keys of a front matter have to be unique.
void state_licence(ModelOrigin& origin, const std::string& key, const std::string& value) {
  if (std::none_of(origin.licence.begin(), origin.licence.end(), [&](const auto& said) { return said.first == key; }))
    origin.licence.emplace_back(key, line_of(value));
}

// A name in a heading and in a code span.
std::string plain(std::string text) {
  text = line_of(text);
  std::replace(text.begin(), text.end(), '`', '\'');
  std::replace(text.begin(), text.end(), '>', ' ');
  return text;
}

// A code span of text with whatever is in it, by CommonMark: between more backquotes than it has in a row.
std::string code_span(const std::string& text) {
  std::size_t most = 0, row = 0;
  for (const char c : text) most = std::max(most, row = c == '`' ? row + 1 : 0);
  const std::string fence(most + 1, '`'), pad = most > 0 ? " " : "";
  return fence + pad + text + pad + fence;
}

// A scalar of YAML on one line, or nothing for what begins a list, a block or an anchor.
std::string scalar_of(std::string_view text) {
  const auto trimmed = [](std::string_view value) {
    const std::size_t begin = value.find_first_not_of(" \t");
    if (begin == std::string_view::npos) return std::string_view();
    return value.substr(begin, value.find_last_not_of(" \t\r") + 1 - begin);
  };
  text = trimmed(text);
  if (text.empty() || std::string_view("|>&*!#[{@%`").find(text[0]) != std::string_view::npos) return "";
  const char quote = text[0];
  if (quote != '"' && quote != '\'') {
    for (std::size_t at = text.find('#'); at != std::string_view::npos; at = text.find('#', at + 1))
      if (text[at - 1] == ' ' || text[at - 1] == '\t') return std::string(trimmed(text.substr(0, at)));
    return std::string(text);
  }
  std::string out;
  for (std::size_t i = 1; i < text.size(); ++i) {
    const bool escape = i + 1 < text.size() && (quote == '"' ? text[i] == '\\' : text.substr(i, 2) == "''");
    if (escape) ++i;
    else if (text[i] == quote) return out;
    out += text[i];
  }
  return "";  // goes on in the next line
}

// "key: value" lines of the front matter; lists and nested values are not of interest here.
void read_front_matter(std::string_view text, ModelOrigin& origin) {
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  if (!text.starts_with("---\n") && !text.starts_with("---\r\n")) return;
  const std::size_t end = text.find("\n---", 3);
  if (end == std::string_view::npos) return;
  for (std::size_t at = text.find('\n') + 1; at < end;) {
    const std::size_t stop = std::min(text.find('\n', at), end);
    const std::string_view line = text.substr(at, stop - at);
    at = stop + 1;
    for (const char* key : kLicenceKeys) {
      if (!line.starts_with(std::string(key) + ":")) continue;
      const std::string value = scalar_of(line.substr(std::string_view(key).size() + 1));
      if (!value.empty()) state_licence(origin, key, value);
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
    for (const Json& step : own.at("steps")) steps.push_back(line_of(step.get<std::string>(), kMostCommand));
    origin.base = line_of(own.at("base").get<std::string>());
    origin.steps = std::move(steps);
  } catch (const std::exception&) {
  }
}

std::string named(const fs::path& path) {
  if (std::string name = cached_model_name(path); !name.empty()) return name;
  const fs::path whole = fs::absolute(path).lexically_normal();
  return (whole.has_filename() ? whole : whole.parent_path()).filename().string();
}

void read_card(const std::string& text, ModelOrigin& origin) {
  if (text.size() > kMostBytes) return;
  read_front_matter(text, origin);
  read_own(text, origin);
}

// What stands in a compact file beside the card; what the card says goes before it.
void read_record(const std::string& text, ModelOrigin& origin) {
  const Json record = Json::parse(text, nullptr, false);
  if (!record.is_object()) return;
  const auto said = [&](const char* key) {
    const auto found = record.find(key);
    return found != record.end() && found->is_string() ? line_of(found->get<std::string>()) : std::string();
  };
  if (origin.base.empty()) origin.base = said("base");
  for (const char* key : kLicenceKeys)
    if (const std::string value = said(key); !value.empty()) state_licence(origin, key, value);
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

// Why transformers does not load what was written; nullopt too where no config.json that names its family lies there.
std::optional<std::string> loading_obstacle(const fs::path& folder) {
  for (const fs::path& file : {folder / "config.json", folder / "model" / "config.json"}) {
    if (!fs::is_regular_file(file)) continue;
    const Json config = read_json(file);
    if (!config.contains("architectures") && !config.contains("model_type")) return std::nullopt;
    return transformers_obstacle(parse_config(config, nullptr, file.string()));
  }
  return std::nullopt;
}

// One word for a shell.
std::string shell_word(const std::string& text) {
  constexpr std::string_view kSafe = "_@%+=:,./-";
  const auto safe = [&](unsigned char c) {
    return std::isalnum(c) != 0 || kSafe.find(static_cast<char>(c)) != kSafe.npos;
  };
  if (!text.empty() && std::all_of(text.begin(), text.end(), safe)) return text;
  const bool control = std::any_of(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
  std::string out = control ? "$'" : "'";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (control && (c == '\'' || c == '\\')) out += {'\\', c};
    else if (byte < 0x20 || byte == 0x7f) out += c == '\n' ? "\\n" : c == '\t' ? "\\t" : fmt::format("\\x{:02x}", byte);
    else if (c == '\'') out += "'\\''";
    else out += c;
  }
  return out + "'";
}

// Words for a shell; of places the last name.
std::string words_of(const Json& value, bool places) {
  if (value.is_string()) {
    const auto text = value.get<std::string>();
    return shell_word(places && text.find('/') != std::string::npos ? named(text) : text);
  }
  if (!value.is_array()) return value.dump();
  std::string all;
  for (const Json& item : value) all += (all.empty() ? "" : " ") + words_of(item, places);
  return all;
}

// Whether the weights of a folder, or of the compact file in it, are codes.
bool holds_codes(const fs::path& folder) {
  if (fs::exists(folder / "codes.pare")) return true;
  if (fs::is_regular_file(folder / "config.json")) {
    const Json config = read_json(folder / "config.json");
    const auto said = config.find("quantization_config");
    if (said != config.end() && !said->is_null()) return true;
  }
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() != ".pare" || !CompactFile::is_compact(entry.path())) continue;
    const CompactFile file(entry.path());
    if (std::any_of(file.tensors().begin(), file.tensors().end(), [](const auto& t) { return !t.codec.is_float(); }))
      return true;
  }
  return false;
}

std::string escaped(std::string json) {  // inside of an HTML comment
  for (const auto& [c, code] : {std::pair('<', "\\u003c"), std::pair('>', "\\u003e")})
    for (std::size_t at = json.find(c); at != std::string::npos; at = json.find(c, at)) json.replace(at, 1, code);
  return json;
}

}  // namespace

std::string gguf_key(const std::string& licence_key) {
  return licence_key == "license" ? "general.license" : "general.license." + licence_key.substr(8);
}

ModelOrigin origin_of(const fs::path& from, bool folder_names) {
  ModelOrigin origin;
  if (from.empty()) return origin;
  if (GgufFile::is_gguf(from)) {
    const GgufFile file(from);
    for (const char* key : kLicenceKeys)
      if (const auto value = file.text(gguf_key(key))) state_licence(origin, key, *value);
    for (const char* key : {kOriginKey, "general.name", "general.basename", "general.base_model.0.name"})
      if (origin.base.empty()) origin.base = line_of(file.text(key).value_or(""));
  }
  if (CompactFile::is_compact(from)) {
    const CompactFile file(from);
    read_card(file.embedded(kCard).value_or(""), origin);
    read_record(file.embedded(kOriginFile).value_or(""), origin);
  }
  if (const auto card = read_notice(from, kCard)) read_card(*card, origin);
  if (origin.base.empty()) origin.base = line_of(cached_model_name(from));
  if (origin.base.empty() && fs::is_regular_file(from / "config.json")) {
    const Json config = read_json(from / "config.json");
    const auto said = config.find("_name_or_path");  // "org/name", or a folder on the machine of whoever saved it
    if (said != config.end() && said->is_string()) {
      const auto name = said->get<std::string>();
      if (std::count(name.begin(), name.end(), '/') == 1 && name.front() != '/' && name.front() != '.')
        origin.base = line_of(name);
    }
  }
  if (origin.base.empty() && folder_names) origin.base = line_of(named(from));
  return origin;
}

std::string origin_record(const ModelOrigin& origin) {
  Json record = {{"base", origin.base}};
  for (const auto& [key, value] : origin.licence) record[key] = value;
  return record.dump() + "\n";
}

std::string command_of(const std::string& verb, const Options& options) {
  static constexpr std::array kUnsaid = {"model", "out", "threads", "quiet", "json", "restart", "max-ram", "device",
                                        "checkpoint-minutes", "rank-timeout"};
  std::string command = "pare " + verb;
  for (const auto& [name, value] : options.resolved().items()) {
    if (!options.changed(name) || std::find(kUnsaid.begin(), kUnsaid.end(), name) != kUnsaid.end()) continue;
    const OptionType type = options.type(name);
    const bool places = type == OptionType::kPath || type == OptionType::kTextList;
    command += (value == false ? " --no-" : " --") + name;
    if (!value.is_boolean()) command += " " + words_of(value, places);
  }
  return line_of(command, kMostCommand);
}

void write_model_card(const fs::path& folder, const CardStep& step) {
  ModelOrigin origin = origin_of(step.from);
  origin.steps.push_back(line_of(step.command, kMostCommand));
  const bool converted = std::all_of(origin.steps.begin(), origin.steps.end(), [](const std::string& command) {
    return command.starts_with("pare export");
  });
  std::string text = "---\n";
  for (const auto& [key, value] : origin.licence) text += fmt::format("{}: {}\n", key, Json(value).dump());
  if (!origin.base.empty())
    text += fmt::format("base_model: {}\n", Json(origin.base).dump());
  if (const bool codes = holds_codes(folder); !origin.base.empty() && (codes || !converted))
    text += fmt::format("base_model_relation: {}\n", codes ? "quantized" : "finetune");
  const auto obstacle = loading_obstacle(folder);
  text += fmt::format("library_name: {}\ntags:\n- pare\n---\n\n", obstacle ? "pare" : "transformers");
  if (origin.base.empty()) {
    text += "# A model made by pare\n\nTrained from nothing but text.\n";
  } else {
    text += fmt::format("# {0}\n\nMade by pare from `{0}`. ", plain(origin.base));
    text += origin.licence.empty() ? "The original states no licence where pare looks for one (one value for `license` "
                                     "in the front matter of its README.md); its terms hold for this model too.\n"
                                   : "Its licence, above, holds for this model too.\n";
  }
  for (const std::string& name : licence_file_names()) {
    if (fs::exists(folder / name)) text += "The original's " + name + " file lies beside this one.\n";
    else if (const std::string why = step.from.empty() ? "" : notice_obstacle(step.from, name); !why.empty())
      text += "The original's " + name + " is " + why + ", and was not taken along.\n";
  }
  if (obstacle) text += fmt::format("\npare loads this model, transformers does not: {}.\n", plain(*obstacle));
  if (!step.files.empty()) text += "\n" + step.files + "\n";
  text += "\n## How it was made\n\n";
  for (std::size_t i = 0; i < origin.steps.size(); ++i)
    text += fmt::format("{}. {}\n", i + 1, code_span(origin.steps[i]));
  const std::string figures = figures_of(step.figures);
  text += "\n## Evaluation\n\n";
  text += figures.empty() ? "Nothing was measured in the last step; `pare eval` measures it.\n" : figures;
  const Json own = {{"base", origin.base}, {"steps", origin.steps}};
  text += fmt::format("\n{}{}{}\n", kOpen, escaped(own.dump()), kClose);
  write_text(folder / kCard, text);
}

}  // namespace pare
