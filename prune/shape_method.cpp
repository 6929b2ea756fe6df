// A smaller model of the same kind: fewer blocks, heads, neurons, channels and experts.
#include "core/error.h"
#include "prune/cutter.h"
#include "prune/depth.h"
#include "prune/search.h"

namespace pare {
namespace {

constexpr double kDefaultDamping = 0.01;

RankBy rank_by(const Options& options) {
  const auto name = options.get_or<std::string>("rank-by", "measured");
  return name == "weights" ? RankBy::kWeights : name == "random" ? RankBy::kRandom : RankBy::kMeasured;
}

std::optional<std::int64_t> budget_of(const Options& options) {
  if (!options.has("max-params")) return std::nullopt;
  for (const char* axis : {"layers", "heads", "kv-heads", "ffn", "hidden", "experts"})
    if (options.has(axis))
      throw usage_error("--method shape", "--max-params, which searches the shape, or a shape",
                        "--max-params and --" + std::string(axis));
  return options.get<std::int64_t>("max-params");
}

// What is known of it in advance: of a search the largest shape that it may find.
Shape planned_shape(const ModelConfig& config, const Options& options) {
  const auto budget = budget_of(options);
  return budget ? shapes_within(config, multiple_of(options), *budget).front() : asked_shape(config, options);
}

bool refits(const Options& options) { return !options.get<bool>("no-correction"); }

ModelConfig result(const ModelConfig& config, const Options& options) {
  return cut_config(config, planned_shape(config, options));
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
  const auto budget = budget_of(job.options);
  plan.shape = budget ? search_shape(job, plan, multiple_of(job.options), *budget) : asked_shape(config, job.options);
  choose_globals(job, plan);
  write_cut(job, plan);
}

std::uint64_t peak(const ModelConfig& config, const Options& options, const fs::path& spill) {
  Shape shape = planned_shape(config, options);
  if (options.has("max-params")) {  // trials are of every shape between
    shape = shape_of(config);
    shape.layers = 1;
  }
  const auto samples = options.get<std::int64_t>("samples"), length = window_length(config, options);
  const std::uint64_t cut = cut_peak_bytes(config, shape, samples, length, refits(options), spill);
  return shape.layers < config.num_layers ? std::max(cut, choose_blocks_peak_bytes(config, samples, length)) : cut;
}

double passes(const ModelConfig& config, const Options& options) {
  const Shape shape = planned_shape(config, options);
  if (options.has("max-params"))
    return choose_blocks_passes(config, (config.num_layers + 1) / 2) + cut_passes(config, shape, refits(options)) +
           search_passes(config, multiple_of(options), refits(options));
  return choose_blocks_passes(config, shape.layers) + cut_passes(config, shape, refits(options));
}

}  // namespace

void choose_globals(PruneJob& job, CutPlan& plan) {
  const int layers = static_cast<int>(plan.shape.layers);
  plan.layers = plan.rank == RankBy::kMeasured ? choose_blocks(job, layers, plan.report)
                                               : choose_blocks_unmeasured(job, layers, plan.rank);
  plan.channels = choose_channels(job, plan.layers, plan.shape.hidden, plan.rank);
}

PruneMethod shape_method() {
  return {"shape",
          "fewer blocks, heads, MLP neurons, channels or experts: a smaller model of the same kind",
          true,
          {},
          {"layers", "heads", "kv-heads", "ffn", "hidden", "experts", "max-params", "multiple-of", "rank-by",
           "no-correction", "damping"},
          result,
          run,
          peak,
          passes};
}

}  // namespace pare
