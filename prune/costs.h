// What a shape costs: parameters, bytes, or seconds a token. No LibTorch types.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <tuple>

#include "core/codec.h"
#include "core/config.h"
#include "prune/shape.h"

namespace pare {

// How the result will be stored. A float codec: a model folder in it. Another: the compact file of what
// `pare quantize --codec` writes, embedding and head in q8, each in a smaller group where a row does not divide.
struct StoredAs {
  Codec linear{CodecKind::kBf16, 0};
  Codec other{CodecKind::kBf16, 0};  // float tensors beside codes, such as routers: as in the input
  double beside = 0;                 // bytes of the file that are no tensors
  Codec of(const TensorSpec& spec) const;
  std::uint64_t bytes(const TensorSpec& spec) const;
  std::string name() const { return linear.name(); }
};
// --codec over the dtype ("bfloat16") in which prune writes the folder. Error: exit 2.
StoredAs stored_as(const std::string& codec, const std::string& dtype);

// Seconds that decoding one token takes: fixed + head * bytes of the head + for each block (per_block + attention *
// bytes of its attention + mlp * bytes of its MLP that the token reads). prune/speed.h measures them.
struct DecodeTimes {
  double fixed = 0, head = 0, per_block = 0, attention = 0, mlp = 0;
};

enum class Unit { kParameters, kBytes, kSeconds };

// A part of a model, in bytes as stored or, for parameters, elements. `read`: by the decoding of one token.
struct PartSizes {
  double all = 0, attention = 0, mlp_read = 0, head = 0;
};
// Of everything outside the blocks, and of one block of these widths. `config` gives all that a cut does not change.
PartSizes outer_sizes(const ModelConfig& config, std::int64_t hidden, const StoredAs* stored);
PartSizes block_sizes(const ModelConfig& config, std::int64_t hidden, const BlockWidths& widths, std::int64_t experts,
                      const StoredAs* stored);  // null: elements

// Sums of parts that were counted once each: no config is built for a shape.
class ShapeCosts {
 public:
  ShapeCosts(const ModelConfig& config, Unit unit, StoredAs stored, DecodeTimes times = {})
      : config_(config), unit_(unit), stored_(stored), times_(times) {}
  double outer(std::int64_t hidden);
  double block(std::int64_t hidden, const BlockWidths& widths, std::int64_t experts);
  double of(const Shape& shape);  // all blocks alike
  double of(const ModelConfig& model);  // of this model cut in any way
  Unit unit() const { return unit_; }

 private:
  const StoredAs* stored() const { return unit_ == Unit::kParameters ? nullptr : &stored_; }
  const ModelConfig& config_;
  Unit unit_;
  StoredAs stored_;
  DecodeTimes times_;
  std::map<std::int64_t, double> outers_;
  std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>, double> blocks_;
};

}  // namespace pare
