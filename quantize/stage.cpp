// The quantize stage: options, plan, work folder and report.
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <set>

#include "core/error.h"
#include "core/model_card.h"
#include "core/placement.h"
#include "core/tokenizer.h"
#include "model/blocks.h"
#include "model/fisher.h"
#include "quantize/allocate.h"
#include "quantize/equalize.h"
#include "quantize/layers.h"
#include "quantize/options.h"
#include "quantize/quantize.h"
#include "quantize/tune.h"

namespace pare {
namespace {

constexpr int kManifestVersion = 1;
// Stays in the output: what was done to which input, and the error of every linear.
constexpr const char* kManifest = "quantize.json";
constexpr const char* kRows = "quantize.rows";
// While it is being quantized: the model with its inputs scaled, in float32.
constexpr const char* kEqualized = "quantize.equalized";
constexpr const char* kEqualizedRows = "quantize.equalized_rows";
// While it is being tuned: the model as rounded, and how far tuning has come.
constexpr const char* kRounded = "quantize.rounded";
constexpr const char* kAllocation = "quantize.bits.json";  // which tensor gets which codec, once that is known
constexpr const char* kTuneState = "quantize.tune.safetensors";
constexpr std::int64_t kValidationWindows = 16;
constexpr double kValidationShare = 0.05;  // of the tuning text, at its end

QuantizeMethod method_of(const Options& options) {
  const auto name = options.get<std::string>("method");
  if (name == "rtn-q4_0") return QuantizeMethod::kQ4_0;
  if (name == "rtn-imatrix") return QuantizeMethod::kImatrix;
  return name == "gptq" ? QuantizeMethod::kGptq : name == "rtn" ? QuantizeMethod::kRtn : QuantizeMethod::kAbsmax;
}

std::vector<std::string> texts(const Options& options, const char* name) {
  return options.get_or<std::vector<std::string>>(name, {});
}

QuantizePolicy policy_of(const Options& options) {
  return {options.get<std::string>("codec"), options.get<std::string>("embedding-codec"),
          options.get<std::string>("head-codec"), texts(options, "policy"),
          options.get<std::string>("fallback") != "none"};
}

std::int64_t context_of(const Options& options, const ModelConfig& config) {
  return options.get_or<std::int64_t>("context", std::min<std::int64_t>(512, config.max_position_embeddings));
}

bool calibrated(const Options& options) {
  return !texts(options, "text").empty() || options.get<bool>("random-tokens");
}

bool equalizes(const Options& options) {
  return options.get<std::string>("equalize") != "none";
}

TuneSettings tuning_of(const Options& options) {
  return {options.get<std::int64_t>("tune-codes"), options.get<std::int64_t>("tune"),
          options.get<std::int64_t>("tune-batch"), options.get<double>("tune-lr"), options.get<double>("tune-code-lr")};
}
Equalizing equalizing_of(const Options& options) {
  const auto name = options.get<std::string>("equalize");
  return name == "awq" ? Equalizing::kAwq : name == "smoothquant" ? Equalizing::kSmoothQuant : Equalizing::kLeastNoise;
}

// Zeros that the sweep is to choose.
std::optional<Sparsity> sparsity_of(const Options& options) {
  if (options.has("pattern")) return Sparsity::pattern(options.get<std::string>("pattern"), "--pattern");
  if (options.has("sparsity")) return Sparsity{options.get<double>("sparsity")};
  return std::nullopt;
}

// Everything that can be wrong with them.
void check_sparsity(const Options& options, const std::vector<TensorPlan>& tensors) {
  const std::optional<Sparsity> sparsity = sparsity_of(options);
  if (!sparsity) return;
  const std::string place = options.has("pattern") ? "--pattern" : "--sparsity";
  if (options.has("pattern") && options.has("sparsity"))
    throw usage_error("--pattern", "one of --sparsity and --pattern", "both", "leave one of the two out");
  for (const char* other : {"bits", "kl"})
    if (options.has(other))
      throw usage_error("--" + std::string(other), "a --codec for all linears with " + place, "both",
                        "what codecs cost is measured on whole matrices");
  if (options.get<std::int64_t>("tune-codes") > 0)
    throw usage_error("--tune-codes", "--tune with " + place, "steps in which codes move", "zeros would not stay");
  require_zeros(tensors, *sparsity, place);
}

std::int64_t tuning_steps(const Options& options) {
  return options.get<std::int64_t>("tune") + options.get<std::int64_t>("tune-codes");
}

void refuse_codes(const Checkpoint& model) {
  std::vector<std::string> quantized;
  for (const TensorSpec& spec : model.tensors()) {
    if (model.is_quantized(spec.name)) quantized.push_back(spec.name + " as " + model.codec(spec.name).name());
  }
  if (quantized.empty()) return;
  throw input_error(
      model.folder().string(), "float weights",
      quantized.front() + (quantized.size() > 1 ? " and " + std::to_string(quantized.size() - 1) + " more" : ""),
      "quantize the original: codes cannot be rounded again without loss");
}

void refuse_unused_options(const Options& options, const ModelConfig& config) {
  const std::string place = "pare quantize";
  const bool text = !texts(options, "text").empty();
  if (text && options.get<bool>("random-tokens")) {
    throw usage_error("--random-tokens", "one source of calibration tokens", "--text as well");
  }
  if (method_of(options) != QuantizeMethod::kGptq) {
    refuse_unused(options, {"polish", "damping", "retarget", "sparsity", "pattern"},
                  "with --method " + options.get<std::string>("method"), place);
  }
  if (!options.get<bool>("retarget")) refuse_unused(options, {"paired-tokens"}, "without --retarget", place);
  if (tuning_steps(options) == 0)
    refuse_unused(options, {"tune-text", "tune-batch", "tune-lr"}, "without --tune or --tune-codes", place);
  if (options.get<std::int64_t>("tune-codes") == 0)
    refuse_unused(options, {"tune-code-lr"}, "without --tune-codes", place);
  if (options.has("bits") && options.has("kl"))
    throw usage_error("--kl", "one of --bits and --kl", "both", "leave one of the two out");
  if (options.get<bool>("random-tokens")) refuse_unused(options, {"tune-text"}, "with --random-tokens", place);
  if (!text) refuse_unused(options, {"split"}, "without --text", place);
  if (!calibrated(options)) {
    refuse_unused(options,
                  {"samples", "context", "device", "expert-tokens", "equalize", "fisher", "bits", "kl", "tune",
                   "tune-codes"},
                  "without --text or --random-tokens", place);
  }
  if (!config.has_experts()) refuse_unused(options, {"expert-tokens"}, "in a model without experts", place);
  if (config.has_experts()) refuse_unused(options, {"retarget", "fisher", "bits", "kl"}, "in a model with experts", place);
  if ((options.get<bool>("retarget") || equalizes(options)) && options.get<std::int64_t>("samples") < kHeldOutEvery)
    throw usage_error(equalizes(options) ? "--equalize" : "--retarget",
                      "at least " + std::to_string(kHeldOutEvery) + " --samples",
                      std::to_string(options.get<std::int64_t>("samples")));
  if (config.tie_word_embeddings) {
    refuse_unused(options, {"head-codec"}, "where the head is the embedding: --embedding-codec decides", place);
  }
}

// Whether codecs are chosen by what they cost.
bool allocates(const Options& options) { return options.has("bits") || options.has("kl"); }

// Those that --bits and --kl decide about.
std::vector<std::size_t> free_linears(const Options& options, const std::vector<TensorPlan>& tensors) {
  const auto codec = options.get<std::string>("codec");
  if (codec == "keep")
    throw usage_error(options.has("bits") ? "--bits" : "--kl", "a --codec that quantizes", "keep", "leave one of the two out");
  return free_tensors(tensors, Codec::parse(codec, "--codec"));
}

// Everything that can be wrong before weights are touched.
std::vector<TensorPlan> check(const Options& options, const PlannedModel& model) {
  const fs::path folder = options.get<std::string>("model");
  if (model.quantized) {
    throw input_error(folder.string(), "float weights", "codes",
                      "quantize once: codes cannot be rounded again without loss");
  }
  refuse_unused_options(options, model.config);
  const auto text = texts(options, "text");
  const QuantizeMethod method = method_of(options);
  if ((method == QuantizeMethod::kGptq || method == QuantizeMethod::kImatrix) && !calibrated(options)) {
    throw usage_error("--method " + options.get<std::string>("method"), "calibration text", "none",
                      "--text FILE, or --method rtn, which does without");
  }
  std::vector<std::string> paths = text;
  for (const std::string& path : texts(options, "tune-text")) paths.push_back(path);
  for (const std::string& path : paths) {
    if (!fs::exists(path)) throw input_error(path, "a text file or folder", "nothing there");
  }
  if (!text.empty() && !has_tokenizer(folder)) {
    throw input_error((folder / "tokenizer.json").string(), "the model's tokenizer", "nothing there",
                      "calibration text has to be turned into tokens");
  }
  const std::int64_t context = context_of(options, model.config);
  if (context > model.config.max_position_embeddings) {
    throw usage_error("--context",
                      "at most the model's " + std::to_string(model.config.max_position_embeddings) + " positions",
                      std::to_string(context));
  }
  require_device(options.get<std::string>("device"));
  std::vector<TensorPlan> tensors = plan_codecs(model.config, policy_of(options));
  if (std::none_of(tensors.begin(), tensors.end(), [](const TensorPlan& t) { return t.codec.has_value(); })) {
    throw usage_error("quantize policy", "a tensor to quantize", "keep for all of them");
  }
  if (rounds_as_q4_0(method) && std::none_of(tensors.begin(), tensors.end(), [](const TensorPlan& t) {
        return t.codec && t.codec->kind == CodecKind::kQ4;
      })) {
    throw usage_error("--method " + options.get<std::string>("method"), "a tensor in q4, q4g64 or q4g128",
                      "none, the rule is for no other codec", "choose another --codec or --method rtn");
  }
  check_sparsity(options, tensors);
  if (equalizes(options)) equalize_notes(model.config, tensors);
  if (allocates(options)) {
    const std::vector<std::size_t> free = free_linears(options, tensors);
    require_choices(Codec::parse(options.get<std::string>("codec"), "--codec"));
    require_free(free, options.has("bits") ? "--bits" : "--kl");
    if (options.has("bits")) require_bits(tensors, free, options.get<double>("bits"));
  }
  return tensors;
}

std::uint64_t elements(const TensorSpec& spec) {
  std::uint64_t count = 1;
  for (std::int64_t size : spec.shape) count *= static_cast<std::uint64_t>(size);
  return count;
}

// Bytes of the tensors as the compact file will hold them, and as this folder does.
struct Sizes {
  std::uint64_t compact = 0, folder = 0, before = 0;
};

Sizes sizes_of(const ModelConfig& config, const std::vector<TensorPlan>& plan, const std::string& dtype) {
  Sizes sizes;
  for (const TensorPlan& tensor : plan) {
    const std::uint64_t count = elements(tensor.spec), dense = count * dtype_bytes(dtype);
    sizes.before += dense;
    if (!tensor.codec) {
      sizes.compact += dense;
      sizes.folder += dense;
      continue;
    }
    const std::int64_t rows = tensor.spec.shape[0], cols = tensor.spec.shape[1];
    const auto groups = static_cast<std::uint64_t>(rows * tensor.codec->groups(cols));
    sizes.compact += tensor.codec->payload_bytes(rows, cols);
    // Without a packed form: floats for other loaders and one byte a code for ours.
    sizes.folder += !has_packed_form(config, tensor.spec, *tensor.codec)
                        ? count * 5 + groups * static_cast<std::uint64_t>(tensor.codec->group_bits() + 7) / 8
                        : count * static_cast<std::uint64_t>(tensor.codec->bits()) / 8 + groups * 5;
  }
  return sizes;
}

MemoryPlan memory_of(const Options& options, const ModelConfig& config, const std::vector<TensorPlan>& tensors) {
  const std::uint64_t base = std::uint64_t{256} << 20;  // libraries, tokenizer, tiles of all threads
  std::uint64_t outside = 0, linear = 0, codes = 0, factor = 0;
  for (const TensorPlan& tensor : tensors) {
    const std::uint64_t count = elements(tensor.spec);
    if (tensor.spec.layer < 0) {
      outside = std::max(outside, count * (tensor.codec && !equalizes(options) ? 1 : 4));
      continue;
    }
    if (!tensor.codec) continue;
    if (tensor.spec.layer == 0 && tensor.spec.expert <= 0) codes += count;  // of several experts one at a time
    linear = std::max(linear, count);
    const auto columns = static_cast<std::uint64_t>(tensor.spec.shape[1]);
    factor = std::max(factor, columns * columns * (tensor.spec.shape[1] > kWidestDouble ? 4 : 8));
  }
  // Codes of the block so far; of one linear its floats, and codes before, after and while they are polished.
  const std::uint64_t work = codes + linear * (sparsity_of(options) ? 13 : 7);  // mask, zeroed floats, codes once more
  const auto samples = options.get<std::int64_t>("samples"), context = context_of(options, config);
  // Of linears that share an input each kind of group has a factor of its own, such as with --bits, --kl or --policy.
  std::set<std::int64_t> groups;
  for (const TensorPlan& tensor : tensors)
    if (tensor.codec && tensor.spec.layer >= 0) groups.insert(tensor.codec->group);
  const std::uint64_t factors = factor * (allocates(options) ? 4 : groups.size());
  const bool gptq = method_of(options) == QuantizeMethod::kGptq;
  const auto peak = [&](const fs::path& spill) {
    WalkOptions walk;
    walk.hessian = true;
    walk.spill = spill;
    walk.cross = walk.held_out = options.get<bool>("retarget");
    walk.paired_tokens = options.get<std::int64_t>("paired-tokens");
    std::uint64_t walking = calibrated(options) ? walk_peak_bytes(config, samples, context, walk) : 0;
    if (gptq) walking += factors;
    if (options.get<bool>("retarget")) walking += 2 * factor;  // Hessian and factor of the other windows
    if (equalizes(options)) walking = std::max(walking, equalize_peak_bytes(config, linear, samples, context, spill));
    std::uint64_t whole = 0;  // steps that hold the whole model
    if (options.get<bool>("fisher") || allocates(options)) whole = fisher_peak_bytes(config, samples, context, 0);
    if (tuning_steps(options) > 0)
      whole = std::max(whole, tune_peak_bytes(config, tensors, context, tuning_of(options).code_steps > 0, 0));
    return base + std::max({outside, walking + work, whole});
  };
  return plan_memory(options, peak,
                     calibrated(options) ? "raise --max-ram, or use --method rtn without text" : "raise --max-ram");
}

StagePlan plan(const Options& given, const PlannedModel& input) {
  const Options options = with_preset(given, input.config);
  const std::vector<TensorPlan> tensors = check(options, input);
  const fs::path out = options.get<std::string>("out");
  if (fs::exists(fs::symlink_status(out))) {
    throw usage_error(out.string(), "an output that does not exist yet", "an existing one",
                      "remove it or choose another --out");
  }
  const ModelConfig& config = input.config;
  const auto samples = options.get<std::int64_t>("samples"), context = context_of(options, config);
  std::vector<std::string> notes = fallback_notes(tensors);
  double operations = 0, block_parameters = 0, search = 0;
  std::uint64_t widest = 0;
  for (const TensorPlan& tensor : tensors) {
    if (tensor.spec.role != TensorRole::kLinear) continue;
    const auto count = static_cast<double>(elements(tensor.spec));
    widest = std::max(widest, static_cast<std::uint64_t>(tensor.spec.shape[1]));
    block_parameters += count;
    if (!tensor.codec) continue;
    const double group = static_cast<double>(tensor.spec.shape[1] / tensor.codec->groups(tensor.spec.shape[1]));
    // Of scales; GPTQ searches a second time, on compensated weights.
    search += count * 45.0 * std::min(group, 128.0) * (method_of(options) == QuantizeMethod::kGptq ? 2.0 : 1.0);
    if (calibrated(options))
      operations += count * 8.0 * static_cast<double>(tensor.spec.shape[1]);  // sweep, errors, polish
  }
  operations += search;
  if (calibrated(options)) {
    const auto tokens = static_cast<double>(samples * context);
    operations += tokens * 2.0 * 3.0 * block_parameters;  // the original once, the compressed stream twice
    operations += tokens * static_cast<double>(widest) * block_parameters / static_cast<double>(widest);
    if (tokens < 4.0 * static_cast<double>(widest)) {
      notes.push_back("few calibration tokens: " + std::to_string(samples * context) + " for inputs of width " +
                      std::to_string(widest));
    }
  }
  if (equalizes(options)) {
    notes.push_back("a float32 copy of the model with its inputs scaled lies beside the output while it is made");
    if (allocates(options)) notes.push_back("inputs are scaled for --codec, before each tensor gets a codec of its own");
    for (std::string& note : equalize_notes(config, tensors)) notes.push_back(std::move(note));
    operations += kEqualizeCandidates * (search + 2.0 * static_cast<double>(kScaleTokens) * block_parameters);
  }
  if (tuning_steps(options) > 0)  // the original once, the quantized model forwards and backwards
    operations += static_cast<double>(tuning_steps(options) * options.get<std::int64_t>("tune-batch") * context) * 8.0 *
                  static_cast<double>(parameter_count(config));
  if (allocates(options)) operations += 4.0 * operations;
  if (options.get<bool>("fisher") || allocates(options))
    operations += static_cast<double>(samples * context) * 4.0 * static_cast<double>(parameter_count(config));
  const MemoryPlan memory = memory_of(options, config, tensors);
  memory.add_note(notes);
  Sizes sizes = sizes_of(config, tensors, input.dtype);
  if (options.has("bits")) {
    for (const std::size_t i : free_linears(options, tensors)) {
      const std::int64_t rows = tensors[i].spec.shape[0], cols = tensors[i].spec.shape[1];
      const auto planned = static_cast<std::uint64_t>(options.get<double>("bits") * static_cast<double>(rows * cols) / 8);
      const std::uint64_t counted = tensors[i].codec->payload_bytes(rows, cols);
      sizes.compact = sizes.compact + planned - counted;
      sizes.folder = sizes.folder + planned - std::min(sizes.folder, counted);
    }
    notes.push_back("which tensor gets which codec is decided by measuring them: sizes are those of --bits");
  } else if (options.has("kl")) {
    notes.push_back("which tensor gets which codec is decided by measuring them: sizes are those of --codec everywhere");
  }
  StagePlan plan{1.0 + operations / (1.2e10 * omp_get_num_procs()), memory.peak, sizes.folder, std::move(notes), input};
  plan.result.quantized =
      std::any_of(tensors.begin(), tensors.end(), [](const TensorPlan& t) { return t.codec.has_value(); });
  plan.result.compact_bytes = sizes.compact;
  return plan;
}

CalibrationWindows calibration(const Options& options, const Checkpoint& model, std::uint64_t seed) {
  const std::int64_t samples = options.get<std::int64_t>("samples"), context = context_of(options, model.config());
  if (options.get<bool>("random-tokens")) return random_windows(model.config().vocab_size, samples, context, seed);
  std::vector<fs::path> paths;
  for (const std::string& path : texts(options, "text")) paths.emplace_back(path);
  if (paths.empty()) return {};
  std::optional<std::string> split;
  if (options.has("split")) split = options.get<std::string>("split");
  return sample_windows(Tokenizer::from_file(model.folder() / "tokenizer.json"), paths, samples, context, seed, split);
}

// Windows to tune on, and of the end of that text those to measure it with.
std::pair<CalibrationWindows, CalibrationWindows> tuning_windows(const Options& options, const Checkpoint& model,
                                                                 std::uint64_t seed) {
  const std::int64_t context = context_of(options, model.config());
  const std::int64_t count = tuning_steps(options) * options.get<std::int64_t>("tune-batch");
  const std::uint64_t own = seed + 0x74756e65;  // not the windows of the calibration
  if (options.get<bool>("random-tokens")) {
    const std::int64_t vocab = model.config().vocab_size;
    return {random_windows(vocab, count, context, own), random_windows(vocab, kValidationWindows, context, own + 1)};
  }
  std::vector<fs::path> paths;
  const char* source = options.has("tune-text") ? "tune-text" : "text";
  for (const std::string& path : texts(options, source)) paths.emplace_back(path);
  std::optional<std::string> split;
  if (options.has("split")) split = options.get<std::string>("split");
  const Tokenizer tokenizer = Tokenizer::from_file(model.folder() / "tokenizer.json");
  return {sample_windows(tokenizer, paths, count, context, own, split, {0, 1 - kValidationShare}),
          sample_windows(tokenizer, paths, kValidationWindows, context, own + 1, split, {1 - kValidationShare, 1})};
}

// The work folder belongs to one input, one set of options and one choice of windows. Returns the figures of a run that
// had come further than rounding, else an empty object.
Json claim(const fs::path& work, const Json& manifest, Context& context) {
  const fs::path file = work / kManifest;
  if (!fs::exists(file)) {
    // A run killed in its first moment leaves at most a file on the way to its name. Anything else is not ours.
    for (const auto& entry : fs::directory_iterator(work)) {
      if (entry.path().filename().string().find(".tmp-") != std::string::npos) continue;
      throw usage_error(work.string(), "an unfinished run of this very command", "one of another command",
                        "remove that folder, or finish the command it belongs to");
    }
    write_text(file, manifest.dump(1) + "\n");
    return Json::object();
  }
  const Json found = read_json(file);
  std::string differences;
  const auto compare = [&](const Json& ours, const Json& theirs, const std::string& prefix) {
    for (const auto& [key, value] : ours.items()) {
      if (value.is_object() || (theirs.contains(key) && theirs.at(key) == value)) continue;
      differences += (differences.empty() ? "" : ", ") + prefix + key + " " +
                     (theirs.contains(key) ? theirs.at(key).dump() : "unset") + " there and " + value.dump() + " here";
    }
  };
  compare(manifest, found, "");
  compare(manifest.at("options"), found.value("options", Json::object()), "--");
  if (!differences.empty()) {
    throw usage_error(work.string(), "an unfinished run of this very command", "one with " + differences,
                      "remove that folder, or repeat the command it belongs to");
  }
  context.progress->note("Continuing the unfinished run in " + work.string());
  return found;
}

// Totals by module, drift and size as report rows; returns the summary.
Json report(const Options& options, const ModelConfig& config, const std::vector<TensorPlan>& tensors,
            const std::string& dtype, const Json& linears, Context& context) {
  std::vector<std::string> modules;
  std::map<std::string, std::pair<double, double>> sums;
  double before = 0, after = 0, drift = -1, kept = 0, swept = 0, log_ratio = 0;
  double zeros = 0, masked = 0;
  int compared = 0;
  std::vector<const Json*> routed;
  bool errors = false, compares = false;
  for (const Json& row : linears) {
    if (row.contains("drift")) drift = row.at("drift").get<double>();
    if (row.contains("expert_tokens")) routed.push_back(&row);
    if (!row.contains("after")) continue;
    errors = true;
    const auto name = row.at("name").get<std::string>();
    const std::string module =
        module_kind(name.substr(name.find('.', std::string_view("model.layers.").size()) + 1,
                                name.rfind('.') - name.find('.', std::string_view("model.layers.").size()) - 1));
    if (!sums.contains(module)) modules.push_back(module);
    const double own_after = row.at("after").get<double>(), own_before = row.value("before", own_after);
    compares = compares || row.contains("before");
    sums[module].first += own_before;
    sums[module].second += own_after;
    before += own_before;
    after += own_after;
    if (own_before > 0 && own_after > 0) {
      log_ratio += std::log(own_after / own_before);
      ++compared;
    }
    zeros += row.value("zeros", 0.0);
    if (row.contains("zeros")) masked += row.at("rows").get<double>() * row.at("columns").get<double>();
    kept += row.value("rows_kept_nearest", 0.0);
    swept += row.contains("sweep") ? row.at("rows").get<double>() : 0.0;
  }
  Report& rows = context.report;
  const auto optional = [&](double value) { return compares ? std::optional<double>(value) : std::nullopt; };
  for (const std::string& module : modules) {
    rows.add(
        {"quantize", "layer_error " + module, optional(sums[module].first), sums[module].second, "squared output", {}});
  }
  Json summary = {{"method", options.get<std::string>("method")}};
  if (errors) {
    rows.add({"quantize", "layer_error", optional(before), after, "squared output", {}});
    rows.add({"quantize", "stream_error", {}, drift, "of its energy", {}});
    if (compares) summary["layer_error_before"] = before;
    summary["layer_error"] = after;
    summary["layer_error_ratio"] = compared > 0 ? std::exp(log_ratio / compared) : 1.0;
    summary["stream_error"] = drift;
  }
  for (const Json* row : routed) {
    const auto tokens = row->at("expert_tokens").get<std::vector<std::int64_t>>();
    rows.add({"quantize",
              "fewest tokens of an expert, " + row->at("name").get<std::string>(),
              {},
              static_cast<double>(*std::min_element(tokens.begin(), tokens.end())),
              expert_summary(tokens, row->at("least").get<std::int64_t>()),
              {}});
  }
  if (swept > 0) {
    rows.add({"quantize",
              "rows that kept nearest codes",
              {},
              kept,
              "of " + std::to_string(static_cast<std::int64_t>(swept)),
              {}});
    summary["rows_kept_nearest"] = kept;
  }
  if (masked > 0) {
    rows.add({"quantize", "sparsity of all block linears", {}, zeros / masked, "fraction", {}});
    summary["sparsity"] = zeros / masked;
  }
  const Sizes sizes = sizes_of(config, tensors, dtype);
  double parameters = 0;
  for (const TensorPlan& tensor : tensors) parameters += static_cast<double>(elements(tensor.spec));
  const double bits = 8.0 * static_cast<double>(sizes.compact) / parameters;
  rows.add({"quantize", "bits_per_weight", 8.0 * static_cast<double>(sizes.before) / parameters, bits, "bits", {}});
  summary["bits_per_weight"] = bits;
  summary["fallbacks"] = fallback_notes(tensors);
  for (const std::string& note : fallback_notes(tensors)) {
    rows.add({"quantize", "fallback " + note.substr(0, note.find(':')), {}, {}, note.substr(note.find(':') + 2), {}});
  }
  return summary;
}

// The model that is rounded: the original with its inputs scaled, as a folder in the work folder. Returns what was scaled.
Json equalize_into(const fs::path& work, const Options& options, const Checkpoint& model,
                   const std::vector<TensorPlan>& tensors, const CalibrationWindows& windows, const std::string& dtype,
                   bool spill, Context& context) {
  for (const std::string& note : equalize_notes(model.config(), tensors)) context.progress->note(note);
  fs::create_directories(work / kEqualized);
  CheckpointWriter writer(work / kEqualized, model.config(), "float32");
  equalize({model, tensors, writer, work / kEqualizedRows,
            equalizing_of(options),
            method_of(options) == QuantizeMethod::kAbsmax ? ScaleRule::kAbsmax : ScaleRule::kSearched, windows, dtype,
            options.get<std::string>("device"), context.threads, options.get<std::int64_t>("expert-tokens"),
            spill ? work : fs::path()},
           context);
  writer.finish();
  return equalize_rows(model.config(), work / kEqualizedRows);
}

Json run(const Options& given, Context& context) {
  const auto start = std::chrono::steady_clock::now();
  const Checkpoint original(given.get<std::string>("model"));
  const Options options = with_preset(given, original.config());
  refuse_codes(original);
  const PlannedModel planned = planned_model(original);
  std::vector<TensorPlan> tensors = check(options, planned);
  const bool spill = memory_of(options, original.config(), tensors).spill;
  if (sparsity_of(options)) require_unpruned(original, tensors);
  FolderTransaction folder(options.get<std::string>("out"));
  Json linears, tuned, allocation, scaled;
  const std::string& dtype = planned.dtype;
  const bool fresh = fs::is_empty(folder.work());
  try {
    for (const std::string& note : fallback_notes(tensors)) context.progress->note(note);
    CalibrationWindows windows = calibration(options, original, context.seed);
    Json said = options.resolved();
    for (const char* key : {"model", "out", "text", "tune-text", "split", "max-ram", "rank-timeout"})
      said.erase(key);  // by content: input and windows; the last two decide no byte
    Json manifest = {{"stage", "quantize"}, {"version", kManifestVersion}, {"input", original.content_hash()},
                     {"dtype", dtype},      {"windows", windows.hash()},   {"options", said}};
    const bool tunes = tuning_steps(options) > 0;
    std::pair<CalibrationWindows, CalibrationWindows> tuning;
    if (tunes) {
      tuning = tuning_windows(options, original, context.seed);
      manifest["tuning_windows"] = tuning.first.hash();
    }
    const Json done = claim(folder.work(), manifest, context);
    linears = done.value("linears", Json());
    tuned = done.value("tuned", Json());
    scaled = done.value("scaled", Json());
    std::optional<Checkpoint> equalized;
    if (equalizes(options) && (linears.is_null() || (tunes && tuned.is_null()))) {
      scaled = equalize_into(folder.work(), options, original, tensors, windows, dtype, spill, context);
      equalized.emplace(folder.work() / kEqualized);
    }
    const Checkpoint& model = equalized ? *equalized : original;
    const fs::path rounded = tunes ? folder.work() / kRounded : folder.work();
    fs::create_directories(rounded);
    const fs::path allocated = folder.work() / kAllocation;
    allocation = done.value("bits", Json());  // of a run that had ended but for the rename
    if (allocation.is_null() && fs::exists(allocated)) allocation = read_json(allocated);
    for (const Json& row : allocation)
      for (TensorPlan& tensor : tensors)
        if (tensor.spec.name == row.at("name"))
          tensor.codec = tensor.asked = Codec::parse(row.at("codec").get<std::string>(), allocated.string());
    if (linears.is_null()) {
      TokenWeights sensitivity;
      if (options.get<bool>("fisher") || (allocates(options) && allocation.is_null()))
        sensitivity = fisher_weights(model, windows, context.seed, options.get<std::string>("device"), context.threads,
                                     context);
      if (allocates(options) && allocation.is_null()) {
        const auto given = [&](const char* name) {
          return options.has(name) ? std::optional<double>(options.get<double>(name)) : std::nullopt;
        };
        allocation = allocate_bits({model, windows, sensitivity, given("bits"), given("kl"),
                                    options.get<std::string>("device"), context.threads, spill ? folder.work() : fs::path()},
                                   free_linears(options, tensors),
                                   tensors, context);
        write_text(allocated, allocation.dump(1) + "\n");
      }
      CheckpointWriter writer(rounded, original.config(), dtype);
      const QuantizeJob job{model,
                            tensors,
                            writer,
                            folder.work() / kRows,
                            method_of(options),
                            std::move(windows),
                            options.get<double>("damping"),
                            options.get<int>("polish"),
                            options.get<std::string>("device"),
                            context.threads,
                            options.get<std::int64_t>("expert-tokens"),
                            spill ? folder.work() : fs::path(),
                            options.get<bool>("retarget"),
                            options.get<std::int64_t>("paired-tokens"),
                            options.get<bool>("fisher") ? &sensitivity : nullptr,
                            sparsity_of(options)};
      quantize_layers(job, context);
      linears = collect_rows(original.config(), job.rows);
      if (tunes) {
        writer.finish();
        manifest["linears"] = linears;
        write_text(folder.work() / kManifest, manifest.dump(1) + "\n");
      }
    }
    CheckpointWriter writer(folder.work(), original.config(), dtype);
    if (tunes && tuned.is_null()) {
      const Checkpoint codes(rounded);
      const TuneResult result =
          tune({model, codes, tensors, std::move(tuning.first), std::move(tuning.second), tuning_of(options), dtype,
                options.get<std::string>("device"), context.threads, folder.work() / kTuneState},
               writer, context);
      tuned = {{"kl_before", result.kl_before},
               {"kl_after", result.kl_after},
               {"improved", result.improved},
               {"codes_moved", result.codes_moved}};
    }
    writer.copy_side_files(original.folder());
    writer.finish();
    manifest["linears"] = linears;
    if (tunes) manifest["tuned"] = tuned;
    if (!allocation.is_null()) manifest["bits"] = allocation;
    if (!scaled.is_null()) manifest["scaled"] = scaled;
    write_text(folder.work() / kManifest, manifest.dump(1) + "\n");
    fs::remove_all(folder.work() / kRows);
    fs::remove_all(folder.work() / kRounded);
    fs::remove(folder.work() / kTuneState);
    fs::remove_all(folder.work() / kEqualized);
    fs::remove_all(folder.work() / kEqualizedRows);
    fs::remove(folder.work() / kAllocation);
  } catch (const Error& error) {
    // A refusal leaves nothing behind, an interruption or a full disk what can be resumed.
    if (fresh && (error.code() == ExitCode::kInput || error.code() == ExitCode::kUsage)) folder.discard();
    throw;
  }
  Json summary = report(options, original.config(), tensors, dtype, linears, context);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (!allocation.is_null()) {
    summary["bits"] = allocation;
    std::map<std::string, std::pair<double, int>> kinds;  // where the bits went
    for (const Json& row : allocation) {
      const auto name = row.at("name").get<std::string>();
      const std::size_t dot = name.find('.', std::string_view("model.layers.").size());
      auto& [bits, count] = kinds[name.substr(dot + 1, name.rfind('.') - dot - 1)];
      bits += row.at("bits").get<double>();
      ++count;
    }
    for (const auto& [kind, sum] : kinds)
      context.report.add({"quantize", "bits " + kind, {}, sum.first / sum.second, "mean of its layers", {}});
  }
  if (!scaled.is_null()) summary["scaled"] = equalize_report(scaled, context.report);
  if (!tuned.is_null()) {
    context.report.add({"quantize", "tuning_kl", tuned.at("kl_before").get<double>(), tuned.at("kl_after").get<double>(),
                        "nats/token", {}});
    summary["tuned"] = tuned;
  }
  context.report.add({"quantize", "seconds", {}, seconds, "s", {}, false});
  write_model_card(folder.work(), {original.folder(), command_of("quantize", options), context.report, {}});
  if (context.before_commit) context.before_commit();
  folder.commit();
  summary["seconds"] = seconds;
  summary["linears"] = linears;
  summary["out"] = options.get<std::string>("out");
  context.print(context.report.table());
  return summary;
}

}  // namespace

Command quantize_command() {
  Command command;
  command.name = "quantize";
  command.summary = "Round the weights to 2, 3, 4 or 8 bits with GPTQ or searched scales";
  command.example = "pare quantize --model DIR --out DIR --codec q4 --text train.txt";
  command.is_stage = true;
  command.options = quantize_options();
  command.run = run;
  command.plan = plan;
  return calibrated_by_ranks(std::move(command));
}

}  // namespace pare
