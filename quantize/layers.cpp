#include "quantize/layers.h"

#include <algorithm>
#include <numeric>
#include <optional>

#include "core/error.h"
#include "quantize/gptq.h"
#include "quantize/scales.h"

namespace pare {
namespace {

std::string piece_name(int layer) { return "block " + std::to_string(layer); }
fs::path rows_file(const fs::path& rows, int layer) { return rows / ("block-" + std::to_string(layer) + ".json"); }

double total(const std::vector<double>& values) { return std::accumulate(values.begin(), values.end(), 0.0); }

class Quantizer : public BlockVisitor {
 public:
  Quantizer(const QuantizeJob& job, Context& context) : job_(job), context_(context) {
    for (const TensorPlan& tensor : job.plan) plan_[tensor.spec.name] = &tensor;
  }

  void embedding(std::span<float> weight) override { job_.writer.read_f32("model.embed_tokens.weight", weight.data()); }
  bool finished(int layer) override { return job_.writer.has_piece(piece_name(layer)); }
  void restore(int layer, std::span<BlockLinear> linears) override {
    for (BlockLinear& linear : linears) job_.writer.read_f32(linear.name, linear.weight.data());
  }
  void begin_block(int layer) override {
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
    std::optional<SweepFactor> factor;
    for (BlockLinear& linear : linears) {
      const TensorPlan& plan = *plan_.at(linear.name);
      if (!plan.codec) continue;
      throw_if_interrupted(linear.name, "the same command continues with this block");
      if (job_.method == QuantizeMethod::kGptq && !factor) {
        factor = factor_hessian(input.hessian, input.columns, {job_.damping, true}, "inputs of " + linear.name,
                                job_.threads);
      }
      QuantizedTensor codes = quantize(linear, *plan.codec, input, factor);
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
    job_.writer.begin_piece(piece_name(layer));
    for (const TensorPlan& tensor : job_.plan) {
      if (tensor.spec.layer != layer) continue;
      if (tensor.codec) {
        job_.writer.put_codes(tensor.spec.name, codes_.at(tensor.spec.name));
      } else {
        job_.writer.put(tensor.spec.name, job_.model.read_f32(tensor.spec.name).data());
      }
    }
    job_.writer.end_piece();
  }

  // One block on its weights alone.
  void without_calibration(int layer) {
    begin_block(layer);
    for (const TensorPlan& tensor : job_.plan) {
      if (tensor.spec.layer != layer || !tensor.codec) continue;
      throw_if_interrupted(tensor.spec.name, "the same command continues with this block");
      codes_.emplace(tensor.spec.name, nearest(tensor, job_.model.read_f32(tensor.spec.name).data()));
      job_.model.release(tensor.spec.name);
      rows_.push_back({{"name", tensor.spec.name}, {"codec", tensor.codec->name()}});
    }
    end_block(layer, 0);
  }

  void require_finite(const TensorSpec& spec) const {
    const std::vector<float> values = job_.model.read_f32(spec.name);
    pare::require_finite(values.data(), spec.shape[0], static_cast<std::int64_t>(values.size()) / spec.shape[0],
                         spec.name);
  }

  QuantizedTensor nearest(const TensorPlan& tensor, const float* values) const {
    const ScaleRule rule = job_.method == QuantizeMethod::kAbsmax ? ScaleRule::kAbsmax : ScaleRule::kSearched;
    return round_to_nearest(values, tensor.spec.shape[0], tensor.spec.shape[1], *tensor.codec, rule, {},
                            tensor.spec.name, job_.threads);
  }

 private:
  QuantizedTensor quantize(const BlockLinear& linear, const Codec& codec, const InputStatistics& input,
                           const std::optional<SweepFactor>& factor) {
    const float* weight = linear.original.data();
    const Importance importance{input.hessian.data(), input.mean_square.data()};
    Json row = {{"name", linear.name}, {"codec", codec.name()}, {"rows", linear.rows}, {"columns", linear.cols}};
    const auto error_of = [&](const QuantizedTensor& codes) {
      std::vector<float> unpacked(linear.original.size());
      codes.unpack(unpacked.data());
      return total(row_errors(weight, unpacked.data(), linear.rows, linear.cols, input.hessian.data(), job_.threads));
    };
    const bool searched = job_.method != QuantizeMethod::kAbsmax;
    QuantizedTensor codes =
        round_to_nearest(weight, linear.rows, linear.cols, codec, searched ? ScaleRule::kSearched : ScaleRule::kAbsmax,
                         importance, linear.name, job_.threads);
    if (job_.method == QuantizeMethod::kGptq) {
      const bool pruned = is_pruned(linear.original);
      GptqResult result = gptq(weight, codes, input.hessian.data(), *factor, pruned, job_.threads);
      if (result.nearest_rows == linear.rows && result.nearest_error > 0) {
        throw failure(linear.name, "a column sweep that improves on nearest codes",
                      "none of " + std::to_string(linear.rows) + " rows improved",
                      "more calibration text, or --method rtn");
      }
      row["before"] = result.nearest_error;
      row["after"] = job_.polish > 0
                         ? polish(weight, result.tensor, input.hessian.data(), pruned, job_.polish, job_.threads)
                         : result.error;
      row["sweep"] = result.sweep_error;
      row["rows_kept_nearest"] = result.nearest_rows;
      row["damping"] = factor->damping;
      row["dead_columns"] = std::count(factor->dead.begin(), factor->dead.end(), 1);
      row["zeros_kept"] = pruned;
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
    const std::vector<float> values = job.model.read_f32(tensor.spec.name);
    if (tensor.codec) {
      job.writer.put_codes(tensor.spec.name, quantizer.nearest(tensor, values.data()));
    } else {
      quantizer.require_finite(tensor.spec);
      job.writer.put(tensor.spec.name, values.data());
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

}  // namespace pare
