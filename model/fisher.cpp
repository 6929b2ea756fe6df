#include "model/fisher.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "model/decoder.h"
#include "model/sampled_labels.h"
#include "model/shards.h"
#include "model/threads.h"

namespace pare {
namespace {

using torch::Tensor;

void normalize(std::vector<float>& weights) {
  std::vector<float> sorted = weights;
  const auto at = static_cast<std::ptrdiff_t>(kFisherClip * static_cast<double>(sorted.size() - 1));
  std::nth_element(sorted.begin(), sorted.begin() + at, sorted.end());
  const float limit = sorted[static_cast<std::size_t>(at)];
  double sum = 0;
  for (float& w : weights) {
    w = std::min(w, limit);
    sum += static_cast<double>(w);
  }
  const double mean = sum / static_cast<double>(weights.size());
  for (float& w : weights) {
    w = static_cast<float>(
        mean > 0 ? (1 - kFisherFloor) * static_cast<double>(w) / mean + kFisherFloor : 1.0);
  }
}

}  // namespace

TokenWeights fisher_weights(const Checkpoint& checkpoint, const CalibrationWindows& windows, std::uint64_t seed,
                            const std::string& device_name, int threads, Context& context) {
  const ModelConfig& config = checkpoint.config();
  if (config.has_experts())
    throw usage_error("--fisher", "a model without experts", std::to_string(config.experts.count) + " experts",
                      "leave --fisher out");
  require_ids(windows, config.vocab_size);
  const SingleThreadedTorch single;
  const torch::Device device = parse_device(device_name);
  Decoder decoder = load_decoder(checkpoint, device);
  for (Tensor& parameter : decoder->parameters()) parameter.set_requires_grad(false);
  const int workers = !device.is_cpu() ? 1 : threads > 0 ? threads : omp_get_num_procs();
  const auto stages = static_cast<std::size_t>(config.num_layers) * kBlockStages;

  std::vector<std::vector<Tensor>> seen(static_cast<std::size_t>(workers), std::vector<Tensor>(stages));
  for (int layer = 0; layer < config.num_layers; ++layer) {
    decoder->block(layer)->set_observer([&seen, layer](BlockStage stage, const Tensor& output) {
      seen[static_cast<std::size_t>(omp_get_thread_num())]
          [static_cast<std::size_t>(layer) * kBlockStages + static_cast<std::size_t>(stage)] = output;
    });
  }
  TokenWeights weights;
  weights.values.assign(stages, {});
  weights.outputs.assign(stages, {});
  const RopeTables& rope = decoder->rope(windows.length);
  context.progress->begin("sensitivity", windows.count);
  in_order(
      windows.count, workers,
      [&](std::int64_t w) {
        throw_if_interrupted("sensitivity", "the same command begins this step again");
        Tensor ids = torch::empty({1, windows.length}, torch::kLong);
        std::copy_n(windows.ids.begin() + w * windows.length, windows.length, ids.data_ptr<std::int64_t>());
        Tensor x = decoder->embed(ids.to(device)).detach().requires_grad_();
        for (int layer = 0; layer < config.num_layers; ++layer) x = decoder->block(layer)->forward(x, rope);
        const Tensor hidden = decoder->final_norm(x).view({windows.length, -1});
        const Tensor labels = sampled_labels(decoder, hidden.detach(), seed, static_cast<std::uint64_t>(w * windows.length));
        std::vector<Tensor>& outputs = seen[static_cast<std::size_t>(omp_get_thread_num())];
        const Tensor loss = cross_entropy_loss(hidden, decoder->output_head(), labels, 1.0, nullptr);
        const auto gradients = torch::autograd::grad({loss}, outputs);
        std::vector<std::pair<Tensor, Tensor>> squares;  // [positions], [outputs]
        for (const Tensor& gradient : gradients) {
          const Tensor square = gradient.to(torch::kCPU, torch::kFloat).square()[0];
          squares.emplace_back(square.mean(-1).contiguous(), square.mean(0).contiguous());
        }
        for (Tensor& output : outputs) output.reset();
        return squares;
      },
      [&](std::int64_t w, const std::vector<std::pair<Tensor, Tensor>>& squares) {
        for (std::size_t i = 0; i < stages; ++i) {
          const auto& [positions, outputs] = squares[i];
          const float* values = positions.data_ptr<float>();
          weights.values[i].insert(weights.values[i].end(), values, values + windows.length);
          auto& sums = weights.outputs[i];
          sums.resize(static_cast<std::size_t>(outputs.numel()));
          for (std::size_t j = 0; j < sums.size(); ++j)
            sums[j] += static_cast<double>(outputs.data_ptr<float>()[j]) / static_cast<double>(windows.count);
        }
        context.progress->update(w + 1);
      });
  context.progress->end();
  for (std::size_t i = 0; i < stages; ++i) {
    for (const float w : weights.values[i]) {
      if (!std::isfinite(w))
        throw failure("sensitivity of layer " + std::to_string(i / kBlockStages), "finite gradients",
                      "NaN or infinity", "the model is damaged, or overflows float32");
    }
    normalize(weights.values[i]);
  }
  return weights;
}

std::uint64_t fisher_peak_bytes(const ModelConfig& config, std::int64_t windows, std::int64_t length, int threads) {
  const int workers = threads > 0 ? threads : omp_get_num_procs();
  const auto layers = static_cast<std::uint64_t>(config.num_layers), tokens = static_cast<std::uint64_t>(length);
  const std::uint64_t graph = layers * 2 * block_work_bytes(config, length) +
                              tokens * 3 * static_cast<std::uint64_t>(config.vocab_size) * 4;
  return static_cast<std::uint64_t>(parameter_count(config)) * 4 + static_cast<std::uint64_t>(workers) * graph +
         static_cast<std::uint64_t>(windows) * tokens * layers * kBlockStages * 4;
}

}  // namespace pare
