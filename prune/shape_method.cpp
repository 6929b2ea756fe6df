// A smaller model of the same kind: fewer blocks, heads, neurons, channels and experts.
#include <algorithm>
#include <iterator>

#include "core/error.h"
#include "prune/cutter.h"
#include "prune/depth.h"
#include "prune/search.h"
#include "runtime/export_size.h"

namespace pare {
namespace {

constexpr double kDefaultDamping = 0.01;

RankBy rank_by(const Options& options) {
  const auto name = options.get_or<std::string>("rank-by", "measured");
  return name == "weights" ? RankBy::kWeights : name == "random" ? RankBy::kRandom : RankBy::kMeasured;
}

constexpr const char* kBudgets[] = {"max-params", "max-bytes", "min-tokens-per-second"};

bool per_layer(const Options& options) { return options.get<bool>("per-layer"); }

// What the compact file holds beside its tensors. Of the model's own: the file of a smaller one has no more.
double bytes_beside(const ModelConfig& config, const StoredAs& stored, const fs::path& folder) {
  if (stored.linear.is_float()) return 0;
  std::vector<CompactWriter::Plan> tensors;
  for (const TensorSpec& spec : expected_tensors(config)) tensors.push_back({spec.name, stored.of(spec), spec.shape});
  return static_cast<double>(compact_bytes_beside(folder, config, tensors));
}

// dtype: in which the folder is written.
std::optional<Budget> budget_of(const ModelConfig& config, const Options& options, const std::string& dtype) {
  std::string given;
  int budgets = 0;
  for (const char* name : kBudgets)
    if (options.has(name)) {
      given = name;
      ++budgets;
    }
  if (budgets > 1)
    throw usage_error("--method shape", "one of --max-params, --max-bytes and --min-tokens-per-second",
                      std::to_string(budgets) + " of them");
  if (options.has("codec") && (budgets == 0 || given == "max-params"))
    throw usage_error("--method shape", "--codec with --max-bytes or --min-tokens-per-second, which it is for",
                      "--codec without them", "prune writes floats; quantize has the codecs");
  if (budgets == 0) return std::nullopt;
  for (const char* axis : {"layers", "heads", "kv-heads", "ffn", "hidden", "experts"})
    if (options.has(axis))
      throw usage_error("--method shape", "--" + given + ", which searches the shape, or a shape",
                        "--" + given + " and --" + axis);
  Budget budget;
  budget.stored = stored_as(options.get_or<std::string>("codec", ""), dtype);
  if (given == "max-params") {
    budget.limit = static_cast<double>(options.get<std::int64_t>("max-params"));
  } else if (given == "max-bytes") {
    budget.unit = Unit::kBytes;
    budget.limit = static_cast<double>(parse_bytes(options.get<std::string>("max-bytes"), "--max-bytes"));
    budget.stored.beside = bytes_beside(config, budget.stored, options.get<std::string>("model"));
  } else {
    budget.unit = Unit::kSeconds;
    budget.limit = 1 / options.get<double>("min-tokens-per-second");
  }
  return budget;
}

// What is known of the result in advance: of a search the most expensive shape that it may find; of a speed, which is
// measured when it runs, and of blocks that may differ, the model's own.
Shape planned_shape(const ModelConfig& config, const Options& options, const std::string& dtype) {
  if (!config.layer_widths.empty())
    throw usage_error("--method shape", "a model whose blocks are all alike",
                      "blocks of different widths (" + width_keys(config) + ")",
                      "cut the original instead, or zero weights with another method");
  const auto budget = budget_of(config, options, dtype);
  if (!budget) {
    const Shape shape = asked_shape(config, options);
    if (per_layer(options)) {
      check_per_layer(config, shape);
      refuse_means(config, shape, multiple_of(options));
    }
    return shape;
  }
  if (budget->unit == Unit::kSeconds) return shape_of(config);
  ShapeCosts costs(config, budget->unit, budget->stored);
  if (!per_layer(options)) return shapes_within(config, multiple_of(options), *budget, costs).front();
  refuse_widths(config, multiple_of(options), *budget, costs);
  return shape_of(config);
}

bool refits(const Options& options) { return !options.get<bool>("no-correction"); }

ModelConfig result(const ModelConfig& config, const Options& options, const std::string& dtype) {
  return cut_config(config, planned_shape(config, options, dtype));
}

// What was chosen; a config.json that no other program reads is announced.
void report_shape(PruneJob& job, const CutPlan& plan) {
  const Checkpoint written(job.work);
  const ModelConfig& config = written.config();
  const Shape own = shape_of(job.model.config()), made = shape_of(config);
  for (const auto& [what, part] : {std::pair{"blocks", &Shape::layers},
                                   {"heads", &Shape::heads},
                                   {"heads of keys and values", &Shape::kv_heads},
                                   {"neurons", &Shape::ffn},
                                   {"channels", &Shape::hidden},
                                   {"experts", &Shape::experts}}) {
    const bool of_each_block = !plan.widths.empty() && part != &Shape::layers && part != &Shape::hidden;
    if (own.*part == made.*part || of_each_block) continue;
    job.context.report.add({"prune", what, static_cast<double>(own.*part), static_cast<double>(made.*part), "",
                            std::nullopt});
  }
  for (int layer = 0; layer < config.num_layers && !plan.widths.empty(); ++layer) {
    const BlockWidths widths = config.widths(layer);
    const std::string block = " of block " + std::to_string(plan.layers[static_cast<std::size_t>(layer)]);
    const auto row = [&](const std::string& what, std::int64_t before, std::int64_t after) {
      job.context.report.add({"prune", what + block, static_cast<double>(before), static_cast<double>(after), "",
                              std::nullopt});
    };
    row("heads of keys and values", job.model.config().num_kv_heads, widths.kv_heads);
    row("neurons", job.model.config().intermediate_size, widths.inner);
  }
  if (!config.layer_widths.empty()) job.context.progress->note(own_widths_note(config));
}

void run(PruneJob& job) {
  const ModelConfig& config = job.model.config();
  for (const TensorSpec& spec : job.model.tensors()) {  // a NaN would make every cost NaN
    read_finite(job.model, spec.name);
    job.model.release(spec.name);
  }
  CutPlan plan;
  plan.rank = rank_by(job.options);
  plan.refit = refits(job.options);
  plan.damping = job.options.get_or<double>("damping", kDefaultDamping);
  const std::int64_t multiple = multiple_of(job.options);
  if (const auto budget = budget_of(config, job.options, job.dtype)) {
    const DecodeTimes times = decode_times(job, *budget);
    if (per_layer(job.options)) search_widths(job, plan, multiple, *budget, times);
    else search_shape(job, plan, multiple, *budget, times);
  } else {
    plan.shape = asked_shape(config, job.options);
  }
  choose_globals(job, plan);
  if (per_layer(job.options) && plan.widths.empty()) spread_widths(job, plan, multiple);
  write_cut(job, plan);
  report_shape(job, plan);
}

bool searches(const Options& options) {
  return std::any_of(std::begin(kBudgets), std::end(kBudgets), [&](const char* name) { return options.has(name); });
}

ScoreLevels planned_levels(const ModelConfig& config, const Options& options, const Shape& shape) {
  const bool all = searches(options);
  return score_levels(config, multiple_of(options), all || shape.ffn < config.intermediate_size,
                      all || shape.kv_heads < config.num_kv_heads, all);
}

std::uint64_t peak(const ModelConfig& config, const Options& options, const std::string& dtype,
                   const fs::path& spill) {
  Shape shape = planned_shape(config, options, dtype);
  if (searches(options)) {  // trials are of every shape between
    shape = shape_of(config);
    shape.layers = 1;
  }
  const auto samples = options.get<std::int64_t>("samples"), length = window_length(config, options);
  std::uint64_t bytes = cut_peak_bytes(config, shape, samples, length, refits(options), spill);
  if (per_layer(options))
    bytes = std::max(bytes, scores_peak_bytes(config, planned_levels(config, options, shape), samples, length,
                                              refits(options), spill));
  if (options.has("min-tokens-per-second")) {  // a file of the model as stored, mapped, and its largest tensor in floats
    ShapeCosts costs(config, Unit::kBytes, budget_of(config, options, dtype)->stored);
    bytes = std::max(bytes, static_cast<std::uint64_t>(costs.of(config)) +
                                8 * static_cast<std::uint64_t>(config.vocab_size * config.hidden_size));
  }
  return shape.layers < config.num_layers ? std::max(bytes, choose_blocks_peak_bytes(config, samples, length)) : bytes;
}

double passes(const ModelConfig& config, const Options& options, const std::string& dtype) {
  const Shape shape = planned_shape(config, options, dtype);
  const double cut = cut_passes(config, shape, refits(options));
  if (!searches(options)) {
    const double depth = choose_blocks_passes(config, shape.layers);
    return depth + cut + (per_layer(options) ? scores_passes(config, planned_levels(config, options, shape), shape.layers)
                                             : 0);
  }
  if (per_layer(options))
    return scores_passes(config, planned_levels(config, options, shape), config.num_layers) + 3 * (cut + 3);
  return choose_blocks_passes(config, (config.num_layers + 1) / 2) + cut +
         search_passes(config, multiple_of(options), refits(options));
}

}  // namespace

std::string own_widths_note(const ModelConfig& config) {
  return "blocks of different widths: " + width_keys(config) + " of config.json has a number for each block, which " +
         "pare reads and transformers does not read for this family";
}

void choose_globals(PruneJob& job, CutPlan& plan) {
  const int layers = static_cast<int>(plan.shape.layers);
  if (plan.layers.empty())
    plan.layers = plan.rank == RankBy::kMeasured ? choose_blocks(job, layers, plan.report)
                                                 : choose_blocks_unmeasured(job, layers, plan.rank);
  plan.channels = choose_channels(job, plan.layers, plan.shape.hidden, plan.rank);
}

PruneMethod shape_method() {
  return {"shape",
          "fewer blocks, heads, MLP neurons, channels or experts: a smaller model of the same kind",
          true,
          {},
          {"layers", "heads", "kv-heads", "ffn", "hidden", "experts", "max-params", "max-bytes",
           "min-tokens-per-second", "codec", "per-layer", "multiple-of", "rank-by",
           "no-correction", "damping"},
          result,
          run,
          peak,
          passes};
}

}  // namespace pare
