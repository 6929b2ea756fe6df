// Second moments of what a cut layer reads, and of what is to come of it. Include only from .cpp files (LibTorch
// headers).
#pragma once

#include <functional>
#include <vector>

#include "model/blocks.h"
#include "model/decoder.h"

namespace pare {

// Rows of one window: inputs [n, in] in the cut model, and what is to come of them [n, out].
struct Pairs {
  torch::Tensor inputs, targets;
  bool first = true;  // row 0 is the window's first token
};

// Of all tokens, in double on the CPU: H [in, in], T [out, in], sum |t|^2.
struct Sums {
  torch::Tensor gram, cross;
  double energy = 0;
  std::int64_t tokens = 0;
};

struct Fit {
  Sums fitted, held;  // held: of windows that the fit does not see; without tokens where there are too few windows
  const Sums& judge() const { return held.tokens > 0 ? held : fitted; }
};

// pairs(window), called on several threads. Products in float32 over fixed tiles, added in double in a fixed order: the
// same bits at any thread count. The first token of windows that start with the tokenizer's prefix counts at most
// kFirstTokenEnergy times the mean of the others, in inputs and in targets.
Fit collect(const CalibrationWindows& windows, std::int64_t inputs, std::int64_t targets, const torch::Device& device,
            int threads, const std::function<Pairs(std::int64_t)>& pairs);

// Sums over the windows, in their order, of the list that `work` gives for each; called on several threads.
std::vector<double> sum_windows(const CalibrationWindows& windows, const torch::Device& device, int threads,
                                const std::function<std::vector<double>(std::int64_t)>& work);

// Bytes of collect() beside the pairs' own computation.
std::uint64_t collect_bytes(std::int64_t windows, std::int64_t length, std::int64_t inputs, std::int64_t targets);

}  // namespace pare
