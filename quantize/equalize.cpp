#include "quantize/equalize.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <tuple>

#include "core/error.h"
#include "quantize/awq.h"
#include "quantize/fold.h"
#include "quantize/least_noise.h"
#include "quantize/scale_search.h"
#include "quantize/smooth_quant.h"

namespace pare {
namespace {

constexpr BlockStage kStages[] = {BlockStage::kQkv, BlockStage::kO, BlockStage::kGateUp, BlockStage::kDown};

std::string piece_name(int layer, std::int64_t expert = -1) {
  return "folded block " + std::to_string(layer) + (expert < 0 ? "" : " expert " + std::to_string(expert));
}
fs::path rows_file(const fs::path& rows, int layer) {
  return rows / ("fold-" + std::to_string(layer) + ".json");
}

// Error: exit 3 naming the row that is not finite.
std::vector<float> floats(const EqualizeJob& job, const TensorSpec& spec) {
  std::vector<float> values = job.model.read_f32(spec.name);
  require_finite(values.data(), spec.shape[0], static_cast<std::int64_t>(values.size()) / spec.shape[0], spec.name);
  job.model.release(spec.name);
  return values;
}

// An input of a block, or of one of its experts.
using Input = std::tuple<int, std::int64_t, BlockStage>;

// Those that a linear reads or makes which is kept as it is: scaling would round it anew.
std::set<Input> kept_inputs(const ModelConfig& config, const std::vector<TensorPlan>& plan) {
  std::set<Input> kept;
  for (const TensorPlan& tensor : plan) {
    const TensorSpec& spec = tensor.spec;
    if (spec.role != TensorRole::kLinear || tensor.codec) continue;
    kept.emplace(spec.layer, spec.expert, input_stage(config, spec));
    if (const auto made = made_rows(config, spec)) kept.emplace(spec.layer, spec.expert, made->stage);
  }
  return kept;
}

class Equalizer : public BlockVisitor {
 public:
  Equalizer(const EqualizeJob& job, Context& context)
      : job_(job), config_(job.model.config()), context_(context), kept_(kept_inputs(config_, job.plan)) {
    for (const TensorPlan& tensor : job.plan) plan_[tensor.spec.name] = &tensor;
  }

  bool finished(int layer) override { return job_.writer.has_piece(piece_name(layer)); }
  void begin_block(int layer) override {
    own_ = of_block(config_, layer);
    scales_ = {};
    rows_ = Json::array();
  }

  // The weights of the walk stay as they are: every input is measured in the original model.
  void compress(int layer, BlockStage stage, std::span<BlockLinear> linears, const InputStatistics& input) override {
    if (cannot_fold(config_, stage) || kept_.contains({layer, input.expert, stage})) return;
    std::vector<ScaledLinear> rounded;
    for (const BlockLinear& linear : linears) {
      if (const auto& codec = plan_.at(linear.name)->codec)
        rounded.push_back({linear.name, linear.original.data(), linear.rows, linear.cols, *codec});
    }
    if (rounded.empty()) return;
    if (half(input) == 0) {  // an expert that next to no held-out token chose
      rows_.push_back({{"name", rounded.front().name}, {"before", 0.0}, {"after", 0.0}, {"exponent", nullptr}});
      return;
    }
    BlockScales& scales = input.expert >= 0 ? expert_scales_ : scales_;
    scales[stage] = search(layer, stage, rounded, input);
  }

  void end_expert(int layer, std::int64_t expert) override {
    put(layer, expert, expert_scales_);
    expert_scales_ = {};
  }
  void end_block(int layer, double) override {
    if (finished(layer)) return;
    write_text(rows_file(job_.rows, layer), rows_.dump());
    put(layer, -1, scales_);
  }

 private:
  static constexpr int kLeastNoiseGrid = 4;

  std::vector<float> search(int layer, BlockStage stage, std::span<const ScaledLinear> linears,
                            const InputStatistics& input) {
    const std::vector<std::vector<float>> candidates = this->candidates(stage, linears, input);
    const std::optional<std::string> norm = folds_into_norm(config_, stage);
    std::vector<float> norm_weight;
    if (norm) norm_weight = job_.model.read_f32("model.layers." + std::to_string(layer) + "." + *norm);
    std::vector<float> best;
    double least = 0, before = 0;
    std::optional<std::size_t> chosen;
    std::vector<float> columns(static_cast<std::size_t>(input.columns));
    for (std::size_t i = 0; i < candidates.size(); ++i) {
      throw_if_interrupted(linears.front().name, "the same command continues with this block");
      const std::vector<float> scales =
          norm ? storable_scales(config_, norm_weight, candidates[i], job_.dtype) : candidates[i];
      for (std::size_t j = 0; j < columns.size(); ++j)
        columns[j] = scales[static_cast<std::size_t>(fold_channel(own_, stage, static_cast<std::int64_t>(j)))];
      double error = 0;
      for (const ScaledLinear& linear : linears)
        error += scaled_error(linear, compared(input), columns, job_.rule, job_.threads);
      if (i == 0) before = least = error;
      if (error >= least) continue;
      least = error;
      best = scales;
      chosen = i;
    }
    Json row = {{"name", linears.front().name}, {"before", before}, {"after", least}, {"exponent", nullptr}};
    if (chosen) row["exponent"] = exponent(*chosen);
    rows_.push_back(std::move(row));
    return best;
  }

  // The first leaves the input alone.
  std::vector<std::vector<float>> candidates(BlockStage stage, std::span<const ScaledLinear> linears,
                                             const InputStatistics& input) const {
    const std::size_t channels = static_cast<std::size_t>(fold_channels(own_, stage));
    std::vector<std::vector<float>> out = {std::vector<float>(channels, 1.0f)};
    if (job_.method == Equalizing::kAwq) {
      const std::vector<double> magnitude = channel_roots(own_, stage, input.mean_square);
      for (int k = 1; k < kAwqGrid; ++k) out.push_back(awq_scales(magnitude, static_cast<double>(k) / kAwqGrid));
      return out;
    }
    if (job_.method == Equalizing::kLeastNoise) {
      std::vector<std::int64_t> channel;
      for (std::int64_t j = 0; j < input.columns; ++j) channel.push_back(fold_channel(own_, stage, j));
      const std::vector<float> least =
          least_noise_scales(linears, fitted(input), channel, static_cast<std::int64_t>(channels));
      for (int k = 1; k <= kLeastNoiseGrid; ++k) {
        out.push_back(least);
        const float share = static_cast<float>(k) / kLeastNoiseGrid;
        for (float& scale : out.back()) scale = std::pow(scale, share);
      }
      return out;
    }
    std::vector<double> weights(static_cast<std::size_t>(input.columns), 0.0);
    for (const ScaledLinear& linear : linears)
      for (std::int64_t r = 0; r < linear.rows; ++r)
        for (std::int64_t j = 0; j < linear.columns; ++j) {
          double& peak = weights[static_cast<std::size_t>(j)];
          peak = std::max(peak, static_cast<double>(std::abs(linear.weight[r * linear.columns + j])));
        }
    const std::vector<double> inputs(input.peak.begin(), input.peak.end());
    for (int k = 0; k < kSmoothGrid; ++k)
      out.push_back(smooth_scales(channel_peaks(own_, stage, inputs), channel_peaks(own_, stage, weights),
                                  static_cast<double>(k) / (kSmoothGrid - 1)));
    return out;
  }
  double exponent(std::size_t candidate) const {
    const auto k = static_cast<double>(candidate);
    if (job_.method == Equalizing::kLeastNoise) return k / kLeastNoiseGrid;
    return job_.method == Equalizing::kAwq ? k / kAwqGrid : (k - 1) / (kSmoothGrid - 1);
  }
  // Least noise is fitted to half of the sample and compared on the other half.
  std::span<const float> fitted(const InputStatistics& input) const {
    return std::span(input.sample).first(half(input));
  }
  std::span<const float> compared(const InputStatistics& input) const {
    return job_.method == Equalizing::kLeastNoise ? std::span(input.sample).subspan(half(input)) : input.sample;
  }
  static std::size_t half(const InputStatistics& input) {
    const auto columns = static_cast<std::size_t>(input.columns);
    return input.sample.size() / columns / 2 * columns;
  }

  void put(int layer, std::int64_t expert, const BlockScales& scales) {
    job_.writer.begin_piece(piece_name(layer, expert));
    for (const TensorPlan& tensor : job_.plan) {
      if (tensor.spec.layer != layer || tensor.spec.expert != expert) continue;
      std::vector<float> values = floats(job_, tensor.spec);
      fold_scales(config_, tensor.spec, scales, values);
      job_.writer.put(tensor.spec.name, values.data());
    }
    job_.writer.end_piece();
  }

  const EqualizeJob& job_;
  const ModelConfig& config_;
  ModelConfig own_;  // with the widths of the block
  Context& context_;
  std::set<Input> kept_;
  std::map<std::string, const TensorPlan*> plan_;
  BlockScales scales_, expert_scales_;
  Json rows_ = Json::array();
};

}  // namespace

std::vector<std::string> equalize_notes(const ModelConfig& config, const std::vector<TensorPlan>& plan) {
  std::vector<std::string> notes;
  for (const BlockStage stage : kStages)
    if (const auto reason = cannot_fold(config, stage)) notes.push_back("not scaled, " + *reason);
  const std::set<Input> kept = kept_inputs(config, plan);
  std::set<Input> left, scaled;
  for (const TensorPlan& tensor : plan) {
    if (tensor.spec.role != TensorRole::kLinear || !tensor.codec) continue;
    const Input input{tensor.spec.layer, tensor.spec.expert, input_stage(config, tensor.spec)};
    if (!cannot_fold(config, std::get<BlockStage>(input))) (kept.contains(input) ? left : scaled).insert(input);
  }
  if (scaled.empty())
    throw usage_error("--equalize", "an input whose linears are all quantized, and whose scales fold away", "none",
                      "leave --equalize out");
  if (!left.empty())
    notes.push_back("not scaled, a linear that is kept reads or makes them: " + std::to_string(left.size()) + " of " +
                    std::to_string(left.size() + scaled.size()) + " inputs");
  return notes;
}

void equalize(const EqualizeJob& job, Context& context) {
  fs::create_directories(job.rows);
  for (const TensorPlan& tensor : job.plan) {
    if (tensor.spec.layer >= 0 || job.writer.has(tensor.spec.name)) continue;
    job.writer.put(tensor.spec.name, floats(job, tensor.spec).data());
  }
  Equalizer equalizer(job, context);
  bool all = true;
  for (int layer = 0; layer < job.model.config().num_layers; ++layer) all = all && equalizer.finished(layer);
  if (all) return;
  WalkOptions walk;
  walk.device = job.device;
  walk.threads = job.threads;
  walk.original_stream = false;
  walk.expert_tokens = job.expert_tokens;
  walk.spill = job.spill;
  walk.sample_tokens = kScaleTokens;
  walk_blocks(job.model, job.windows, walk, context, equalizer);
}

Json equalize_rows(const ModelConfig& config, const fs::path& rows) {
  Json all = Json::array();
  bool scaled = false;
  for (int layer = 0; layer < config.num_layers; ++layer)
    for (const Json& row : read_json(rows_file(rows, layer))) {
      scaled = scaled || !row.at("exponent").is_null();
      all.push_back(row);
    }
  if (!scaled)
    throw failure("--equalize", "an input whose scaling lowers the error of its linears",
                  "none of " + std::to_string(all.size()), "leave --equalize out, or use more calibration text");
  return all;
}

Json equalize_report(const Json& rows, Report& report) {
  std::vector<std::string> kinds;
  std::map<std::string, Json> sums;
  for (const Json& row : rows) {
    const auto name = row.at("name").get<std::string>();
    const std::size_t dot = name.find('.', std::string_view("model.layers.").size());
    const std::string kind = module_kind(name.substr(dot + 1, name.rfind('.') - dot - 1));
    if (!sums.contains(kind)) {
      kinds.push_back(kind);
      sums[kind] = {{"inputs", 0}, {"scaled", 0}, {"exponents", 0.0}, {"before", 0.0}, {"after", 0.0}};
    }
    Json& sum = sums[kind];
    sum["inputs"] = sum["inputs"].get<int>() + 1;
    for (const char* key : {"before", "after"}) sum[key] = sum[key].get<double>() + row.at(key).get<double>();
    if (row.at("exponent").is_null()) continue;
    sum["scaled"] = sum["scaled"].get<int>() + 1;
    sum["exponents"] = sum["exponents"].get<double>() + row.at("exponent").get<double>();
  }
  Json out = Json::array();
  for (const std::string& kind : kinds) {
    Json& sum = sums[kind];
    const int scaled = sum.at("scaled").get<int>();
    if (scaled > 0) sum["exponent"] = sum.at("exponents").get<double>() / scaled;
    sum.erase("exponents");
    report.add({"quantize", "scaled inputs, " + kind, sum.at("before").get<double>(), sum.at("after").get<double>(),
                std::to_string(scaled) + " of " + std::to_string(sum.at("inputs").get<int>()), {}});
    out.push_back({{"kind", kind}});
    out.back().update(sum);
  }
  return out;
}

std::uint64_t equalize_peak_bytes(const ModelConfig& config, std::uint64_t linear, std::int64_t windows,
                                  std::int64_t length, const fs::path& spill) {
  WalkOptions walk;
  walk.original_stream = false;
  walk.spill = spill;
  walk.sample_tokens = kScaleTokens;
  const auto wide = static_cast<std::uint64_t>(
      std::max({config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim}));
  // Scaled, rounded and the difference of one linear beside its codes; the inputs scaled and rounded; an embedding or
  // head as floats is counted by the caller.
  return walk_peak_bytes(config, windows, length, walk) + linear * 14 +
         static_cast<std::uint64_t>(kScaleTokens) * wide * 16;
}

}  // namespace pare
