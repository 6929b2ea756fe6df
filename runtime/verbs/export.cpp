// pare export: a model -> one file for a runtime, or a model folder. Codes are laid out anew and never rounded again
// unless asked.
#include "runtime/export.h"

#include <fmt/format.h>

#include "core/error.h"
#include "runtime/compatibility.h"
#include "runtime/gguf_export.h"
#include "runtime/verbs/cli.h"

namespace pare {
namespace {

ExportOptions compact_options(const Options& options) {
  ExportOptions chosen;
  chosen.out = options.get_or<std::string>("out", "");
  chosen.codec = options.get<std::string>("codec");
  chosen.fallback = !options.get<bool>("no-fallback");
  return chosen;
}

GgufOptions gguf_options(const Options& options) {
  GgufOptions chosen;
  chosen.out = options.get_or<std::string>("out", "");
  chosen.codec = options.get<std::string>("codec");
  chosen.fallback = !options.get<bool>("no-fallback");
  chosen.requantize = options.get<bool>("requantize");
  chosen.imatrix = options.get_or<std::string>("imatrix", "");
  return chosen;
}

Json run_compact(const Checkpoint& checkpoint, const fs::path& out, const Options& options, Context& context) {
  const ExportOptions chosen = compact_options(options);
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
  const GgufOptions chosen = gguf_options(options);
  const GgufPlan plan = plan_gguf(checkpoint, chosen);
  export_gguf(checkpoint, plan, chosen, context);
  return {{"out", out.string()}, {"file_bytes", fs::file_size(out)}, {"notes", plan.notes}};
}

bool is_folder(const std::string& to) { return to != "compact" && to != "gguf"; }

FolderForm folder_form(const std::string& to) {
  return to == "gptq" ? FolderForm::kGptq : to == "gptq_v2" ? FolderForm::kGptqV2 : FolderForm::kCompressedTensors;
}

Json run_folder(const Checkpoint& checkpoint, const std::string& to, const fs::path& out, Context& context) {
  const std::vector<std::string> notes = export_folder(checkpoint, out, context, folder_form(to));
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

// Where the model would load, as rows and as text.
Json compatibility_rows(const Checkpoint& checkpoint, std::string& text) {
  Json rows = Json::array();
  text = fmt::format("{:<14} {:<8} {:<8} {}\n", "target", "loads", "fast", "give it");
  for (const Compatibility& row : compatibility(checkpoint)) {
    text += fmt::format("{:<14} {:<8} {:<8} {}\n", row.target, answer_name(row.loads), answer_name(row.fast), row.how);
    for (const std::string& reason : row.reasons) text += "    " + reason + "\n";
    rows.push_back({{"target", row.target},
                    {"loads", answer_name(row.loads)},
                    {"fast", answer_name(row.fast)},
                    {"how", row.how},
                    {"reasons", row.reasons}});
  }
  return rows;
}

Json run_plan(const Options& options, Context& context) {
  std::string text;
  const Json rows = compatibility_rows(Checkpoint::open(options.get<std::string>("model")), text);
  context.print(text);
  return {{"model", options.get<std::string>("model")}, {"targets", rows}};
}

// Whether run_export would refuse, as far as headers tell, and where the model would load.
Json dry_run(const Checkpoint& checkpoint, const Options& options, Context& context) {
  const auto to = options.get<std::string>("to"), codec = options.get<std::string>("codec");
  std::vector<std::string> notes = checkpoint.notes();
  if (to == "gguf") {
    notes = plan_gguf(checkpoint, gguf_options(options)).notes;
  } else if (to == "compact") {
    notes = plan_export(checkpoint, compact_options(options)).notes;
  } else {
    notes = plan_folder(checkpoint, folder_form(to));
  }
  std::string text;
  const Json rows = compatibility_rows(checkpoint, text);
  std::string said = "nothing is written; headers hold nothing against --to " + to + " --codec " + codec + "\n";
  for (const std::string& note : notes) said += "    " + note + "\n";
  context.print(said + "the model as it is:\n" + text);
  return {{"to", to}, {"notes", notes}, {"targets", rows}};
}

Json run_export(const Options& options, Context& context) {
  const bool dry = options.get<bool>("dry-run");
  if (!dry && !options.has("out")) throw usage_error("--out", "a file or folder to write", "nothing", "or --dry-run");
  const fs::path out = options.get_or<std::string>("out", "");
  const auto to = options.get<std::string>("to"), codec = options.get<std::string>("codec");
  // A wrong name, before anything is read.
  if (to == "gguf") check_gguf_codec(codec);
  else if (is_k_quant_name(codec))
    throw usage_error("--codec", "a codec of --to " + to, codec, "K-quants are blocks of GGUF: --to gguf");
  else if (codec != "keep") Codec::parse(codec, "--codec");
  if (is_folder(to) && codec != "keep")
    throw usage_error("--codec", "keep with --to " + to, codec, "pare quantize makes folders of codes");
  if (is_folder(to) && options.get<bool>("no-fallback"))
    throw usage_error("--no-fallback", "--to compact or gguf", "--to " + to, "a folder holds every matrix as it is");
  if (to != "gguf" && options.get<bool>("requantize"))
    throw usage_error("--requantize", "--to gguf", "--to " + to, "only GGUF blocks may not hold codes as they are");
  if (to != "gguf" && options.has("imatrix"))
    throw usage_error("--imatrix", "--to gguf", "--to " + to, "it weighs the errors of K-quants");
  if (!out.empty() && fs::exists(fs::symlink_status(out)))
    throw usage_error(out.string(), "an output that does not exist yet", "an existing one",
                      "remove it or choose another --out");
  const Checkpoint checkpoint = Checkpoint::open(options.get<std::string>("model"));
  if (dry) return dry_run(checkpoint, options, context);
  Json result = to == "gguf"     ? run_gguf(checkpoint, out, options, context)
                : is_folder(to)  ? run_folder(checkpoint, to, out, context)
                                 : run_compact(checkpoint, out, options, context);
  context.print(context.report.table());
  result["report"] = context.report.to_json();
  return result;
}

}  // namespace

Command export_command() {
  Command command;
  command.name = "export";
  command.summary =
      "Write a model as one file, compact for pare's runtime or gguf for llama.cpp, or as a model folder (folder: "
      "compressed-tensors; gptq, gptq_v2: GPTQ of 4 or 8 bits)";
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
       .choices = {"compact", "gguf", "folder", "gptq", "gptq_v2"}},
      {.name = "codec",
       .type = OptionType::kText,
       .help =
           "storage of float matrices: keep, f32, f16, bf16, q8, q8c, w8a8, q4, q4g64, q4g128, q4a, q4ag64, "
           "q4ag128, q4m, q4mg64, q4mg128, q3, q3g64, q3g128, q2, q2g64, q2g128 (gguf: keep, f32, f16, bf16, q8, q4, q2_k, q3_k, q4_k, q5_k, q6_k, the last five "
           "by searched scales, and where rows are no multiples of 256 in the next finer block of 32; folders: keep); codes "
           "stay codes",
       .default_value = "keep"},
      {.name = "no-fallback",
       .type = OptionType::kFlag,
       .help = "refuse matrices that the target cannot hold as asked instead of storing them as q8c, fused ones as f16, "
               "(compact), F32 or a block of 32 (gguf)",
       .default_value = false},
      {.name = "requantize",
       .type = OptionType::kFlag,
       .help = "gguf: round codes again, to --codec; with keep q4a weights to what Q4_1 can hold, which else are in F32",
       .default_value = false},
      {.name = "imatrix",
       .type = OptionType::kPath,
       .help = "gguf, q2_k to q6_k: file of llama-imatrix; errors in a column cost what its inputs' squares say"},
      {.name = "dry-run",
       .type = OptionType::kFlag,
       .help = "write nothing; say what headers hold against it, and which programs would load the model and run it fast",
       .default_value = false},
      {.name = "out", .type = OptionType::kPath, .help = "file or folder to write"}};
  command.run = run_export;
  return command;
}

Command plan_command() {
  Command command;
  command.name = "plan";
  command.summary = "Say which programs would load a model and run it fast, and why others would not";
  command.example = "pare plan model-q4";
  command.options = {{.name = "model",
                      .type = OptionType::kPath,
                      .help = "model folder, GGUF file or compact file",
                      .required = true,
                      .positional = true}};
  command.run = run_plan;
  return command;
}

}  // namespace pare
