#include "compress/compress.h"

#include <memory>

#include "compress/pipeline.h"
#include "compress/recipe.h"
#include "model/ranks.h"

namespace pare {

Command compress_command(Toolbox tools) {
  Command command;
  command.name = "compress";
  command.summary =
      "Run a recipe: distill, prune, quantize in any order, export one file, measure it against the original";
  command.options = recipe_flags();
  OptionDecl dry_run;
  dry_run.name = "dry-run";
  dry_run.type = OptionType::kFlag;
  dry_run.help = "print the plan (sizes, memory, time, what each stage does) and write nothing";
  dry_run.default_value = false;
  command.options.push_back(dry_run);
  command.example =
      "pare compress --model MODEL --out SMALL   or   pare compress recipe.yaml --model MODEL --out SMALL --dry-run";
  const auto shared = std::make_shared<Toolbox>(std::move(tools));
  command.run = [shared](const Options& options, Context& context) -> Json {
    refuse_ranks("compress", "its stages run on several ranks: pare train, finetune, distill, prune, quantize");
    Json flags = options.resolved();
    if (context.seed_given) flags["seed"] = context.seed;
    const fs::path file = options.get_or<std::string>("recipe", "");
    Pipeline pipeline(load_recipe(file, flags, shared->stages), *shared);
    if (!options.get<bool>("dry-run")) return pipeline.run(context);
    const Plan plan = pipeline.plan();
    context.print(plan.text());
    return plan.to_json();
  };
  return command;
}

}  // namespace pare
