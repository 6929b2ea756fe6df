// pare export: a model -> one file for a runtime, or a model folder. Codes are laid out anew and never rounded again
// unless asked.
#include "runtime/export.h"

#include "core/error.h"
#include "runtime/gguf_export.h"
#include "runtime/verbs/cli.h"

namespace pare {
namespace {

Json run_compact(const Checkpoint& checkpoint, const fs::path& out, const Options& options, Context& context) {
  ExportOptions chosen;
  chosen.out = out;
  chosen.codec = options.get<std::string>("codec");
  chosen.fallback = !options.get<bool>("no-fallback");
  const ExportPlan plan = plan_export(checkpoint, chosen);
  export_compact(checkpoint, chosen, context);
  const CompactFile file(out);
  return {{"out", out.string()},
          {"file_bytes", file.file_bytes()},
          {"tensor_bytes", file.tensor_bytes()},
          {"file_hash", file.file_hash()},
          {"notes", plan.notes}};
}

Json run_gguf(const Checkpoint& checkpoint, const fs::path& out, const Options& options, Context& context) {
  GgufOptions chosen;
  chosen.out = out;
  chosen.codec = options.get<std::string>("codec");
  chosen.fallback = !options.get<bool>("no-fallback");
  chosen.requantize = options.get<bool>("requantize");
  const GgufPlan plan = plan_gguf(checkpoint, chosen);
  export_gguf(checkpoint, plan, chosen, context);
  return {{"out", out.string()}, {"file_bytes", fs::file_size(out)}, {"notes", plan.notes}};
}

Json run_folder(const Checkpoint& checkpoint, const fs::path& out, Context& context) {
  const std::vector<std::string> notes = export_folder(checkpoint, out, context);
  const Checkpoint written(out);
  const auto bytes = static_cast<double>(written.tensor_bytes());
  context.report.add({.stage = "folder",
                      .metric = "tensor_bytes",
                      .before = static_cast<double>(checkpoint.tensor_bytes()),
                      .after = bytes,
                      .unit = "bytes",
                      .standard_error = {}});
  return {{"out", out.string()}, {"tensor_bytes", written.tensor_bytes()}, {"notes", notes}};
}

Json run_export(const Options& options, Context& context) {
  const fs::path out = options.get<std::string>("out");
  const auto to = options.get<std::string>("to"), codec = options.get<std::string>("codec");
  if (codec != "keep") Codec::parse(codec, "--codec");  // a wrong name before anything is read
  if (to == "folder" && codec != "keep")
    throw usage_error("--codec", "keep with --to folder", codec, "pare quantize makes folders of codes");
  if (to == "folder" && options.get<bool>("no-fallback"))
    throw usage_error("--no-fallback", "--to compact or gguf", "--to folder", "a folder holds every matrix as it is");
  if (to != "gguf" && options.get<bool>("requantize"))
    throw usage_error("--requantize", "--to gguf", "--to " + to, "only GGUF blocks may not hold codes as they are");
  if (fs::exists(fs::symlink_status(out)))
    throw usage_error(out.string(), "an output that does not exist yet", "an existing one",
                      "remove it or choose another --out");
  const Checkpoint checkpoint = Checkpoint::open(options.get<std::string>("model"));
  Json result = to == "gguf"     ? run_gguf(checkpoint, out, options, context)
                : to == "folder" ? run_folder(checkpoint, out, context)
                                 : run_compact(checkpoint, out, options, context);
  context.print(context.report.table());
  result["report"] = context.report.to_json();
  return result;
}

}  // namespace

Command export_command() {
  Command command;
  command.name = "export";
  command.summary = "Write a model as one file, compact for pare's runtime or gguf for llama.cpp, or as a model folder";
  command.example = "pare export model-q4 --to compact --out model.pare";
  command.options = {
      {.name = "model",
       .type = OptionType::kPath,
       .help = "model folder, GGUF file or compact file",
       .required = true,
       .positional = true},
      {.name = "to",
       .type = OptionType::kText,
       .help = "target format",
       .default_value = "compact",
       .choices = {"compact", "gguf", "folder"}},
      {.name = "codec",
       .type = OptionType::kText,
       .help =
           "storage of float matrices: keep, f32, f16, bf16, q8, q8c, w8a8, q4, q4g64, q4g128, q4a, q4ag64, "
           "q4ag128, q4m, q4mg64, q4mg128, q3, q3g64, q3g128, q2, q2g64, q2g128 (gguf: keep, f32, f16, bf16, q8, q4; folder: keep); codes "
           "stay codes",
       .default_value = "keep"},
      {.name = "no-fallback",
       .type = OptionType::kFlag,
       .help = "refuse matrices that the target cannot hold as asked instead of storing them as q8c, fused ones as f16, "
               "(compact) or F32 (gguf)",
       .default_value = false},
      {.name = "requantize",
       .type = OptionType::kFlag,
       .help = "gguf: round q4a weights to what Q4_1 can hold instead of storing them in F32",
       .default_value = false},
      {.name = "out", .type = OptionType::kPath, .help = "file or folder to write", .required = true}};
  command.run = run_export;
  return command;
}

}  // namespace pare
