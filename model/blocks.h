// The block walk: one decoder block's weights resident (of experts one), calibration activations carried from block to
// block, once
// through the original weights and once through the weights as compressed so far. Shared by prune and quantize.
// No LibTorch types here.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "core/context.h"
#include "core/options.h"
#include "model/block_stage.h"
#include "model/calibration.h"
#include "model/sweep.h"

namespace pare {

// {"self_attn.q_proj", ...}, or the fused {"self_attn.qkv_proj"}. `expert`: whose, in a model with experts.
std::vector<std::string> stage_modules(const ModelConfig& config, BlockStage stage, std::int64_t expert = -1);

// Statistics of one distinct input x [columns] over all calibration tokens, in the compressed stream. What an expert
// reads counts with the square of what its output is multiplied by, 0 for tokens that did not choose it. An expert
// that fewer than WalkOptions::expert_tokens chose is given all tokens instead, with the same factor for each.
struct InputStatistics {
  std::int64_t columns = 0, tokens = 0;
  std::int64_t expert = -1;         // whose, else -1; then `tokens` are those that chose it
  bool all_tokens = false;          // the fallback for an expert that too few chose
  std::vector<double> mean_square;  // [columns] E[w x_j^2]: the diagonal of the Hessian
  SquareMatrix hessian;             // [columns * columns] E[w x x^T], symmetric; empty unless asked for
  // [columns * columns] E[w (x_original - x) x^T] over the tokens that both streams carry; empty unless asked for.
  SquareMatrix cross;
  std::int64_t paired_tokens = 0;
  // The two above over every kHeldOutEvery-th of those windows alone, in float32; empty unless asked for.
  SquareMatrix held_hessian, held_cross;
  std::int64_t held_tokens = 0;
  // Both empty unless asked for; in the compressed stream, weighted like the rest.
  std::vector<float> peak;    // [columns] max |x_j| over the windows that are not held out
  std::vector<float> sample;  // [rows * columns] inputs of held-out windows, evenly spaced
};

// One linear of the block. Writing `weight` replaces it in the compressed stream.
struct BlockLinear {
  std::string name;    // "model.layers.0.self_attn.q_proj.weight"
  std::string module;  // "self_attn.q_proj"
  std::int64_t expert = -1;  // whose, in a model with experts
  std::int64_t rows = 0, cols = 0;
  std::span<const float> original;  // [rows * cols] as the checkpoint has it
  std::span<float> weight;          // [rows * cols]
};

class BlockVisitor {
 public:
  virtual ~BlockVisitor() = default;
  // Before the first block: the embedding [hidden] of token `id` in the compressed stream, may be changed in place.
  virtual void embedding(std::int64_t id, std::span<float> row) {}
  // True: this block was finished by an earlier run; `restore` then fills in its weights, for the linears that share an
  // input at a time, and `compress` is not called.
  virtual bool finished(int layer) { return false; }
  virtual void restore(int layer, std::span<BlockLinear> linears) {}
  virtual void begin_block(int layer) {}
  // Of a block with experts: how many tokens chose each. Also called for a block that is restored.
  virtual void routed(int layer, std::span<const std::int64_t> tokens) {}
  // Called in stage order with the linears that share the input; may replace their weights.
  virtual void compress(int layer, BlockStage stage, std::span<BlockLinear> linears, const InputStatistics& input) = 0;
  // After the linears of one expert of a block that is not restored; they are not needed any more.
  virtual void end_expert(int layer, std::int64_t expert) {}
  // drift: mean square of (compressed - original) hidden state after the block over the mean square of the original.
  virtual void end_block(int layer, double drift) {}
};

// Windows whose inputs are held at a time; a constant, so that sums do not depend on the machine.
inline constexpr std::int64_t kShardWindows = 8;
inline constexpr std::int64_t kExpertTokens = 128;
inline constexpr std::int64_t kHeldOutEvery = 5;
inline constexpr std::int64_t kPairedTokens = 32768, kPairedTokensPerColumn = 8;
// By what an input differs from the original model's is known from fewer tokens than the Hessian wants: with cross
// statistics every so many-th window is carried through the original weights too, at least `paired_tokens` tokens and
// kPairedTokensPerColumn for each column of the widest input where the windows hold so many.
std::int64_t paired_stride(const ModelConfig& config, std::int64_t windows, std::int64_t length,
                           std::int64_t paired_tokens);

// What each token of the calibration windows counts for each distinct input: [layer][stage][window * length + position].
struct TokenWeights {
  std::vector<std::vector<float>> values;  // [layer * kBlockStages + stage]
  // Of the linears that share the input, joined: the mean over tokens for each output, not scaled. Empty: not known.
  std::vector<std::vector<double>> outputs;
  std::span<const float> of(int layer, BlockStage stage) const {
    return values[static_cast<std::size_t>(layer) * kBlockStages + static_cast<std::size_t>(stage)];
  }
};

struct WalkOptions {
  std::string device = "cpu";
  int threads = 0;                             // 0: all cores
  bool hessian = false;                        // else only mean_square
  bool cross = false;                          // needs hessian; the original stream is that of paired_stride
  bool held_out = false;                       // needs cross: see InputStatistics
  std::int64_t sample_tokens = 0;              // at most so many rows in InputStatistics::sample; needs held-out windows
  const TokenWeights* token_weights = nullptr; // of each input, mean 1; null: all 1. Not with experts
  std::int64_t expert_tokens = kExpertTokens;  // see InputStatistics; at least 1
  bool original_stream = true;                 // false: drift is 0 and activation memory is saved
  std::int64_t paired_tokens = kPairedTokens;  // with cross: see paired_stride
  fs::path spill;                              // folder for activations in HDF5 files; empty: they stay in memory
  std::int64_t widest_double = kWidestDouble;  // statistics of wider inputs are kept in float32
};

// Statistics are float32 or split products (split_products.h) over fixed shards of windows, added in double in a fixed
// order: the same bits at any thread count. The weight of a window's first token is capped at kFirstTokenEnergy times the mean energy of the
// others.
inline constexpr double kFirstTokenEnergy = 4.0;
void walk_blocks(const Checkpoint& checkpoint, const CalibrationWindows& windows, const WalkOptions& options,
                 Context& context, BlockVisitor& visitor);

// A command that calibrates by walk_blocks, on several ranks: rank 0 runs it; the others open --model, carry their
// shards of the windows through each walk and share its sums, whose bits are those of one rank. They write nothing.
Command calibrated_by_ranks(Command command);

// "tokens of its 8 experts: 120 to 977, median 512; 1 of them calibrated on all tokens"
std::string expert_summary(std::span<const std::int64_t> tokens, std::int64_t least);

// Errors: exit 2 for a name that is no device, exit 5 for a device that this build or machine does not have.
void require_device(const std::string& name);

// What --max-ram decides: peak bytes with the activations where they are to be. `peak` is asked with an empty path, and
// with another one for a run whose activations go to a file. Errors: exit 5 with `hint` where neither fits.
struct MemoryPlan {
  std::uint64_t peak = 0, unspilled = 0;
  bool spill = false;
  void add_note(std::vector<std::string>& notes) const;  // where activations go to a file
};
MemoryPlan plan_memory(const Options& options, const std::function<std::uint64_t(const fs::path& spill)>& peak,
                       const std::string& hint);

// What a block computes with for `rows` positions, in bytes beside its weights.
std::uint64_t block_work_bytes(const ModelConfig& config, std::int64_t rows);
// Peak anonymous memory of a walk: activations unless they are spilled, one block, the originals and the statistics of
// one input, in bytes; from the config and the kind of products that this machine has.
std::uint64_t walk_peak_bytes(const ModelConfig& config, std::int64_t windows, std::int64_t length,
                              const WalkOptions& options);

}  // namespace pare
