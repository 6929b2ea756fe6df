// What a pruning method is to the stage: one row of a table, one file each.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "core/context.h"
#include "core/options.h"
#include "model/blocks.h"

namespace pare {

// What the stage hands to a method. `work` is the folder of the transaction; what a method leaves under `state`
// survives a kill and is removed before the folder appears under its final name.
struct PruneJob {
  const Checkpoint& model;
  const Options& options;
  Context& context;
  CalibrationWindows windows;  // empty when the run has no --text
  fs::path work, state;
  std::string dtype;           // storage of the float tensors: as in the input
  fs::path spill;              // folder for the walk's activations; empty: they stay in memory
};

struct PruneMethod {
  std::string name;
  std::string summary;
  bool needs_text = false;             // works on calibration text; otherwise text serves the measurement alone
  std::vector<std::string> needs;      // options of which exactly one must be given
  std::vector<std::string> takes;      // further options that mean something to it
  // Config of the result as far as it is known in advance; dtype: of the floats in the folder. Errors: exit 2 for values
  // that do not fit this model.
  ModelConfig (*result)(const ModelConfig& config, const Options& options, const std::string& dtype) = nullptr;
  // Writes every tensor and finishes the folder in job.work; resumes from what an earlier run left there.
  void (*run)(PruneJob& job) = nullptr;
  // Peak anonymous bytes (activations in memory or, with `spill`, in a file where the method walks), and forward passes
  // over the calibration text.
  std::uint64_t (*peak_bytes)(const ModelConfig& config, const Options& options, const std::string& dtype,
                              const fs::path& spill) = nullptr;
  double (*passes)(const ModelConfig& config, const Options& options, const std::string& dtype) = nullptr;
};

const std::vector<PruneMethod>& prune_methods();

// unstructured.cpp
PruneMethod magnitude_method();
PruneMethod wanda_method();
PruneMethod sparsegpt_method();
PruneMethod random_method();
// shape_method.cpp
PruneMethod shape_method();
// What a user of the folder has to know of blocks that differ.
std::string own_widths_note(const ModelConfig& config);

// --context, or its default for this model.
std::int64_t window_length(const ModelConfig& config, const Options& options);
// Elements of a tensor as float32. Exit 3 when one of them is NaN or infinite.
std::vector<float> read_finite(const Checkpoint& model, const std::string& name);
void check_finite(const float* values, std::size_t count, const std::string& place);
// The values after a trip through the stored dtype: what the stream sees is what ships.
void round_to(const std::string& dtype, std::vector<float>& values);
// Name of a tensor in decoder block `layer`: ("mlp.up_proj.weight", 3) -> "model.layers.3.mlp.up_proj.weight".
std::string block_tensor(int layer, const std::string& inside);
std::string block_piece(int layer);  // name of the durable piece that holds the block, written after its experts'
std::string expert_piece(int layer, std::int64_t expert);
// Float32 bytes of one block's weights, or of the largest part of it that is handled at a time.
std::uint64_t block_bytes(const ModelConfig& config);
// Embedding, final norm and head as they are, as one piece.
void copy_outer_tensors(const PruneJob& job, CheckpointWriter& writer);

}  // namespace pare
