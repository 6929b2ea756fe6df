#include "compress/export/export_verb.h"

#include <algorithm>

#include "compress/export/gguf_export.h"
#include "core/error.h"
#include "runtime/verbs/cli.h"

namespace pare {
namespace {

Json run_gguf(const Options& options, Context& context) {
  GgufOptions chosen;
  chosen.out = options.get<std::string>("out");
  chosen.codec = options.get<std::string>("codec");
  chosen.fallback = !options.get<bool>("no-fallback");
  if (fs::exists(fs::symlink_status(chosen.out)))
    throw usage_error(chosen.out.string(), "an output that does not exist yet", "an existing one",
                      "remove it or choose another --out");
  const Checkpoint checkpoint(options.get<std::string>("model"));
  const GgufPlan plan = plan_gguf(checkpoint, chosen);
  export_gguf(checkpoint, plan, chosen.out, context);
  context.print(context.report.table());
  return {{"out", chosen.out.string()},
          {"file_bytes", fs::file_size(chosen.out)},
          {"notes", plan.notes},
          {"report", context.report.to_json()}};
}

}  // namespace

Command export_command_full() {
  Command command = export_command();
  command.summary = "Write a model folder as one file: compact for pare's runtime, gguf for llama.cpp";
  const auto to =
      std::find_if(command.options.begin(), command.options.end(), [](const OptionDecl& o) { return o.name == "to"; });
  to->choices.push_back("gguf");
  const auto compact = command.run;
  command.run = [compact](const Options& options, Context& context) {
    return options.get<std::string>("to") == "gguf" ? run_gguf(options, context) : compact(options, context);
  };
  return command;
}

}  // namespace pare
