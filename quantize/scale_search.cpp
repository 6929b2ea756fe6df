#include "quantize/scale_search.h"

#include <omp.h>

#include <cmath>
#include <vector>

#include "model/decoder.h"
#include "model/threads.h"

namespace pare {
namespace {

constexpr std::int64_t kTile = 64;     // rows of the weight that one thread multiplies at a time
constexpr std::int64_t kTokens = 256;  // whose outputs it holds

torch::Tensor view(const float* values, std::int64_t rows, std::int64_t columns) {
  return torch::from_blob(const_cast<float*>(values), {rows, columns}, torch::kFloat);
}

}  // namespace

double scaled_error(const ScaledLinear& linear, std::span<const float> inputs, std::span<const float> scales,
                    ScaleRule rule, int threads) {
  const torch::NoGradGuard no_grad;
  const SingleThreadedTorch single;
  const std::int64_t n = linear.columns, tokens = static_cast<std::int64_t>(inputs.size()) / n;
  const torch::Tensor x = view(inputs.data(), tokens, n), s = view(scales.data(), 1, n),
                      weight = view(linear.weight, linear.rows, n);
  const torch::Tensor scaled = weight * s, divided = x / s;
  const torch::Tensor mean_square = divided.to(torch::kDouble).square().sum(0);
  Importance importance;
  importance.mean_square = mean_square.data_ptr<double>();
  torch::Tensor rounded = torch::empty_like(scaled);
  round_to_nearest(scaled.data_ptr<float>(), linear.rows, n, linear.codec, rule, importance, linear.name, threads)
      .unpack(rounded.data_ptr<float>());
  const bool rounds = linear.codec.int8_inputs;
  const torch::Tensor heard = rounds ? round_tokens(divided) : torch::Tensor();
  if (!rounds) rounded = weight - rounded / s;  // of the difference one product is enough
  const std::int64_t tiles = (linear.rows + kTile - 1) / kTile;
  std::vector<double> errors(static_cast<std::size_t>(tiles), 0.0);
#pragma omp parallel for schedule(dynamic) num_threads(threads > 0 ? threads : omp_get_num_procs())
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const torch::NoGradGuard no_grad_here;
    const std::int64_t first = tile * kTile, count = std::min(kTile, linear.rows - first);
    const torch::Tensor own = rounded.narrow(0, first, count).t(), original = weight.narrow(0, first, count).t();
    for (std::int64_t t = 0; t < tokens; t += kTokens) {
      const std::int64_t some = std::min(kTokens, tokens - t);
      const torch::Tensor inputs_here = x.narrow(0, t, some);
      const torch::Tensor error =
          rounds ? inputs_here.mm(original) - heard.narrow(0, t, some).mm(own) : inputs_here.mm(own);
      errors[static_cast<std::size_t>(tile)] += error.to(torch::kDouble).square().sum().item<double>();
    }
  }
  double total = 0;
  for (const double error : errors) total += error;
  return total;
}

}  // namespace pare
