// Where a scale of a linear's inputs folds away: what its columns are multiplied by is divided out where the input is
// made, in a norm, in the rows of v or in those of up. No LibTorch types.
#pragma once

#include <array>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/config.h"
#include "model/block_stage.h"

namespace pare {

// What the columns of each of a block's four inputs are multiplied by, one factor per channel; empty: nothing. Of an
// expert the last two alone.
struct BlockScales {
  std::array<std::vector<float>, kBlockStages> of;
  const std::vector<float>& operator[](BlockStage stage) const { return of[static_cast<std::size_t>(stage)]; }
  std::vector<float>& operator[](BlockStage stage) { return of[static_cast<std::size_t>(stage)]; }
};

// Which input a linear of a block reads.
BlockStage input_stage(const ModelConfig& config, const TensorSpec& spec);
// Rows [first, end) of a linear that make the input of another one: v's of kO, up's of kDown; or none.
struct MadeRows {
  BlockStage stage;
  std::int64_t first = 0, end = 0;
};
std::optional<MadeRows> made_rows(const ModelConfig& config, const TensorSpec& spec);

// Why scales of this input have nowhere to go; nullopt: they fold.
std::optional<std::string> cannot_fold(const ModelConfig& config, BlockStage stage);
// Of the input: its columns, but for o_proj the columns of v, each of which several heads of queries may share.
std::int64_t fold_channels(const ModelConfig& config, BlockStage stage);
std::int64_t fold_channel(const ModelConfig& config, BlockStage stage, std::int64_t column);

// Largest of `values` [columns] in each channel.
std::vector<double> channel_peaks(const ModelConfig& config, BlockStage stage, std::span<const double> values);
// Root of the mean of `values` [columns] in each channel.
std::vector<double> channel_roots(const ModelConfig& config, BlockStage stage, std::span<const double> values);

// The norm's tensor that an input's scales fold into; nullopt: a linear's rows.
std::optional<std::string> folds_into_norm(const ModelConfig& config, BlockStage stage);
// The scales nearest to `scales` that leave the norm `weight` exact when it is stored in `dtype`: what was divided out
// and rounded there is what the columns get. 1 where the norm gives nothing.
std::vector<float> storable_scales(const ModelConfig& config, std::span<const float> weight,
                                   std::span<const float> scales, const std::string& dtype);

// A tensor of the block (of an expert: with the expert's scales) after folding: the function of the block is the same.
// values: all elements of `spec`, in place.
void fold_scales(const ModelConfig& config, const TensorSpec& spec, const BlockScales& scales, std::span<float> values);

}  // namespace pare
