// A model that lies in one file, as Checkpoint takes it: the tensors of its config by name, floats or codes.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/codec.h"
#include "core/config.h"
#include "core/file.h"
#include "core/safetensors.h"

namespace pare {

class TensorStore {
 public:
  virtual ~TensorStore() = default;
  virtual const ModelConfig& config() const = 0;
  virtual DType dtype(const TensorSpec& spec) const = 0;  // of floats: F32, F16 or BF16, which holds them exactly
  virtual Codec codec(const TensorSpec& spec) const = 0;
  virtual QuantizedTensor codes(const TensorSpec& spec) const = 0;
  // Rows of floats, [count, columns].
  virtual void read_rows_f32(const TensorSpec& spec, std::int64_t first, std::int64_t count, float* out) const = 0;
  virtual void release(const TensorSpec& spec) const = 0;
  // The text of one of the files that stand beside the weights in a folder (side_file_names()).
  virtual std::optional<std::string> side_file(const std::string& name) const = 0;
  virtual std::string content_hash() const = 0;
  virtual std::vector<std::string> notes() const { return {}; }
};

// Errors: exit 3; not a GGUF file of a supported model, tensors missing, left over or mis-shaped (all of them at once).
std::shared_ptr<TensorStore> open_gguf_model(const fs::path& path);
std::shared_ptr<TensorStore> open_compact_model(const fs::path& path);

// How floats are kept that a folder has in `dtype`: doubles as F32, others as they are; and the type of such floats.
Codec float_codec(DType dtype);
DType float_dtype(CodecKind kind);

// Whether `dtype`, F32, F16 or BF16, holds these floats bit for bit, NaN payloads and signs of zero included.
bool holds_exactly(DType dtype, std::span<const float> values);

// Vectors stand in F32 in such files, whatever they were. They are taken back to the type that most values of the float
// matrices have where that holds them exactly; a file lists what this rule would not restore.
class VectorTypes {
 public:
  // `listed`: JSON object {tensor name: "BF16"}, or nothing.
  VectorTypes(const std::optional<std::string>& listed, const std::string& place);
  void count_matrix(DType dtype, std::int64_t values) { counts_[index(dtype)] += values; }
  // Where there are no float matrices: the type that the model is said to have ("bfloat16").
  void set_fallback(const std::string& torch_dtype);
  DType main() const;
  DType of(const std::string& name, std::span<const float> values) const;
  // What `listed` has to be for tensors of these types; nothing where the rule restores them all.
  void expect(const std::string& name, DType dtype, std::span<const float> values);
  std::optional<std::string> exceptions() const;

 private:
  static std::size_t index(DType dtype) { return dtype == DType::kBF16 ? 0 : dtype == DType::kF16 ? 1 : 2; }
  std::int64_t counts_[3] = {0, 0, 0};
  DType fallback_ = DType::kF32;
  Json listed_ = Json::object(), exceptions_ = Json::object();
  std::string place_;
};

}  // namespace pare
