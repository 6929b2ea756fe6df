#include "quantize/kl_model.h"

#include <omp.h>

#include "core/error.h"
#include "model/sampled_labels.h"
#include "model/shards.h"
#include "model/threads.h"

namespace pare {

using torch::Tensor;

KlModel::KlModel(const Checkpoint& original, const Checkpoint& quantized, const std::string& device, int threads,
                 std::int64_t length)
    : device_(parse_device(device)),
      threads_(!device_.is_cpu() ? 1 : threads > 0 ? threads : omp_get_num_procs()),
      original_(load_decoder(original, device_)),
      quantized_(load_decoder(quantized, device_)) {
  for (Decoder* decoder : {&original_, &quantized_}) {
    for (Tensor& parameter : (*decoder)->parameters()) parameter.set_requires_grad(false);
    (*decoder)->rope(length);  // made now, read by all threads
  }
}

Tensor KlModel::ids(const CalibrationWindows& windows, std::int64_t window) const {
  Tensor out = torch::empty({1, windows.length}, torch::kLong);
  std::copy_n(windows.ids.begin() + window * windows.length, windows.length, out.data_ptr<std::int64_t>());
  return out.to(device_);
}

Tensor KlModel::loss(const Tensor& ids, double scale, LossSums& sums) {
  Tensor taught;
  {
    const torch::NoGradGuard no_grad;
    taught = original_->hidden(ids);
  }
  const Tensor hidden = quantized_->hidden(ids);
  // Every position counts: distributions are compared, not labels.
  const Tensor targets = torch::zeros({ids.numel()}, torch::TensorOptions(device_).dtype(torch::kLong));
  return distill_loss(hidden.view({-1, hidden.size(-1)}), quantized_->output_head(),
                      taught.view({-1, taught.size(-1)}), original_->output_head(), targets, {}, scale, &sums);
}

double KlModel::divergence(const CalibrationWindows& windows) {
  const SingleThreadedTorch single;
  double sum = 0;
  in_order(
      windows.count, threads_,
      [&](std::int64_t window) {
        const torch::NoGradGuard no_grad;
        throw_if_interrupted("KL of the quantized model", "the same command continues here");
        LossSums own;
        loss(ids(windows, window), 1.0, own);
        return own.kl / static_cast<double>(own.rows);
      },
      [&](std::int64_t, double kl) { sum += kl; });
  return sum / static_cast<double>(windows.count);
}

std::vector<Tensor> KlModel::gradients(const CalibrationWindows& windows, std::int64_t first, std::int64_t count,
                                       const std::vector<Tensor>& parameters, double& kl) {
  const SingleThreadedTorch single;
  std::vector<Tensor> sums(parameters.size());
  kl = 0;
  struct Part {
    std::vector<Tensor> gradients;
    double kl = 0;
  };
  in_order(
      count, threads_,
      [&](std::int64_t shard) {
        throw_if_interrupted("gradient of the quantized model", "the same command continues here");
        LossSums own;
        const Tensor value =
            loss(ids(windows, first + shard), 1.0 / static_cast<double>(count * windows.length), own);
        Part part;
        part.gradients = torch::autograd::grad({value}, parameters, {}, false, false, /*allow_unused=*/true);
        part.kl = own.kl / static_cast<double>(own.rows);
        return part;
      },
      [&](std::int64_t, Part part) {
        const torch::NoGradGuard no_grad;
        kl += part.kl / static_cast<double>(count);
        for (std::size_t i = 0; i < sums.size(); ++i) {
          if (!part.gradients[i].defined()) continue;
          if (sums[i].defined())
            sums[i].add_(part.gradients[i]);
          else
            sums[i] = part.gradients[i].contiguous();
        }
      });
  return sums;
}

std::vector<Tensor> KlModel::curvature(const CalibrationWindows& windows, std::int64_t count, std::uint64_t seed,
                                       const std::vector<Tensor>& parameters) {
  const SingleThreadedTorch single;
  std::vector<Tensor> sums;
  for (const Tensor& parameter : parameters) sums.push_back(torch::zeros_like(parameter));
  const double scale = 1.0 / static_cast<double>(count * windows.length);
  in_order(
      count, threads_,
      [&](std::int64_t window) {
        throw_if_interrupted("curvature of the original model", "the same command continues here");
        const torch::AutoGradMode with_gradients(true);
        const Tensor hidden = original_->hidden(ids(windows, window)).view({windows.length, -1});
        const Tensor labels = sampled_labels(original_, hidden.detach(), seed,
                                             static_cast<std::uint64_t>(window * windows.length));
        const Tensor loss = cross_entropy_loss(hidden, original_->output_head(), labels, 1.0, nullptr);
        return torch::autograd::grad({loss}, parameters, {}, false, false, /*allow_unused=*/true);
      },
      [&](std::int64_t, const std::vector<Tensor>& gradients) {
        const torch::NoGradGuard no_grad;
        for (std::size_t i = 0; i < sums.size(); ++i)
          if (gradients[i].defined()) sums[i].addcmul_(gradients[i], gradients[i], scale);
      });
  return sums;
}

}  // namespace pare
