#include "prune/moments.h"

#include <algorithm>
#include <cmath>

#include "model/threads.h"
#include "prune/measure.h"

namespace pare {
namespace {

using torch::Tensor;

constexpr std::int64_t kBatchWindows = 8;  // whose rows are held at a time
constexpr std::int64_t kTileRows = 64, kTileTokens = 512;

// sum [rows of a^T, rows of b^T] += a^T b in tiles of fixed size.
void add_product(const Tensor& a, const Tensor& b, Tensor& sum, int threads) {
  const auto tiles = static_cast<std::size_t>((a.size(1) + kTileRows - 1) / kTileRows);
  for_each_shard(a.device(), threads, tiles, [&](std::size_t tile) {
    const std::int64_t first = static_cast<std::int64_t>(tile) * kTileRows;
    const std::int64_t count = std::min(kTileRows, a.size(1) - first);
    Tensor part = sum.narrow(0, first, count);
    for (std::int64_t t = 0; t < a.size(0); t += kTileTokens) {
      const std::int64_t rows = std::min(kTileTokens, a.size(0) - t);
      const Tensor left = a.narrow(0, t, rows).narrow(1, first, count).t().contiguous();
      part += torch::matmul(left, b.narrow(0, t, rows)).to(torch::kDouble);
    }
  });
}

void add(const std::vector<Pairs>& rows, Sums& sums, int threads) {
  if (rows.empty()) return;
  std::vector<Tensor> inputs, targets;
  for (const Pairs& pairs : rows) {
    inputs.push_back(pairs.inputs);
    targets.push_back(pairs.targets);
  }
  const Tensor x = torch::cat(inputs, 0), t = torch::cat(targets, 0);
  add_product(x, x, sums.gram, threads);
  add_product(t, x, sums.cross, threads);
  for (const Tensor& target : targets) sums.energy += target.square().sum(torch::kDouble).item<double>();
  sums.tokens += x.size(0);
}

// The first token of a window that starts with the tokenizer's prefix attracts outliers, which would decide alone.
void cap_first_token(const CalibrationWindows& windows, Pairs& pairs) {
  if (!windows.prefixed || !pairs.first || pairs.inputs.size(0) < 2) return;
  for (Tensor* rows : {&pairs.inputs, &pairs.targets}) *rows = rows->clone();
  double scale = 1;
  for (const Tensor* rows : {&pairs.inputs, &pairs.targets}) {
    const Tensor energy = rows->square().sum(1, false, torch::kDouble);
    const double first = energy[0].item<double>();
    const double others = (energy.sum().item<double>() - first) / static_cast<double>(energy.size(0) - 1);
    if (first > kFirstTokenEnergy * others) scale = std::min(scale, std::sqrt(kFirstTokenEnergy * others / first));
  }
  for (Tensor* rows : {&pairs.inputs, &pairs.targets}) (*rows)[0] *= scale;
}

}  // namespace

Fit collect(const CalibrationWindows& windows, std::int64_t inputs, std::int64_t targets, const torch::Device& device,
            int threads, const std::function<Pairs(std::int64_t)>& pairs) {
  const SingleThreadedTorch single;
  Fit fit;
  const auto doubles = torch::TensorOptions().dtype(torch::kDouble).device(device);
  for (Sums* sums : {&fit.fitted, &fit.held}) {
    sums->gram = torch::zeros({inputs, inputs}, doubles);
    sums->cross = torch::zeros({targets, inputs}, doubles);
  }
  for (std::int64_t first = 0; first < windows.count; first += kBatchWindows) {
    const std::int64_t count = std::min(kBatchWindows, windows.count - first);
    std::vector<Pairs> all(static_cast<std::size_t>(count)), fitted, held;
    for_each_shard(device, threads, all.size(), [&](std::size_t i) {
      throw_if_interrupted("prune", "run the same command again");
      all[i] = pairs(first + static_cast<std::int64_t>(i));
      cap_first_token(windows, all[i]);
    });
    for (std::int64_t i = 0; i < count; ++i)
      ((first + i) % kHeldOutEvery == kHeldOutEvery - 1 ? held : fitted).push_back(all[static_cast<std::size_t>(i)]);
    add(fitted, fit.fitted, threads);
    add(held, fit.held, threads);
  }
  for (Sums* sums : {&fit.fitted, &fit.held}) {
    sums->gram = sums->gram.cpu();
    sums->cross = sums->cross.cpu();
  }
  return fit;
}

std::vector<double> sum_windows(const CalibrationWindows& windows, const torch::Device& device, int threads,
                                const std::function<std::vector<double>(std::int64_t)>& work) {
  std::vector<std::vector<double>> parts(static_cast<std::size_t>(windows.count));
  for_each_shard(device, threads, parts.size(), [&](std::size_t w) {
    throw_if_interrupted("prune", "run the same command again");
    parts[w] = work(static_cast<std::int64_t>(w));
  });
  std::vector<double> sums(parts[0].size(), 0.0);
  for (const auto& part : parts)
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += part[i];
  return sums;
}

std::uint64_t collect_bytes(std::int64_t windows, std::int64_t length, std::int64_t inputs, std::int64_t targets) {
  const std::int64_t rows = std::min(kBatchWindows, windows) * length;
  return 16 * static_cast<std::uint64_t>((inputs + targets) * inputs) +     // of both kinds of windows
         8 * static_cast<std::uint64_t>(rows * (inputs + targets));  // as they come, and joined
}

}  // namespace pare
