#include <algorithm>
#include <cmath>
#include <map>
#include <thread>

#include "core/error.h"
#include "core/file.h"
#include "core/model_card.h"
#include "core/tokenizer.h"
#include "model/blocks.h"
#include "prune/measure.h"
#include "prune/method.h"
#include "prune/prune.h"

namespace pare {
namespace {

constexpr const char* kManifest = "prune.json";  // stays in the output: what was done to which input
constexpr const char* kState = "prune.state";
constexpr const char* kWritten = "written.json";  // in the state folder: the rows of a method whose folder is complete
constexpr int kManifestVersion = 1;

std::vector<OptionDecl> option_table() {
  std::vector<std::string> methods;
  std::string method_help = "what to remove:";
  for (const PruneMethod& method : prune_methods()) {
    methods.push_back(method.name);
    method_help += (methods.size() == 1 ? " " : "; ") + method.name + ": " + method.summary;
  }
  return {
      {.name = "model", .type = OptionType::kPath, .help = "model folder to prune (float weights)", .required = true},
      {.name = "out", .type = OptionType::kPath, .help = "model folder to write; must not exist", .required = true},
      {.name = "method", .type = OptionType::kText, .help = method_help, .choices = methods, .required = true},
      {.name = "sparsity",
       .type = OptionType::kNumber,
       .help = "magnitude, wanda, sparsegpt, random: fraction of the weights of the decoder blocks' linears to zero",
       .minimum = 0.0,
       .maximum = 0.99},
      {.name = "pattern",
       .type = OptionType::kText,
       .help = "magnitude, wanda, sparsegpt, random: N:M, N weights kept of every M inputs, instead of --sparsity"},
      {.name = "reconstruct",
       .type = OptionType::kFlag,
       .help = "with --sparsity or --pattern: refit the weights that stay to the outputs of the original matrix by "
               "least squares",
       .default_value = false},
      {.name = "allocation",
       .type = OptionType::kText,
       .help = "with --sparsity: uniform (default), or owl: blocks in which more weights are outliers by |w| * input "
               "norm lose less",
       .choices = {"uniform", "owl"}},
      {.name = "layers",
       .type = OptionType::kInteger,
       .help = "shape: decoder blocks to keep; those go without which the predictions change least",
       .minimum = 1},
      {.name = "heads",
       .type = OptionType::kInteger,
       .help = "shape: query heads to keep in every block, the same number of each group that shares keys and values",
       .minimum = 1},
      {.name = "kv-heads",
       .type = OptionType::kInteger,
       .help = "shape: heads of keys and values to keep in every block; without --heads with all their query heads",
       .minimum = 1},
      {.name = "ffn",
       .type = OptionType::kInteger,
       .help = "shape: MLP neurons to keep in every block (of every expert), rounded up to --multiple-of",
       .minimum = 1},
      {.name = "hidden",
       .type = OptionType::kInteger,
       .help = "shape: channels of the residual stream to keep, rounded up to --multiple-of",
       .minimum = 1},
      {.name = "experts",
       .type = OptionType::kInteger,
       .help = "shape: experts to keep in every block",
       .minimum = 1},
      {.name = "max-params",
       .type = OptionType::kInteger,
       .help = "shape: instead of all these, the shape of at most so many parameters that measures best: tries blocks, "
               "heads, neurons, channels and experts down to half of each, and takes the cheapest combination",
       .minimum = 1},
      {.name = "max-bytes",
       .help = "shape: the same for bytes, such as 300M: of all tensors where --codec is f32, f16 or bf16; else of the "
               "compact file that quantize and export make of it, with tokenizer, header and card"},
      {.name = "min-tokens-per-second",
       .type = OptionType::kNumber,
       .help = "shape: the same for the speed at which pare decodes on this machine with these --threads, measured on "
               "random weights in --codec, one sequence at the beginning of its context",
       .minimum = 1e-3,
       .maximum = 1e6},
      {.name = "codec",
       .type = OptionType::kText,
       .help = "shape, with --max-bytes or --min-tokens-per-second: what the result is going to be: f32, f16 or bf16 "
               "(a folder; default: this folder's own floats), or a codec of quantize (a compact file, embedding and "
               "head in q8)"},
      {.name = "per-layer",
       .type = OptionType::kFlag,
       .help = "shape: blocks may differ: --ffn and --kv-heads are means, given out by what each block loses; with a "
               "budget blocks, heads and neurons are chosen together. pare reads the result, and llama.cpp that of a "
               "Llama or Mistral; transformers does not",
       .default_value = false},
      {.name = "multiple-of",
       .type = OptionType::kInteger,
       .help = "shape: multiple of the widths that linears read, for codecs and loaders (default 32)",
       .minimum = 1},
      {.name = "rank-by",
       .type = OptionType::kText,
       .help = "shape: what decides what goes: measured (on the text, default), weights (their norms) or random (by "
               "the seed); the last two to compare with",
       .choices = {"measured", "weights", "random"}},
      {.name = "no-correction",
       .type = OptionType::kFlag,
       .help = "shape: leave kept weights as they are instead of refitting them to what is left",
       .default_value = false},
      {.name = "damping",
       .type = OptionType::kNumber,
       .help = "sparsegpt, --reconstruct, shape: damping of the refit, relative to the mean second moment (default "
               "0.01)",
       .minimum = 1e-9,
       .maximum = 100.0},
      {.name = "text",
       .type = OptionType::kTextList,
       .help = "calibration text: .txt or .jsonl files, or folders of them"},
      {.name = "split", .help = "separator between documents of .txt files, such as <|endoftext|>"},
      {.name = "random-tokens",
       .type = OptionType::kFlag,
       .help = "calibrate on uniform random tokens instead of text",
       .default_value = false},
      {.name = "samples",
       .type = OptionType::kInteger,
       .help = "calibration windows",
       .default_value = 128,
       .minimum = 1},
      {.name = "context",
       .type = OptionType::kInteger,
       .help = "tokens per calibration window (default: 512, or all of the model's positions where it has fewer)",
       .minimum = 2},
      {.name = "device", .type = OptionType::kText, .help = "cpu, cuda or cuda:N", .default_value = "cpu"},
      {.name = "max-ram",
       .help = "memory to stay below, such as 4G: methods that calibrate move activations to a file where they do not "
               "fit; refused (exit 5) where that is not enough"},
  };
}

const PruneMethod& method_of(const Options& options) {
  const auto name = options.get<std::string>("method");
  for (const PruneMethod& method : prune_methods())
    if (method.name == name) return method;
  throw usage_error("--method", "a method of the table", name);
}

bool is_set(const Options& options, const std::string& name) {
  return options.has(name) && options.resolved().at(name) != Json(false);
}

std::vector<fs::path> text_paths(const Options& options) {
  std::vector<fs::path> paths;
  if (options.has("text"))
    for (const auto& path : options.get<std::vector<std::string>>("text")) paths.emplace_back(path);
  return paths;
}

bool calibrated(const Options& options) {
  return !text_paths(options).empty() || options.get<bool>("random-tokens");
}

// Options that belong to other methods are refused rather than ignored.
void check_options(const PruneMethod& method, const Options& options) {
  std::vector<std::string> problems;
  int given = 0;
  std::string names;
  for (const std::string& name : method.needs) {
    given += is_set(options, name) ? 1 : 0;
    names += (names.empty() ? "--" : " or --") + name;
  }
  if (given != 1 && !method.needs.empty())
    problems.push_back(given == 0 ? "needs " + names : "takes one of " + names + ", not both");
  for (const char* name :
       {"sparsity", "pattern", "reconstruct", "allocation", "layers", "heads", "kv-heads", "ffn", "hidden", "experts",
        "max-params", "max-bytes", "min-tokens-per-second", "codec", "per-layer", "multiple-of", "rank-by", "no-correction", "damping"}) {
    const auto in = [&](const std::vector<std::string>& list) {
      return std::find(list.begin(), list.end(), name) != list.end();
    };
    if (is_set(options, name) && !in(method.needs) && !in(method.takes))
      problems.push_back("has no use for --" + std::string(name));
  }
  if (is_set(options, "no-correction") && is_set(options, "damping"))
    problems.push_back("has no use for --damping with --no-correction");
  const bool text = !text_paths(options).empty();
  if (!text && options.changed("split")) problems.push_back("has no use for --split without --text");
  if (!calibrated(options))
    for (const char* name : {"samples", "context", "device"})
      if (options.changed(name))
        problems.push_back("has no use for --" + std::string(name) + " without --text or --random-tokens");
  if (text && options.get<bool>("random-tokens")) problems.push_back("takes --text or --random-tokens, not both");
  const bool walks = method.needs_text || is_set(options, "reconstruct") ||
                     options.get_or<std::string>("allocation", "uniform") != "uniform";
  if (walks && !calibrated(options))
    problems.push_back("needs calibration text: --text FILE (or --random-tokens)");
  if (problems.empty()) return;
  std::string all;
  for (const std::string& problem : problems) all += (all.empty() ? "" : "; ") + problem;
  throw usage_error("--method " + method.name, "options that fit the method", all);
}

void check_model(const Checkpoint& model) {
  for (const TensorSpec& spec : model.tensors())
    if (model.is_quantized(spec.name))
      throw input_error(model.folder().string(), "float weights", spec.name + " as " + model.codec(spec.name).name(),
                        "prune first, then quantize: codes cannot be pruned without rounding again");
}

void check_text(const Options& options, const ModelConfig& config) {
  const auto paths = text_paths(options);
  const fs::path folder = options.get<std::string>("model");
  const std::int64_t length = window_length(config, options);
  if (calibrated(options) && length > config.max_position_embeddings)
    throw usage_error("--context", "at most the model's " + std::to_string(config.max_position_embeddings) +
                                       " positions", std::to_string(length));
  if (paths.empty()) return;
  for (const fs::path& path : paths)
    if (!fs::exists(path)) throw input_error(path.string(), "a text file or folder", "nothing there");
  if (!has_tokenizer(folder))
    throw input_error((folder / "tokenizer.json").string(), "the model's tokenizer", "nothing there",
                      "calibration text has to be turned into tokens");
}

// The work folder belongs to one set of options, one input and one choice of windows.
void claim_work_folder(const PruneJob& job) {
  Json options = job.options.resolved();
  // Paths by content below; the last two decide no byte.
  for (const char* key : {"model", "out", "text", "split", "max-ram", "rank-timeout"}) options.erase(key);
  const Json manifest = {{"version", kManifestVersion},
                         {"options", options},
                         {"seed", job.context.seed},
                         {"input", job.model.content_hash()},
                         {"dtype", job.dtype},
                         {"windows", job.windows.count > 0 ? Json(job.windows.hash()) : Json()}};
  const fs::path file = job.work / kManifest;
  const auto clear = [&] {
    for (const auto& entry : fs::directory_iterator(job.work)) fs::remove_all(entry.path());
    write_text(file, manifest.dump(1));
  };
  if (!fs::exists(file)) {
    // A run killed in its first moment leaves at most a file on the way to its name. Anything else is not ours.
    const bool strays = std::all_of(fs::directory_iterator(job.work), fs::directory_iterator(), [](const auto& entry) {
      return entry.path().filename().string().find(".tmp-") != std::string::npos;
    });
    if (!strays)
      throw usage_error(job.work.string(), "an unfinished run of this very command", "one of another command",
                        "remove that folder, or finish the command it belongs to");
    clear();
  } else {
    if (read_json(file) != manifest)
      throw usage_error(job.work.string(), "an unfinished run of this very command",
                        "one with other options, another input or other text",
                        "remove that folder, or finish the command it belongs to");
    job.context.progress->note("Continuing the unfinished run in " + job.work.string());
    // Killed just before its rename: the figures went with the state, so the run is repeated.
    if (fs::exists(job.work / "config.json") && !fs::exists(job.state)) clear();
  }
  fs::create_directories(job.state);
}

std::uint64_t zeros(const std::vector<float>& values) {
  return static_cast<std::uint64_t>(std::count(values.begin(), values.end(), 0.0f));
}

// Zeros of each kind of linear, counted in what was written, against what was asked.
void report_sparsity(const PruneJob& job, const Checkpoint& result, Json& summary) {
  struct Count {
    std::uint64_t before = 0, after = 0, all = 0;
  };
  std::map<std::string, Count> kinds;
  Count total;
  for (const TensorSpec& spec : result.tensors()) {
    if (spec.role != TensorRole::kLinear || spec.layer < 0) continue;
    Count& kind = kinds[spec.module];
    const auto before = zeros(job.model.read_f32(spec.name)), after = zeros(result.read_f32(spec.name));
    const auto all = static_cast<std::uint64_t>(spec.shape[0] * spec.shape[1]);
    for (Count* count : {&kind, &total}) {
      count->before += before;
      count->after += after;
      count->all += all;
    }
    job.model.release(spec.name);
    result.release(spec.name);
  }
  const auto fraction = [](std::uint64_t part, std::uint64_t whole) {
    return static_cast<double>(part) / static_cast<double>(std::max<std::uint64_t>(1, whole));
  };
  for (const auto& [module, count] : kinds)
    job.context.report.add({"prune", "sparsity of " + module, fraction(count.before, count.all),
                            fraction(count.after, count.all), "fraction", std::nullopt});
  job.context.report.add({"prune", "sparsity of all block linears", fraction(total.before, total.all),
                          fraction(total.after, total.all), "fraction", std::nullopt});
  if (total.after <= total.before)
    throw failure("prune", "more zeros than before", std::to_string(total.after) + " of " + std::to_string(total.all),
                  "the model already has this sparsity; ask for more");
  summary["sparsity"] = fraction(total.after, total.all);
  const std::int64_t parameters = parameter_count(result.config());
  job.context.report.add({"prune", "nonzero block parameters", static_cast<double>(total.all - total.before),
                          static_cast<double>(total.all - total.after), "parameters", std::nullopt});
  summary["parameters"] = parameters;
}

Json finish(PruneJob& job, const PruneMethod& method) {
  Report& report = job.context.report;
  Json summary = {{"method", method.name}};
  const Checkpoint result(job.work);
  const std::int64_t before = parameter_count(job.model.config()), after = parameter_count(result.config());
  report.add({"prune", "parameters", static_cast<double>(before), static_cast<double>(after), "parameters",
              std::nullopt});
  summary["parameters_before"] = before;
  summary["parameters"] = after;
  if (after == before) report_sparsity(job, result, summary);
  if (job.windows.count > 0) {
    const Divergence d = compare_models(job.model, result, job.windows,
                                        parse_device(job.options.get<std::string>("device")), job.context);
    if (!std::isfinite(d.kl))
      throw failure("prune", "finite predictions of the pruned model", "a divergence of " + std::to_string(d.kl),
                    "remove less");
    report.add({"prune", "calibration loss", d.original_loss, d.loss, "nats/token", d.loss_error});
    report.add({"prune", "calibration mean_kl", std::nullopt, d.kl, "nats/token", d.kl_error});
    summary["calibration_loss_before"] = d.original_loss;
    summary["calibration_loss"] = d.loss;
    summary["calibration_kl"] = d.kl;
    summary["calibration_kl_stderr"] = d.kl_error;
  }
  return summary;
}

MemoryPlan memory_of(const PruneMethod& method, const ModelConfig& config, const Options& options,
                     const std::string& dtype) {
  const std::uint64_t base = std::uint64_t{192} << 20;  // libraries, tokenizer
  const auto peak = [&](const fs::path& spill) {
    std::uint64_t bytes = std::max(method.peak_bytes(config, options, dtype, spill),  // or an outer tensor being copied
                                   4 * static_cast<std::uint64_t>(config.vocab_size * config.hidden_size));
    if (calibrated(options))
      bytes = std::max(bytes, compare_peak_bytes(config, options.get<std::int64_t>("samples"),
                                                 window_length(config, options)));
    return base + bytes;
  };
  return plan_memory(options, peak, "raise --max-ram");
}

Json run(const Options& options, Context& context) {
  const PruneMethod& method = method_of(options);
  check_options(method, options);
  const Checkpoint model(options.get<std::string>("model"));
  check_model(model);
  check_text(options, model.config());
  const std::string dtype = planned_model(model).dtype;
  method.result(model.config(), options, dtype);
  parse_device(options.get<std::string>("device"));
  const bool spill = memory_of(method, model.config(), options, dtype).spill;
  FolderTransaction folder(options.get<std::string>("out"));

  PruneJob job{model, options, context, {}, folder.work(), folder.work() / kState, dtype,
               spill ? folder.work() / kState : fs::path()};
  const auto texts = text_paths(options);
  try {
    if (options.get<bool>("random-tokens"))
      job.windows = random_windows(model.config().vocab_size, options.get<std::int64_t>("samples"),
                                   window_length(model.config(), options), context.seed);
    else if (!texts.empty())
      job.windows =
          sample_windows(Tokenizer::from_file(model.folder() / "tokenizer.json"), texts,
                         options.get<std::int64_t>("samples"), window_length(model.config(), options), context.seed,
                         options.has("split") ? std::optional(options.get<std::string>("split")) : std::nullopt);
    require_ids(job.windows, model.config().vocab_size);
  } catch (...) {
    if (fs::is_empty(folder.work())) folder.discard();
    throw;
  }
  claim_work_folder(job);
  Json summary;
  try {
    // Killed between here and the rename, only the measurement is repeated.
    const fs::path written = job.state / kWritten;
    if (fs::exists(written)) {
      const Report earlier = Report::from_json(read_json(written), written.string());
      for (const ReportRow& row : earlier.rows()) context.report.add(row);
    } else {
      const std::size_t first = context.report.rows().size();
      method.run(job);
      Report own;
      for (std::size_t i = first; i < context.report.rows().size(); ++i) own.add(context.report.rows()[i]);
      write_text(written, own.to_json().dump());
    }
    summary = finish(job, method);
  } catch (const Error& error) {
    if (error.code() == ExitCode::kInput || error.code() == ExitCode::kUsage) folder.discard();
    throw;
  }
  fs::remove_all(job.state);
  write_model_card(folder.work(), {options.get<std::string>("model"), command_of("prune", options),
                                   context.report, {}});
  if (context.before_commit) context.before_commit();
  folder.commit();
  summary["out"] = options.get<std::string>("out");
  context.print(context.report.table());
  return summary;
}

StagePlan plan(const Options& options, const PlannedModel& input) {
  const PruneMethod& method = method_of(options);
  check_options(method, options);
  if (input.quantized)
    throw input_error(options.get<std::string>("model"), "float weights", "codes",
                      "prune first, then quantize: codes cannot be pruned without rounding again");
  check_text(options, input.config);
  parse_device(options.get<std::string>("device"));
  if (fs::exists(options.get<std::string>("out")))
    throw usage_error(options.get<std::string>("out"), "a folder that does not exist yet", "an existing one");
  const ModelConfig& config = input.config;
  const ModelConfig result = method.result(config, options, input.dtype);
  const auto parameters = static_cast<std::uint64_t>(parameter_count(config));
  const bool text = calibrated(options);
  const auto samples = static_cast<std::uint64_t>(options.get<std::int64_t>("samples"));
  const auto length = static_cast<std::uint64_t>(window_length(config, options));
  const MemoryPlan memory = memory_of(method, config, options, input.dtype);
  // 2 flop per parameter and token, at 20 GFLOP/s a core; the measurement is two more passes with two heads.
  const double flop = text ? 2.0 * static_cast<double>(parameters) * static_cast<double>(samples * length) *
                                 (method.passes(config, options, input.dtype) + 3)
                           : 0;
  const double cores = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::string> notes;
  for (const auto& [option, width] : {std::pair{"ffn", result.intermediate_size}, {"hidden", result.hidden_size}})
    if (options.has(option) && width != options.get<std::int64_t>(option))
      notes.push_back("--" + std::string(option) + " rounded up to " + std::to_string(width));
  if (!text) notes.push_back("no --text: the result is not measured");
  if (options.has("max-params") || options.has("max-bytes"))
    notes.push_back("the shape is searched: its size is the largest that may be found");
  if (options.has("min-tokens-per-second"))
    notes.push_back("the shape is searched, and what is fast enough measured, when it runs: the size is the model's own");
  if (options.get<bool>("per-layer"))
    notes.push_back("blocks will differ in width: pare reads the result, llama.cpp that of a Llama or Mistral, "
                    "transformers does not");
  memory.add_note(notes);
  return {flop / (2e10 * cores) + static_cast<double>(parameters) * 1e-8, memory.peak,
          static_cast<std::uint64_t>(parameter_count(result)) * dtype_bytes(input.dtype), std::move(notes),
          planned_model(result, input.dtype)};
}

}  // namespace

const std::vector<PruneMethod>& prune_methods() {
  static const std::vector<PruneMethod> table = {magnitude_method(), wanda_method(), sparsegpt_method(),
                                                 random_method(), shape_method()};
  return table;
}

void check_finite(const float* values, std::size_t count, const std::string& place) {
  for (std::size_t i = 0; i < count; ++i)
    if (!std::isfinite(values[i]))
      throw input_error(place, "finite numbers", (std::isnan(values[i]) ? "NaN" : "infinity") +
                                                     (" at element " + std::to_string(i)),
                        "the model is damaged or its training diverged");
}

std::int64_t window_length(const ModelConfig& config, const Options& options) {
  return options.get_or<std::int64_t>("context", std::min<std::int64_t>(512, config.max_position_embeddings));
}

std::vector<float> read_finite(const Checkpoint& model, const std::string& name) {
  std::vector<float> values = model.read_f32(name);
  check_finite(values.data(), values.size(), (model.folder() / name).string());
  return values;
}

void round_to(const std::string& dtype, std::vector<float>& values) {
  if (dtype == "bfloat16")
    for (float& x : values) x = bf16_to_f32(f32_to_bf16(x));
  else if (dtype == "float16")
    for (float& x : values) x = f16_to_f32(f32_to_f16(x));
}

std::string block_tensor(int layer, const std::string& inside) {
  return "model.layers." + std::to_string(layer) + "." + inside;
}

std::uint64_t block_bytes(const ModelConfig& config) {
  std::map<std::int64_t, std::uint64_t> bytes;  // by expert, -1: what is common to all
  ModelConfig widest = config;
  widest.layer_widths.clear();
  for (const TensorSpec& spec : expected_tensors(widest)) {
    if (spec.layer != 0) continue;
    std::uint64_t count = 4;
    for (const std::int64_t size : spec.shape) count *= static_cast<std::uint64_t>(size);
    bytes[spec.expert] += count;
  }
  return bytes[-1] + (config.has_experts() ? bytes[0] : 0);
}

std::string block_piece(int layer) { return "block-" + std::to_string(layer); }

std::string expert_piece(int layer, std::int64_t expert) {
  return block_piece(layer) + "-expert-" + std::to_string(expert);
}

void copy_outer_tensors(const PruneJob& job, CheckpointWriter& writer) {
  const std::string piece = "outer";
  if (writer.has_piece(piece)) return;
  writer.begin_piece(piece);
  for (const TensorSpec& spec : job.model.tensors()) {
    if (spec.layer >= 0) continue;
    writer.put(spec.name, read_finite(job.model, spec.name).data());
    job.model.release(spec.name);
  }
  writer.end_piece();
}

Command prune_command() {
  Command command;
  command.name = "prune";
  command.summary = "Remove weights, or blocks, heads, neurons and channels, and measure what that costs";
  command.options = option_table();
  command.run = run;
  command.plan = plan;
  command.is_stage = true;
  command.example = "pare prune --model smol --out smol-half --method wanda --sparsity 0.5 --text notes.txt";
  return calibrated_by_ranks(std::move(command));
}

}  // namespace pare
