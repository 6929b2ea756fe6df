// A GGUF file as a model of ours.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <set>

#include "core/error.h"
#include "core/gguf_arch.h"
#include "core/gguf_file.h"
#include "core/tensor_store.h"

namespace pare {
namespace {

constexpr const char* kTypesKey = "pare.dtypes";

class GgufModel : public TensorStore {
 public:
  explicit GgufModel(const fs::path& path)
      : file_(path), vectors_(file_.text(kTypesKey), path.string() + ": " + kTypesKey) {
    const std::string place = path.string();
    if (file_.integer("split.count").value_or(1) > 1)
      throw input_error(place, "a model in one file",
                        "one of " + std::to_string(*file_.integer("split.count")) + " parts",
                        "llama-gguf-split --merge joins them");
    const auto name = file_.text("general.architecture");
    if (!name) throw input_error(place, "the key general.architecture", "none");
    arch_ = &gguf_architecture_named(*name, file_.find("blk.0.ffn_gate_inp.weight") != nullptr, place);
    config_ = gguf_config(file_, *arch_);
    if (parameter_limit() < parameter_count(config_))
      throw input_error(place,
                        "tensors for the " + std::to_string(parameter_count(config_)) + " parameters of its keys",
                        "a file of " + std::to_string(file_.file_bytes()) + " bytes");
    specs_ = expected_tensors(config_);
    place_tensors();
    choose_types();
  }

  const ModelConfig& config() const override { return config_; }
  DType dtype(const TensorSpec& spec) const override { return source(spec).dtype; }
  // Which codes blocks are takes a look at all of them: once, when it is asked.
  Codec codec(const TensorSpec& spec) const override {
    const Source& from = source(spec);
    const std::lock_guard lock(looking_);
    if (!from.codec) from.codec = codec_of_blocks(spec, from);
    return *from.codec;
  }

  QuantizedTensor codes(const TensorSpec& spec) const override {
    const Source& from = source(spec);
    QuantizedTensor tensor = no_codes(codec(spec), spec.shape[0], spec.shape[1]);
    for (std::int64_t r = 0; r < tensor.rows; ++r) unpack_ggml_row(from.view->type, row(from, spec, r), tensor, r);
    tensor.validate(file_.path().string() + ": " + from.view->name);
    return tensor;
  }

  void read_rows_f32(const TensorSpec& spec, std::int64_t first, std::int64_t count, float* out) const override {
    const Source& from = source(spec);
    if (!from.own.empty()) {
      std::copy_n(from.own.begin() + first, count, out);
      return;
    }
    const std::int64_t cols = columns(spec);
    for (std::int64_t r = 0; r < count; ++r)
      ggml_to_f32(from.view->type, row(from, spec, first + r), cols, out + r * cols);
    if (from.adds_one)
      for (std::int64_t i = 0; i < count * cols; ++i) out[i] -= 1.0f;
  }

  void release(const TensorSpec& spec) const override {
    const std::span<const std::byte> data = source(spec).view->data;
    file_.file().release(static_cast<std::size_t>(data.data() - file_.file().bytes().data()), data.size());
  }

  std::optional<std::string> side_file(const std::string& name) const override {
    if (name == "tokenizer.json") return gguf_tokenizer_json(file_, config_.vocab_size);
    if (name == "chat_template.jinja") return file_.text("tokenizer.chat_template");
    if (name != "tokenizer_config.json" || !file_.has("tokenizer.ggml.tokens")) return std::nullopt;
    const auto tokens = file_.texts("tokenizer.ggml.tokens").value();
    Json out = {{"tokenizer_class", "PreTrainedTokenizerFast"}, {"model_max_length", config_.max_position_embeddings}};
    for (const auto& [key, token] :
         {std::pair("bos_token_id", "bos_token"), std::pair("eos_token_id", "eos_token"),
          std::pair("unknown_token_id", "unk_token"), std::pair("padding_token_id", "pad_token")}) {
      const auto id = file_.integer(std::string("tokenizer.ggml.") + key);
      if (id && *id >= 0 && *id < static_cast<std::int64_t>(tokens.size()))
        out[token] = tokens[static_cast<std::size_t>(*id)];
    }
    return out.dump(2) + "\n";
  }

  std::string content_hash() const override { return hash_file(file_.path()); }
  std::vector<std::string> notes() const override {
    std::map<std::string, std::int64_t> unpacked;
    for (const TensorSpec& spec : specs_) {
      const GgmlType type = source(spec).view->type;
      if (ggml_block_values(type) > 1 && codec(spec).is_float()) ++unpacked[ggml_type_name(type)];
    }
    std::vector<std::string> notes;
    for (const auto& [type, tensors] : unpacked)
      notes.push_back(std::to_string(tensors) + " tensors of " + type + ": taken as the floats that they stand for");
    return notes;
  }

 private:
  struct Source {
    const GgufView* view = nullptr;
    std::int64_t first = 0;  // the row of the view where ours begin
    bool neighbours = false, adds_one = false, always_f32 = false;
    std::vector<float> own;  // values that the file has in a key, instead of the view
    DType dtype = DType::kF32;
    mutable std::optional<Codec> codec;  // of blocks: nothing before they were looked at
  };

  // As many codes, scales, zeros and minima as such a matrix has.
  static QuantizedTensor no_codes(const Codec& codec, std::int64_t rows, std::int64_t cols) {
    const auto groups = static_cast<std::size_t>(rows * codec.groups(cols));
    QuantizedTensor tensor{codec, rows, cols, {}, std::vector<std::uint16_t>(groups), {}, {}};
    tensor.codes.resize(static_cast<std::size_t>(rows * cols));
    if (codec.kind == CodecKind::kQ4a) tensor.zeros.resize(groups);
    if (codec.kind == CodecKind::kQ4m) tensor.minima.resize(groups);
    return tensor;
  }

  static std::int64_t columns(const TensorSpec& spec) { return spec.shape.size() == 2 ? spec.shape[1] : 1; }
  const Source& source(const TensorSpec& spec) const { return sources_.find(spec.name)->second; }

  const std::byte* row(const Source& from, const TensorSpec& spec, std::int64_t r) const {
    const std::int64_t there = from.first + (from.neighbours ? row_before(r, config_.head_dim) : r);
    return from.view->data.data() + static_cast<std::uint64_t>(there) * ggml_bytes(from.view->type, columns(spec));
  }

  // At most what the bytes of the file could hold: keys must not ask for more memory than it has.
  std::int64_t parameter_limit() const { return static_cast<std::int64_t>(file_.file_bytes() / 84 * 256) + 256; }

  void place_tensors() {
    std::string problems;
    int count = 0;
    const auto complain = [&](const std::string& text) {
      if (++count <= 20) problems += (problems.empty() ? "" : "; ") + text;
    };
    std::set<std::string_view> used = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"};
    if (config_.tie_word_embeddings) used.insert("output.weight");
    std::vector<GgufPlacement> placements = gguf_placements(config_, *arch_, specs_);
    split_if_split(placements);
    for (const GgufPlacement& place : placements) {
      const GgufView* view = file_.find(place.name);
      used.insert(place.name);
      if (view == nullptr) {
        complain(place.name + " is missing");
        continue;
      }
      if (view->shape != place.shape) {
        complain(place.name + " has shape " + shape_text(view->shape) + " instead of " + shape_text(place.shape));
        continue;
      }
      if (place.shape.size() == 1 && ggml_block_values(view->type) > 1) {
        complain(place.name + " is " + ggml_type_name(view->type) + ", a vector in blocks");
        continue;
      }
      std::int64_t first = 0;
      for (const TensorSpec* part : place.parts) {
        sources_[part->name] = {view, first, place.neighbours, place.adds_one, place.always_f32, {}, DType::kF32, {}};
        first += part->shape[0];
      }
    }
    for (const GgufView& view : file_.tensors())
      if (!used.contains(view.name)) complain(view.name + " " + shape_text(view.shape) + " is left over");
    if (count > 20) problems += "; and " + std::to_string(count - 20) + " more";
    if (count > 0)
      throw input_error(file_.path().string(), "exactly the tensors of " + std::string(arch_->name), problems);
  }

  // Files may have q, k and v, joined in most, as three tensors; then each is a placement of its own.
  void split_if_split(std::vector<GgufPlacement>& placements) const {
    for (const auto& [joined, names] :
         {std::pair(std::string(".attn_qkv."), std::vector<std::string>{".attn_q.", ".attn_k.", ".attn_v."})}) {
      for (std::size_t i = 0; i < placements.size(); ++i) {
        const std::size_t at = placements[i].name.find(joined);
        if (at == std::string::npos || placements[i].parts.size() != names.size() ||
            file_.find(placements[i].name) != nullptr)
          continue;
        std::vector<GgufPlacement> parts;
        for (std::size_t part = 0; part < names.size(); ++part) {
          GgufPlacement one = placements[i];
          one.name = one.name.substr(0, at) + names[part] + one.name.substr(at + joined.size());
          one.parts = {placements[i].parts[part]};
          one.shape = one.parts[0]->shape;
          parts.push_back(std::move(one));
        }
        placements.erase(placements.begin() + static_cast<std::ptrdiff_t>(i));
        placements.insert(placements.begin() + static_cast<std::ptrdiff_t>(i), parts.begin(), parts.end());
      }
    }
  }

  // Blocks that are codes of ours stay codes, the smallest that hold all of a tensor; others are floats in F32.
  Codec codec_of_blocks(const TensorSpec& spec, const Source& from) const {
    const GgmlType type = from.view->type;
    std::vector<QuantizedTensor> tries;
    const auto add = [&](CodecKind kind) { tries.push_back(no_codes({kind, 32}, 1, spec.shape[1])); };
    if (type == GgmlType::kQ8_0) add(CodecKind::kQ8);
    if (type == GgmlType::kQ4_0) add(CodecKind::kQ4);
    if (type == GgmlType::kQ4_1) add(CodecKind::kQ4a), add(CodecKind::kQ4m);
    if (tries.empty() || from.always_f32) return float_codec(DType::kF32);
    std::size_t fits = 0;  // what q4a holds, q4m holds as well
    for (std::int64_t r = 0; r < spec.shape[0]; ++r) {
      const std::byte* blocks = row(from, spec, r);
      if (!ggml_scales_are_finite(type, blocks, spec.shape[1]))
        throw input_error(file_.path().string() + ": " + from.view->name, "finite scales and minima",
                          "others in row " + std::to_string(r) + " of " + spec.name, "the file is damaged");
      while (fits < tries.size() && !unpack_ggml_row(type, blocks, tries[fits], 0)) ++fits;
    }
    release(spec);
    return fits < tries.size() ? tries[fits].codec : float_codec(DType::kF32);
  }

  void choose_types() {
    for (const TensorSpec& spec : specs_) {
      Source& from = sources_[spec.name];
      const GgmlType type = from.view->type;
      if (ggml_block_values(type) > 1) continue;
      if (type == GgmlType::kF16) from.dtype = DType::kF16;
      if (type == GgmlType::kBF16) from.dtype = DType::kBF16;
      from.codec = float_codec(from.dtype);
      if (!from.always_f32) vectors_.count_matrix(from.dtype, spec.shape[0] * columns(spec));
    }
    for (const TensorSpec& spec : specs_) {
      Source& from = sources_[spec.name];
      if (!from.always_f32 || from.view->type != GgmlType::kF32) continue;
      if (from.adds_one) read_own(spec, from);
      std::vector<float> values(static_cast<std::size_t>(spec.shape[0] * columns(spec)));
      read_rows_f32(spec, 0, spec.shape[0], values.data());
      from.dtype = vectors_.of(spec.name, values);
      from.codec = float_codec(from.dtype);
    }
  }

  // Norms whose weight + 1 is rounded have the weight itself in a key, which has to say the same.
  void read_own(const TensorSpec& spec, Source& from) {
    const std::string key = "pare." + from.view->name;
    auto values = file_.numbers(key);
    if (!values) return;
    std::vector<float> sums(static_cast<std::size_t>(spec.shape[0]));
    ggml_to_f32(GgmlType::kF32, from.view->data.data(), spec.shape[0], sums.data());
    bool same = values->size() == sums.size();
    for (std::size_t i = 0; same && i < sums.size(); ++i) {
      const float sum = 1.0f + (*values)[i];
      same = std::memcmp(&sum, &sums[i], sizeof sum) == 0;
    }
    if (!same)
      throw input_error(file_.path().string() + ": " + key, "the weights of " + from.view->name + " less 1", "others");
    from.own = std::move(*values);
  }

  GgufFile file_;
  VectorTypes vectors_;
  const GgufArchitecture* arch_ = nullptr;
  ModelConfig config_;
  std::vector<TensorSpec> specs_;
  std::map<std::string, Source, std::less<>> sources_;
  mutable std::mutex looking_;
};

}  // namespace

std::shared_ptr<TensorStore> open_gguf_model(const fs::path& path) {
  return std::make_shared<GgufModel>(path);
}

}  // namespace pare
