#include "prune/scores.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/arch/arch.h"
#include "core/error.h"
#include "model/activations.h"
#include "model/threads.h"
#include "prune/measure.h"
#include "prune/moments.h"
#include "prune/rank.h"
#include "prune/refit.h"

namespace pare {
namespace {

using torch::Tensor;

// As in depth.cpp: candidates that advance side by side.
constexpr std::uint64_t kStreamBudget = std::uint64_t{1} << 30;

std::uint64_t stream_bytes(const ModelConfig& config, std::int64_t windows, std::int64_t length) {
  return 4 * static_cast<std::uint64_t>(group_tokens(windows, length)) * static_cast<std::uint64_t>(config.hidden_size);
}

std::size_t side_by_side(const ModelConfig& config, std::int64_t windows, std::int64_t length) {
  const std::uint64_t fit = kStreamBudget / std::max<std::uint64_t>(1, stream_bytes(config, windows, length));
  return static_cast<std::size_t>(std::clamp<std::uint64_t>(fit, 1, 4096));
}

// A block with one linear changed, or none at all.
struct Candidate {
  std::string module;  // empty: without the block
  Tensor weight;
};

class Meter {
 public:
  Meter(PruneJob& job, const CutPlan& plan, const ScoreLevels& levels)
      : job_(job),
        plan_(plan),
        levels_(levels),
        config_(job.model.config()),
        device_(parse_device(job.options.get<std::string>("device"))),
        groups_(shard_groups(job.windows, device_)),
        head_(job.model, device_),
        rope_(rope_tables(config_, job.windows.length, device_)),
        file_(job.state / "scores.json") {
    if (fs::exists(file_)) known_ = read_json(file_);
  }

  std::vector<BlockScores> run(const std::vector<int>& layers);

 private:
  Tensor load(std::int64_t window) const {
    Tensor values = torch::empty({1, job_.windows.length, config_.hidden_size}, torch::kFloat);
    hidden_.read(window, values.data_ptr<float>());
    return values.to(device_);
  }
  std::vector<Candidate> candidates(DecoderBlock& block);
  std::vector<double> divergences(int layer, DecoderBlock& block, const std::vector<Candidate>& candidates);
  std::string key(int layer) const {
    return Json({layer, levels_.ffn, levels_.kv_heads, levels_.without}).dump();
  }

  PruneJob& job_;
  const CutPlan& plan_;
  const ScoreLevels& levels_;
  const ModelConfig& config_;
  torch::Device device_;
  std::vector<std::vector<Tensor>> groups_;
  Head head_;
  RopeTables rope_;
  fs::path file_;
  Json known_ = Json::object();
  Activations hidden_;  // of the original, before the block
};

std::vector<Candidate> Meter::candidates(DecoderBlock& block) {
  Shape smallest = shape_of(config_);
  const std::int64_t group = config_.num_heads / config_.num_kv_heads;
  if (!levels_.ffn.empty()) smallest.ffn = levels_.ffn.back();
  if (!levels_.kv_heads.empty()) {
    smallest.kv_heads = levels_.kv_heads.back();
    smallest.heads = smallest.kv_heads * group;
  }
  CutPlan plan = plan_;
  plan.shape = smallest;
  plan.channels = all_of(config_.hidden_size);
  const Importance measured =
      measure_block(job_, plan, smallest, block, rope_, device_, [&](std::int64_t w) { return load(w); });
  std::vector<Candidate> out;
  // Columns of `module` in units of `width` inputs that stay, by what `mix` gives it to read.
  const auto add = [&](const std::string& module, const std::vector<Kept>& choices, std::int64_t width,
                       const std::function<Tensor(const Tensor&)>& mix) {
    if (choices.empty()) return;
    const Tensor whole = block->weight(module).detach().cpu().to(torch::kDouble);
    Tensor gram;
    if (plan_.refit)
      gram = collect(job_.windows, whole.size(1), 0, device_, job_.context.threads, [&](std::int64_t w) {
               const Tensor rows = rows_of(mix(load(w)));
               return Pairs{rows, rows.narrow(1, 0, 0)};
             }).fitted.gram;
    for (const Kept& units : choices) {
      Kept columns;
      for (const std::int64_t unit : units)
        for (std::int64_t i = 0; i < width; ++i) columns.push_back(unit * width + i);
      const Tensor index = torch::tensor(columns, torch::kLong);
      Tensor kept = whole.index_select(1, index);
      if (plan_.refit) {
        const Tensor own = gram.index_select(0, index).index_select(1, index).contiguous();
        const Tensor cross = torch::matmul(whole, gram.index_select(1, index)).contiguous();
        const Refit solver(own.data_ptr<double>(), own.size(0), plan_.damping, module);
        const Tensor prior = kept.to(torch::kFloat).contiguous();
        auto solved = solver.solve(prior.data_ptr<float>(), cross.data_ptr<double>(), whole.size(0));
        kept = torch::from_blob(solved.data(), kept.sizes(), torch::kFloat).to(torch::kDouble);
      }
      out.push_back({module, torch::zeros_like(whole).index_copy(1, index, kept).to(torch::kFloat).to(device_)});
    }
  };
  std::vector<Kept> neurons, heads;
  for (const std::int64_t n : levels_.ffn) neurons.push_back(most_important(measured.neurons.at(0), n));
  for (const std::int64_t n : levels_.kv_heads) heads.push_back(most_important(measured.kv_heads, n));
  const auto attention = [&](const Tensor& hidden) {
    return block->attention_mix(block->attention_input(hidden), rope_);
  };
  add("mlp.down_proj", neurons, 1, [&](const Tensor& hidden) {
    const Tensor read = block->parallel_residual() ? hidden : block->attention_output(hidden, attention(hidden));
    return block->mlp_mix(block->mlp_input(read));
  });
  add("self_attn.o_proj", heads, group * config_.head_dim, attention);
  if (levels_.without) out.push_back({});
  return out;
}

std::vector<double> Meter::divergences(int layer, DecoderBlock& block, const std::vector<Candidate>& candidates) {
  std::vector<WindowFigures> figures(candidates.size());
  const std::size_t together = side_by_side(config_, job_.windows.count, job_.windows.length);
  std::int64_t window = 0;
  for (const auto& shards : groups_) {
    Stream before;
    for (const Tensor& shard : shards) {
      std::vector<Tensor> rows;
      for (std::int64_t i = 0; i < shard.size(0); ++i) rows.push_back(load(window++));
      before.push_back(torch::cat(rows, 0));
    }
    const auto forward = [&] {
      Stream after(before.size());
      for_each_shard(device_, job_.context.threads, before.size(),
                     [&](std::size_t s) { after[s] = block->forward(before[s], rope_); });
      return after;
    };
    for (std::size_t first = 0; first < candidates.size(); first += together) {
      throw_if_interrupted("prune", "run the same command again");
      const std::size_t end = std::min(candidates.size(), first + together);
      std::vector<Stream> streams = {forward()};  // the original
      for (std::size_t c = first; c < end; ++c) {
        if (candidates[c].module.empty()) {
          streams.push_back(before);
          continue;
        }
        Tensor there = block->weight(candidates[c].module);
        const Tensor own = there.detach().clone();
        there.copy_(candidates[c].weight);
        streams.push_back(forward());
        there.copy_(own);
      }
      std::vector<Stream*> moving;
      std::vector<const Stream*> others;
      for (Stream& stream : streams) moving.push_back(&stream);
      for (std::size_t c = 1; c < streams.size(); ++c) others.push_back(&streams[c]);
      for (int next = layer + 1; next < config_.num_layers; ++next)
        advance(job_.model, next, rope_, moving, device_, job_.context.threads);
      const auto measured =
          compare_streams(streams[0], head_, others, head_, shards, device_, job_.context.threads);
      for (std::size_t c = first; c < end; ++c) figures[c].append(measured[c - first]);
    }
  }
  std::vector<double> out;
  for (std::size_t c = 0; c < figures.size(); ++c)
    out.push_back(finite_divergence(figures[c].divergence().kl,
                                    "the model " + (candidates[c].module.empty()
                                                        ? "without block " + std::to_string(layer)
                                                        : "with less of block " + std::to_string(layer) + "'s " +
                                                              candidates[c].module)));
  return out;
}

std::vector<BlockScores> Meter::run(const std::vector<int>& layers) {
  const SingleThreadedTorch single;
  const torch::NoGradGuard no_grad;
  hidden_ = Activations(job_.windows.count, job_.windows.length * config_.hidden_size, job_.spill);
  std::int64_t window = 0;
  for (const auto& shards : groups_)
    for (const Tensor& shard : embed_stream(job_.model, shards, device_))
      for (std::int64_t i = 0; i < shard.size(0); ++i, ++window)
        hidden_.write(window, shard[i].to(torch::kCPU).contiguous().data_ptr<float>());
  job_.context.progress->begin("scores of blocks", config_.num_layers);
  std::vector<BlockScores> out;
  for (int layer = 0; layer < config_.num_layers && out.size() < layers.size(); ++layer) {
    DecoderBlock block = load_block(job_.model, layer, device_);
    if (layers[out.size()] == layer) {
      if (!known_.contains(key(layer))) {
        known_[key(layer)] = divergences(layer, block, candidates(block));
        write_text(file_, known_.dump());
      }
      const auto all = known_.at(key(layer)).get<std::vector<double>>();
      const auto ffn = static_cast<std::ptrdiff_t>(levels_.ffn.size());
      const auto heads = static_cast<std::ptrdiff_t>(levels_.kv_heads.size());
      out.push_back({{all.begin(), all.begin() + ffn},
                     {all.begin() + ffn, all.begin() + ffn + heads},
                     levels_.without ? all.back() : 0.0});
    }
    for_each_shard(device_, job_.context.threads, static_cast<std::size_t>(job_.windows.count), [&](std::size_t w) {
      throw_if_interrupted("prune", "run the same command again");
      const Tensor after = block->forward(load(static_cast<std::int64_t>(w)), rope_);
      hidden_.write(static_cast<std::int64_t>(w), after.to(torch::kCPU).contiguous().data_ptr<float>());
    });
    job_.context.progress->update(layer + 1);
  }
  job_.context.progress->end();
  return out;
}

}  // namespace

std::vector<BlockScores> measure_scores(PruneJob& job, const CutPlan& plan, const std::vector<int>& layers,
                                        const ScoreLevels& levels) {
  return Meter(job, plan, levels).run(layers);
}

double finite_divergence(double kl, const std::string& model) {
  if (std::isfinite(kl)) return kl;
  throw failure("prune", "finite predictions of " + model, "a divergence of " + std::to_string(kl),
                "remove less; where every cut ends so, the model's own predictions are not finite");
}

std::uint64_t scores_peak_bytes(const ModelConfig& config, const ScoreLevels& levels, std::int64_t windows,
                                std::int64_t length, bool refit, const fs::path& spill) {
  const std::size_t count = levels.ffn.size() + levels.kv_heads.size() + (levels.without ? 1 : 0);
  const std::size_t together = std::min(count, side_by_side(config, windows, length));
  const auto wide = std::max(levels.ffn.empty() ? 0 : config.intermediate_size,
                             levels.kv_heads.empty() ? 0 : config.num_heads * config.head_dim);
  std::uint64_t bytes = compare_peak_bytes(config, windows, length, static_cast<std::int64_t>(together)) +
                        (static_cast<std::uint64_t>(together) + 2) * (config.has_experts() ? 2 : 1) *
                            stream_bytes(config, windows, length);
  bytes += block_bytes(config) +
           4 * static_cast<std::uint64_t>(config.hidden_size) *
               (levels.ffn.size() * static_cast<std::uint64_t>(config.intermediate_size) +
                levels.kv_heads.size() * static_cast<std::uint64_t>(config.num_heads * config.head_dim));
  if (refit)  // the moments, those of what stays, their factor, and both sides of the equations in double
    bytes += collect_bytes(windows, length, wide, 0) + 24 * static_cast<std::uint64_t>(wide * wide) +
             32 * static_cast<std::uint64_t>(wide * config.hidden_size);
  if (spill.empty()) bytes += 4 * static_cast<std::uint64_t>(windows * length * config.hidden_size);
  return bytes;
}

double scores_passes(const ModelConfig& config, const ScoreLevels& levels, std::int64_t layers) {
  const auto count = static_cast<double>(levels.ffn.size() + levels.kv_heads.size() + (levels.without ? 1 : 0));
  const double part = static_cast<double>(layers) / static_cast<double>(config.num_layers);
  // Every candidate goes through half of the blocks on average, and the original beside it; moments and rankings.
  return 1 + part * (3 + (count + 1) * static_cast<double>(config.num_layers) / 2);
}

std::vector<std::int64_t> even_levels(std::int64_t all, std::int64_t step, int count) {
  std::vector<std::int64_t> out;
  for (int level = 1; level <= count; ++level) {
    const std::int64_t value = std::max(step, (all * (count + 1 - level) / (count + 1) + step / 2) / step * step);
    if (value < all && (out.empty() || value < out.back())) out.push_back(value);
  }
  return out;
}

ScoreLevels score_levels(const ModelConfig& config, std::int64_t multiple, bool ffn, bool heads, bool without) {
  constexpr int kLevels = 7;
  ScoreLevels levels;
  levels.without = without && config.num_layers > 1;
  if (ffn && !config.has_experts()) levels.ffn = even_levels(config.intermediate_size, multiple, kLevels);
  if (!heads || find_family(config.family)->heads_share_width) return levels;
  Shape shape = shape_of(config);
  const std::int64_t group = shape.heads / shape.kv_heads;
  for (const std::int64_t count : even_levels(config.num_kv_heads, 1, kLevels))
    if (config.num_heads * config.head_dim % multiple != 0 || count * group * config.head_dim % multiple == 0)
      levels.kv_heads.push_back(count);
  return levels;
}

double level_cost(std::int64_t all, const std::vector<std::int64_t>& levels, const std::vector<double>& scores,
                  std::int64_t n) {
  double upper = 0;  // at `above`
  std::int64_t above = all;
  if (n >= all) return 0;
  for (std::size_t i = 0; i < levels.size(); ++i) {
    const double lower = std::max(upper, scores[i]);
    if (n >= levels[i])
      return lower + (upper - lower) * static_cast<double>(n - levels[i]) / static_cast<double>(above - levels[i]);
    upper = lower;
    above = levels[i];
  }
  return std::numeric_limits<double>::infinity();
}

}  // namespace pare
