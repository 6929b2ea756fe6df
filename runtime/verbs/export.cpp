// pare export: model folder -> compact file. Codes are laid out anew and never rounded again.
#include "runtime/export.h"

#include "core/error.h"
#include "runtime/verbs/cli.h"

namespace pare {
namespace {

ExportOptions export_options(const Options& options) {
  ExportOptions out;
  out.out = options.get<std::string>("out");
  out.codec = options.get<std::string>("codec");
  out.fallback = !options.get<bool>("no-fallback");
  if (out.codec != "keep") Codec::parse(out.codec, "--codec");  // a wrong name before anything is read
  if (fs::exists(fs::symlink_status(out.out)))
    throw usage_error(out.out.string(), "an output that does not exist yet", "an existing one",
                      "remove it or choose another --out");
  return out;
}

}  // namespace

Command export_command() {
  Command command;
  command.name = "export";
  command.summary = "Write a model folder as one compact file for the runtime";
  command.example = "pare export model-q4 --to compact --out model.pare";
  command.options = {
      {.name = "model", .type = OptionType::kPath, .help = "model folder", .required = true, .positional = true},
      {.name = "to",
       .type = OptionType::kText,
       .help = "target format",
       .default_value = "compact",
       .choices = {"compact"}},
      {.name = "codec",
       .type = OptionType::kText,
       .help = "storage of float matrices: keep, f32, f16, bf16, q8, q8c, w8a8, q4, q4g64, q4g128, q4a, q4ag64, "
               "q4ag128, q4m, q4mg64, q4mg128, q3, q3g64, q3g128, q2, q2g64, q2g128; codes stay codes",
       .default_value = "keep"},
      {.name = "no-fallback",
       .type = OptionType::kFlag,
       .help = "refuse rows that the group does not divide instead of storing them as q8c",
       .default_value = false},
      {.name = "out", .type = OptionType::kPath, .help = "compact file to write", .required = true}};
  command.run = [](const Options& options, Context& context) {
    const ExportOptions chosen = export_options(options);
    const Checkpoint checkpoint(options.get<std::string>("model"));
    const ExportPlan plan = plan_export(checkpoint, chosen);
    export_compact(checkpoint, chosen, context);
    const CompactFile file(chosen.out);
    context.print(context.report.table());
    return Json{{"out", chosen.out.string()},
                {"file_bytes", file.file_bytes()},
                {"tensor_bytes", file.tensor_bytes()},
                {"file_hash", file.file_hash()},
                {"notes", plan.notes},
                {"report", context.report.to_json()}};
  };
  return command;
}

}  // namespace pare
