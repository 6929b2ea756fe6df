#include "prune/measure.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <mutex>
#include <thread>

#include "core/error.h"
#include "model/fused.h"
#include "model/threads.h"

namespace pare {
namespace {

using torch::Tensor;

constexpr std::int64_t kShardTokens = 512;
constexpr std::int64_t kSlice = 2048;  // ids whose logits are held at a time
constexpr std::int64_t kRows = 512;    // positions of a window likewise: 8 MiB in double

// Sum and sum of squares of per-window means.
struct Spread {
  double sum = 0, square = 0;
  void add(double x) {
    sum += x;
    square += x * x;
  }
  double mean(double n) const { return sum / n; }
  double error(double n) const {
    if (n < 2) return 0;
    return std::sqrt(std::max(square - sum * sum / n, 0.0) / (n - 1) / n);
  }
};

// Softmax over slices that arrive one after the other: sum of exp(logit - largest so far), [rows, 1].
struct Partition {
  Tensor largest, sum;
  // What earlier sums are multiplied by; afterwards `weights` holds exp(logits - largest).
  Tensor add(const Tensor& logits, Tensor& weights) {
    const Tensor peak = logits.amax(1, true);
    const Tensor next = largest.defined() ? torch::maximum(largest, peak) : peak;
    weights = (logits - next).exp();
    const Tensor factor = largest.defined() ? (largest - next).exp() : torch::zeros_like(next);
    sum = largest.defined() ? sum * factor + weights.sum(1, true) : weights.sum(1, true);
    largest = next;
    return factor;
  }
  Tensor log() const { return largest + sum.log(); }
};

// Logits at the target where it lies in the slice, else 0.
Tensor at_target(const Tensor& logits, const Tensor& target, std::int64_t first) {
  const Tensor inside = target.ge(first).logical_and(target.lt(first + logits.size(1)));
  return logits.gather(1, (target - first).clamp(0, logits.size(1) - 1)) * inside;
}

}  // namespace

void for_each_shard(const torch::Device& device, int threads, std::size_t count,
                    const std::function<void(std::size_t)>& work) {
  if (!device.is_cpu()) {
    const torch::NoGradGuard no_grad;
    for (std::size_t i = 0; i < count; ++i) work(i);
    return;
  }
  const SingleThreadedTorch single;
  if (threads <= 0) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  std::atomic<std::size_t> next{0};
  std::exception_ptr problem;
  std::mutex problem_mutex;
  const auto body = [&] {
    const torch::NoGradGuard no_grad;
    try {
      for (std::size_t i = next++; i < count; i = next++) work(i);
    } catch (...) {
      const std::lock_guard lock(problem_mutex);
      if (!problem) problem = std::current_exception();
      next = count;
    }
  };
  std::vector<std::thread> pool;
  const std::size_t workers = std::min(static_cast<std::size_t>(threads), count);
  for (std::size_t i = 1; i < workers; ++i) pool.emplace_back(body);
  body();
  for (std::thread& thread : pool) thread.join();
  if (problem) std::rethrow_exception(problem);
}

std::vector<Tensor> window_shards(const CalibrationWindows& windows, const torch::Device& device) {
  const std::int64_t step = std::max<std::int64_t>(1, kShardTokens / windows.length);
  std::vector<Tensor> shards;
  for (std::int64_t first = 0; first < windows.count; first += step) {
    const std::int64_t count = std::min(step, windows.count - first);
    const std::int32_t* ids = windows.ids.data() + first * windows.length;
    Tensor shard = torch::empty({count, windows.length}, torch::kLong);
    std::copy(ids, ids + count * windows.length, shard.data_ptr<std::int64_t>());
    shards.push_back(shard.to(device));
  }
  return shards;
}

std::vector<std::vector<Tensor>> shard_groups(const CalibrationWindows& windows, const torch::Device& device) {
  std::vector<std::vector<Tensor>> groups;
  std::int64_t tokens = kGroupTokens;
  for (const Tensor& shard : window_shards(windows, device)) {
    if (tokens + shard.numel() > kGroupTokens) {
      groups.emplace_back();
      tokens = 0;
    }
    tokens += shard.numel();
    groups.back().push_back(shard);
  }
  return groups;
}

std::int64_t group_tokens(std::int64_t windows, std::int64_t length) {
  return std::min(windows * length, std::max({length, kGroupTokens}));
}

Stream embed_stream(const Checkpoint& model, const std::vector<Tensor>& shards, const torch::Device& device) {
  const std::int64_t width = model.config().hidden_size;
  Tensor positions;
  if (model.config().learned_positions) positions = load_tensor(model, "model.embed_positions.weight", device);
  Stream stream;
  for (const Tensor& shard : shards) {
    const Tensor ids = shard.to(torch::kCPU).contiguous();
    Tensor hidden = torch::empty({ids.size(0), ids.size(1), width}, torch::kFloat);
    for (std::int64_t i = 0; i < ids.numel(); ++i)
      model.read_rows_f32("model.embed_tokens.weight", ids.data_ptr<std::int64_t>()[i], 1,
                          hidden.data_ptr<float>() + i * width);
    stream.push_back(hidden.mul_(model.config().embedding_scale).to(device));
    if (!positions.defined()) continue;
    require_positions(model.config(), ids.size(1), "calibration windows");
    stream.back() = stream.back() + positions.narrow(0, 0, ids.size(1));
  }
  model.release("model.embed_tokens.weight");
  return stream;
}

void advance(const Checkpoint& model, int layer, const RopeTables& rope, const std::vector<Stream*>& streams,
             const torch::Device& device, int threads) {
  if (streams.empty()) return;
  DecoderBlock block = load_block(model, layer, device, false);
  const ModelConfig& config = model.config();
  const std::size_t shards = streams[0]->size();
  const auto each = [&](const std::function<void(Tensor&, std::size_t)>& work) {
    for_each_shard(device, threads, streams.size() * shards, [&](std::size_t i) {
      throw_if_interrupted("prune", "run the same command again");
      work((*streams[i / shards])[i % shards], i);
    });
  };
  if (!config.has_experts()) return each([&](Tensor& hidden, std::size_t) { hidden = block->forward(hidden, rope); });
  std::vector<Tensor> sums(streams.size() * shards);  // of what the experts so far add
  each([&](Tensor& hidden, std::size_t i) {
    hidden = block->attention_output(hidden, block->attention_mix(block->attention_input(hidden), rope));
    sums[i] = torch::zeros({hidden.size(0) * hidden.size(1), config.hidden_size}, hidden.options());
  });
  for (std::int64_t expert = 0; expert < config.experts.count; ++expert) {
    load_expert(model, block, expert, device);
    each([&](Tensor& hidden, std::size_t i) {
      const Tensor normed = block->mlp_input(hidden);
      sums[i] = block->add_expert(sums[i], normed, block->expert_shares(normed), expert);
    });
    drop_expert(block, config, expert);
  }
  each([&](Tensor& hidden, std::size_t i) { hidden = residual_add(hidden, sums[i].view(hidden.sizes())); });
}

Head::Head(const Checkpoint& model, const torch::Device& device)
    : model_(&model),
      name_(model.config().tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight"),
      norm_(load_tensor(model, "model.norm.weight", device)) {
  if (model.config().layer_norm) norm_bias_ = load_tensor(model, "model.norm.bias", device);
  if (!device.is_cpu()) resident_ = load_tensor(model, name_, device);
}

Tensor Head::normed(const Tensor& hidden) const {
  return apply_norm(model_->config(), hidden, norm_, norm_bias_, torch::kFloat);
}

Tensor Head::logits(const Tensor& normed, std::int64_t first, std::int64_t count) const {
  Tensor rows;
  if (resident_.defined()) {
    rows = resident_.narrow(0, first, count);
  } else {
    rows = torch::empty({count, model_->config().hidden_size}, torch::kFloat);
    model_->read_rows_f32(name_, first, count, rows.data_ptr<float>());
  }
  Tensor logits = torch::matmul(normed, rows.t()).to(torch::kDouble);
  const double cap = model_->config().final_softcap;
  return cap > 0 ? torch::tanh(logits / cap) * cap : logits;
}

void WindowFigures::append(const WindowFigures& more) {
  kl.insert(kl.end(), more.kl.begin(), more.kl.end());
  loss.insert(loss.end(), more.loss.begin(), more.loss.end());
  original_loss.insert(original_loss.end(), more.original_loss.begin(), more.original_loss.end());
}

Divergence WindowFigures::divergence() const {
  const auto spread = [](const std::vector<double>& values) {
    Spread sums;
    for (const double value : values) sums.add(value);
    return sums;
  };
  const auto n = static_cast<double>(kl.size());
  const Spread k = spread(kl), l = spread(loss), o = spread(original_loss);
  return {k.mean(n), k.error(n), l.mean(n), l.error(n), o.mean(n), o.error(n)};
}

std::vector<WindowFigures> compare_streams(const Stream& original, const Head& original_head,
                                           const std::vector<const Stream*>& others, const Head& other_head,
                                           const std::vector<Tensor>& shards, const torch::Device& device,
                                           int threads) {
  std::vector<std::pair<std::size_t, std::int64_t>> windows;  // shard, window in it
  for (std::size_t s = 0; s < shards.size(); ++s)
    for (std::int64_t w = 0; w < shards[s].size(0); ++w) windows.emplace_back(s, w);
  std::vector<WindowFigures> result(others.size());
  for (WindowFigures& figures : result)
    for (std::vector<double>* list : {&figures.kl, &figures.loss, &figures.original_loss})
      list->resize(windows.size());
  const std::int64_t vocab = original_head.vocab_size();
  for_each_shard(device, threads, windows.size(), [&](std::size_t i) {
    const auto [s, w] = windows[i];
    const std::int64_t scored = shards[s].size(1) - 1;
    for (std::int64_t top = 0; top < scored; top += kRows) {
      throw_if_interrupted("prune", "run the same command again");
      const std::int64_t count = std::min(kRows, scored - top);
      const Tensor target = shards[s][w].narrow(0, top + 1, count).unsqueeze(1);
      const Tensor hidden = original_head.normed(original[s][w].narrow(0, top, count));
      Partition p;
      Tensor wanted = torch::zeros({count, 1}, hidden.options().dtype(torch::kDouble));
      struct Other {
        Tensor hidden, wanted, cross;  // cross: sum of exp(log p - largest) (logit of p - logit of q)
        Partition q;
      };
      std::vector<Other> rest;
      for (const Stream* stream : others)
        rest.push_back({other_head.normed((*stream)[s][w].narrow(0, top, count)), torch::zeros_like(wanted),
                        torch::zeros_like(wanted), {}});
      for (std::int64_t first = 0; first < vocab; first += kSlice) {
        const std::int64_t width = std::min(kSlice, vocab - first);
        const Tensor a = original_head.logits(hidden, first, width);
        Tensor weights, unused;
        const Tensor factor = p.add(a, weights);
        wanted += at_target(a, target, first);
        for (Other& other : rest) {
          const Tensor b = other_head.logits(other.hidden, first, width);
          other.cross = other.cross * factor + (weights * (a - b)).sum(1, true);
          other.q.add(b, unused);
          other.wanted += at_target(b, target, first);
        }
      }
      const auto mean = [scored](const Tensor& x) { return x.sum().item<double>() / static_cast<double>(scored); };
      for (std::size_t k = 0; k < rest.size(); ++k) {
        result[k].kl[i] += mean(rest[k].cross / p.sum - p.log() + rest[k].q.log());
        result[k].loss[i] += mean(rest[k].q.log() - rest[k].wanted);
        result[k].original_loss[i] += mean(p.log() - wanted);
      }
    }
  });
  return result;
}

Divergence compare_models(const Checkpoint& original, const Checkpoint& other, const CalibrationWindows& windows,
                          const torch::Device& device, Context& context) {
  const Checkpoint* models[2] = {&original, &other};
  const Head heads[2] = {Head(original, device), Head(other, device)};
  const auto groups = shard_groups(windows, device);
  int done = 0;
  context.progress->begin("measure", static_cast<std::int64_t>(groups.size()) *
                                         (original.config().num_layers + other.config().num_layers));
  WindowFigures figures;
  for (const auto& shards : groups) {
    Stream streams[2];
    for (int side = 0; side < 2; ++side) {
      const ModelConfig& config = models[side]->config();
      const RopeTables rope = rope_tables(config, windows.length, device);
      streams[side] = embed_stream(*models[side], shards, device);
      for (int layer = 0; layer < config.num_layers; ++layer) {
        advance(*models[side], layer, rope, {&streams[side]}, device, context.threads);
        context.progress->update(++done);
      }
    }
    figures.append(
        compare_streams(streams[0], heads[0], {&streams[1]}, heads[1], shards, device, context.threads)[0]);
  }
  context.progress->end();
  return figures.divergence();
}

std::uint64_t compare_peak_bytes(const ModelConfig& config, std::int64_t windows, std::int64_t length,
                                 std::int64_t others) {
  const std::int64_t tokens = group_tokens(windows, length), hidden = config.hidden_size;
  const std::int64_t shard = std::max(length, std::min(tokens, kShardTokens));
  const auto threads = std::min<std::int64_t>(std::max(1u, std::thread::hardware_concurrency()),
                                              (tokens + shard - 1) / shard * (others + 1));
  WalkOptions none;
  none.original_stream = false;
  const std::uint64_t computing = static_cast<std::uint64_t>(threads) * block_work_bytes(config, shard);
  // Per thread: slices of both heads and of their logits, normed rows of all streams.
  const std::int64_t rows = std::min(kRows, length);
  const std::int64_t slices = std::min(kSlice, config.vocab_size) * (2 * 4 * hidden + 8 * 8 * rows);
  const auto comparing = static_cast<std::uint64_t>(threads * (slices + 4 * rows * hidden * (others + 1)));
  const auto streams = static_cast<std::uint64_t>((config.has_experts() ? 3 : 2) * 4 * tokens * hidden);
  return streams + std::max(walk_peak_bytes(config, 0, length, none) + computing, comparing);
}

}  // namespace pare
