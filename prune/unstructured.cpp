// Zeros inside matrices that keep their shape: magnitude, Wanda and, as the null, random choice.
#include <algorithm>
#include <map>

#include "core/error.h"
#include "prune/masks.h"
#include "prune/method.h"

namespace pare {
namespace {

Sparsity sparsity_of(const Options& options) {
  if (options.has("pattern")) return Sparsity::pattern(options.get<std::string>("pattern"), "--pattern");
  return Sparsity{options.get<double>("sparsity")};
}

ModelConfig same_shape(const ModelConfig& config, const Options& options) {
  const Sparsity sparsity = sparsity_of(options);
  for (const TensorSpec& spec : expected_tensors(config)) {
    if (spec.role != TensorRole::kLinear || spec.layer < 0) continue;
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

// Magnitude competes inside the whole tensor (the baseline of the Wanda paper), random inside each row as Wanda does.
void run_without_text(PruneJob& job, bool random) {
  const Sparsity sparsity = sparsity_of(job.options);
  CheckpointWriter writer(job.work, job.model.config(), job.dtype);
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
        if (spec.layer != layer || spec.role != TensorRole::kLinear) continue;
        if (spec.expert != expert) continue;
        std::vector<float> weights = read_finite(job.model, spec.name);
        const std::int64_t rows = spec.shape[0], cols = spec.shape[1];
        const auto scores = random ? random_scores(job.context.seed, spec.name, rows, cols)
                                   : magnitude_scores(weights.data(), rows, cols);
        apply_mask(keep_mask(scores.data(), rows, cols, sparsity, random ? Scope::kRow : Scope::kTensor),
                   weights.data());
        pruned.emplace(spec.name, std::move(weights));
      }
      put_piece(job, writer, layer, expert, pruned);
    }
    job.context.progress->update(layer + 1);
  }
  copy_outer_tensors(job, writer);
  writer.copy_side_files(job.model.folder());
  writer.finish();
  job.context.progress->end();
}

// Masks a block's linears from the inputs they see in the stream that is pruned so far. A finished block leaves its
// masks (a byte per weight) in the state folder, so that a later run can carry the stream on.
class WandaVisitor : public BlockVisitor {
 public:
  WandaVisitor(PruneJob& job, CheckpointWriter& writer)
      : job_(job), writer_(writer), sparsity_(sparsity_of(job.options)) {}

  bool finished(int layer) override { return writer_.has_piece(block_piece(layer)); }

  void restore(int layer, std::span<BlockLinear> linears) override {
    const fs::path file = mask_file(layer, linears[0].expert);
    const SafetensorsFile masks(file);
    for (BlockLinear& linear : linears) {
      const TensorView* view = masks.find(linear.name);
      if (view == nullptr || view->data.size() != linear.weight.size())
        throw failure(file.string(), "the mask of " + linear.name, "none or one of another size",
                      "remove " + job_.work.string() + " and run again");
      for (std::size_t i = 0; i < linear.weight.size(); ++i)
        linear.weight[i] = view->data[i] == std::byte{0} ? 0.0f : linear.original[i];
    }
  }

  void compress(int layer, BlockStage stage, std::span<BlockLinear> linears, const InputStatistics& input) override {
    for (BlockLinear& linear : linears) {
      check_finite(linear.original.data(), linear.original.size(), linear.name);
      const auto scores =
          wanda_scores(linear.original.data(), input.mean_square.data(), linear.rows, linear.cols);
      check_finite(scores.data(), scores.size(), linear.name + " (scores)");
      const auto keep = keep_mask(scores.data(), linear.rows, linear.cols, sparsity_, Scope::kRow);
      std::copy(linear.original.begin(), linear.original.end(), linear.weight.begin());
      apply_mask(keep, linear.weight.data());
      pruned_[linear.expert][linear.name].assign(linear.weight.begin(), linear.weight.end());
      masks_[linear.expert][linear.name] = keep;
    }
  }

  void routed(int layer, std::span<const std::int64_t> tokens) override {
    job_.context.report.add({"prune", "fewest tokens of an expert, block " + std::to_string(layer), std::nullopt,
                             static_cast<double>(*std::min_element(tokens.begin(), tokens.end())),
                             expert_summary(tokens, kExpertTokens), std::nullopt});
  }

  void end_expert(int layer, std::int64_t expert) override { put(layer, expert); }

  void end_block(int layer, double drift) override {
    if (!finished(layer)) put(layer, -1);
    job_.context.report.add({"prune", "drift after block " + std::to_string(layer), std::nullopt, drift, "relative",
                             std::nullopt});
  }

 private:
  fs::path mask_file(int layer, std::int64_t expert) const {
    return job_.state / ((expert < 0 ? block_piece(layer) : expert_piece(layer, expert)) + ".masks");
  }

  void put(int layer, std::int64_t expert) {
    std::vector<TensorDecl> decls;
    const auto& masks = masks_[expert];
    for (const auto& [name, keep] : masks)
      decls.push_back({name, DType::kU8, {static_cast<std::int64_t>(keep.size())}});
    SafetensorsWriter file(mask_file(layer, expert), decls, {});
    for (const auto& [name, keep] : masks) file.write(std::as_bytes(std::span(keep)));
    file.finish();
    put_piece(job_, writer_, layer, expert, pruned_[expert]);
    pruned_.erase(expert);
    masks_.erase(expert);
  }

  PruneJob& job_;
  CheckpointWriter& writer_;
  Sparsity sparsity_;
  std::map<std::int64_t, std::map<std::string, std::vector<float>>> pruned_;  // by expert, -1: of the whole block
  std::map<std::int64_t, std::map<std::string, std::vector<std::uint8_t>>> masks_;
};

WalkOptions walk_options(const Options& options, const fs::path& spill) {
  WalkOptions walk;
  walk.device = options.get<std::string>("device");
  walk.spill = spill;
  return walk;
}

void run_wanda(PruneJob& job) {
  CheckpointWriter writer(job.work, job.model.config(), job.dtype);
  WandaVisitor visitor(job, writer);
  WalkOptions walk = walk_options(job.options, job.spill);
  walk.threads = job.context.threads;
  walk_blocks(job.model, job.windows, walk, job.context, visitor);
  copy_outer_tensors(job, writer);
  writer.copy_side_files(job.model.folder());
  writer.finish();
}

std::uint64_t wanda_peak(const ModelConfig& config, const Options& options, const fs::path& spill) {
  // Beside the walk: the block as pruned, its masks, and scores of one matrix in double.
  return walk_peak_bytes(config, options.get<std::int64_t>("samples"), window_length(config, options),
                         walk_options(options, spill)) +
         block_bytes(config) * 9 / 4;
}
// Original, pruned copy and scores of one block.
std::uint64_t block_peak(const ModelConfig& config, const Options&, const fs::path&) { return 4 * block_bytes(config); }
double no_passes(const ModelConfig&, const Options&) { return 0; }
double walk_passes(const ModelConfig&, const Options&) { return 3; }  // original, statistics, compressed

}  // namespace

PruneMethod magnitude_method() {
  return {"magnitude", "zero the smallest weights of each matrix", false, {"sparsity", "pattern"}, {}, same_shape,
          [](PruneJob& job) { run_without_text(job, false); }, block_peak, no_passes};
}
PruneMethod wanda_method() {
  return {"wanda", "zero the weights with the smallest |w| * input norm of each row", true, {"sparsity", "pattern"}, {},
          same_shape, run_wanda, wanda_peak, walk_passes};
}
PruneMethod random_method() {
  return {"random", "zero weights of each row at random: the null to compare with", false, {"sparsity", "pattern"}, {},
          same_shape, [](PruneJob& job) { run_without_text(job, true); }, block_peak, no_passes};
}

}  // namespace pare
