// The model with the inputs of its linears scaled so that rounding costs less: the same function, other numbers to
// round. No LibTorch types.
#pragma once

#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "core/context.h"
#include "model/blocks.h"
#include "quantize/policy.h"
#include "quantize/scales.h"

namespace pare {

enum class Equalizing { kAwq, kSmoothQuant, kLeastNoise };

struct EqualizeJob {
  const Checkpoint& model;
  const std::vector<TensorPlan>& plan;  // which codec each linear will get
  CheckpointWriter& writer;             // of a float32 folder
  fs::path rows;                        // folder of the figures of finished blocks
  Equalizing method = Equalizing::kAwq;
  ScaleRule rule = ScaleRule::kSearched;
  const CalibrationWindows& windows;    // at least kHeldOutEvery
  std::string dtype;                    // in which the quantized folder will hold the norms
  std::string device = "cpu";
  int threads = 0;
  std::int64_t expert_tokens = kExpertTokens;
  fs::path spill;
};

// Inputs of held-out windows that candidates are compared on.
inline constexpr std::int64_t kScaleTokens = 2048;
inline constexpr double kEqualizeCandidates = 21;  // about, in estimates of time

// One line per kind of input that has to stay as it is: its scales do not fold, or a linear that reads or makes it has
// no codec. Error: exit 2 where none is left.
std::vector<std::string> equalize_notes(const ModelConfig& config, const std::vector<TensorPlan>& plan);

// Writes every tensor of the model into the writer, one durable piece per block; skips what is there. Of each input
// that folds (quantize/fold.h) the method's candidate with the least output error on held-out windows, leaving it alone
// included. Every block is measured in the original model. Errors: those of walk_blocks, exit 130 on interruption.
void equalize(const EqualizeJob& job, Context& context);

// The figures of every input that could be scaled, in order: {"name" of its first linear, "exponent" (null: left
// alone), "before", "after"}: squared output error on held-out windows, under nearest codes; 0 where an expert got none
// of their tokens. Error: exit 1 where all are left alone.
Json equalize_rows(const ModelConfig& config, const fs::path& rows);
// Adds the sums of each kind of input as report rows; returns them.
Json equalize_report(const Json& rows, Report& report);

// Peak anonymous memory of equalize in bytes, from the config alone; `linear`: elements of the largest one.
std::uint64_t equalize_peak_bytes(const ModelConfig& config, std::uint64_t linear, std::int64_t windows,
                                  std::int64_t length, const fs::path& spill);

}  // namespace pare
