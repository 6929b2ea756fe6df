// Recipe: what one `pare compress` run does, as written in YAML (JSON is YAML too), overridden by flags.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "core/file.h"
#include "core/json.h"
#include "core/options.h"

namespace pare {

// One entry of `stages:`. `given` holds only the keys that were written; paths in it are absolute.
struct RecipeStage {
  std::string name;
  Json given = Json::object();
  std::string place;  // "recipe.yaml:7: stages[1] (prune)"
};

// Sections hold every declared key with its value (null: not set). Paths are absolute.
struct Recipe {
  std::string place = "command line";  // file name for messages
  Json run = Json::object();           // recipe_options()
  Json evaluation = Json::object();    // eval_options()
  Json exporting = Json::object();     // export_options()
  Json require = Json::object();       // require_options()
  std::vector<RecipeStage> stages;

  std::string text(std::string_view key) const;               // of `run`; "" when not set
  std::vector<std::string> list(const Json& section, std::string_view key) const;
};

// The tables behind recipe keys and flags. A key of a section is the flag --SECTION-KEY (--eval-text,
// --require-mean-kl).
const std::vector<OptionDecl>& recipe_options();
const std::vector<OptionDecl>& eval_options();
const std::vector<OptionDecl>& export_options();
const std::vector<OptionDecl>& require_options();

// The same keys as flags without defaults (a flag that was not given must not hide the recipe), the positional
// recipe file, and --set STAGE.KEY=VALUE.
std::vector<OptionDecl> recipe_flags();

// Reads `yaml` (at most 1 MiB, 32 levels, 20,000 nodes with aliases followed, one document), lays `flags` (resolved
// values of recipe_flags(); nulls are ignored) over it and fills in defaults. Relative paths in the file are
// relative to `folder`, those of flags to the working directory. `stages` are the commands a recipe may name;
// without `stages:` it is one `quantize` with its defaults.
// Errors: exit 2 listing every problem at once, with line numbers and the nearest valid key.
Recipe parse_recipe(std::string_view yaml, const std::string& place, const fs::path& folder, const Json& flags,
                    const std::vector<Command>& stages);
// The same from a file; an empty path means flags alone.
Recipe load_recipe(const fs::path& file, const Json& flags, const std::vector<Command>& stages);

// YAML that parse_recipe reads back into an equal recipe. `header` lines are written as comments.
std::string emit_recipe(const Recipe& recipe, const std::vector<std::string>& header);

// Options whose value names a file or folder (by type, or a list of text files).
bool is_path_option(const OptionDecl& decl);

}  // namespace pare
