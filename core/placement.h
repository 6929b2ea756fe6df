// Where a checkpoint keeps a tensor that has not its own place there: under another name, transposed, or with its rows
// among those of others (q, k and v in one tensor). Inside, every tensor has one name and one layout.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "core/codec.h"
#include "core/config.h"

namespace pare {

struct Placement {
  std::string name;                 // of the stored tensor
  std::vector<std::int64_t> shape;  // of the stored tensor
  bool transposed = false;          // a matrix stored as [in, out]
  // Row r of ours, which is an output, is row first + r / run * stride + r % run of the stored tensor.
  std::int64_t first = 0, run = 1, stride = 1;

  std::int64_t row(std::int64_t r) const { return first + r / run * stride + r % run; }
  std::int64_t stored_rows() const { return transposed ? shape[1] : shape[0]; }
};

// A whole tensor under another name.
Placement renamed(std::string name, const TensorSpec& spec);
// nullopt: under its own name, as it is.
std::optional<Placement> placement(const ModelConfig& config, const TensorSpec& spec);
// Its elements do not lie in the stored tensor as they do in ours.
bool rearranged(const Placement& place, const TensorSpec& spec);

// One tensor of a folder and what it is made of; where the folder has the tensor as it is, that one alone.
struct StoredTensor {
  std::string name;
  std::vector<std::int64_t> shape;
  bool transposed = false;
  std::vector<const TensorSpec*> parts;
  std::vector<Placement> places;  // of each part
  bool whole() const { return parts.size() == 1 && !rearranged(places[0], *parts[0]); }
};
// In the order of `specs`, which must outlive the result.
std::vector<StoredTensor> stored_tensors(const ModelConfig& config, const std::vector<TensorSpec>& specs);

// Rows [first, first + count) of our tensor from the bytes of the stored one; `size`: bytes of an element.
void take_rows_from(const Placement& place, const TensorSpec& spec, const std::byte* stored, std::size_t size,
                    std::int64_t first, std::int64_t count, std::byte* out);
// All of our tensor to where it belongs among the bytes of the stored one.
void put_into(const Placement& place, const TensorSpec& spec, const std::byte* own, std::size_t size,
              std::byte* stored);

// Whether transformers finds a Linear module by the tensor's name: not a transposed one (Conv1D), nor the heads that
// transformers 5 renames on loading.
bool is_module(const ModelConfig& config, const TensorSpec& spec);
// Whether compressed-tensors can express codes of this tensor: that form knows such modules. compressed-tensors 0.20
// lays out the packed zero points of asymmetric codes otherwise on loading than on saving, so transformers refuses such
// folders.
bool has_packed_form(const ModelConfig& config, const TensorSpec& spec, const Codec& codec);

// What comes before the names of the base model, "transformer." say, and is missing where it was saved alone; or "".
std::string base_prefix(const ModelConfig& config);
// Masks and tables that older checkpoints carry and transformers ignores too.
bool is_buffer(const ModelConfig& config, std::string_view name);

}  // namespace pare
