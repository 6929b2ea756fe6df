#include "compress/recipe.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>

#include "compress/yaml.h"
#include "core/error.h"

namespace pare {
namespace {

OptionDecl decl(std::string name, OptionType type, std::string help, Json default_value = nullptr) {
  OptionDecl d;
  d.name = std::move(name);
  d.type = type;
  d.help = std::move(help);
  d.default_value = std::move(default_value);
  return d;
}

OptionDecl number(std::string name, std::string help, double minimum, double maximum) {
  OptionDecl d = decl(std::move(name), OptionType::kNumber, std::move(help));
  d.minimum = minimum;
  d.maximum = maximum;
  return d;
}

OptionDecl integer(std::string name, std::string help, Json default_value, double minimum, double maximum) {
  OptionDecl d = decl(std::move(name), OptionType::kInteger, std::move(help), std::move(default_value));
  d.minimum = minimum;
  d.maximum = maximum;
  return d;
}

const OptionDecl* find(const std::vector<OptionDecl>& decls, std::string_view name) {
  for (const auto& d : decls)
    if (d.name == name) return &d;
  return nullptr;
}

std::vector<std::string> names(const std::vector<OptionDecl>& decls) {
  std::vector<std::string> out;
  for (const auto& d : decls) out.push_back(d.name);
  return out;
}

const std::vector<std::string> kSections = {"eval", "export", "require"};

const std::vector<OptionDecl>& section_options(const std::string& section) {
  if (section == "eval") return eval_options();
  if (section == "export") return export_options();
  return require_options();
}

std::string suggestion(const std::string& name, const std::vector<std::string>& candidates) {
  const std::string near = nearest_name(name, candidates);
  if (!near.empty()) return "; did you mean '" + near + "'?";
  std::string all;
  for (const auto& c : candidates) all += (all.empty() ? "" : ", ") + c;
  return "; valid: " + all;
}

// The type comes from the table: `split: 12` is text where text is declared, a number where a number is.
Json typed_scalar(const YamlValue& value, OptionType type) {
  const std::string& s = value.scalar;
  if (value.quoted || type == OptionType::kText || type == OptionType::kPath || type == OptionType::kTextList) return s;
  if (type == OptionType::kFlag) {
    if (s == "true" || s == "yes" || s == "on") return true;
    if (s == "false" || s == "no" || s == "off") return false;
    return s;
  }
  if (s.empty()) return s;
  char* end = nullptr;
  const long long whole = std::strtoll(s.c_str(), &end, 10);
  if (*end == '\0' && std::to_string(whole) == (s[0] == '+' ? s.substr(1) : s)) return whole;
  const double real = std::strtod(s.c_str(), &end);
  if (*end == '\0' && std::isfinite(real)) {
    if (type == OptionType::kInteger && real == std::floor(real) && std::abs(real) < 9e15)
      return static_cast<long long>(real);
    return real;
  }
  return s;
}

Json typed(const YamlValue& value, OptionType type) {
  switch (value.kind) {
    case YamlValue::Kind::kNull:
      return nullptr;
    case YamlValue::Kind::kScalar: {
      Json scalar = typed_scalar(value, type);
      if (type == OptionType::kTextList) return Json::array({std::move(scalar)});
      return scalar;
    }
    case YamlValue::Kind::kList: {
      Json list = Json::array();
      for (const auto& item : value.items) list.push_back(typed(item, OptionType::kText));
      return list;
    }
    case YamlValue::Kind::kMap:
      break;
  }
  return Json::object();
}

fs::path absolute_in(const fs::path& folder, const std::string& path) {
  const fs::path p(path);
  return (p.is_absolute() ? p : fs::absolute(folder) / p).lexically_normal();
}

Json with_absolute_paths(Json value, const OptionDecl& d, const fs::path& folder) {
  if (!is_path_option(d)) return value;
  if (value.is_string() && !value.get_ref<const std::string&>().empty())
    return absolute_in(folder, value.get<std::string>()).string();
  if (value.is_array())
    for (auto& item : value)
      if (item.is_string() && !item.get_ref<const std::string&>().empty())
        item = absolute_in(folder, item.get<std::string>()).string();
  return value;
}

class Parser {
 public:
  Parser(std::string place, fs::path folder, const std::vector<Command>& stages)
      : place_(std::move(place)), folder_(std::move(folder)), stages_(stages) {
    for (const auto& s : stages_) stage_names_.push_back(s.name);
  }

  Recipe parse(std::string_view yaml, const Json& flags) {
    Recipe recipe;
    recipe.place = place_;
    const YamlValue root = parse_yaml(yaml, place_);
    if (root.kind == YamlValue::Kind::kMap)
      top(root, recipe);
    else if (root.kind != YamlValue::Kind::kNull)
      problem(root.line, "a recipe is a mapping of keys such as 'model:' and 'stages:'");
    if (!has_stages_ && std::find(stage_names_.begin(), stage_names_.end(), "quantize") != stage_names_.end())
      recipe.stages.push_back({"quantize", Json::object(), "default stage (quantize)"});
    lay_over(flags, recipe);
    recipe.run = resolve(recipe_options(), recipe.run, place_);
    for (const auto& section : kSections) {
      Json& values = section_of(recipe, section);
      values = resolve(section_options(section), values, place_ + ": " + section);
    }
    report();
    return recipe;
  }

 private:
  void problem(int line, const std::string& text) {
    problems_.push_back(place_ + ":" + std::to_string(line) + ": " + text);
  }

  static Json& section_of(Recipe& recipe, const std::string& section) {
    if (section == "eval") return recipe.evaluation;
    if (section == "export") return recipe.exporting;
    return recipe.require;
  }

  // Keys of one mapping against one table; values that the table refuses are reported with their own line.
  Json keys(const YamlValue& map, const std::vector<OptionDecl>& decls, const std::string& what,
            const std::vector<std::string>& other_names,
            const std::function<bool(const std::string&, const YamlValue&, int)>& other) {
    Json given = Json::object();
    std::vector<std::string> valid = names(decls);
    valid.insert(valid.end(), other_names.begin(), other_names.end());
    for (std::size_t i = 0; i < map.entries.size(); ++i) {
      const auto& [key, value] = map.entries[i];
      const int line = map.key_lines[i];
      if (other && other(key, value, line)) continue;
      const OptionDecl* d = find(decls, key);
      if (!d) {
        problem(line, "unknown key '" + key + "' in " + what + suggestion(key, valid));
        continue;
      }
      if (value.kind == YamlValue::Kind::kNull) continue;
      if (value.kind == YamlValue::Kind::kMap) {
        problem(line, "'" + key + "' takes a value, found a mapping");
        continue;
      }
      if (value.kind == YamlValue::Kind::kList && d->type != OptionType::kTextList) {
        problem(line, "'" + key + "' takes one value, found a list");
        continue;
      }
      Json checked = with_absolute_paths(typed(value, d->type), *d, folder_);
      OptionDecl alone = *d;
      alone.required = false;
      try {
        Options({alone}, Json{{key, checked}}, place_ + ":" + std::to_string(line));
        given[key] = std::move(checked);
      } catch (const Error& e) {
        problems_.push_back(e.what());
      }
    }
    return given;
  }

  void top(const YamlValue& root, Recipe& recipe) {
    std::vector<std::string> others = kSections;
    others.push_back("stages");
    recipe.run = keys(root, recipe_options(), "the recipe", others,
                      [&](const std::string& key, const YamlValue& value, int line) {
                        if (key == "stages") {
                          stages(value, line, recipe);
                          return true;
                        }
                        if (std::find(kSections.begin(), kSections.end(), key) == kSections.end()) return false;
                        if (value.kind == YamlValue::Kind::kMap)
                          section_of(recipe, key) = keys(value, section_options(key), "'" + key + "'", {}, {});
                        else if (value.kind != YamlValue::Kind::kNull)
                          problem(line, "'" + key + "' is a mapping of options");
                        return true;
                      });
  }

  void stages(const YamlValue& list, int line, Recipe& recipe) {
    has_stages_ = true;
    if (list.kind == YamlValue::Kind::kNull) return;  // export alone
    if (list.kind != YamlValue::Kind::kList) {
      problem(line, "'stages' is a list, such as\n  stages:\n    - quantize: {codec: q4}");
      return;
    }
    for (std::size_t i = 0; i < list.items.size(); ++i) {
      const YamlValue& item = list.items[i];
      if (item.kind == YamlValue::Kind::kScalar) {
        stage(item.scalar, YamlValue{}, item.line, i, recipe);
      } else if (item.kind == YamlValue::Kind::kMap && item.entries.size() == 1) {
        stage(item.entries[0].first, item.entries[0].second, item.key_lines[0], i, recipe);
      } else {
        problem(item.line, "stages[" + std::to_string(i) +
                               "] is one stage name with its options, such as '- prune: {sparsity: 0.5}'");
      }
    }
  }

  void stage(const std::string& name, const YamlValue& options, int line, std::size_t index, Recipe& recipe) {
    const auto command = std::find_if(stages_.begin(), stages_.end(), [&](const Command& c) { return c.name == name; });
    if (command == stages_.end()) {
      problem(line, "unknown stage '" + name + "'" + suggestion(name, stage_names_));
      return;
    }
    const std::string what = "stages[" + std::to_string(index) + "] (" + name + ")";
    RecipeStage entry{name, Json::object(), place_ + ":" + std::to_string(line) + ": " + what};
    if (options.kind == YamlValue::Kind::kMap)
      entry.given = keys(options, inner_options(*command), what, {}, {});
    else if (options.kind != YamlValue::Kind::kNull)
      problem(line, what + " takes a mapping of options");
    recipe.stages.push_back(std::move(entry));
  }

  // The pipeline itself sets the folders of a stage.
  static std::vector<OptionDecl> inner_options(const Command& command) {
    std::vector<OptionDecl> out;
    for (const auto& d : command.options)
      if (d.name != "model" && d.name != "out") out.push_back(d);
    return out;
  }

  void lay_over(const Json& flags, Recipe& recipe) {
    const fs::path here = fs::current_path();
    auto take = [&](Json& target, const OptionDecl& d, const std::string& flag) {
      const auto found = flags.find(flag);
      if (found == flags.end() || found->is_null()) return;
      if (d.type == OptionType::kFlag && *found == false) return;
      if (d.type == OptionType::kTextList && found->is_array() && found->empty()) return;
      target[d.name] = with_absolute_paths(*found, d, here);
    };
    for (const auto& d : recipe_options()) take(recipe.run, d, d.name);
    for (const auto& section : kSections)
      for (const auto& d : section_options(section)) take(section_of(recipe, section), d, section + "-" + d.name);
    const auto set = flags.find("set");
    if (set == flags.end() || !set->is_array()) return;
    for (const auto& item : *set) set_stage_option(item.get<std::string>(), here, recipe);
  }

  void set_stage_option(const std::string& text, const fs::path& here, Recipe& recipe) {
    const std::string place = "--set " + text;
    const auto dot = text.find('.');
    const auto equals = text.find('=');
    if (dot == std::string::npos || equals == std::string::npos || equals < dot) {
      problems_.push_back(place + ": expected STAGE.KEY=VALUE, such as quantize.codec=q4");
      return;
    }
    const std::string name = text.substr(0, dot), key = text.substr(dot + 1, equals - dot - 1);
    bool any = false;
    for (auto& s : recipe.stages) {
      if (s.name != name) continue;
      any = true;
      const auto command =
          std::find_if(stages_.begin(), stages_.end(), [&](const Command& c) { return c.name == name; });
      const std::vector<OptionDecl> decls = inner_options(*command);
      const OptionDecl* d = find(decls, key);
      if (!d) {
        problems_.push_back(place + ": unknown option '" + key + "' of " + name + suggestion(key, names(decls)));
        return;
      }
      YamlValue value;
      value.kind = YamlValue::Kind::kScalar;
      value.scalar = text.substr(equals + 1);
      Json checked = with_absolute_paths(typed(value, d->type), *d, here);
      OptionDecl alone = *d;
      alone.required = false;
      try {
        Options({alone}, Json{{key, checked}}, place);
        s.given[key] = std::move(checked);
      } catch (const Error& e) {
        problems_.push_back(e.what());
        return;
      }
    }
    if (any) return;
    std::vector<std::string> present;
    for (const auto& s : recipe.stages) present.push_back(s.name);
    problems_.push_back(place + ": the recipe has no stage '" + name + "'" + suggestion(name, present));
  }

  Json resolve(const std::vector<OptionDecl>& decls, const Json& given, const std::string& place) {
    try {
      return Options(decls, given, place).resolved();
    } catch (const Error& e) {
      problems_.push_back(e.what());
      return Json::object();
    }
  }

  void report() const {
    if (problems_.empty()) return;
    if (problems_.size() == 1) throw usage_error(problems_[0], "", "");
    std::string text = std::to_string(problems_.size()) + " problems:";
    for (const auto& p : problems_) text += "\n  " + p;
    throw usage_error(text, "", "");
  }

  std::string place_;
  fs::path folder_;
  const std::vector<Command>& stages_;
  std::vector<std::string> stage_names_;
  std::vector<std::string> problems_;
  bool has_stages_ = false;
};

}  // namespace

std::string Recipe::text(std::string_view key) const {
  const auto found = run.find(key);
  return found == run.end() || !found->is_string() ? std::string() : found->get<std::string>();
}

std::vector<std::string> Recipe::list(const Json& section, std::string_view key) const {
  const auto found = section.find(key);
  if (found == section.end() || !found->is_array()) return {};
  return found->get<std::vector<std::string>>();
}

bool is_path_option(const OptionDecl& d) {
  if (d.type == OptionType::kPath) return true;
  return d.type == OptionType::kTextList && (d.name.find("text") != std::string::npos || d.name == "held-out");
}

const std::vector<OptionDecl>& recipe_options() {
  static const std::vector<OptionDecl> table = [] {
    std::vector<OptionDecl> t = {
        decl("model", OptionType::kPath, "Hugging Face folder of the model to compress"),
        decl("out", OptionType::kPath,
             "folder that will hold model.pare, model/, report.json, report.html and the resolved recipe"),
        decl("text", OptionType::kTextList,
             "text for every stage that learns from data: .txt or .jsonl files or folders; "
             "without it, text is sampled from the model itself"),
        decl("split", OptionType::kText, "separator between documents of .txt files, such as <|endoftext|>"),
        integer("seed", "seed of everything random", 0, 0, 9e15),
        decl("device", OptionType::kText, "device of the LibTorch stages: cpu, cuda, cuda:1", "cpu"),
        integer("samples", "documents sampled from the model where no text is given", 64, 1, 1e6),
        integer("context", "tokens per sampled document", 256, 8, 1e6),
        decl("work", OptionType::kPath,
             "folder for finished stages; kept after the run (default: OUT.work, removed at the end)"),
    };
    t[0].required = t[1].required = true;
    return t;
  }();
  return table;
}

const std::vector<OptionDecl>& eval_options() {
  static const std::vector<OptionDecl> table = {
      decl("text", OptionType::kTextList, "held-out text; without it, other text sampled from the model itself"),
      decl("split", OptionType::kText,
           "separator between documents of the held-out .txt files (default: the recipe's split)"),
      integer("context", "tokens per window, a BOS included", 512, 2, 1e6),
      integer("max-tokens", "scored tokens at most, in whole windows from the start", 20000, 1, 1e12),
      decl("final-only", OptionType::kFlag, "measure the compact file only, not each stage", false),
  };
  return table;
}

const std::vector<OptionDecl>& export_options() {
  static const std::vector<OptionDecl> table = [] {
    std::vector<OptionDecl> t = {
        decl("codec", OptionType::kText, "matrices that no stage quantized: as stored, or this", "keep")};
    t[0].choices = {"keep", "f32", "f16", "bf16"};
    return t;
  }();
  return table;
}

const std::vector<OptionDecl>& require_options() {
  static const std::vector<OptionDecl> table = {
      number("mean-kl", "KL(original || compact file) at most, nats per token", 0, 1e9),
      number("p99-kl", "99 % quantile of that KL at most, nats", 0, 1e9),
      number("top1", "top-1 agreement with the original at least, fraction", 0, 1),
      number("perplexity-ratio", "perplexity over the original's at most", 0, 1e9),
      number("bytes", "size of the compact file at most, bytes", 1, 1e18),
      number("bits-per-weight", "tensor bits per own parameter at most", 0, 64),
      number("tokens-per-second", "decoding speed of the compact file at least", 0, 1e12),
  };
  return table;
}

std::vector<OptionDecl> recipe_flags() {
  std::vector<OptionDecl> flags;
  OptionDecl file =
      decl("recipe", OptionType::kPath, "recipe in YAML; without one: quantize with its defaults, then export");
  file.positional = true;
  flags.push_back(file);
  auto add = [&](OptionDecl d, const std::string& prefix) {
    if (d.name == "seed" && prefix.empty()) return;  // a flag of every command
    d.name = prefix + d.name;
    d.required = false;
    if (!d.default_value.is_null() && d.type != OptionType::kFlag)
      d.help += " (default " +
                (d.default_value.is_string() ? d.default_value.get<std::string>() : d.default_value.dump()) + ")";
    d.default_value = nullptr;
    flags.push_back(std::move(d));
  };
  for (const auto& d : recipe_options()) add(d, "");
  for (const auto& section : kSections)
    for (const auto& d : section_options(section)) add(d, section + "-");
  flags.push_back(decl("set", OptionType::kTextList, "option of a stage, STAGE.KEY=VALUE (quantize.codec=q4ag32)"));
  return flags;
}

Recipe parse_recipe(std::string_view yaml, const std::string& place, const fs::path& folder, const Json& flags,
                    const std::vector<Command>& stages) {
  return Parser(place, folder, stages).parse(yaml, flags);
}

Recipe load_recipe(const fs::path& file, const Json& flags, const std::vector<Command>& stages) {
  if (file.empty()) return parse_recipe("", "command line", fs::current_path(), flags, stages);
  std::error_code ignored;
  if (fs::is_directory(file, ignored))
    throw usage_error(file.string(), "a recipe file", "a folder", "a model folder is given with --model");
  if (!fs::is_regular_file(file, ignored)) throw usage_error(file.string(), "a recipe file", "no such file");
  if (fs::file_size(file) > (1u << 20))
    throw usage_error(file.string(), "a recipe of at most 1 MiB", std::to_string(fs::file_size(file)) + " bytes");
  return parse_recipe(read_text(file), file.string(), file.has_parent_path() ? file.parent_path() : fs::path("."),
                      flags, stages);
}

}  // namespace pare
