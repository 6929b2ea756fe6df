#include "quantize/layers.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <optional>

#include "core/error.h"
#include "quantize/gptq.h"
#include "quantize/q4_0.h"
#include "quantize/retarget.h"
#include "quantize/scales.h"

namespace pare {
namespace {

// The block's own piece comes after those of its experts: with it, all of the block is there.
std::string piece_name(int layer, std::int64_t expert = -1) {
  return "block " + std::to_string(layer) + (expert < 0 ? "" : " expert " + std::to_string(expert));
}
fs::path rows_file(const fs::path& rows, int layer) {
  return rows / ("block-" + std::to_string(layer) + ".json");
}

constexpr std::int64_t kFloatsAtATime = std::int64_t{1} << 24;  // 64 MiB

double total(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

// [groups][size * size]; empty where groups are too wide for that objective.
std::vector<double> diagonal_blocks(const InputStatistics& input, std::int64_t size) {
  std::vector<double> blocks;
  if (size > kBlockObjectiveLimit) return blocks;
  blocks.reserve(static_cast<std::size_t>(input.columns * size));
  input.hessian.visit([&](const auto* hessian) {
    for (std::int64_t i = 0; i < input.columns; ++i) {
      const auto* row = hessian + i * input.columns + i / size * size;
      blocks.insert(blocks.end(), row, row + size);
    }
  });
  return blocks;
}

class Quantizer : public BlockVisitor {
 public:
  Quantizer(const QuantizeJob& job, Context& context) : job_(job), context_(context) {
    for (const TensorPlan& tensor : job.plan) plan_[tensor.spec.name] = &tensor;
  }

  void embedding(std::int64_t id, std::span<float> row) override {
    job_.writer.read_rows_f32("model.embed_tokens.weight", id, 1, row.data());
  }
  bool finished(int layer) override { return job_.writer.has_piece(piece_name(layer)); }
  void restore(int layer, std::span<BlockLinear> linears) override {
    for (BlockLinear& linear : linears) {
      job_.writer.read_f32(linear.name, linear.weight.data());
      job_.writer.release(linear.name);
    }
  }
  void begin_block(int layer) override {
    if (layer == 0) job_.writer.release("model.embed_tokens.weight");
    codes_.clear();
    rows_ = Json::array();
    for (const TensorPlan& tensor : job_.plan) {
      if (tensor.spec.layer == layer && !tensor.codec) require_finite(tensor.spec);
    }
  }

  void routed(int layer, std::span<const std::int64_t> tokens) override {
    if (finished(layer)) return;
    rows_.push_back({{"name", piece_name(layer)}, {"expert_tokens", tokens}, {"least", job_.expert_tokens}});
    context_.progress->note("Block " + std::to_string(layer) + ": " + expert_summary(tokens, job_.expert_tokens));
  }

  void compress(int layer, BlockStage stage, std::span<BlockLinear> linears, const InputStatistics& input) override {
    std::map<std::int64_t, SweepFactor> factors;  // by the group that the sweep keeps together
    std::optional<Retargeter> retargeter;
    for (BlockLinear& linear : linears) {
      const TensorPlan& plan = *plan_.at(linear.name);
      if (!plan.codec) continue;
      throw_if_interrupted(linear.name, "the same command continues with this block");
      const SweepFactor* factor = nullptr;
      if (job_.method == QuantizeMethod::kGptq) {
        std::int64_t group = plan.codec->group > 0 && plan.codec->group <= kSweepBlock ? plan.codec->group : 0;
        if (group == 0 && job_.sparsity) group = job_.sparsity->of;
        auto found = factors.find(group);
        if (found == factors.end())
          found = factors.emplace(group, factor_hessian(input.hessian, input.columns, {job_.damping, true, group},
                                                        "inputs of " + linear.name, job_.threads)).first;
        factor = &found->second;
      }
      if (job_.retarget && !retargeter)
        retargeter.emplace(input, *factor, job_.damping, "inputs of " + linear.name, job_.threads);
      QuantizedTensor codes = quantize(linear, *plan.codec, input, factor, retargeter);
      codes.unpack(linear.weight.data());
      codes_.emplace(linear.name, std::move(codes));
    }
  }

  void end_block(int layer, double drift) override {
    if (finished(layer)) return;
    if (job_.windows.count > 0) {
      rows_.push_back({{"name", piece_name(layer)}, {"drift", drift}});
      context_.progress->note("Block " + std::to_string(layer) + ": " + block_summary(drift));
    }
    write_text(rows_file(job_.rows, layer), rows_.dump());
    put_piece(layer, -1);
  }

  void end_expert(int layer, std::int64_t expert) override { put_piece(layer, expert); }

  // One block on its weights alone.
  void without_calibration(int layer) {
    begin_block(layer);
    std::int64_t expert = -1;
    for (const TensorPlan& tensor : job_.plan) {
      if (tensor.spec.layer != layer) continue;
      throw_if_interrupted(tensor.spec.name, "the same command continues with this block");
      if (expert >= 0 && tensor.spec.expert != expert) put_piece(layer, expert);
      expert = tensor.spec.expert;
      if (!tensor.codec) continue;
      codes_.emplace(tensor.spec.name, nearest(tensor));
      rows_.push_back({{"name", tensor.spec.name}, {"codec", tensor.codec->name()}});
    }
    if (expert >= 0) put_piece(layer, expert);
    end_block(layer, 0);
  }

  void require_finite(const TensorSpec& spec) const {
    const std::vector<float> values = job_.model.read_f32(spec.name);
    pare::require_finite(values.data(), spec.shape[0], static_cast<std::int64_t>(values.size()) / spec.shape[0],
                         spec.name);
  }

  // On the weights alone, some rows at a time: embeddings are the largest tensors of many models.
  QuantizedTensor nearest(const TensorPlan& tensor) const {
    const ScaleRule rule = job_.method == QuantizeMethod::kAbsmax ? ScaleRule::kAbsmax : ScaleRule::kSearched;
    const std::int64_t rows = tensor.spec.shape[0], cols = tensor.spec.shape[1];
    const std::int64_t step = std::max<std::int64_t>(1, kFloatsAtATime / cols);
    QuantizedTensor out;
    out.codec = *tensor.codec;
    out.rows = rows;
    out.cols = cols;
    out.codes.reserve(static_cast<std::size_t>(rows * cols));
    std::vector<float> values(static_cast<std::size_t>(std::min(step, rows) * cols));
    for (std::int64_t first = 0; first < rows; first += step) {
      const std::int64_t count = std::min(step, rows - first);
      job_.model.read_rows_f32(tensor.spec.name, first, count, values.data());
      try {
        const QuantizedTensor part =
            rounds_as_q4_0(job_.method) && tensor.codec->kind == CodecKind::kQ4
                ? round_q4_0(values.data(), count, cols, *tensor.codec, nullptr, tensor.spec.name, job_.threads)
                : round_to_nearest(values.data(), count, cols, *tensor.codec, rule, {}, tensor.spec.name, job_.threads);
        out.codes.insert(out.codes.end(), part.codes.begin(), part.codes.end());
        out.scales.insert(out.scales.end(), part.scales.begin(), part.scales.end());
        out.zeros.insert(out.zeros.end(), part.zeros.begin(), part.zeros.end());
        out.minima.insert(out.minima.end(), part.minima.begin(), part.minima.end());
      } catch (const Error&) {
        require_finite(tensor.spec);  // names the row in the whole tensor
        throw;
      }
    }
    job_.model.release(tensor.spec.name);
    return out;
  }

 private:
  // What the block has outside its experts, or one of them; its codes are not needed afterwards.
  void put_piece(int layer, std::int64_t expert) {
    job_.writer.begin_piece(piece_name(layer, expert));
    for (const TensorPlan& tensor : job_.plan) {
      if (tensor.spec.layer != layer || tensor.spec.expert != expert) continue;
      if (tensor.codec) {
        job_.writer.put_codes(tensor.spec.name, codes_.at(tensor.spec.name));
        codes_.erase(tensor.spec.name);
      } else {
        job_.writer.put(tensor.spec.name, job_.model.read_f32(tensor.spec.name).data());
      }
    }
    job_.writer.end_piece();
  }

  QuantizedTensor quantize(const BlockLinear& linear, const Codec& codec, const InputStatistics& input,
                           const SweepFactor* factor, const std::optional<Retargeter>& retargeter) {
    const float* weight = linear.original.data();
    const bool pruned = is_pruned(linear.original);
    Retargeting target;
    if (retargeter) {
      target = retargeter->retarget(weight, linear.rows, pruned);
      weight = target.weight.data();
    }
    const std::vector<double> blocks = diagonal_blocks(input, linear.cols / codec.groups(linear.cols));
    const Importance importance{blocks.empty() ? nullptr : blocks.data(), input.mean_square.data(), true};
    Json row = {{"name", linear.name}, {"codec", codec.name()}, {"rows", linear.rows}, {"columns", linear.cols}};
    const auto error_of = [&](const QuantizedTensor& codes) {
      std::vector<float> unpacked(linear.original.size());
      codes.unpack(unpacked.data());
      return input.hessian.visit([&](const auto* hessian) {
        return total(row_errors(weight, unpacked.data(), linear.rows, linear.cols, hessian, job_.threads));
      });
    };
    const bool searched = job_.method != QuantizeMethod::kAbsmax;
    const auto nearest_codes = [&](const float* values) {
      return rounds_as_q4_0(job_.method) && codec.kind == CodecKind::kQ4
                 ? round_q4_0(values, linear.rows, linear.cols, codec,
                              job_.method == QuantizeMethod::kImatrix ? input.mean_square.data() : nullptr, linear.name,
                              job_.threads)
                 : round_to_nearest(values, linear.rows, linear.cols, codec,
                                    searched ? ScaleRule::kSearched : ScaleRule::kAbsmax, importance, linear.name,
                                    job_.threads);
    };
    QuantizedTensor codes = nearest_codes(weight);
    if (job_.method == QuantizeMethod::kGptq) {
      std::vector<std::uint8_t> keep;
      if (pruned) keep = nonzero(linear.original);
      std::optional<QuantizedTensor> swept;
      if (job_.sparsity) {
        SweepMask mask(*factor, linear.rows, *job_.sparsity);
        swept = prune_and_sweep(weight, codes, *factor, mask, job_.threads);
        keep = mask.keep();
        std::vector<float> left(weight, weight + linear.rows * linear.cols);
        for (std::size_t i = 0; i < left.size(); ++i)
          if (keep[i] == 0) left[i] = 0.0f;
        codes = nearest_codes(left.data());  // with the same zeros
      }
      GptqResult result = input.hessian.visit([&](const auto* hessian) {
        return swept ? better_rows(weight, codes, std::move(*swept), hessian, job_.threads)
                     : gptq(weight, codes, hessian, *factor, keep, job_.threads);
      });
      if (result.nearest_rows == linear.rows && result.nearest_error > 0) {
        throw failure(linear.name, "a column sweep that improves on nearest codes",
                      "none of " + std::to_string(linear.rows) + " rows improved",
                      "more calibration text, or --method rtn");
      }
      row["before"] = result.nearest_error;
      row["after"] = job_.polish == 0 ? result.error : input.hessian.visit([&](const auto* hessian) {
        return polish(weight, result.tensor, hessian, keep, job_.polish, job_.threads);
      });
      row["sweep"] = result.sweep_error;
      row["rows_kept_nearest"] = result.nearest_rows;
      row["damping"] = factor->damping;
      row["dead_columns"] = std::count(factor->dead.begin(), factor->dead.end(), 1);
      row["zeros_kept"] = !keep.empty();
      if (job_.sparsity) row["zeros"] = std::count(keep.begin(), keep.end(), 0);
      if (retargeter) row["retarget_shrink"] = target.shrink;
      codes = std::move(result.tensor);
    } else {
      const double after = error_of(codes);
      if (searched) {
        row["before"] = error_of(round_to_nearest(weight, linear.rows, linear.cols, codec, ScaleRule::kAbsmax,
                                                  importance, linear.name, job_.threads));
      }
      row["after"] = after;
    }
    if (input.expert >= 0) {
      row["tokens"] = input.tokens;
      row["all_tokens"] = input.all_tokens;
    }
    rows_.push_back(std::move(row));
    return codes;
  }

  std::string block_summary(double drift) const {
    double before = 0, after = 0;
    for (const Json& row : rows_) {
      before += row.value("before", 0.0);
      after += row.value("after", 0.0);
    }
    char text[160];
    if (before > 0) {
      std::snprintf(text, sizeof text, "layer error %.4g, %.4g before (%+.1f %%), stream off by %.3g of its energy",
                    after, before, 100.0 * (after / before - 1.0), drift);
    } else {
      std::snprintf(text, sizeof text, "layer error %.4g, stream off by %.3g of its energy", after, drift);
    }
    return text;
  }

  const QuantizeJob& job_;
  Context& context_;
  std::map<std::string, const TensorPlan*> plan_;
  std::map<std::string, QuantizedTensor> codes_;
  Json rows_ = Json::array();
};

}  // namespace

void quantize_layers(const QuantizeJob& job, Context& context) {
  Quantizer quantizer(job, context);
  fs::create_directories(job.rows);
  for (const TensorPlan& tensor : job.plan) {
    if (tensor.spec.layer >= 0 || job.writer.has(tensor.spec.name)) continue;
    if (tensor.codec) {
      job.writer.put_codes(tensor.spec.name, quantizer.nearest(tensor));
    } else {
      quantizer.require_finite(tensor.spec);
      job.writer.put(tensor.spec.name, job.model.read_f32(tensor.spec.name).data());
    }
    job.model.release(tensor.spec.name);
  }
  const int layers = static_cast<int>(job.model.config().num_layers);
  bool all = true;
  for (int layer = 0; layer < layers; ++layer) all = all && quantizer.finished(layer);
  if (all) return;
  if (job.windows.count > 0) {
    WalkOptions walk;
    walk.device = job.device;
    walk.threads = job.threads;
    walk.hessian = true;
    walk.expert_tokens = job.expert_tokens;
    walk.spill = job.spill;
    walk.cross = walk.held_out = job.retarget;
    walk.paired_tokens = job.paired_tokens;
    walk.token_weights = job.token_weights;
    walk_blocks(job.model, job.windows, walk, context, quantizer);
    return;
  }
  context.progress->begin("quantize", layers);
  for (int layer = 0; layer < layers; ++layer) {
    if (!quantizer.finished(layer)) quantizer.without_calibration(layer);
    context.progress->update(layer + 1);
  }
  context.progress->end();
}

Json collect_rows(const ModelConfig& config, const fs::path& rows) {
  Json all = Json::array();
  for (int layer = 0; layer < config.num_layers; ++layer) {
    for (const Json& row : read_json(rows_file(rows, layer))) all.push_back(row);
  }
  return all;
}

void require_unpruned(const Checkpoint& model, const std::vector<TensorPlan>& tensors) {
  for (const TensorPlan& tensor : tensors) {
    if (tensor.spec.role != TensorRole::kLinear || tensor.spec.layer < 0) continue;
    const bool pruned = is_pruned(model.read_f32(tensor.spec.name));
    model.release(tensor.spec.name);
    if (pruned)
      throw input_error(tensor.spec.name, "a matrix that is not pruned yet", "zeros",
                        "zeros stay zeros without being asked for");
  }
}

}  // namespace pare
