// Weights re-targeted to the inputs that they will get in the quantized model. No LibTorch types.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/blocks.h"
#include "model/sweep.h"

namespace pare {

// With x the input of a linear in the original model and y the one in the quantized model, E ||W x - V y||^2 + l ||V - W||^2
// is least at V = W + D, D = W C (H + l)^-1, H = E[y y^T], C = E[(x - y) y^T]; GPTQ on V is Qronos (Zhang et al. 2025)
// from its second column on. Where tokens are few D is mostly noise: V = W + a D, with the a in [0, 1] that is best on
// windows from which D was not made.
struct Retargeting {
  double shrink = 0;          // a
  std::vector<float> weight;  // [rows * columns] W + a D
};

// For linears that share an input: what depends on the input alone is made once.
class Retargeter {
 public:
  // input: with cross and held-out statistics. factor: of the damped Hessian of all windows, as the sweep uses it.
  Retargeter(const InputStatistics& input, const SweepFactor& factor, double damping, const std::string& place,
             int threads);
  // weight [rows * columns]. keep_zeros: weights that are exactly 0 stay so.
  Retargeting retarget(const float* weight, std::int64_t rows, bool keep_zeros) const;

 private:
  // rows [columns][kSweepRows] times (H + l)^-1, in place.
  void divide(std::vector<double>& rows, const SweepFactor& factor) const;

  const InputStatistics& input_;
  const SweepFactor& factor_;
  SweepFactor part_factor_;  // of the windows that are not held out
  int threads_;
};

}  // namespace pare
