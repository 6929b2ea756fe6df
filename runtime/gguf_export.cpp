#include "runtime/gguf_export.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <cmath>
#include <cstring>
#include <map>

#include "core/chat_template.h"
#include "core/error.h"
#include "core/model_card.h"
#include "core/tensor_store.h"
#include "runtime/k_quants.h"
#include "runtime/round_to_nearest.h"
#include "runtime/team.h"

namespace pare {
namespace {

GgmlType float_type(CodecKind kind) {
  if (kind == CodecKind::kF16) return GgmlType::kF16;
  if (kind == CodecKind::kBf16) return GgmlType::kBF16;
  return GgmlType::kF32;
}

// Codes of 3 and 2 bits are 4-bit codes too: the same weights, at 4.5 bits.
GgmlType block_type(CodecKind kind) {
  if (kind == CodecKind::kQ8) return GgmlType::kQ8_0;
  return kind == CodecKind::kQ4a || kind == CodecKind::kQ4m ? GgmlType::kQ4_1 : GgmlType::kQ4_0;
}

constexpr std::int64_t kKBlock = 256;

constexpr std::pair<const char*, GgmlType> kTargets[] = {
    {"f32", GgmlType::kF32},   {"f16", GgmlType::kF16},   {"bf16", GgmlType::kBF16}, {"q8", GgmlType::kQ8_0},
    {"q4", GgmlType::kQ4_0},   {"q2_k", GgmlType::kQ2_K}, {"q3_k", GgmlType::kQ3_K}, {"q4_k", GgmlType::kQ4_K},
    {"q5_k", GgmlType::kQ5_K}, {"q6_k", GgmlType::kQ6_K}};

// What a float matrix is stored in; nothing: as it is.
std::optional<GgmlType> wanted_type(const std::string& name) {
  if (name == "keep") return std::nullopt;
  for (const auto& [known, type] : kTargets)
    if (name == known) return type;
  if (name == "q4g32") return GgmlType::kQ4_0;
  throw usage_error("--codec", "keep, f32, f16, bf16, q8, q4 or q2_k to q6_k: what GGUF blocks can hold", name);
}

// Blocks of 32, of rows that are no whole blocks of 256: the same arithmetic with halves for scales and minima, or more
// bits, so that no weight is stored more coarsely than was asked.
GgmlType narrow_type(GgmlType type) {
  switch (type) {
    case GgmlType::kQ2_K:
    case GgmlType::kQ3_K:
      return GgmlType::kQ4_0;
    case GgmlType::kQ4_K:
      return GgmlType::kQ4_1;
    case GgmlType::kQ5_K:
      return GgmlType::kQ5_1;
    case GgmlType::kQ6_K:
      return GgmlType::kQ8_0;
    default:
      return type;
  }
}

// llama.cpp: llama_ftype, the type of most matrices.
std::uint32_t file_type(GgmlType type) {
  switch (type) {
    case GgmlType::kF32:
      return 0;
    case GgmlType::kF16:
      return 1;
    case GgmlType::kQ4_0:
      return 2;
    case GgmlType::kQ4_1:
      return 3;
    case GgmlType::kQ8_0:
      return 7;
    case GgmlType::kQ5_1:
      return 9;
    case GgmlType::kQ2_K:
      return 10;
    case GgmlType::kQ3_K:
      return 11;  // the S of each: all matrices of one type
    case GgmlType::kQ4_K:
      return 14;
    case GgmlType::kQ5_K:
      return 16;
    case GgmlType::kQ6_K:
      return 18;
    case GgmlType::kBF16:
      return 32;
    default:
      break;
  }
  throw std::logic_error("ggml type");
}

// The bits of 1 + w, less 1, against those of w.
bool survives_one(float w) {
  const float back = (1.0f + w) - 1.0f;
  return std::bit_cast<std::uint32_t>(back) == std::bit_cast<std::uint32_t>(w);
}

std::int64_t columns_of(const TensorSpec& spec) {
  return spec.shape.size() == 2 ? spec.shape[1] : 1;
}

class TensorWriter {
 public:
  TensorWriter(const Checkpoint& checkpoint, bool keep, int threads, const Importances& importances, GgufWriter& out)
      : checkpoint_(checkpoint),
        keep_(keep),
        threads_(threads > 0 ? threads : processors()),
        importances_(importances),
        out_(out) {}

  void write(const GgufPlacement& source, const GgufTensor& target) {
    for (std::size_t i = 0; i < source.parts.size(); ++i) {
      importance_ = importances_.of(source.name, static_cast<std::int64_t>(i), columns_of(*source.parts[i]));
      write_part(source, *source.parts[i], target);
    }
  }
  std::int64_t not_finite() const { return not_finite_; }

 private:
  void write_part(const GgufPlacement& source, const TensorSpec& spec, const GgufTensor& target) {
    const std::int64_t columns = columns_of(spec), rows = spec.shape[0];
    const auto order = [&](std::int64_t row) {
      return source.neighbours ? row_behind(row, checkpoint_.config().head_dim) : row;
    };
    row_.resize(static_cast<std::size_t>(std::max<std::uint64_t>(4, ggml_bytes(target.type, columns))));
    values_.resize(static_cast<std::size_t>(columns));
    const bool coded = checkpoint_.is_quantized(spec.name);
    const QuantizedTensor codes = coded ? checkpoint_.codes(spec.name) : QuantizedTensor();
    if (coded && block_type(codes.codec.kind) == target.type) {
      for (std::int64_t r = 0; r < rows; ++r) {
        pack_ggml_row(target.type, codes, order(r), row_.data());
        put(target.type, columns);
      }
      return checkpoint_.release(spec.name);
    }
    const auto read = [&](std::int64_t row, float* to) {
      if (coded) return codes.unpack_row(order(row), to);
      checkpoint_.read_rows_f32(spec.name, order(row), 1, to);
      if (source.adds_one)
        for (std::int64_t i = 0; i < columns; ++i) to[i] += 1.0f;
    };
    if (is_searched_type(target.type)) {
      search(spec, target.type, read);
    } else {
      for (std::int64_t r = 0; r < rows; ++r) {
        read(r, values_.data());
        convert(target, spec);
        put(target.type, columns);
      }
    }
    checkpoint_.release(spec.name);
  }

  // Rows by themselves, so the bytes do not depend on the number of threads.
  template <class Read>
  void search(const TensorSpec& spec, GgmlType type, const Read& read) {
    constexpr std::int64_t kTogether = std::int64_t{1} << 20;  // values
    const std::int64_t columns = columns_of(spec), rows = spec.shape[0];
    const std::int64_t batch = std::clamp<std::int64_t>(kTogether / columns, 1, rows);
    const auto bytes = static_cast<std::int64_t>(ggml_bytes(type, columns));
    values_.resize(static_cast<std::size_t>(batch * columns));
    row_.resize(static_cast<std::size_t>(batch * bytes));
    for (std::int64_t first = 0; first < rows; first += batch) {
      throw_if_interrupted(spec.name, "nothing was written; run the same command again");
      const std::int64_t count = std::min(batch, rows - first);
      for (std::int64_t r = 0; r < count; ++r) {
        read(first + r, values_.data() + r * columns);
        require_blocks(type, values_.data() + r * columns, columns,
                       "tensor " + spec.name + ", row " + std::to_string(first + r));
      }
      run_team(static_cast<int>(std::min<std::int64_t>(threads_, count)), [&](int thread, int threads) {
        for (std::int64_t r = thread; r < count; r += threads)
          round_to_blocks(type, values_.data() + r * columns, columns, importance_, row_.data() + r * bytes);
      });
      out_.write(std::span(row_).first(static_cast<std::size_t>(count * bytes)));
    }
  }

  void put(GgmlType type, std::int64_t columns) {
    out_.write(std::span(row_).first(static_cast<std::size_t>(ggml_bytes(type, columns))));
  }
  // values_ -> row_
  void convert(const GgufTensor& target, const TensorSpec& spec) {
    const auto columns = static_cast<std::int64_t>(values_.size());
    const bool blocks = ggml_block_values(target.type) > 1;
    for (const float value : values_) {
      if (std::isfinite(target.type == GgmlType::kF16 ? f16_to_f32(f32_to_f16(value)) : value)) continue;
      ++not_finite_;
      if (keep_ && !blocks) continue;
      throw input_error("tensor " + spec.name,
                        std::string("finite values that ") + ggml_type_name(target.type) + " can hold",
                        std::to_string(value), std::isfinite(value) ? "choose bf16 or f32" : "the model is damaged");
    }
    if (target.type == GgmlType::kF32) {
      std::memcpy(row_.data(), values_.data(), values_.size() * 4);
    } else if (!blocks) {
      for (std::size_t i = 0; i < values_.size(); ++i) {
        const std::uint16_t bits = target.type == GgmlType::kF16 ? f32_to_f16(values_[i]) : f32_to_bf16(values_[i]);
        std::memcpy(row_.data() + 2 * i, &bits, 2);
      }
    } else {
      const Codec codec{target.type == GgmlType::kQ8_0 ? CodecKind::kQ8 : CodecKind::kQ4, 32};
      pack_ggml_row(target.type, round_to_nearest(codec, 1, columns, values_.data(), "tensor " + spec.name), 0,
                    row_.data());
    }
  }

  const Checkpoint& checkpoint_;
  bool keep_;
  int threads_;
  const Importances& importances_;
  const float* importance_ = nullptr;  // of the part that is written
  GgufWriter& out_;
  std::vector<std::byte> row_;
  std::vector<float> values_;
  std::int64_t not_finite_ = 0;
};

class Planner {
 public:
  Planner(const Checkpoint& checkpoint, const GgufOptions& options)
      : checkpoint_(checkpoint),
        options_(options),
        config_(checkpoint.config()),
        place_(checkpoint.folder().string()),
        arch_(gguf_architecture(config_, place_)),
        wanted_(wanted_type(options.codec)),
        keep_(!wanted_) {}

  GgufPlan run() {
    if (!options_.imatrix.empty()) {
      if (!wanted_ || ggml_block_values(*wanted_) != kKBlock)
        throw usage_error("--imatrix", "a codec that searches scales with it: q2_k to q6_k", "--codec " + options_.codec);
      plan_.importances = Importances::read(options_.imatrix);
    }
    plan_.notes = checkpoint_.notes();
    for (GgufPlacement& source : gguf_placements(config_, arch_, checkpoint_.tensors())) {
      const GgmlType type = source.always_f32 ? GgmlType::kF32 : type_of(source);
      plan_.tensors.push_back({source.name, type, source.shape});
      if (source.shape.size() > 1) matrices_[type] += plan_.tensors.back().bytes();
      plan_.sources.push_back(std::move(source));
      plan_.constants.emplace_back();
    }
    for (auto& [name, values] : gguf_rope_tensors(config_)) {
      plan_.tensors.push_back({name, GgmlType::kF32, {static_cast<std::int64_t>(values.size())}});
      plan_.sources.emplace_back();
      plan_.constants.push_back(std::move(values));
    }
    counted_notes();
    metadata();
    return std::move(plan_);
  }

 private:
  // The one type of all parts, or F32.
  GgmlType type_of(const GgufPlacement& source) {
    const TensorSpec& first = *source.parts[0];
    const std::int64_t columns = first.shape[1];
    const GgmlType asked = type_of(first), type = columns % ggml_block_values(asked) == 0 ? asked : narrow_type(asked);
    const bool quantized = checkpoint_.is_quantized(first.name);
    const auto any = [&](const auto& holds) {
      return std::any_of(source.parts.begin(), source.parts.end(),
                         [&](const TensorSpec* part) { return holds(part->name); });
    };
    const auto as_codes = [&](const std::string& name) {
      return checkpoint_.is_quantized(name) && block_type(checkpoint_.codec(name).kind) == type;
    };
    std::string obstacle;
    if (any([&](const std::string& name) {
          return (checkpoint_.is_quantized(name) != quantized && !options_.requantize) ||
                 type_of(checkpoint_.spec(name)) != asked;
        }))
      obstacle = "its parts are of different types";
    else if (columns % ggml_block_values(type) != 0)
      obstacle = "rows of " + std::to_string(columns) + " are no whole blocks of 32";
    else if (type != asked && !options_.fallback)
      obstacle = "rows of " + std::to_string(columns) + " are no whole blocks of 256";
    else if (any([&](const std::string& name) { return as_codes(name) && !exact_minima(name); })) {
      if (options_.requantize) {
        ++rounded_minima_;
        return type;
      }
      obstacle = "zero x scale is no half, which Q4_1 needs (--requantize rounds it)";
    }
    if (obstacle.empty()) {
      const auto codec = [&](const std::string& name) { return checkpoint_.codec(name); };
      widened_ += any([&](const std::string& name) { return as_codes(name) && codec(name).bits() < 4; });
      rounding_ += any([&](const std::string& name) { return as_codes(name) && codec(name).int8_inputs; });
      again_ += any([&](const std::string& name) { return checkpoint_.is_quantized(name) && !as_codes(name); });
      codes_stay_ += wanted_ && ggml_block_values(*wanted_) == kKBlock && !options_.requantize && quantized;
      doubles_ += keep_ && any([&](const std::string& name) { return checkpoint_.dtype(name) == DType::kF64; });
      if (type != asked && narrow_++ == 0) first_narrow_ = source.name;
      const bool written = is_searched_type(type) && any([&](const std::string& name) { return !as_codes(name); });
      if (!options_.imatrix.empty() && written)
        plain_ += !plan_.importances.has(source.name, source.shape.size() == 3 ? source.shape[0] : 1, columns);
      return type;
    }
    if (!options_.fallback)
      throw input_error(place_, "matrices that GGUF blocks hold as asked", source.name + ": " + obstacle,
                        "leave out --no-fallback to store such tensors in " +
                            std::string(ggml_type_name(columns % ggml_block_values(type) == 0 ? type : GgmlType::kF32)));
    plan_.notes.push_back(source.name + ": " + obstacle + "; stored in F32");
    return GgmlType::kF32;
  }

  // What one part by itself is stored in where its rows allow it.
  GgmlType type_of(const TensorSpec& part) const {
    const Codec codec = checkpoint_.codec(part.name);
    if (codec.is_float()) return wanted_.value_or(float_type(codec.kind));
    return options_.requantize && wanted_ ? *wanted_ : block_type(codec.kind);
  }

  bool exact_minima(const std::string& name) const {
    return checkpoint_.codec(name).kind != CodecKind::kQ4a || minima_are_halves(checkpoint_.codes(name));
  }

  void counted_notes() {
    const auto note = [&](std::int64_t count, const char* text) {
      if (count > 0) plan_.notes.push_back(std::to_string(count) + text);
    };
    note(widened_, " matrices of 3 or 2 bits: stored in Q4_0, the same weights at 4.5 bits");
    note(rounding_,
         " matrices of w8a8: stored in Q8_0, the same weights; their inputs are rounded as llama.cpp does, "
         "not one scale per token");
    note(rounded_minima_,
         " matrices of q4a: stored in Q4_1 with minima rounded to half precision, as --requantize asks");
    note(doubles_, " matrices of F64: stored in F32");
    const std::string wanted = wanted_ ? ggml_type_name(*wanted_) : "";
    note(again_, (" matrices of codes: rounded again, to " + wanted + ", as --requantize asks").c_str());
    note(codes_stay_, (" matrices of codes: they stay so; --requantize rounds them to " + wanted).c_str());
    note(plain_, " matrices that --imatrix has no inputs of: all columns cost the same");
    if (narrow_ > 0)
      note(narrow_, (" matrices whose rows are no multiples of 256: stored in " +
                     std::string(ggml_type_name(narrow_type(*wanted_))) + " instead of " + wanted +
                     ", no weight more coarsely; the first is " + first_narrow_)
                        .c_str());
  }

  void metadata() {
    const auto most = std::max_element(matrices_.begin(), matrices_.end(),
                                       [](const auto& a, const auto& b) { return a.second < b.second; });
    const bool blocks =
        std::any_of(matrices_.begin(), matrices_.end(), [](const auto& m) { return ggml_block_values(m.first) > 1; });
    const fs::path named = checkpoint_.is_file() ? checkpoint_.folder().stem()
                                                 : fs::absolute(checkpoint_.folder() / "config.json").parent_path();
    plan_.metadata = {{"general.architecture", std::string(arch_.name)},
                      {"general.type", std::string("model")},
                      {"general.name", named.filename().string()},
                      {"general.file_type", file_type(most->first)}};
    const ModelOrigin origin = origin_of(checkpoint_.folder());
    for (const auto& [key, value] : origin.licence) plan_.metadata.emplace_back(gguf_key(key), value);
    plan_.metadata.emplace_back("general.base_model.count", std::uint32_t{1});
    plan_.metadata.emplace_back("general.base_model.0.name", origin.base);
    plan_.metadata.emplace_back(kOriginKey, origin.base);
    if (blocks) plan_.metadata.emplace_back("general.quantization_version", std::uint32_t{2});
    for (auto& pair : gguf_config_keys(config_, arch_, plan_.notes)) plan_.metadata.push_back(std::move(pair));
    tokenizer();
    vectors();
  }

  // llama.cpp takes a model whose name speaks of Phi-3 for one with Phi-3's tokens, and does not load it without them.
  void check_name(const GgufPairs& keys) {
    auto& name = std::get<std::string>(plan_.metadata[2].second);
    std::string lower = name;
    std::transform(lower.begin(), lower.end(), lower.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    if (lower.find("phi3") == std::string::npos && lower.find("phi-3") == std::string::npos) return;
    for (const auto& [key, value] : keys) {
      if (key != "tokenizer.ggml.tokens") continue;
      const auto& tokens = std::get<std::vector<std::string>>(value);
      for (const char* token : {"</s>", "<unk>", "<s>", "<|endoftext|>"}) {
        if (std::find(tokens.begin(), tokens.end(), token) != tokens.end()) continue;
        plan_.notes.push_back("general.name is \"model\": llama.cpp expects the token " + std::string(token) +
                              " in what is called " + name);
        name = "model";
        return;
      }
    }
  }

  void tokenizer() {
    const auto text = checkpoint_.tokenizer_text();
    if (!text) {
      plan_.notes.push_back("no tokenizer: the file has token ids alone");
      plan_.metadata.emplace_back("tokenizer.ggml.model", std::string("none"));
      const char* keys[] = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"};
      for (std::size_t i = 0; i < std::min(std::size(keys), config_.eos_ids.size()); ++i)
        plan_.metadata.emplace_back(keys[i], static_cast<std::uint32_t>(config_.eos_ids[i]));
      return;
    }
    const auto chat =
        ChatTemplate::source([&](const std::string& name) { return checkpoint_.side_file(name); }, place_);
    const std::string place = place_ + (checkpoint_.is_file() ? ": tokenizer" : "/tokenizer.json");
    GgufPairs keys =
        gguf_tokenizer_keys(*text, place, config_, chat ? std::optional(chat->text) : std::nullopt, plan_.notes);
    check_name(keys);
    for (auto& pair : keys) plan_.metadata.push_back(std::move(pair));
  }

  // What a reader could not tell from F32 vectors: types other than the rule of VectorTypes gives, and norms whose
  // 1 + weight is rounded.
  void vectors() {
    VectorTypes types({}, place_);
    GgufPairs norms;
    for (std::size_t i = 0; i < plan_.sources.size(); ++i) {
      if (plan_.sources[i].always_f32 || ggml_block_values(plan_.tensors[i].type) > 1) continue;
      for (const TensorSpec* part : plan_.sources[i].parts) {
        const GgmlType type = plan_.tensors[i].type;
        types.count_matrix(type == GgmlType::kBF16  ? DType::kBF16
                           : type == GgmlType::kF16 ? DType::kF16
                                                    : DType::kF32,
                           part->shape[0] * columns_of(*part));
      }
    }
    for (const GgufPlacement& source : plan_.sources) {
      if (!source.always_f32) continue;
      for (const TensorSpec* part : source.parts) {
        const Codec codec = checkpoint_.codec(part->name);
        const std::vector<float> values = checkpoint_.read_f32(part->name);
        if (codec.is_float() && checkpoint_.dtype(part->name) != DType::kF64)
          types.expect(part->name, checkpoint_.dtype(part->name), values);
        if (source.adds_one && !std::all_of(values.begin(), values.end(), survives_one))
          norms.emplace_back("pare." + source.name, values);
      }
    }
    if (keep_)
      if (const auto listed = types.exceptions()) plan_.metadata.emplace_back("pare.dtypes", *listed);
    for (auto& norm : norms) plan_.metadata.push_back(std::move(norm));
  }

  const Checkpoint& checkpoint_;
  const GgufOptions& options_;
  const ModelConfig& config_;
  std::string place_;
  const GgufArchitecture& arch_;
  std::optional<GgmlType> wanted_;
  bool keep_;
  GgufPlan plan_;
  std::map<GgmlType, std::uint64_t> matrices_;
  std::int64_t widened_ = 0, rounding_ = 0, rounded_minima_ = 0, doubles_ = 0, again_ = 0, codes_stay_ = 0, narrow_ = 0, plain_ = 0;
  std::string first_narrow_;
};

}  // namespace

void check_gguf_codec(const std::string& name) {
  wanted_type(name);
}

bool is_k_quant_name(const std::string& name) {
  return std::any_of(std::begin(kTargets), std::end(kTargets), [&](const auto& target) {
    return name == target.first && ggml_block_values(target.second) == kKBlock;
  });
}

GgufPlan plan_gguf(const Checkpoint& checkpoint, const GgufOptions& options) {
  return Planner(checkpoint, options).run();
}

void export_gguf(const Checkpoint& checkpoint, const GgufPlan& plan, const GgufOptions& options, Context& context) {
  const fs::path& path = options.out;
  if (context.progress != nullptr) {
    for (const std::string& note : plan.notes) context.progress->note(note);
    context.progress->begin("export " + path.filename().string(), static_cast<std::int64_t>(plan.tensors.size()));
  }
  GgufWriter out(path, plan.metadata, plan.tensors);
  TensorWriter tensors(checkpoint, options.codec == "keep", context.threads, plan.importances, out);
  for (std::size_t i = 0; i < plan.tensors.size(); ++i) {
    throw_if_interrupted(path.string(), "nothing was written; run the same command again");
    if (plan.sources[i].parts.empty())
      out.write(std::as_bytes(std::span(plan.constants[i])));
    else
      tensors.write(plan.sources[i], plan.tensors[i]);
    if (context.progress != nullptr) context.progress->update(static_cast<std::int64_t>(i) + 1);
  }
  out.finish();
  if (context.progress != nullptr) {
    context.progress->end();
    if (tensors.not_finite() > 0)
      context.progress->note(std::to_string(tensors.not_finite()) + " weights are not finite; kept bit for bit");
  }
  context.report.add({.stage = "gguf",
                      .metric = "file_bytes",
                      .before = {},
                      .after = static_cast<double>(fs::file_size(path)),
                      .unit = "bytes",
                      .standard_error = {}});
}

}  // namespace pare
