// Removing MLP neurons, the same number in every block: HF configs know one intermediate_size.
#include <algorithm>
#include <cstring>
#include <limits>
#include <map>

#include "core/error.h"
#include "prune/method.h"
#include "prune/neurons.h"

namespace pare {
namespace {

constexpr double kDefaultDamping = 0.01;
constexpr std::int64_t kDefaultMultiple = 32;

std::int64_t target_width(const ModelConfig& config, const Options& options) {
  if (config.has_experts())
    throw usage_error("--method ffn-width", "a model with one MLP a block",
                      std::to_string(config.experts.count) + " experts",
                      "depth, magnitude and random work on models with experts");
  const std::int64_t multiple = options.get_or<std::int64_t>("multiple-of", kDefaultMultiple);
  const std::int64_t asked = options.get<std::int64_t>("ffn");
  const std::int64_t width = (asked + multiple - 1) / multiple * multiple;
  if (width >= config.intermediate_size)
    throw usage_error("--ffn", "fewer than the model's " + std::to_string(config.intermediate_size) + " neurons",
                      std::to_string(asked) + (width != asked ? ", rounded up to " + std::to_string(width) +
                                                                    " (a multiple of " + std::to_string(multiple) + ")"
                                                              : ""),
                      width != asked ? "choose a smaller --ffn or --multiple-of" : "choose a smaller --ffn");
  return width;
}

ModelConfig narrower(const ModelConfig& config, const Options& options) {
  ModelConfig out = config;
  out.intermediate_size = target_width(config, options);
  return out;
}

// Chooses the neurons when the walk reaches down_proj, which is the last linear of a block: gate and up still ran at
// full width, and zero columns in down_proj make the stream behave as the narrow block will.
class WidthVisitor : public BlockVisitor {
 public:
  WidthVisitor(PruneJob& job, CheckpointWriter& writer)
      : job_(job),
        writer_(writer),
        width_(target_width(job.model.config(), job.options)),
        correct_(!job.options.get<bool>("no-correction")),
        damping_(job.options.get_or<double>("damping", kDefaultDamping)) {}

  bool finished(int layer) override { return writer_.has_piece(block_piece(layer)); }

  void restore(int layer, std::span<BlockLinear> linears) override {
    for (BlockLinear& linear : linears) {
      if (linear.module != "mlp.down_proj") continue;
      current_ = load(layer);
      spread(current_, linear);
    }
  }

  void compress(int layer, BlockStage stage, std::span<BlockLinear> linears, const InputStatistics& input) override {
    for (const BlockLinear& linear : linears) check_finite(linear.original.data(), linear.original.size(), linear.name);
    if (stage != BlockStage::kDown) return;
    BlockLinear& down = linears[0];
    Block block;
    block.kept =
        most_important(neuron_importance(down.original.data(), input.mean_square.data(), down.rows, down.cols), width_);
    block.down = take_columns(down.original.data(), down.rows, down.cols, block.kept);
    if (correct_) {
      block.error_plain = relative_error(down.original.data(), block.down.data(), input.hessian.doubles().data(),
                                         down.rows, down.cols, block.kept);
      block.down = corrected_down(down.original.data(), input.hessian.doubles().data(), down.rows, down.cols,
                                  block.kept, damping_);
      round_to(job_.dtype, block.down);
      check_finite(block.down.data(), block.down.size(), down.name + " (corrected)");
      block.error = relative_error(down.original.data(), block.down.data(), input.hessian.doubles().data(), down.rows,
                                   down.cols, block.kept);
      // Rounding to 16 bits may cost what a tiny correction gained: the plain columns are exact, so keep those.
      if (block.error > block.error_plain) {
        block.down = take_columns(down.original.data(), down.rows, down.cols, block.kept);
        block.error = block.error_plain;
      }
    }
    spread(block, down);
    current_ = std::move(block);
  }

  void end_block(int layer, double drift) override {
    if (correct_)
      job_.context.report.add({"prune", "down_proj error of block " + std::to_string(layer) + " by correction",
                               current_.error_plain, current_.error, "relative", std::nullopt});
    job_.context.report.add(
        {"prune", "drift after block " + std::to_string(layer), std::nullopt, drift, "relative", std::nullopt});
    if (finished(layer)) return;
    save(layer, current_);
    writer_.begin_piece(block_piece(layer));
    for (const TensorSpec& spec : job_.model.tensors()) {
      if (spec.layer != layer) continue;
      std::vector<float> values = read_finite(job_.model, spec.name);
      if (spec.module == "mlp.gate_proj" || spec.module == "mlp.up_proj")
        values = take_rows(values.data(), spec.shape.size() == 2 ? spec.shape[1] : 1, current_.kept);
      else if (spec.module == "mlp.gate_up_proj")  // gate above up: both lose the same rows
        values = take_rows(values.data(), spec.shape.size() == 2 ? spec.shape[1] : 1, both_halves(current_.kept));
      else if (spec.module == "mlp.down_proj" && spec.role == TensorRole::kLinear)
        values = current_.down;
      writer_.put(spec.name, values.data());
      job_.model.release(spec.name);
    }
    writer_.end_piece();
  }

 private:
  struct Block {
    std::vector<std::int64_t> kept;
    std::vector<float> down;  // [outputs, kept]
    double error_plain = 0, error = 0;
  };

  std::vector<std::int64_t> both_halves(const std::vector<std::int64_t>& kept) const {
    std::vector<std::int64_t> rows = kept;
    for (const std::int64_t row : kept) rows.push_back(row + job_.model.config().intermediate_size);
    return rows;
  }

  void spread(const Block& block, BlockLinear& down) const {
    std::fill(down.weight.begin(), down.weight.end(), 0.0f);
    for (std::int64_t i = 0; i < down.rows; ++i)
      for (std::size_t j = 0; j < block.kept.size(); ++j)
        down.weight[static_cast<std::size_t>(i * down.cols + block.kept[j])] =
            block.down[static_cast<std::size_t>(i) * block.kept.size() + j];
  }

  fs::path state_file(int layer) const { return job_.state / (block_piece(layer) + ".neurons"); }

  void save(int layer, const Block& block) const {
    const auto kept = static_cast<std::int64_t>(block.kept.size());
    const double errors[2] = {block.error_plain, block.error};
    SafetensorsWriter file(state_file(layer),
                           {{"kept", DType::kI64, {kept}},
                            {"errors", DType::kF64, {2}},
                            {"down", DType::kF32, {static_cast<std::int64_t>(block.down.size())}}},
                           {});
    file.write(std::as_bytes(std::span(block.kept)));
    file.write(std::as_bytes(std::span(errors)));
    file.write(std::as_bytes(std::span(block.down)));
    file.finish();
  }

  Block load(int layer) const {
    const SafetensorsFile file(state_file(layer));
    const TensorView *kept = file.find("kept"), *errors = file.find("errors"), *down = file.find("down");
    if (kept == nullptr || errors == nullptr || down == nullptr || kept->elements() != width_ ||
        errors->elements() != 2)
      throw failure(state_file(layer).string(), "the neurons of a finished block", "something else",
                    "remove " + job_.work.string() + " and run again");
    Block block;
    block.kept.resize(static_cast<std::size_t>(kept->elements()));
    block.down.resize(static_cast<std::size_t>(down->elements()));
    std::memcpy(block.kept.data(), kept->data.data(), kept->data.size());
    std::memcpy(block.down.data(), down->data.data(), down->data.size());
    std::memcpy(&block.error_plain, errors->data.data(), sizeof(double));
    std::memcpy(&block.error, errors->data.data() + sizeof(double), sizeof(double));
    return block;
  }

  PruneJob& job_;
  CheckpointWriter& writer_;
  std::int64_t width_;
  bool correct_;
  double damping_;
  Block current_;
};

WalkOptions walk_options(const Options& options, const fs::path& spill) {
  WalkOptions walk;
  walk.spill = spill;
  walk.device = options.get<std::string>("device");
  walk.hessian = !options.get<bool>("no-correction");
  walk.widest_double = std::numeric_limits<std::int64_t>::max();  // the refit solves in double
  return walk;
}

void run(PruneJob& job) {
  CheckpointWriter writer(job.work, narrower(job.model.config(), job.options), job.dtype);
  WidthVisitor visitor(job, writer);
  WalkOptions walk = walk_options(job.options, job.spill);
  walk.threads = job.context.threads;
  walk_blocks(job.model, job.windows, walk, job.context, visitor);
  copy_outer_tensors(job, writer);
  writer.copy_side_files(job.model.folder());
  writer.finish();
}

std::uint64_t peak(const ModelConfig& config, const Options& options, const fs::path& spill) {
  const WalkOptions walk = walk_options(options, spill);
  const auto n = static_cast<std::uint64_t>(config.intermediate_size);
  const auto k = static_cast<std::uint64_t>(target_width(config, options));
  // Beside the walk: H_SS in double and W, W' and their products in the correction.
  const std::uint64_t solve =
      walk.hessian ? 8 * (k * k + (n - k) * k + 4 * n * static_cast<std::uint64_t>(config.hidden_size)) : 0;
  return walk_peak_bytes(config, options.get<std::int64_t>("samples"), window_length(config, options), walk) + solve;
}
double passes(const ModelConfig&, const Options&) {
  return 3;
}

}  // namespace

PruneMethod ffn_width_method() {
  return {"ffn-width",
          "remove the MLP neurons that matter least, the same number in every block",
          true,
          {"ffn"},
          {"multiple-of", "no-correction", "damping"},
          narrower,
          run,
          peak,
          passes};
}

}  // namespace pare
