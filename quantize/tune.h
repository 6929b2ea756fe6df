// What rounding leaves is tuned on the whole model: scales, norms and biases, and codes too, by the KL to the original.
// No LibTorch types.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "core/context.h"
#include "model/blocks.h"
#include "quantize/policy.h"

namespace pare {

struct TuneSettings {
  std::int64_t code_steps = 0;  // first: codes move with everything else (straight-through gradients)
  std::int64_t steps = 0;       // then: codes stay
  std::int64_t batch = 16;      // windows a step
  double lr = 1e-3;             // of the logarithm of a scale, and relative to its size of a norm or bias
  double code_lr = 0.008;       // in steps of the code
};

struct TuneJob {
  const Checkpoint& original;  // floats
  const Checkpoint& rounded;   // its codes
  const std::vector<TensorPlan>& plan;
  CalibrationWindows windows;     // settings.batch for each step, one step after the other
  CalibrationWindows validation;  // of text that no window comes from
  TuneSettings settings;
  std::string dtype;              // that floats are stored in
  std::string device = "cpu";
  int threads = 0;
  fs::path state;                 // file: an interrupted run continues from it
};

struct TuneResult {
  double kl_before = 0, kl_after = 0;  // nats per token on the validation windows
  bool improved = false;               // false: what was rounded is written as it is
  std::int64_t codes_moved = 0;
};

// Minimises KL(original || quantized) over the next-token distributions with Adam (Kingma & Ba 2015): the logarithms of
// the scales and, of q4m, where the middle of the codes lies, f16 as stored in every forward pass; norms and biases,
// likewise as stored; and in the first code_steps latent codes, rounded in the forward pass and with the gradient of the
// rounded ones, drawn to them by the curvature as steps go on (against the swinging of Nagel et al. 2022). With codes
// fixed this is DWQ (Hannun 2025) or E2E-QP of EfficientQAT (Chen et al. 2024), with codes quantization-aware
// distillation (Liu et al. 2023, LLM-QAT, on the model's own predictions). Writes every tensor into `writer`. The same
// bits at any number of threads: each window's gradient is made on one thread, and they are added in order.
// Errors: exit 1 when the loss is not finite, exit 130 on interruption (resumable).
TuneResult tune(const TuneJob& job, CheckpointWriter& writer, Context& context);

// Both models in float32, and what optimising holds beside them.
std::uint64_t tune_peak_bytes(const ModelConfig& config, const std::vector<TensorPlan>& plan, std::int64_t length,
                              bool codes_move, int threads);

}  // namespace pare
