#include "quantize/least_noise.h"

#include <algorithm>
#include <cmath>

#include "model/decoder.h"
#include "model/threads.h"

namespace pare {
namespace {

using torch::Tensor;

constexpr int kSteps = 150, kFineSteps = 80;
constexpr double kRate = 0.05, kFineRate = 0.01;  // of log d
constexpr std::int64_t kRows = 512;               // of a weight, evenly spaced

// Largest code of what is rounded about symmetrically: of 16 codes 7.5.
double largest_code(const Codec& codec) {
  return (std::pow(2.0, codec.bits()) - 1) / 2;
}

class Noise {
 public:
  Noise(std::span<const ScaledLinear> linears, std::span<const float> inputs, std::span<const std::int64_t> channel)
      : channel_(torch::tensor(at::ArrayRef<std::int64_t>(channel.data(), channel.size()))) {
    const std::int64_t n = linears.front().columns, tokens = static_cast<std::int64_t>(inputs.size()) / n;
    const Tensor x = torch::from_blob(const_cast<float*>(inputs.data()), {tokens, n}, torch::kFloat).square();
    mean_square_ = x.mean(0);
    energy_ = torch::zeros({n});
    for (const ScaledLinear& linear : linears) {
      const Tensor weight =
          torch::from_blob(const_cast<float*>(linear.weight), {linear.rows, n}, torch::kFloat).square();
      if (linear.codec.int8_inputs) energy_ += weight.sum(0) / (12.0 * 127.0 * 127.0);
      const std::int64_t every = (linear.rows + kRows - 1) / kRows;
      const Tensor some = weight.slice(0, 0, linear.rows, every).contiguous();
      const double factor = static_cast<double>(linear.rows) / static_cast<double>(some.size(0));
      groups_.push_back(some.view({some.size(0), linear.codec.groups(n), -1}) *
                        (factor / (12.0 * std::pow(largest_code(linear.codec), 2))));
    }
    if (energy_.max().item<float>() > 0) inputs_ = x;
  }

  Tensor operator()(const Tensor& log_d) const {
    const Tensor d = log_d.index_select(0, channel_).exp(), power = mean_square_ / d;
    Tensor noise = torch::zeros({});
    for (const Tensor& weight : groups_) {
      const std::int64_t groups = weight.size(1);
      noise = noise + ((weight * d.view({1, groups, -1})).amax(2) * power.view({groups, -1}).sum(1)).sum();
    }
    return inputs_.defined() ? noise + (inputs_ / d).amax(1).mean() * (energy_ * d).sum() : noise;
  }

 private:
  Tensor channel_, mean_square_, energy_, inputs_;  // [columns], [columns], [columns], [tokens, columns] squared
  std::vector<Tensor> groups_;                      // [rows, groups, size] squared
};

}  // namespace

std::vector<float> least_noise_scales(std::span<const ScaledLinear> linears, std::span<const float> inputs,
                                      std::span<const std::int64_t> channel, std::int64_t channels) {
  const SingleThreadedTorch single;
  const torch::AutoGradMode with_gradients(true);
  const Noise noise(linears, inputs, channel);
  Tensor log_d = torch::zeros({channels}, torch::requires_grad());
  torch::optim::Adam adam({log_d}, torch::optim::AdamOptions(kRate));
  for (int step = 0; step < kSteps + kFineSteps; ++step) {
    if (step == kSteps) static_cast<torch::optim::AdamOptions&>(adam.param_groups()[0].options()).lr(kFineRate);
    adam.zero_grad();
    noise(log_d).log().backward();
    adam.step();
  }
  const Tensor log_s = log_d.detach() / 2;
  const Tensor s = (log_s - (log_s.max() + log_s.min()) / 2).exp().contiguous();
  std::vector<float> scales(s.data_ptr<float>(), s.data_ptr<float>() + channels);
  const bool fine = std::all_of(scales.begin(), scales.end(), [](float x) { return std::isfinite(x) && x > 0; });
  return fine ? scales : std::vector<float>(scales.size(), 1.0f);  // inputs that are all 0
}

double noise_of(std::span<const ScaledLinear> linears, std::span<const float> inputs,
                std::span<const std::int64_t> channel, std::span<const float> scales) {
  const torch::NoGradGuard no_grad;
  const SingleThreadedTorch single;
  const Tensor s = torch::from_blob(const_cast<float*>(scales.data()), {static_cast<std::int64_t>(scales.size())});
  return Noise(linears, inputs, channel)(2 * s.log()).item<double>();
}

}  // namespace pare
