// Channels of the residual stream that stay, and blocks where nothing is measured.
#include <numeric>

#include "core/error.h"
#include "prune/cutter.h"
#include "prune/masks.h"
#include "prune/measure.h"
#include "prune/refit.h"

namespace pare {
namespace {

using torch::Tensor;

constexpr std::int64_t kRows = 4096;  // of an embedding or a head, held at a time

// += squares of the columns of a tensor whose last dimension is the channels.
void add_column_squares(const Checkpoint& model, const std::string& name, std::vector<double>& sums) {
  const TensorSpec& spec = model.spec(name);
  const std::int64_t rows = spec.shape[0], cols = spec.shape[1];
  std::vector<float> values(static_cast<std::size_t>(std::min(rows, kRows) * cols));
  for (std::int64_t first = 0; first < rows; first += kRows) {
    const std::int64_t count = std::min(kRows, rows - first);
    model.read_rows_f32(name, first, count, values.data());
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t j = 0; j < cols; ++j) {
        const double w = values[static_cast<std::size_t>(i * cols + j)];
        sums[static_cast<std::size_t>(j)] += w * w;
      }
  }
  model.release(name);
}

void add_row_squares(const Checkpoint& model, const TensorSpec& spec, std::vector<double>& sums) {
  const std::vector<float> values = model.read_f32(spec.name);
  for (std::int64_t i = 0; i < spec.shape[0]; ++i)
    for (std::int64_t j = 0; j < spec.shape[1]; ++j) {
      const double w = values[static_cast<std::size_t>(i * spec.shape[1] + j)];
      sums[static_cast<std::size_t>(i)] += w * w;
    }
  model.release(spec.name);
}

std::string head_name(const ModelConfig& config) {
  return config.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
}

bool writes_channels(const ModelConfig& config, const TensorSpec& spec) {
  return spec.role == TensorRole::kLinear && spec.shape[0] == config.hidden_size &&
         (spec.module.ends_with("o_proj") || spec.module.ends_with("down_proj") ||
          spec.module.ends_with("." + config.experts.down));
}

// Squares of the weights that read the output of a block's first or second norm, by channel.
std::vector<double> reader_squares(const Checkpoint& model, int layer, bool attention) {
  const ModelConfig& config = model.config();
  std::vector<double> sums(static_cast<std::size_t>(config.hidden_size), 0.0);
  for (const TensorSpec& spec : model.tensors())
    if (spec.layer == layer && spec.role == TensorRole::kLinear && !writes_channels(config, spec) &&
        spec.module.starts_with("self_attn.") == attention)
      add_column_squares(model, spec.name, sums);
  return sums;
}

// E[x_j^2], x the hidden state as a norm without weights leaves it, [hidden_size] for each of `at` (block numbers; the
// number of blocks: before the last norm).
std::vector<std::vector<double>> normed_energy(PruneJob& job, const std::vector<int>& at) {
  const ModelConfig& config = job.model.config();
  const torch::Device device = parse_device(job.options.get<std::string>("device"));
  const RopeTables rope = rope_tables(config, job.windows.length, device);
  const Tensor plain =
      config.norm_adds_one ? torch::zeros({config.hidden_size}) : torch::ones({config.hidden_size});
  const Tensor weight = plain.to(device), bias = config.layer_norm ? torch::zeros_like(weight) : Tensor();
  std::vector<std::vector<double>> energy(at.size(), std::vector<double>(static_cast<std::size_t>(config.hidden_size)));
  const auto groups = shard_groups(job.windows, device);
  job.context.progress->begin("channels", static_cast<std::int64_t>(groups.size()) * config.num_layers);
  std::int64_t done = 0;
  for (const auto& shards : groups) {
    Stream stream = embed_stream(job.model, shards, device);
    for (int layer = 0; layer <= config.num_layers; ++layer) {
      for (std::size_t k = 0; k < at.size(); ++k) {
        if (at[k] != layer) continue;
        std::vector<Tensor> sums(stream.size());
        for_each_shard(device, job.context.threads, stream.size(), [&](std::size_t s) {
          const Tensor x = apply_norm(config, stream[s], weight, bias, torch::kFloat).flatten(0, 1);
          sums[s] = x.square().sum(0, false, torch::kDouble).cpu();
        });
        for (const Tensor& sum : sums)
          for (std::size_t j = 0; j < energy[k].size(); ++j) energy[k][j] += sum.data_ptr<double>()[j];
      }
      if (layer == config.num_layers) break;
      advance(job.model, layer, rope, {&stream}, device, job.context.threads);
      job.context.progress->update(++done);
    }
  }
  job.context.progress->end();
  return energy;
}

std::vector<double> scaled_to_one(std::vector<double> values) {
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  for (double& value : values) value = sum > 0 ? value / sum : 0.0;
  return values;
}

std::vector<double> random_importance(const PruneJob& job, const std::string& name, std::int64_t count) {
  const auto scores = random_scores(job.context.seed, name, 1, count);
  return {scores.begin(), scores.end()};
}

}  // namespace

Kept choose_channels(PruneJob& job, const std::vector<int>& layers, std::int64_t keep, RankBy rank) {
  const ModelConfig& config = job.model.config();
  const auto width = static_cast<std::size_t>(config.hidden_size);
  if (keep == config.hidden_size) return all_of(keep);
  if (rank == RankBy::kRandom) return most_important(random_importance(job, "channels", config.hidden_size), keep);
  std::vector<double> importance(width, 0.0);
  if (rank == RankBy::kWeights) {
    add_column_squares(job.model, "model.embed_tokens.weight", importance);
    if (!config.tie_word_embeddings) add_column_squares(job.model, "lm_head.weight", importance);
    for (const TensorSpec& spec : job.model.tensors()) {
      if (spec.role != TensorRole::kLinear || spec.layer < 0) continue;
      if (writes_channels(config, spec)) add_row_squares(job.model, spec, importance);
      else add_column_squares(job.model, spec.name, importance);
    }
    return most_important(importance, keep);
  }
  const std::string blocks = std::to_string(layers.size());
  const fs::path file = job.state / ("channels-" + std::to_string(keep) + "-for-" + blocks + ".json");
  if (fs::exists(file)) return read_json(file).get<Kept>();
  std::vector<int> at = layers;
  at.push_back(static_cast<int>(config.num_layers));
  const auto energy = normed_energy(job, at);
  const auto add_norm = [&](const std::string& norm, const std::vector<double>& x, std::vector<double> readers) {
    const std::vector<float> weight = job.model.read_f32(norm);
    for (std::size_t j = 0; j < width; ++j) {
      const double factor = static_cast<double>(weight[j]) + (config.norm_adds_one ? 1 : 0);
      readers[j] *= x[j] * factor * factor;
    }
    readers = scaled_to_one(std::move(readers));
    for (std::size_t j = 0; j < width; ++j) importance[j] += readers[j];
  };
  for (std::size_t k = 0; k < layers.size(); ++k) {
    const std::string mlp_norm = config.post_norms ? "pre_feedforward_layernorm" : "post_attention_layernorm";
    add_norm(block_tensor(layers[k], "input_layernorm.weight"), energy[k], reader_squares(job.model, layers[k], true));
    add_norm(block_tensor(layers[k], mlp_norm + ".weight"), energy[k], reader_squares(job.model, layers[k], false));
  }
  std::vector<double> head(width, 0.0);
  add_column_squares(job.model, head_name(config), head);
  add_norm("model.norm.weight", energy.back(), std::move(head));
  const Kept kept = most_important(importance, keep);
  write_text(file, Json(kept).dump());
  return kept;
}

std::vector<int> choose_blocks_unmeasured(PruneJob& job, int keep, RankBy rank) {
  const auto count = job.model.config().num_layers;
  std::vector<double> importance = random_importance(job, "blocks", count);
  if (rank == RankBy::kWeights) {
    std::fill(importance.begin(), importance.end(), 0.0);
    for (const TensorSpec& spec : job.model.tensors()) {
      if (spec.role != TensorRole::kLinear || spec.layer < 0) continue;
      for (const float w : job.model.read_f32(spec.name))
        importance[static_cast<std::size_t>(spec.layer)] += static_cast<double>(w) * static_cast<double>(w);
      job.model.release(spec.name);
    }
  }
  const Kept kept = most_important(importance, keep);
  return {kept.begin(), kept.end()};
}

}  // namespace pare
