// Quantizing the linears of one model, block by block, with or without calibration. No LibTorch types.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "core/context.h"
#include "model/blocks.h"
#include "model/sparsity.h"
#include "quantize/policy.h"

namespace pare {

// kQ4_0 and kImatrix: llama.cpp's roundings (quantize/q4_0.h) of tensors in q4, searched scales of others.
enum class QuantizeMethod { kGptq, kRtn, kAbsmax, kQ4_0, kImatrix };
inline bool rounds_as_q4_0(QuantizeMethod method) {
  return method == QuantizeMethod::kQ4_0 || method == QuantizeMethod::kImatrix;
}

struct QuantizeJob {
  const Checkpoint& model;
  const std::vector<TensorPlan>& plan;
  CheckpointWriter& writer;
  fs::path rows;              // folder of the figures of finished blocks
  QuantizeMethod method = QuantizeMethod::kGptq;
  CalibrationWindows windows; // count 0: no calibration (not with kGptq)
  double damping = 0.01;
  int polish = 2;             // passes of coordinate descent after the sweep
  std::string device = "cpu";
  int threads = 0;
  std::int64_t expert_tokens = kExpertTokens;  // an expert that fewer tokens chose is calibrated on all
  fs::path spill;             // folder for activations that do not fit into memory; empty: they do
  bool retarget = false;      // with kGptq: see quantize/retarget.h
  std::int64_t paired_tokens = kPairedTokens;  // with retarget: see WalkOptions
  const TokenWeights* token_weights = nullptr;
  std::optional<Sparsity> sparsity;  // with kGptq: of each linear, chosen in the same sweep
};

// Writes every tensor of the model into the writer: the embedding, one durable piece per block, the rest. Skips what is
// already there; finished blocks are replayed from their codes. Errors: exit 3 for damaged weights, exit 1 when the
// sweep improves no row of a linear, exit 130 on interruption (resumable).
void quantize_layers(const QuantizeJob& job, Context& context);

// Before hours of calibration, not when the walk comes to the matrix: exit 3, naming it, where a block's linear has zeros
// of a pruning already.
void require_unpruned(const Checkpoint& model, const std::vector<TensorPlan>& tensors);

// The figures of every block linear, in order, as written by quantize_layers into `rows`.
Json collect_rows(const ModelConfig& config, const fs::path& rows);

}  // namespace pare
