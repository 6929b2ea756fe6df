#include "core/tensor_store.h"

#include <bit>
#include <cstring>
#include <stdexcept>

#include "core/compact.h"
#include "core/error.h"

namespace pare {

Codec float_codec(DType dtype) {
  if (dtype == DType::kF16) return {CodecKind::kF16, 0};
  if (dtype == DType::kBF16) return {CodecKind::kBf16, 0};
  return {CodecKind::kF32, 0};
}

DType float_dtype(CodecKind kind) {
  return kind == CodecKind::kF16 ? DType::kF16 : kind == CodecKind::kBf16 ? DType::kBF16 : DType::kF32;
}

bool holds_exactly(DType dtype, std::span<const float> values) {
  if (dtype == DType::kF32) return true;
  if (dtype != DType::kF16 && dtype != DType::kBF16)
    throw std::logic_error("floats in " + std::string(dtype_name(dtype)));
  for (const float value : values) {
    const float back = dtype == DType::kF16 ? f16_to_f32(f32_to_f16(value)) : bf16_to_f32(f32_to_bf16(value));
    if (std::bit_cast<std::uint32_t>(back) != std::bit_cast<std::uint32_t>(value)) return false;
  }
  return true;
}

VectorTypes::VectorTypes(const std::optional<std::string>& listed, const std::string& place) : place_(place) {
  if (!listed) return;
  listed_ = parse_json(*listed, place);
  if (!listed_.is_object()) throw input_error(place, "an object", listed_.type_name());
  for (const auto& [name, type] : listed_.items())
    if (type != "F32" && type != "F16" && type != "BF16")
      throw input_error(place + "." + name, "F32, F16 or BF16", type.dump());
}

void VectorTypes::set_fallback(const std::string& torch_dtype) {
  fallback_ = torch_dtype == "bfloat16" ? DType::kBF16 : torch_dtype == "float16" ? DType::kF16 : DType::kF32;
}

DType VectorTypes::main() const {
  if (counts_[0] + counts_[1] + counts_[2] == 0) return fallback_;
  if (counts_[0] > 0 && counts_[0] >= counts_[1] && counts_[0] > counts_[2]) return DType::kBF16;
  return counts_[1] > 0 && counts_[1] > counts_[2] ? DType::kF16 : DType::kF32;
}

DType VectorTypes::of(const std::string& name, std::span<const float> values) const {
  if (const auto said = listed_.find(name); said != listed_.end()) {
    const DType dtype = parse_dtype(said->get<std::string>(), place_);
    if (!holds_exactly(dtype, values))
      throw input_error(place_ + "." + name, "values that " + said->get<std::string>() + " holds exactly", "others");
    return dtype;
  }
  return holds_exactly(main(), values) ? main() : DType::kF32;
}

void VectorTypes::expect(const std::string& name, DType dtype, std::span<const float> values) {
  if (of(name, values) != dtype) exceptions_[name] = dtype_name(dtype);
}

std::optional<std::string> VectorTypes::exceptions() const {
  if (exceptions_.empty()) return std::nullopt;
  return exceptions_.dump();
}

namespace {

class CompactModel : public TensorStore {
 public:
  explicit CompactModel(const fs::path& path)
      : file_(path), vectors_(file_.embedded("dtypes"), path.string() + ": dtypes") {
    const std::vector<TensorSpec> specs = expected_tensors(file_.config());
    const Json& source = file_.config().source;
    if (source.contains("torch_dtype") && source["torch_dtype"].is_string())
      vectors_.set_fallback(source["torch_dtype"].get<std::string>());
    for (const TensorSpec& spec : specs) {
      const CompactTensor& tensor = file_.tensor(spec.name);
      if (spec.shape.size() == 2 && tensor.codec.is_float())
        vectors_.count_matrix(float_dtype(tensor.codec.kind), spec.shape[0] * spec.shape[1]);
    }
    for (const TensorSpec& spec : specs) {
      if (spec.shape.size() != 1) continue;
      std::vector<float> values(static_cast<std::size_t>(spec.shape[0]));
      read_rows_f32(spec, 0, spec.shape[0], values.data());
      types_.emplace(spec.name, vectors_.of(spec.name, values));
    }
  }
  const ModelConfig& config() const override { return file_.config(); }
  DType dtype(const TensorSpec& spec) const override {
    if (const auto found = types_.find(spec.name); found != types_.end()) return found->second;
    return float_dtype(file_.tensor(spec.name).codec.kind);
  }
  Codec codec(const TensorSpec& spec) const override {
    if (const auto found = types_.find(spec.name); found != types_.end()) return float_codec(found->second);
    return file_.tensor(spec.name).codec;
  }
  QuantizedTensor codes(const TensorSpec& spec) const override {
    const std::string place = file_.path().string() + ": " + spec.name;
    QuantizedTensor tensor =
        unpack_payload(codec(spec), spec.shape[0], spec.shape[1], file_.tensor(spec.name).payload, place);
    tensor.validate(place);
    return tensor;
  }
  void read_rows_f32(const TensorSpec& spec, std::int64_t first, std::int64_t count, float* out) const override {
    const CompactTensor& tensor = file_.tensor(spec.name);
    const DType type = float_dtype(tensor.codec.kind);
    const std::int64_t cols = spec.shape.size() == 2 ? spec.shape[1] : 1;
    const auto bytes = static_cast<std::size_t>(spec.shape[0] * cols) * static_cast<std::size_t>(dtype_bits(type)) / 8;
    to_f32({spec.name, type, spec.shape, tensor.payload.first(bytes)}, first * cols, count * cols, out);
  }
  void release(const TensorSpec& spec) const override { file_.release(file_.tensor(spec.name)); }
  std::optional<std::string> side_file(const std::string& name) const override { return file_.embedded(name); }
  std::string content_hash() const override { return file_.file_hash(); }

 private:
  CompactFile file_;
  VectorTypes vectors_;
  std::map<std::string, DType, std::less<>> types_;  // of vectors
};

}  // namespace

std::shared_ptr<TensorStore> open_compact_model(const fs::path& path) {
  return std::make_shared<CompactModel>(path);
}

}  // namespace pare
