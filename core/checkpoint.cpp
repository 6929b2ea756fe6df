#include "core/checkpoint.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <set>

#include "core/compact.h"
#include "core/compressed_tensors.h"
#include "core/error.h"
#include "core/gguf_file.h"
#include "core/gptq_folder.h"
#include "core/notices.h"
#include "core/placement.h"
#include "core/tensor_store.h"
#include "core/tokenizer.h"

namespace pare {
namespace {

std::string described(const TensorView& view) { return std::string(dtype_name(view.dtype)) + " " + shape_text(view.shape); }

bool is_float(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16 || dtype == DType::kF64;
}

std::int64_t elements_of(const TensorSpec& spec) { return spec.shape[0] * (spec.shape.size() == 2 ? spec.shape[1] : 1); }

// "model.layers.0.mlp.up_proj.weight" -> "model.layers.0.mlp.up_proj"
std::string module_of(const std::string& weight) { return weight.substr(0, weight.size() - std::strlen(".weight")); }

std::size_t element_size(const TensorView& view) { return static_cast<std::size_t>(dtype_bits(view.dtype)) / 8; }

bool all_zero(const TensorView& view) {
  return std::all_of(view.data.begin(), view.data.end(), [](std::byte byte) { return byte == std::byte{0}; });
}

// Rows of a stored matrix of codes.
QuantizedTensor rows_of(const QuantizedTensor& stored, const Placement& place, std::int64_t rows) {
  QuantizedTensor tensor;
  tensor.codec = stored.codec;
  tensor.rows = rows;
  tensor.cols = stored.cols;
  const auto take = [&](const auto& from, auto& to, std::int64_t width) {
    for (std::int64_t r = 0; r < rows && !from.empty(); ++r) {
      const auto begin = from.begin() + static_cast<std::ptrdiff_t>(place.row(r) * width);
      to.insert(to.end(), begin, begin + static_cast<std::ptrdiff_t>(width));
    }
  };
  take(stored.codes, tensor.codes, stored.cols);
  take(stored.scales, tensor.scales, stored.codec.groups(stored.cols));
  take(stored.zeros, tensor.zeros, stored.codec.groups(stored.cols));
  take(stored.minima, tensor.minima, stored.codec.groups(stored.cols));
  return tensor;
}

class Problems {
 public:
  void add(const std::string& text) {
    if (!known_.insert(text).second) return;  // a stored tensor is asked for by each of its parts
    ++count_;
    if (count_ <= kShown) text_ += (text_.empty() ? "" : "; ") + text;
  }
  void finish(const std::string& place) const {
    if (count_ == 0) return;
    std::string text = std::to_string(count_) + (count_ == 1 ? " problem: " : " problems: ") + text_;
    if (count_ > kShown) text += "; and " + std::to_string(count_ - kShown) + " more";
    throw input_error(place, "exactly the tensors of its config.json", text);
  }

 private:
  static constexpr std::size_t kShown = 50;
  std::set<std::string> known_;
  std::size_t count_ = 0;
  std::string text_;
};

// Reports and returns null unless `view` is there with this dtype and shape.
const TensorView* checked(const TensorView* view, const std::string& name, DType dtype,
                          const std::vector<std::int64_t>& shape, Problems& problems) {
  if (view == nullptr) {
    problems.add(name + " is missing");
  } else if (view->dtype != dtype || view->shape != shape) {
    problems.add(name + " is " + described(*view) + " instead of " + dtype_name(dtype) + " " + shape_text(shape));
    view = nullptr;
  }
  return view;
}

std::uint16_t half_scale(float value, const std::string& place) {
  const std::uint16_t bits = f32_to_f16(value);
  if (f16_to_f32(bits) != value)
    throw input_error(place, "scales that half precision holds exactly", std::to_string(value),
                      "quantize the float model with pare instead");
  return bits == 0x8000u ? std::uint16_t{0} : bits;  // -0 means 0
}

}  // namespace

struct Checkpoint::Source {
  Codec codec;
  const TensorView* dense = nullptr;   // floats; for codes.pare the unpacked copy
  TensorView slice;                    // what `dense` points to where the tensor is a part of a larger one
  const TensorView* codes = nullptr;   // pack-quantized: I32 words; int-quantized and codes.pare: I8
  const TensorView* scales = nullptr;  // compressed-tensors: F32/F16/BF16; codes.pare: F16
  const TensorView* zeros = nullptr;
  const TensorView* minima = nullptr;  // codes.pare alone: F16
  std::shared_ptr<const GptqLinear> gptq;  // instead of all of them
  bool side = false;  // codes.pare
  std::int64_t rows = 0, cols = 0;
  TensorSpec spec;
  std::optional<Placement> place;  // where `dense`, or what is packed, holds this tensor in another way
  std::array<const TensorView*, 5> views() const {
    if (!gptq) return {dense, codes, scales, zeros, minima};
    const GptqViews& own = gptq->views();
    return {nullptr, own.weight, own.scales, own.zeros, own.order};
  }
  std::int64_t stored_rows() const { return place ? place->stored_rows() : rows; }
};

const std::vector<std::string>& side_file_names() {
  static const std::vector<std::string> kNames = {
      "tokenizer.json",   "tokenizer_config.json",  "special_tokens_map.json", "added_tokens.json",
      "vocab.json",       "merges.txt",             "tokenizer.model",         "chat_template.jinja",
      "chat_template.json", "generation_config.json", "LICENSE",               "LICENSE.txt",
      "LICENSE.md",       "NOTICE"};
  return kNames;
}

Checkpoint::Checkpoint(const fs::path& folder) : folder_(folder) {
  if (!fs::is_directory(folder))
    throw input_error(folder.string(), "a model folder", fs::exists(folder) ? "a file" : "nothing there",
                      fs::exists(folder) ? "pare export FILE --to folder makes one of a GGUF or compact file" : "");
  if (!fs::exists(folder / "config.json"))
    throw input_error(folder.string(), "a model folder with config.json", "none in it");
  const Json config = read_json(folder / "config.json");
  const Json generation =
      fs::exists(folder / "generation_config.json") ? read_json(folder / "generation_config.json") : Json(nullptr);
  config_ = parse_config(config, generation, (folder / "config.json").string());
  specs_ = expected_tensors(config_);
  for (std::size_t i = 0; i < specs_.size(); ++i) spec_of_.emplace(specs_[i].name, i);
  shards_ = std::make_shared<ShardedTensors>(folder);

  std::optional<QuantizationSchemes> schemes;
  std::optional<GptqScheme> gptq;
  if (config.contains("quantization_config") && !config["quantization_config"].is_null()) {
    const Json& quantization = config["quantization_config"];
    const std::string place = (folder / "config.json").string() + ": quantization_config";
    if (GptqScheme::is_gptq(quantization)) gptq = GptqScheme::parse(quantization, place);
    else schemes.emplace(quantization, place);
  } else if (fs::exists(folder / "quantize_config.json")) {  // folders of early AutoGPTQ
    gptq = GptqScheme::parse(read_json(folder / "quantize_config.json"), (folder / "quantize_config.json").string());
  }

  Problems problems;
  std::map<std::string, Codec> side_codecs;
  if (fs::exists(folder / "codes.pare")) {
    side_ = std::make_shared<SafetensorsFile>(folder / "codes.pare");
    const std::string place = (folder / "codes.pare").string();
    const auto text = side_->metadata().find("pare.codecs");
    if (text == side_->metadata().end()) throw input_error(place, "metadata pare.codecs", "none");
    const Json codecs = parse_json(text->second, place + ": pare.codecs");
    if (!codecs.is_object()) throw input_error(place + ": pare.codecs", "an object", codecs.type_name());
    for (const auto& [name, codec] : codecs.items()) {
      if (!codec.is_string()) throw input_error(place + ": pare.codecs." + name, "a codec name", codec.type_name());
      try {
        side_codecs.emplace(name, Codec::parse(codec.get<std::string>(), place + ": pare.codecs." + name));
      } catch (const Error& problem) {
        throw input_error(problem.place(), problem.expected(), problem.found());  // the file's content, not the usage
      }
    }
  }

  std::size_t side_used = 0;
  std::map<std::string, bool, std::less<>> used;
  for (const std::string& name : shards_->names()) used.emplace(name, false);
  const auto take = [&](const std::string& name) {
    if (const auto found = used.find(name); found != used.end()) found->second = true;
    return shards_->find(name);
  };

  const std::string prefix = base_prefix(config_);
  const bool without_prefix = !prefix.empty() && std::none_of(used.begin(), used.end(), [&](const auto& entry) {
    return entry.first.starts_with(prefix);
  });
  const auto file_place = [&](const TensorSpec& spec) {
    Placement place = placement(config_, spec).value_or(renamed(spec.name, spec));
    if (without_prefix && place.name.starts_with(prefix)) place.name = place.name.substr(prefix.size());
    return place;
  };

  std::map<std::string, std::shared_ptr<const GptqLinear>> gptq_linears;  // by module; null: one with a problem
  const auto gptq_linear = [&](const std::string& module, std::int64_t outputs, std::int64_t inputs) {
    const auto [at, added] = gptq_linears.emplace(module, nullptr);
    if (!added) return at->second;
    if (outputs * gptq->bits % 32 != 0 || inputs * gptq->bits % 32 != 0) {
      problems.add(module + " has " + shape_text({outputs, inputs}) + ", which GPTQ cannot pack into words");
      return at->second;
    }
    const auto part = [&](const char* suffix, std::vector<std::int64_t> shape, bool floats) {
      const std::string name = module + "." + suffix;
      const TensorView* view = take(name);
      const DType dtype = !floats ? DType::kI32 : view != nullptr && is_float(view->dtype) ? view->dtype : DType::kF16;
      return checked(view, name, dtype, shape, problems);
    };
    const std::int64_t groups = gptq->groups(inputs);
    GptqViews views;
    views.weight = part(kGptqWeight, {gptq->words(inputs), outputs}, false);
    views.zeros = part(kGptqZeros, {groups, gptq->words(outputs)}, false);
    views.scales = part(kGptqScales, {groups, outputs}, true);
    const bool ordered = used.contains(module + "." + kGptqOrder);
    if (ordered) views.order = part(kGptqOrder, {inputs}, false);
    if (views.weight != nullptr && views.zeros != nullptr && views.scales != nullptr &&
        (views.order != nullptr || !ordered))
      at->second = std::make_shared<GptqLinear>(*gptq, views, outputs, inputs, folder.string() + ": " + module);
    return at->second;
  };

  for (const TensorSpec& spec : specs_) {
    auto source = std::make_shared<Source>();
    source->spec = spec;
    source->rows = spec.shape[0];
    source->cols = spec.shape.size() == 2 ? spec.shape[1] : 1;
    const Placement place = file_place(spec);
    if (rearranged(place, spec)) source->place = place;
    const TensorView* dense = take(place.name);
    const bool linear = spec.role == TensorRole::kLinear || spec.role == TensorRole::kHead;
    const std::string stem = linear && !place.transposed ? module_of(place.name) : "";
    const std::int64_t stored_rows = place.stored_rows();
    if (gptq && linear && dense == nullptr && used.contains(module_of(place.name) + "." + kGptqWeight)) {
      source->gptq = gptq_linear(module_of(place.name), stored_rows, source->cols);
      if (!source->gptq) continue;
      source->codec = source->gptq->codec();
      if (side_codecs.contains(spec.name)) problems.add(spec.name + " is packed and in codes.pare");
      sources_.emplace(spec.name, std::move(source));
      continue;
    }
    const TensorView* packed = stem.empty() ? nullptr : take(stem + "." + kPackedSuffix);
    const bool bytes = packed == nullptr && !stem.empty() && dense != nullptr && dense->dtype == DType::kI8;
    if (packed != nullptr || bytes) {
      if (dense != nullptr && !bytes) problems.add(place.name + " is there as floats and packed");
      if (side_codecs.contains(spec.name)) problems.add(spec.name + " is packed and in codes.pare");
      if (!schemes) {
        problems.add((bytes ? dense : packed)->name + " without a quantization_config in config.json");
        continue;
      }
      const Codec codec = schemes->codec(stem);
      source->codec = codec;
      if (bytes && codec.kind != CodecKind::kQ8) {
        problems.add(place.name + " has a byte a code where " + codec.name() + " packs them");
        continue;
      }
      if (!codec.fits(source->cols)) {
        problems.add(spec.name + " has rows of " + std::to_string(source->cols) + " that " + codec.name() + " does not divide");
        continue;
      }
      const std::int64_t groups = codec.groups(source->cols);
      source->codes = bytes ? checked(dense, place.name, DType::kI8, {stored_rows, source->cols}, problems)
                            : checked(packed, packed->name, DType::kI32,
                                      {stored_rows, packed_words(source->cols, codec.bits())}, problems);
      const TensorView* scale = take(stem + "." + kScaleSuffix);
      const DType scale_type = scale != nullptr && is_float(scale->dtype) ? scale->dtype : DType::kF32;
      source->scales = checked(scale, stem + "." + kScaleSuffix, scale_type, {stored_rows, groups}, problems);
      const std::string shape_name = stem + "." + kShapeSuffix;
      const TensorView* shape =
          bytes ? nullptr : checked(take(shape_name), shape_name, DType::kI64, {2}, problems);
      if (shape != nullptr) {
        std::int64_t sizes[2];
        std::memcpy(sizes, shape->data.data(), sizeof sizes);
        if (sizes[0] != stored_rows || sizes[1] != source->cols)
          problems.add(shape->name + " says " + shape_text({sizes[0], sizes[1]}) + " instead of " +
                       shape_text(place.shape));
      }
      if (codec.kind == CodecKind::kQ4a)
        source->zeros = checked(take(stem + "." + kZeroSuffix), stem + "." + kZeroSuffix, DType::kI32,
                                {packed_words(stored_rows, 4), groups}, problems);
    } else {
      if (dense == nullptr) {
        if (const auto other = other_source(config_, spec); other && shards_->find(other->name) != nullptr) {
          const TensorView* whole = take(other->name);
          if (whole->shape != other->shape || !is_float(whole->dtype)) {
            problems.add(whole->name + " is " + described(*whole) + " instead of floats " + shape_text(other->shape));
            continue;
          }
          const std::size_t size = whole->data.size() / static_cast<std::size_t>(whole->elements());
          const auto elements = static_cast<std::size_t>(source->rows * source->cols);
          source->slice = {spec.name, whole->dtype, spec.shape,
                           whole->data.subspan(static_cast<std::size_t>(other->first) * size, elements * size)};
          dense = &source->slice;
        }
      }
      if (dense == nullptr) {
        problems.add(place.name + " is missing");
        continue;
      }
      if (!is_float(dense->dtype)) {
        problems.add(place.name + " is " + described(*dense) + ", not F32, F16, BF16 or F64");
        continue;
      }
      source->dense = checked(dense, place.name, dense->dtype, place.shape, problems);
      source->codec = float_codec(dense->dtype);
      if (const auto side = side_codecs.find(spec.name); side != side_codecs.end()) {
        source->side = true;
        source->codec = side->second;
        const bool table = spec.role != TensorRole::kLinear && spec.role != TensorRole::kHead;
        if (spec.shape.size() != 2 || source->codec.is_float() || !source->codec.fits(source->cols) ||
            (table && source->codec.int8_inputs)) {
          problems.add("codes.pare: " + spec.name + " " + shape_text(spec.shape) + " cannot be " + source->codec.name());
          continue;
        }
        if (dense->dtype != DType::kF32) problems.add(spec.name + " has codes in codes.pare and is not F32");
        const std::int64_t groups = source->codec.groups(source->cols);
        const auto part = [&](const char* suffix, DType dtype, std::vector<std::int64_t> shape) {
          const std::string name = spec.name + suffix;
          side_used += side_->find(name) != nullptr ? 1 : 0;
          return checked(side_->find(name), "codes.pare: " + name, dtype, shape, problems);
        };
        source->codes = part(".codes", DType::kI8, spec.shape);
        source->scales = part(".scales", DType::kF16, {source->rows, groups});
        if (source->codec.kind == CodecKind::kQ4a) source->zeros = part(".zeros", DType::kU8, {source->rows, groups});
        if (source->codec.kind == CodecKind::kQ4m)
          source->minima = part(".minima", DType::kF16, {source->rows, groups});
        side_codecs.erase(side);
      }
    }
    sources_.emplace(spec.name, std::move(source));
  }
  for (const auto& [name, codec] : side_codecs)
    if (spec_of_.find(name) == spec_of_.end()) problems.add("codes.pare: " + name + " is not a tensor of this model");
  if (side_ && side_used < side_->tensors().size())
    problems.add("codes.pare: " + std::to_string(side_->tensors().size() - side_used) + " tensors are left over");
  const std::string tied_head = file_place({"lm_head.weight", {config_.vocab_size, config_.hidden_size},
                                            TensorRole::kHead, -1, "lm_head"}).name;
  for (const auto& [name, was_used] : used) {
    if (was_used || is_buffer(config_, name) || (config_.tie_word_embeddings && name == tied_head)) continue;
    const TensorView* view = shards_->find(name);
    // AutoGPTQ gave every linear a bias.
    if (name.ends_with(".bias") && gptq_linears.contains(name.substr(0, name.rfind('.'))) && all_zero(*view)) continue;
    problems.add(name + " " + described(*view) +
                 (name.ends_with(".weight_g_idx") ? " reorders inputs, which is not supported" : " is left over"));
  }
  problems.finish(folder.string());
}

Checkpoint::Checkpoint(std::shared_ptr<TensorStore> store, const fs::path& path)
    : folder_(path), store_(std::move(store)), config_(store_->config()), specs_(expected_tensors(config_)) {
  for (std::size_t i = 0; i < specs_.size(); ++i) spec_of_.emplace(specs_[i].name, i);
}

Checkpoint Checkpoint::open(const fs::path& path) {
  if (GgufFile::is_gguf(path)) return Checkpoint(open_gguf_model(path), path);
  if (CompactFile::is_compact(path)) return Checkpoint(open_compact_model(path), path);
  if (fs::is_regular_file(path))
    throw input_error(path.string(), "a model folder, a GGUF file or a compact file", "another file");
  return Checkpoint(path);
}

std::vector<std::string> Checkpoint::notes() const {
  if (store_) return store_->notes();
  std::size_t reordered = 0, others = 0;
  for (const auto& [name, source] : sources_)
    if (source->gptq && source->codec.is_float()) ++(source->gptq->reordered() ? reordered : others);
  std::vector<std::string> notes;
  if (reordered > 0)
    notes.push_back(std::to_string(reordered) +
                    " linears of GPTQ with inputs in another order (desc_act): taken as the floats that they stand for");
  if (others > 0)
    notes.push_back(std::to_string(others) +
                    " linears of GPTQ that no codec holds: taken as the floats that they stand for");
  for (const std::string& name : side_file_names())
    if (is_notice(name))
      if (const std::string why = notice_obstacle(folder_, name); !why.empty())
        notes.push_back(name + " is " + why + ": left out");
  return notes;
}

bool Checkpoint::is_gptq() const {
  return std::any_of(sources_.begin(), sources_.end(), [](const auto& entry) { return entry.second->gptq != nullptr; });
}

const GptqLinear* Checkpoint::gptq(std::string_view name) const {
  return store_ ? nullptr : source(name).gptq.get();
}

std::optional<std::string> Checkpoint::side_file(const std::string& name) const {
  if (store_) return store_->side_file(name);
  if (is_notice(name)) return read_notice(folder_, name);
  if (!fs::is_regular_file(folder_ / name)) return std::nullopt;
  return read_text(folder_ / name);
}

std::optional<std::string> Checkpoint::tokenizer_text() const {
  return store_ ? store_->side_file("tokenizer.json") : tokenizer_json_text(folder_);
}

const TensorSpec& Checkpoint::spec(std::string_view name) const {
  const auto found = spec_of_.find(name);
  if (found == spec_of_.end()) throw std::logic_error("Checkpoint: no tensor " + std::string(name));
  return specs_[found->second];
}

bool Checkpoint::has(std::string_view name) const { return spec_of_.find(name) != spec_of_.end(); }

const Checkpoint::Source& Checkpoint::source(std::string_view name) const {
  const auto found = sources_.find(name);
  if (found == sources_.end()) throw std::logic_error("Checkpoint: no tensor " + std::string(name));
  return *found->second;
}

DType Checkpoint::dtype(std::string_view name) const {
  if (store_) return store_->dtype(spec(name));
  const Source& from = source(name);
  return from.codec.is_float() && !from.gptq ? from.dense->dtype : DType::kF32;
}

std::string Checkpoint::float_dtype() const {
  std::int64_t f32 = 0, f16 = 0, bf16 = 0;
  for (const TensorSpec& spec : specs_) {
    const CodecKind kind = codec(spec.name).kind;
    if (!codec(spec.name).is_float()) continue;
    auto& count = kind == CodecKind::kF16 ? f16 : kind == CodecKind::kBf16 ? bf16 : f32;
    count += elements_of(spec);
  }
  if (bf16 > f32 && bf16 >= f16) return "bfloat16";
  return f16 > f32 ? "float16" : "float32";
}

Codec Checkpoint::codec(std::string_view name) const {
  return store_ ? store_->codec(spec(name)) : source(name).codec;
}

QuantizedTensor Checkpoint::codes(std::string_view name) const {
  if (store_) return store_->codes(spec(name));
  const Source& from = source(name);
  if (from.codec.is_float()) throw std::logic_error("Checkpoint: " + std::string(name) + " has no codes");
  const std::string place = folder_.string() + ": " + std::string(name);
  if (from.gptq) {
    const QuantizedTensor stored = from.gptq->codes();
    QuantizedTensor own = from.place ? rows_of(stored, *from.place, from.rows) : stored;
    own.validate(place);
    return own;
  }
  QuantizedTensor tensor;
  tensor.codec = from.codec;
  tensor.rows = from.place && !from.side ? from.place->stored_rows() : from.rows;
  tensor.cols = from.cols;
  const auto scale_count = static_cast<std::size_t>(tensor.rows * from.codec.groups(from.cols));
  tensor.scales.resize(scale_count);
  if (from.codes->dtype == DType::kI8) {
    tensor.codes.resize(from.codes->data.size());
    std::memcpy(tensor.codes.data(), from.codes->data.data(), from.codes->data.size());
  } else {
    unpack_weight(*from.codes, tensor);
  }
  if (from.side) {
    std::memcpy(tensor.scales.data(), from.scales->data.data(), from.scales->data.size());
    if (from.zeros != nullptr) {
      tensor.zeros.resize(from.zeros->data.size());
      std::memcpy(tensor.zeros.data(), from.zeros->data.data(), from.zeros->data.size());
    }
    if (from.minima != nullptr) {
      tensor.minima.resize(scale_count);
      std::memcpy(tensor.minima.data(), from.minima->data.data(), from.minima->data.size());
    }
  } else {
    std::vector<float> scales(scale_count);
    to_f32(*from.scales, 0, static_cast<std::int64_t>(scale_count), scales.data());
    for (std::size_t i = 0; i < scale_count; ++i) tensor.scales[i] = half_scale(scales[i], place);
    if (from.zeros != nullptr) unpack_zero_points(*from.zeros, tensor);
  }
  if (from.place && !from.side) tensor = rows_of(tensor, *from.place, from.rows);
  tensor.validate(place);
  return tensor;
}

const TensorView& Checkpoint::view(std::string_view name) const {
  if (store_) throw std::logic_error("Checkpoint: views are of folders");
  const Source& from = source(name);
  if (!from.codec.is_float()) throw std::logic_error("Checkpoint: " + std::string(name) + " is stored as codes");
  if (from.place || from.gptq) throw std::logic_error("Checkpoint: " + std::string(name) + " has no bytes of its own");
  return *from.dense;
}

void Checkpoint::read_f32(std::string_view name, float* out) const {
  if (codec(name).is_float()) read_rows_f32(name, 0, spec(name).shape[0], out);
  else codes(name).unpack(out);
}

void Checkpoint::read_rows_f32(std::string_view name, std::int64_t first, std::int64_t count, float* out) const {
  if (store_) return store_->read_rows_f32(spec(name), first, count, out);
  const Source& from = source(name);
  if (!from.codec.is_float()) throw std::logic_error("rows of codes: " + std::string(name));
  if (from.gptq) {
    for (std::int64_t r = 0; r < count; ++r)
      from.gptq->read_row(from.place ? from.place->row(first + r) : first + r, out + r * from.cols);
    return;
  }
  if (!from.place) return to_f32(*from.dense, first * from.cols, count * from.cols, out);
  const std::size_t size = element_size(*from.dense);
  std::vector<std::byte> rows(static_cast<std::size_t>(count * from.cols) * size);
  take_rows_from(*from.place, from.spec, from.dense->data.data(), size, first, count, rows.data());
  to_f32({from.spec.name, from.dense->dtype, {count, from.cols}, rows}, 0, count * from.cols, out);
}

std::vector<float> Checkpoint::read_f32(std::string_view name) const {
  std::vector<float> values(static_cast<std::size_t>(elements_of(spec(name))));
  read_f32(name, values.data());
  return values;
}

std::uint64_t Checkpoint::tensor_bytes() const {
  std::uint64_t bytes = 0;
  for (const TensorSpec& spec : specs_) {
    const Codec as = codec(spec.name);
    const auto elements = static_cast<std::uint64_t>(elements_of(spec));
    const Source* folded = store_ ? nullptr : &source(spec.name);
    if (folded != nullptr && folded->gptq && as.is_float()) {  // codes that ours do not hold
      std::uint64_t stored = 0;
      for (const TensorView* view : folded->views()) stored += view != nullptr ? view->data.size() : 0;
      bytes += stored * static_cast<std::uint64_t>(folded->rows) / static_cast<std::uint64_t>(folded->stored_rows());
    } else if (as.is_float()) {
      bytes += elements * static_cast<std::uint64_t>(dtype_bits(dtype(spec.name))) / 8;
    } else {
      // The unpacked copy of a codes.pare tensor is for other readers and 8-bit storage of 4-bit codes is a
      // convenience: counted is what the codes need.
      const auto scales = static_cast<std::uint64_t>(spec.shape[0] * as.groups(spec.shape[1]));
      bytes += elements * static_cast<std::uint64_t>(as.bits()) / 8 +
               (scales * static_cast<std::uint64_t>(as.group_bits()) + 7) / 8;
    }
  }
  return bytes;
}

void Checkpoint::release(std::string_view name) const {
  if (store_) return store_->release(spec(name));
  const auto drop = [](const SafetensorsFile& file, const TensorView& view) {
    const auto all = file.file().bytes();
    if (view.data.empty() || view.data.data() < all.data() || view.data.data() >= all.data() + all.size()) return;
    file.file().release(static_cast<std::size_t>(view.data.data() - all.data()), view.data.size());
  };
  for (const TensorView* view : source(name).views()) {
    if (view == nullptr) continue;
    for (const auto& file : shards_->files()) drop(*file, *view);
    if (side_) drop(*side_, *view);
  }
}

std::string Checkpoint::content_hash() const {
  if (store_) return store_->content_hash();
  Hasher hasher;
  const auto file = [&](const std::string& name) {
    if (!fs::is_regular_file(folder_ / name) || (is_notice(name) && !notice_obstacle(folder_, name).empty())) return;
    const MappedFile mapped(folder_ / name);
    hasher.update(name + '\0' + std::to_string(mapped.bytes().size()) + '\0');
    hasher.update(mapped.bytes());
  };
  file("config.json");
  for (const std::string& name : side_file_names()) file(name);
  for (const TensorSpec& spec : specs_) {
    const Source& from = source(spec.name);
    for (const TensorView* view : from.views()) {
      if (view == nullptr) continue;
      hasher.update(view->name + '\0' + dtype_name(view->dtype) + shape_text(view->shape) + '\0');
      hasher.update(view->data);
    }
    release(spec.name);
  }
  return hasher.hex();
}

}  // namespace pare
