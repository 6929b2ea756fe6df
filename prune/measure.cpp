#include "prune/measure.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <mutex>
#include <thread>

#include "core/error.h"
#include "model/threads.h"

namespace pare {
namespace {

using torch::Tensor;

constexpr std::int64_t kShardTokens = 2048;
constexpr std::int64_t kLogitElements = std::int64_t{1} << 21;  // per chunk and thread: 16 MiB in double

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

Tensor log_probabilities(const Tensor& hidden, const Head& head) {  // [rows, width] -> [rows, vocab], double
  const Tensor centred = head.norm_bias.defined() ? hidden - hidden.mean(-1, true) : hidden;
  const Tensor inverse = torch::rsqrt(centred.square().mean(-1, true) + head.eps);
  Tensor normed = centred * inverse * head.norm;
  if (head.norm_bias.defined()) normed = normed + head.norm_bias;
  Tensor logits = torch::matmul(normed, head.weight.t()).to(torch::kDouble);
  if (head.softcap > 0) logits = torch::tanh(logits / head.softcap) * head.softcap;
  return torch::log_softmax(logits, -1);
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

Stream embed_stream(const Checkpoint& model, const std::vector<Tensor>& shards, const torch::Device& device) {
  const torch::NoGradGuard no_grad;
  const Tensor table = load_tensor(model, "model.embed_tokens.weight", device);
  Tensor positions;
  if (model.config().learned_positions) positions = load_tensor(model, "model.embed_positions.weight", device);
  Stream stream;
  for (const Tensor& ids : shards) {
    stream.push_back(table.index_select(0, ids.reshape({-1})).reshape({ids.size(0), ids.size(1), -1}) *
                     model.config().embedding_scale);
    if (!positions.defined()) continue;
    require_positions(model.config(), ids.size(1), "calibration windows");
    stream.back() = stream.back() + positions.narrow(0, 0, ids.size(1));
  }
  return stream;
}

void advance(DecoderBlock& block, const RopeTables& rope, const std::vector<Stream*>& streams,
             const torch::Device& device, int threads) {
  if (streams.empty()) return;
  const std::size_t shards = streams[0]->size();
  for_each_shard(device, threads, streams.size() * shards, [&](std::size_t i) {
    throw_if_interrupted("prune", "run the same command again");
    Tensor& hidden = (*streams[i / shards])[i % shards];
    hidden = block->forward(hidden, rope);
  });
}

Head load_head(const Checkpoint& model, const torch::Device& device) {
  const bool tied = model.config().tie_word_embeddings;
  return {norm_factor(model.config(), load_tensor(model, "model.norm.weight", device)),
          model.config().layer_norm ? load_tensor(model, "model.norm.bias", device) : Tensor(),
          load_tensor(model, tied ? "model.embed_tokens.weight" : "lm_head.weight", device),
          model.config().rms_norm_eps, model.config().final_softcap};
}

std::vector<Divergence> compare_streams(const Stream& original, const Head& original_head,
                                        const std::vector<const Stream*>& others, const Head& other_head,
                                        const std::vector<Tensor>& shards, const torch::Device& device, int threads) {
  struct Sums {  // of one window
    double original_loss = 0;
    std::vector<double> kl, loss;
  };
  std::vector<std::pair<std::size_t, std::int64_t>> windows;  // shard, window in it
  for (std::size_t s = 0; s < shards.size(); ++s)
    for (std::int64_t w = 0; w < shards[s].size(0); ++w) windows.emplace_back(s, w);
  std::vector<Sums> sums(windows.size());
  const std::int64_t step = std::max<std::int64_t>(1, kLogitElements / original_head.weight.size(0));
  for_each_shard(device, threads, windows.size(), [&](std::size_t i) {
    throw_if_interrupted("prune", "run the same command again");
    const auto [s, w] = windows[i];
    Sums& out = sums[i];
    out.kl.assign(others.size(), 0.0);
    out.loss.assign(others.size(), 0.0);
    const std::int64_t scored = shards[s].size(1) - 1;
    for (std::int64_t first = 0; first < scored; first += step) {
      const std::int64_t count = std::min(step, scored - first);
      const Tensor target = shards[s][w].narrow(0, first + 1, count).unsqueeze(1);
      const Tensor log_p = log_probabilities(original[s][w].narrow(0, first, count), original_head);
      const Tensor p = log_p.exp();
      out.original_loss -= log_p.gather(1, target).sum().item<double>() / static_cast<double>(scored);
      for (std::size_t k = 0; k < others.size(); ++k) {
        const Tensor log_q = log_probabilities((*others[k])[s][w].narrow(0, first, count), other_head);
        out.kl[k] += (p * (log_p - log_q)).sum().item<double>() / static_cast<double>(scored);
        out.loss[k] -= log_q.gather(1, target).sum().item<double>() / static_cast<double>(scored);
      }
    }
  });
  std::vector<Divergence> result(others.size());
  const auto n = static_cast<double>(sums.size());
  for (std::size_t k = 0; k < others.size(); ++k) {
    Spread kl, loss, original_loss;
    for (const Sums& window : sums) {
      kl.add(window.kl[k]);
      loss.add(window.loss[k]);
      original_loss.add(window.original_loss);
    }
    result[k] = {kl.mean(n),   kl.error(n),           loss.mean(n),
                 loss.error(n), original_loss.mean(n), original_loss.error(n)};
  }
  return result;
}

Divergence compare_models(const Checkpoint& original, const Checkpoint& other, const CalibrationWindows& windows,
                          const torch::Device& device, Context& context) {
  const std::vector<Tensor> shards = window_shards(windows, device);
  Stream streams[2];
  int done = 0;
  const Checkpoint* models[2] = {&original, &other};
  context.progress->begin("measure", original.config().num_layers + other.config().num_layers);
  for (int side = 0; side < 2; ++side) {
    const ModelConfig& config = models[side]->config();
    const RopeTables rope = rope_tables(config, windows.length, device);
    streams[side] = embed_stream(*models[side], shards, device);
    for (int layer = 0; layer < config.num_layers; ++layer) {
      DecoderBlock block = load_block(*models[side], layer, device);
      advance(block, rope, {&streams[side]}, device, context.threads);
      context.progress->update(++done);
    }
  }
  const Divergence result = compare_streams(streams[0], load_head(original, device), {&streams[1]},
                                            load_head(other, device), shards, device, context.threads)[0];
  context.progress->end();
  return result;
}

}  // namespace pare
