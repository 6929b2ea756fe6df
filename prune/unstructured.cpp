// Zeros inside matrices that keep their shape: magnitude, Wanda, SparseGPT and, as the null, random choice; what the
// weights that stay take over; and how much each block loses.
#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <optional>

#include "core/error.h"
#include "prune/allocation.h"
#include "prune/masks.h"
#include "prune/method.h"
#include "prune/reconstruct.h"
#include "prune/sparsegpt.h"

namespace pare {
namespace {

constexpr double kDefaultDamping = 0.01;

enum class Criterion { kMagnitude, kWanda, kRandom, kSparseGpt };

struct MaskSettings {
  Criterion criterion;
  Sparsity sparsity;  // of all linears together
  bool refit = false, owl = false;
  double damping = kDefaultDamping;

  // Second moments of the inputs are needed.
  bool hessian() const { return refit || criterion == Criterion::kSparseGpt; }
  // What is masked depends on the inputs, or weights that stay do.
  bool walks() const { return hessian() || owl || criterion == Criterion::kWanda; }
};

MaskSettings settings_of(Criterion criterion, const Options& options) {
  return {criterion,
          options.has("pattern") ? Sparsity::pattern(options.get<std::string>("pattern"), "--pattern")
                                 : Sparsity{options.get<double>("sparsity")},
          options.get<bool>("reconstruct"), options.get_or<std::string>("allocation", "uniform") == "owl",
          options.get_or<double>("damping", kDefaultDamping)};
}

bool is_masked(const TensorSpec& spec) { return spec.role == TensorRole::kLinear && spec.layer >= 0; }

template <Criterion criterion>
ModelConfig same_shape(const ModelConfig& config, const Options& options, const std::string&) {
  const MaskSettings settings = settings_of(criterion, options);
  const Sparsity& sparsity = settings.sparsity;
  if (settings.owl && sparsity.n_of_m())
    throw usage_error("--allocation owl", "--sparsity, which blocks can share out", "--pattern " + sparsity.name());
  if (settings.owl && config.has_experts())
    throw usage_error("--allocation owl", "a model without experts", std::to_string(config.experts.count) + " experts",
                      "what an expert reads counts by how often it is chosen, which would decide");
  if (options.has("damping") && !settings.hessian())
    throw usage_error("--damping", "--reconstruct or --method sparsegpt", "neither", "it has no use here");
  for (const TensorSpec& spec : expected_tensors(config)) {
    if (!is_masked(spec)) continue;
    if (sparsity.n_of_m() && spec.shape[1] % sparsity.of != 0)
      throw usage_error("--pattern", "a pattern whose M divides the " + std::to_string(spec.shape[1]) + " inputs of " +
                                         spec.name, sparsity.name(), "use --sparsity instead");
    if (sparsity.removed(spec.shape[1]) == 0)
      throw usage_error("--sparsity", "a fraction that removes at least one of the " + std::to_string(spec.shape[1]) +
                                          " inputs of " + spec.name, std::to_string(sparsity.fraction));
  }
  return config;
}

// Puts one block, or of it one expert: `pruned` weights where there are some, everything else as it is.
void put_piece(const PruneJob& job, CheckpointWriter& writer, int layer, std::int64_t expert,
               const std::map<std::string, std::vector<float>>& pruned) {
  writer.begin_piece(expert < 0 ? block_piece(layer) : expert_piece(layer, expert));
  for (const TensorSpec& spec : job.model.tensors()) {
    if (spec.layer != layer || spec.expert != expert) continue;
    const auto found = pruned.find(spec.name);
    if (found != pruned.end()) writer.put(spec.name, found->second.data());
    else writer.put(spec.name, read_finite(job.model, spec.name).data());
    job.model.release(spec.name);
  }
  writer.end_piece();
}

// By weights alone, or by chance. Magnitude competes inside the whole tensor (the baseline of the Wanda paper), random
// inside each row as Wanda does.
std::vector<std::uint8_t> mask_of(Criterion criterion, const float* weights, const std::string& name,
                                  std::int64_t rows, std::int64_t cols, const double* mean_square, std::uint64_t seed,
                                  const Sparsity& sparsity) {
  const bool magnitude = criterion == Criterion::kMagnitude;
  const auto scores = magnitude                          ? magnitude_scores(weights, rows, cols)
                      : criterion == Criterion::kRandom ? random_scores(seed, name, rows, cols)
                                                        : wanda_scores(weights, mean_square, rows, cols);
  check_finite(scores.data(), scores.size(), name + " (scores)");
  return keep_mask(scores.data(), rows, cols, sparsity, magnitude ? Scope::kTensor : Scope::kRow);
}

void run_without_text(PruneJob& job, const MaskSettings& settings, CheckpointWriter& writer) {
  const int layers = static_cast<int>(job.model.config().num_layers);
  job.context.progress->begin("prune", layers);
  for (int layer = 0; layer < layers; ++layer) {
    throw_if_interrupted("prune", "run the same command again");
    const std::int64_t experts = job.model.config().experts.count;
    // The experts first: the block's own piece says that all of it is there.
    for (std::int64_t expert = experts - 1; expert >= -1; --expert) {
      if (writer.has_piece(block_piece(layer))) break;
      if (expert >= 0 && writer.has_piece(expert_piece(layer, expert))) continue;
      std::map<std::string, std::vector<float>> pruned;
      for (const TensorSpec& spec : job.model.tensors()) {
        if (spec.layer != layer || !is_masked(spec) || spec.expert != expert) continue;
        std::vector<float> weights = read_finite(job.model, spec.name);
        apply_mask(mask_of(settings.criterion, weights.data(), spec.name, spec.shape[0], spec.shape[1], nullptr,
                           job.context.seed, settings.sparsity),
                   weights.data());
        pruned.emplace(spec.name, std::move(weights));
      }
      put_piece(job, writer, layer, expert, pruned);
    }
    job.context.progress->update(layer + 1);
  }
  job.context.progress->end();
}

double total(const std::vector<double>& values) { return std::accumulate(values.begin(), values.end(), 0.0); }

// Weights of one linear, of each row the best that was offered by E |W x - W' x|^2; as they are stored.
class BestRows {
 public:
  BestRows(const BlockLinear& linear, const SquareMatrix& hessian, std::vector<float> start, int threads)
      : linear_(linear), hessian_(hessian), threads_(threads), weight_(std::move(start)), errors_(errors(weight_)) {}

  void offer(const std::vector<float>& candidate) {
    const std::vector<double> own = errors(candidate);
    for (std::int64_t r = 0; r < linear_.rows; ++r) {
      const auto at = static_cast<std::size_t>(r);
      if (!(own[at] < errors_[at])) continue;
      errors_[at] = own[at];
      std::copy_n(candidate.begin() + r * linear_.cols, linear_.cols, weight_.begin() + r * linear_.cols);
    }
  }
  const std::vector<float>& weight() const { return weight_; }
  double error() const { return total(errors_); }
  // Of an output that is 0.
  double energy() const { return total(errors(std::vector<float>(weight_.size(), 0.0f))); }

 private:
  std::vector<double> errors(const std::vector<float>& candidate) const {
    return hessian_.visit([&](const auto* hessian) {
      return row_errors(linear_.original.data(), candidate.data(), linear_.rows, linear_.cols, hessian, threads_);
    });
  }

  const BlockLinear& linear_;
  const SquareMatrix& hessian_;
  int threads_;
  std::vector<float> weight_;
  std::vector<double> errors_;
};

// Masks a block's linears from the inputs they see in the stream that is pruned so far.
class MaskVisitor : public BlockVisitor {
 public:
  MaskVisitor(PruneJob& job, CheckpointWriter& writer, const MaskSettings& settings,
              std::map<std::string, Sparsity> sparsities)
      : job_(job), writer_(writer), settings_(settings), sparsities_(std::move(sparsities)) {}

  bool finished(int layer) override { return writer_.has_piece(block_piece(layer)); }

  void restore(int layer, std::span<BlockLinear> linears) override {
    for (BlockLinear& linear : linears) writer_.read_f32(linear.name, linear.weight.data());
  }

  void begin_block(int layer) override { errors_ = {}; }

  void compress(int layer, BlockStage stage, std::span<BlockLinear> linears, const InputStatistics& input) override {
    std::optional<SweepFactor> factor;
    for (BlockLinear& linear : linears) {
      throw_if_interrupted(linear.name, "the same command continues with this block");
      check_finite(linear.original.data(), linear.original.size(), linear.name);
      const Sparsity& sparsity = sparsities_.at(linear.name);
      const float* original = linear.original.data();
      SparseWeights pruned;
      if (settings_.criterion == Criterion::kSparseGpt) {
        if (!factor)
          factor = factor_hessian(input.hessian, input.columns, {settings_.damping, false}, "inputs of " + linear.name,
                                  job_.context.threads);
        pruned = sparsegpt(original, linear.rows, *factor, sparsity, job_.context.threads);
      } else {
        pruned.keep = mask_of(settings_.criterion, original, linear.name, linear.rows, linear.cols,
                              input.mean_square.data(), job_.context.seed, sparsity);
      }
      std::vector<float> weights(linear.original.begin(), linear.original.end());
      apply_mask(pruned.keep, weights.data());
      round_to(job_.dtype, weights);
      if (settings_.hessian()) weights = improved(linear, input.hessian, pruned, std::move(weights));
      check_finite(weights.data(), weights.size(), linear.name + " (pruned)");
      std::copy(weights.begin(), weights.end(), linear.weight.begin());
      pruned_[linear.expert][linear.name] = std::move(weights);
    }
  }

  void routed(int layer, std::span<const std::int64_t> tokens) override {
    job_.context.report.add({"prune", "fewest tokens of an expert, block " + std::to_string(layer), std::nullopt,
                             static_cast<double>(*std::min_element(tokens.begin(), tokens.end())),
                             expert_summary(tokens, kExpertTokens), std::nullopt});
  }

  void end_expert(int layer, std::int64_t expert) override { put(layer, expert); }

  void end_block(int layer, double drift) override {
    if (settings_.hessian()) {
      const fs::path file = job_.state / (block_piece(layer) + ".errors");
      if (!finished(layer)) write_text(file, Json({errors_.before, errors_.after, errors_.energy}).dump());
      const auto errors = read_json(file).get<std::vector<double>>();
      const double energy = std::max(errors.at(2), std::numeric_limits<double>::min());
      job_.context.report.add({"prune", "output error of block " + std::to_string(layer) + " by refitting",
                               errors[0] / energy, errors[1] / energy, "of its energy", std::nullopt});
    }
    if (!finished(layer)) put(layer, -1);
    job_.context.report.add({"prune", "drift after block " + std::to_string(layer), std::nullopt, drift, "relative",
                             std::nullopt});
  }

 private:
  struct Errors {
    double before = 0, after = 0, energy = 0;  // summed over the block's linears
  };

  // What the weights that stay become: by the sweep, by least squares, of each row the best.
  std::vector<float> improved(const BlockLinear& linear, const SquareMatrix& hessian, const SparseWeights& pruned,
                              std::vector<float> masked) {
    BestRows best(linear, hessian, std::move(masked), job_.context.threads);
    const double before = best.error();
    const auto offer = [&](std::vector<float> candidate) {
      round_to(job_.dtype, candidate);
      best.offer(candidate);
    };
    if (!pruned.weight.empty()) offer(pruned.weight);
    if (settings_.refit) {
      std::vector<float> fitted = best.weight();
      hessian.visit([&](const auto* values) {
        refit_support(linear.original.data(), pruned.keep.data(), linear.rows, linear.cols, values, settings_.damping,
                      RefitLimits{}, fitted.data(), job_.context.threads);
      });
      offer(std::move(fitted));
    }
    if (before > 0 && !(best.error() < before))
      throw failure(linear.name, "weights that make up for some of those that went",
                    "none of " + std::to_string(linear.rows) + " rows improved", "more calibration text");
    errors_.before += before;
    errors_.after += best.error();
    errors_.energy += best.energy();
    return best.weight();
  }

  void put(int layer, std::int64_t expert) {
    put_piece(job_, writer_, layer, expert, pruned_[expert]);
    pruned_.erase(expert);
  }

  PruneJob& job_;
  CheckpointWriter& writer_;
  MaskSettings settings_;
  std::map<std::string, Sparsity> sparsities_;
  std::map<std::int64_t, std::map<std::string, std::vector<float>>> pruned_;  // by expert, -1: of the whole block
  Errors errors_;
};

// Share of each block's |W_ij| sqrt(E[x_j^2]) above kOutlierFactor times their mean, in the original model.
class OutlierVisitor : public BlockVisitor {
 public:
  explicit OutlierVisitor(const PruneJob& job) : job_(job) {}

  void begin_block(int layer) override { inputs_.clear(); }
  void compress(int layer, BlockStage stage, std::span<BlockLinear> linears, const InputStatistics& input) override {
    for (const BlockLinear& linear : linears)
      inputs_.push_back({linear.name, linear.rows, linear.cols, input.mean_square});
  }
  void end_block(int layer, double drift) override {
    double sum = 0, count = 0, above = 0;
    const auto each_score = [&](const auto& work) {
      for (const Linear& linear : inputs_) {
        const auto weights = read_finite(job_.model, linear.name);
        for (const float score : wanda_scores(weights.data(), linear.mean_square.data(), linear.rows, linear.cols))
          work(static_cast<double>(score));
        job_.model.release(linear.name);
      }
    };
    each_score([&](double score) {
      sum += score;
      count += 1;
    });
    each_score([&](double score) { above += score > kOutlierFactor * sum / count ? 1 : 0; });
    shares.push_back(above / count);
  }

  std::vector<double> shares;

 private:
  struct Linear {
    std::string name;
    std::int64_t rows, cols;
    std::vector<double> mean_square;
  };
  const PruneJob& job_;
  std::vector<Linear> inputs_;
};

WalkOptions walk_options(const MaskSettings& settings, const Options& options, const fs::path& spill) {
  WalkOptions walk;
  walk.device = options.get<std::string>("device");
  walk.hessian = settings.hessian();
  walk.spill = spill;
  return walk;
}

// Measured once: a run that continues finds them in the state folder.
std::vector<double> outlier_shares(PruneJob& job, WalkOptions walk) {
  const fs::path file = job.state / "outliers.json";
  if (!fs::exists(file)) {
    walk.hessian = walk.original_stream = false;
    OutlierVisitor visitor(job);
    walk_blocks(job.model, job.windows, walk, job.context, visitor);
    write_text(file, Json(visitor.shares).dump());
  }
  return read_json(file).get<std::vector<double>>();
}

// What each linear loses.
std::map<std::string, Sparsity> plan_sparsities(PruneJob& job, const MaskSettings& settings, const WalkOptions& walk) {
  std::vector<std::string> names;
  std::vector<std::int64_t> sizes, block_sizes(static_cast<std::size_t>(job.model.config().num_layers));
  std::vector<std::size_t> blocks;
  for (const TensorSpec& spec : job.model.tensors()) {
    if (!is_masked(spec)) continue;
    names.push_back(spec.name);
    sizes.push_back(spec.shape[0] * spec.shape[1]);
    blocks.push_back(static_cast<std::size_t>(spec.layer));
    block_sizes[blocks.back()] += sizes.back();
  }
  std::map<std::string, Sparsity> plan;
  for (const std::string& name : names) plan[name] = settings.sparsity;
  if (!settings.owl) return plan;
  const std::vector<double> shares = outlier_shares(job, walk),
                            of_blocks = owl_sparsities(shares, block_sizes, settings.sparsity.fraction);
  std::vector<double> sparsities;
  for (const std::size_t block : blocks) sparsities.push_back(of_blocks[block]);
  const std::int64_t all = std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0});
  const std::vector<std::int64_t> counts = whole_weights(sparsities, sizes, settings.sparsity.removed(all));
  for (std::size_t i = 0; i < names.size(); ++i) plan[names[i]].weights = counts[i];
  for (std::size_t block = 0; block < shares.size(); ++block) {
    job.context.report.add({"prune", "outliers of block " + std::to_string(block), std::nullopt, shares[block],
                            "fraction", std::nullopt});
    job.context.report.add({"prune", "sparsity of block " + std::to_string(block), settings.sparsity.fraction,
                            of_blocks[block], "fraction", std::nullopt});
  }
  return plan;
}

template <Criterion criterion>
void run(PruneJob& job) {
  const MaskSettings settings = settings_of(criterion, job.options);
  CheckpointWriter writer(job.work, job.model.config(), job.dtype);
  if (settings.walks()) {
    WalkOptions walk = walk_options(settings, job.options, job.spill);
    walk.threads = job.context.threads;
    MaskVisitor visitor(job, writer, settings, plan_sparsities(job, settings, walk));
    walk_blocks(job.model, job.windows, walk, job.context, visitor);
  } else {
    run_without_text(job, settings, writer);
  }
  copy_outer_tensors(job, writer);
  writer.copy_side_files(job.model.folder());
  writer.finish();
}

template <Criterion criterion>
std::uint64_t peak(const ModelConfig& config, const Options& options, const std::string&, const fs::path& spill) {
  const MaskSettings settings = settings_of(criterion, options);
  if (!settings.walks()) return 4 * block_bytes(config);  // original, pruned copy and scores of one block
  std::uint64_t linear = 0, square = 0, refit = 0;
  for (const TensorSpec& spec : expected_tensors(config)) {
    if (!is_masked(spec) || (spec.layer > 0 && config.layer_widths.empty())) continue;
    const auto cols = static_cast<std::uint64_t>(spec.shape[1]);
    linear = std::max(linear, static_cast<std::uint64_t>(spec.shape[0]) * cols);
    square = std::max(square, cols * cols * (spec.shape[1] > kWidestDouble ? 4 : 8));
    if (settings.refit) refit = std::max(refit, refit_support_bytes(spec.shape[1], 0));
  }
  // Beside the walk: the block as pruned; scores, mask and weights of one matrix on their way; the factor; the refit.
  return walk_peak_bytes(config, options.get<std::int64_t>("samples"), window_length(config, options),
                         walk_options(settings, options, spill)) +
         block_bytes(config) + linear * (settings.hessian() ? 21 : 13) + refit +
         (criterion == Criterion::kSparseGpt ? square : 0);
}

template <Criterion criterion>
double passes(const ModelConfig& config, const Options& options, const std::string&) {
  const MaskSettings settings = settings_of(criterion, options);
  if (!settings.walks()) return 0;
  // Original, statistics, compressed; for outliers the original's statistics and the original.
  const double walks = 3 + (settings.owl ? 2 : 0);
  if (!settings.hessian()) return walks;
  // A product with H is worth `inputs` tokens: second moments, errors, the sweep, some steps of the refit.
  const double inputs = static_cast<double>(std::max(config.hidden_size, config.intermediate_size));
  const auto tokens = static_cast<double>(options.get<std::int64_t>("samples") * window_length(config, options));
  const double products = 3 + (criterion == Criterion::kSparseGpt ? 1 : 0) + (settings.refit ? 30 : 0);
  return walks + 1 + products * inputs / tokens;
}

template <Criterion criterion>
PruneMethod mask_method(const std::string& name, const std::string& summary) {
  const bool text = criterion == Criterion::kWanda || criterion == Criterion::kSparseGpt;
  return {name,
          summary,
          text,
          {"sparsity", "pattern"},
          {"reconstruct", "allocation", "damping"},
          same_shape<criterion>,
          run<criterion>,
          peak<criterion>,
          passes<criterion>};
}

}  // namespace

PruneMethod magnitude_method() {
  return mask_method<Criterion::kMagnitude>("magnitude", "zero the smallest weights of each matrix");
}
PruneMethod wanda_method() {
  return mask_method<Criterion::kWanda>("wanda", "zero the weights with the smallest |w| * input norm of each row");
}
PruneMethod sparsegpt_method() {
  return mask_method<Criterion::kSparseGpt>(
      "sparsegpt", "zero weights column by column, those after them make up for it");
}
PruneMethod random_method() {
  return mask_method<Criterion::kRandom>("random", "zero weights of each row at random: the null to compare with");
}

}  // namespace pare
