// The shape that a structured cut leaves, and its config. No LibTorch types here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/options.h"

namespace pare {

// What remains, of each decoder block the same.
struct Shape {
  std::int64_t layers = 0, heads = 0, kv_heads = 0;  // query heads; heads / kv_heads of them share keys
  std::int64_t ffn = 0, hidden = 0, experts = 0;     // neurons of the MLP or of each expert; residual channels
  bool operator==(const Shape&) const = default;
  std::string in_words() const;  // "3 blocks of 4 heads (2 of keys), 128 neurons, 192 channels"
};

Shape shape_of(const ModelConfig& config);

// --layers, --heads, --kv-heads, --ffn, --hidden, --experts over the model's own; ffn and hidden rounded up to
// --multiple-of. Errors: exit 2 for a shape that the model cannot be cut to, or that its family cannot say in
// config.json, or that transformers refuses to load; all problems at once.
Shape asked_shape(const ModelConfig& config, const Options& options);
// --per-layer with this mean shape. Error: exit 2 for a family whose blocks cannot differ in what is cut.
void check_per_layer(const ModelConfig& config, const Shape& shape);
// Why a model cannot have this shape; empty: it can.
std::vector<std::string> shape_problems(const ModelConfig& config, const Shape& shape, std::int64_t multiple);
std::int64_t multiple_of(const Options& options);

// The config of the model cut to `shape`, with the blocks `layers`, as it will be read back from config.json. widths: of
// each of these blocks in place of the shape's own, or none.
ModelConfig cut_config(const ModelConfig& config, const Shape& shape, const std::vector<int>& layers,
                       const std::vector<BlockWidths>& widths = {});
// The same where the blocks are not chosen yet: the first ones stand for them.
ModelConfig cut_config(const ModelConfig& config, const Shape& shape);

}  // namespace pare
