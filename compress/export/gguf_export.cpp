#include "compress/export/gguf_export.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "core/error.h"
#include "runtime/round_to_nearest.h"

namespace pare {
namespace {

struct Architecture {
  const char* family;  // row of the arch table
  const char* name;    // general.architecture
  bool interleaved;    // rotary pairs are neighbours: query and key rows change places
  bool free_heads;     // the width of the heads together may differ from the hidden size
};

constexpr Architecture kArchitectures[] = {
    {"llama", "llama", true, true}, {"mistral", "llama", true, true}, {"qwen2", "qwen2", false, false}};

const Architecture& architecture(const ModelConfig& config, const std::string& place) {
  std::string known;
  for (const Architecture& row : kArchitectures) {
    if (config.family != row.family) {
      known += (known.empty() ? "" : ", ") + std::string(row.family);
      continue;
    }
    if (!row.free_heads && config.num_heads * config.head_dim != config.hidden_size)
      throw input_error(
          place,
          "heads x head_dim equal to hidden_size, which llama.cpp's " + std::string(row.name) + " takes for granted",
          std::to_string(config.num_heads * config.head_dim) + " and " + std::to_string(config.hidden_size));
    if (config.sliding_window > 0 && config.sliding_window < config.max_position_embeddings)
      throw input_error(
          place, "attention without a window, which llama.cpp's " + std::string(row.name) + " does not compute",
          "a sliding window of " + std::to_string(config.sliding_window) + " positions", "--to compact keeps it");
    return row;
  }
  throw input_error(place, "a family that can be written as GGUF (" + known + ")", config.family);
}

std::string gguf_name(const TensorSpec& spec, const std::string& place) {
  static const std::map<std::string, std::string, std::less<>> names = {{"embed_tokens", "token_embd"},
                                                                        {"norm", "output_norm"},
                                                                        {"lm_head", "output"},
                                                                        {"input_layernorm", "attn_norm"},
                                                                        {"self_attn.q_proj", "attn_q"},
                                                                        {"self_attn.k_proj", "attn_k"},
                                                                        {"self_attn.v_proj", "attn_v"},
                                                                        {"self_attn.o_proj", "attn_output"},
                                                                        {"post_attention_layernorm", "ffn_norm"},
                                                                        {"mlp.gate_proj", "ffn_gate"},
                                                                        {"mlp.up_proj", "ffn_up"},
                                                                        {"mlp.down_proj", "ffn_down"}};
  const auto found = names.find(spec.module);
  if (found == names.end()) throw input_error(place, "a tensor that llama.cpp has a name for", spec.name);
  const std::string block = spec.layer < 0 ? "" : "blk." + std::to_string(spec.layer) + ".";
  return block + found->second + spec.name.substr(spec.name.rfind('.'));
}

GgmlType float_type(CodecKind kind) {
  if (kind == CodecKind::kF16) return GgmlType::kF16;
  if (kind == CodecKind::kBf16) return GgmlType::kBF16;
  return GgmlType::kF32;
}

GgmlType stored_type(DType dtype) {
  if (dtype == DType::kF16) return GgmlType::kF16;
  if (dtype == DType::kBF16) return GgmlType::kBF16;
  return GgmlType::kF32;
}

// Codes of 3 and 2 bits are 4-bit codes too: the same weights, at 4.5 bits.
GgmlType block_type(CodecKind kind) {
  if (kind == CodecKind::kQ8) return GgmlType::kQ8_0;
  return kind == CodecKind::kQ4a || kind == CodecKind::kQ4m ? GgmlType::kQ4_1 : GgmlType::kQ4_0;
}

// The codec that a float matrix is given, checked once.
Codec wanted_codec(const std::string& name) {
  if (name == "keep") return {};
  const Codec codec = Codec::parse(name, "--codec");
  if (codec.is_float() || codec == Codec{CodecKind::kQ8, 32} || codec == Codec{CodecKind::kQ4, 32}) return codec;
  throw usage_error("--codec", "keep, f32, f16, bf16, q8 or q4: what GGUF blocks of 32 can hold", name);
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
    case GgmlType::kBF16:
      return 32;
  }
  throw std::logic_error("ggml type");
}

// What llama.cpp divides the rotary frequencies by.
std::vector<float> rope_divisors(const ModelConfig& config) {
  ModelConfig plain = config;
  plain.rope_llama3.reset();
  const auto scaled = rope_frequencies(config), base = rope_frequencies(plain);
  std::vector<float> divisors(scaled.size());
  for (std::size_t i = 0; i < scaled.size(); ++i) divisors[i] = static_cast<float>(base[i] / scaled[i]);
  return divisors;
}

// Row of the folder's tensor that stands at `row`: within a head, (half, 2) instead of (2, half).
std::int64_t source_row(std::int64_t row, std::int64_t head_dim) {
  const std::int64_t head = row / head_dim, within = row % head_dim;
  return head * head_dim + (within % 2) * (head_dim / 2) + within / 2;
}

bool is_permuted(const Architecture& arch, const TensorSpec& spec) {
  return arch.interleaved && (spec.module == "self_attn.q_proj" || spec.module == "self_attn.k_proj");
}

class TensorWriter {
 public:
  TensorWriter(const Checkpoint& checkpoint, const Architecture& arch, GgufWriter& out)
      : checkpoint_(checkpoint), arch_(arch), out_(out) {}

  void write(const std::string& source, const GgufTensor& target) {
    const TensorSpec& spec = checkpoint_.spec(source);
    const std::int64_t columns = spec.shape.size() == 2 ? spec.shape[1] : 1;
    const std::int64_t rows = spec.shape[0];
    const auto order = [&](std::int64_t row) {
      return is_permuted(arch_, spec) ? source_row(row, checkpoint_.config().head_dim) : row;
    };
    row_.resize(static_cast<std::size_t>(std::max<std::uint64_t>(4, ggml_bytes(target.type, columns))));
    values_.resize(static_cast<std::size_t>(columns));
    if (checkpoint_.is_quantized(source)) {
      const QuantizedTensor codes = checkpoint_.codes(source);
      for (std::int64_t r = 0; r < rows; ++r) {
        if (ggml_block_values(target.type) > 1) {
          pack_ggml_row(target.type, codes, order(r), row_.data());
        } else {
          codes.unpack_row(order(r), values_.data());
          std::memcpy(row_.data(), values_.data(), values_.size() * 4);
        }
        put(target.type, columns);
      }
    } else {
      const TensorView& view = checkpoint_.view(source);
      for (std::int64_t r = 0; r < rows; ++r) {
        to_f32(view, order(r) * columns, columns, values_.data());
        convert(target, source);
        put(target.type, columns);
      }
    }
    checkpoint_.release(source);
  }

 private:
  void put(GgmlType type, std::int64_t columns) {
    out_.write(std::span(row_).first(static_cast<std::size_t>(ggml_bytes(type, columns))));
  }
  // values_ -> row_
  void convert(const GgufTensor& target, const std::string& source) {
    const auto columns = static_cast<std::int64_t>(values_.size());
    for (const float value : values_) {
      if (std::isfinite(target.type == GgmlType::kF16 ? f16_to_f32(f32_to_f16(value)) : value)) continue;
      throw input_error("tensor " + source,
                        std::string("finite values that ") + ggml_type_name(target.type) + " can hold",
                        std::to_string(value), std::isfinite(value) ? "choose bf16 or f32" : "the model is damaged");
    }
    if (target.type == GgmlType::kF32) {
      std::memcpy(row_.data(), values_.data(), values_.size() * 4);
    } else if (target.type == GgmlType::kF16 || target.type == GgmlType::kBF16) {
      for (std::size_t i = 0; i < values_.size(); ++i) {
        const std::uint16_t bits = target.type == GgmlType::kF16 ? f32_to_f16(values_[i]) : f32_to_bf16(values_[i]);
        std::memcpy(row_.data() + 2 * i, &bits, 2);
      }
    } else {
      const Codec codec{target.type == GgmlType::kQ8_0 ? CodecKind::kQ8 : CodecKind::kQ4, 32};
      pack_ggml_row(target.type, round_to_nearest(codec, 1, columns, values_.data(), "tensor " + source), 0,
                    row_.data());
    }
  }

  const Checkpoint& checkpoint_;
  const Architecture& arch_;
  GgufWriter& out_;
  std::vector<std::byte> row_;
  std::vector<float> values_;
};

void add_architecture(const ModelConfig& config, const Architecture& arch, GgufPlan& plan) {
  const std::string prefix = std::string(arch.name) + ".";
  const auto count = [&](const char* key, std::int64_t value) {
    plan.metadata.emplace_back(prefix + key, static_cast<std::uint32_t>(value));
  };
  const auto number = [&](const char* key, double value) {
    plan.metadata.emplace_back(prefix + key, static_cast<float>(value));
  };
  count("context_length", config.max_position_embeddings);
  count("embedding_length", config.hidden_size);
  count("block_count", config.num_layers);
  count("feed_forward_length", config.intermediate_size);
  count("attention.head_count", config.num_heads);
  count("attention.head_count_kv", config.num_kv_heads);
  count("attention.key_length", config.head_dim);
  count("attention.value_length", config.head_dim);
  count("rope.dimension_count", config.head_dim);
  count("vocab_size", config.vocab_size);
  number("attention.layer_norm_rms_epsilon", config.rms_norm_eps);
  number("rope.freq_base", config.rope_theta);
  if (config.rope_linear_factor != 1.0) {
    plan.metadata.emplace_back(prefix + "rope.scaling.type", std::string("linear"));
    number("rope.scaling.factor", config.rope_linear_factor);
  }
}

}  // namespace

GgufPlan plan_gguf(const Checkpoint& checkpoint, const GgufOptions& options) {
  const ModelConfig& config = checkpoint.config();
  const std::string place = checkpoint.folder().string();
  const Architecture& arch = architecture(config, place);
  const Codec wanted = wanted_codec(options.codec);
  const bool keep = options.codec == "keep";
  GgufPlan plan;
  std::map<GgmlType, std::uint64_t> matrices;
  int widened = 0, rounding = 0;
  for (const TensorSpec& spec : checkpoint.tensors()) {
    GgmlType type = GgmlType::kF32;
    std::string obstacle;
    if (checkpoint.is_quantized(spec.name)) {
      const Codec codec = checkpoint.codec(spec.name);
      type = block_type(codec.kind);
      widened += codec.bits() < 4 ? 1 : 0;
      rounding += codec.int8_inputs ? 1 : 0;
      if (spec.shape[1] % 32 != 0)
        obstacle = "rows of " + std::to_string(spec.shape[1]) + " are no whole blocks of 32";
      else if (codec.kind == CodecKind::kQ4a && !minima_are_halves(checkpoint.codes(spec.name)))
        obstacle = "zero x scale is no half, which Q4_1 needs";
    } else if (spec.shape.size() == 2) {
      type = keep                ? stored_type(checkpoint.dtype(spec.name))
             : wanted.is_float() ? float_type(wanted.kind)
                                 : block_type(wanted.kind);
      if (spec.shape[1] % ggml_block_values(type) != 0)
        obstacle = "rows of " + std::to_string(spec.shape[1]) + " are no whole blocks of 32";
    }
    if (!obstacle.empty()) {
      if (!options.fallback)
        throw input_error(place, "matrices that GGUF blocks hold exactly", spec.name + ": " + obstacle,
                          "leave out --no-fallback to store such tensors in F32");
      plan.notes.push_back(spec.name + ": " + obstacle + "; stored in F32");
      type = GgmlType::kF32;
    }
    plan.tensors.push_back({gguf_name(spec, place), type, spec.shape});
    plan.sources.push_back(spec.name);
    if (spec.shape.size() == 2) matrices[type] += plan.tensors.back().bytes();
  }
  if (widened > 0)
    plan.notes.push_back(std::to_string(widened) +
                         " matrices of 3 or 2 bits: stored in Q4_0, the same weights at 4.5 bits");
  if (rounding > 0)
    plan.notes.push_back(std::to_string(rounding) + " matrices of w8a8: stored in Q8_0, the same weights; their inputs "
                         "are rounded as llama.cpp does, not one scale per token");
  if (config.rope_llama3) {
    plan.tensors.push_back({"rope_freqs.weight", GgmlType::kF32, {config.head_dim / 2}});
    plan.sources.emplace_back();
  }

  const auto most = std::max_element(matrices.begin(), matrices.end(),
                                     [](const auto& a, const auto& b) { return a.second < b.second; });
  const bool blocks =
      std::any_of(matrices.begin(), matrices.end(), [](const auto& m) { return ggml_block_values(m.first) > 1; });
  const fs::path named = fs::absolute(checkpoint.folder() / "config.json").parent_path();
  plan.metadata = {{"general.architecture", std::string(arch.name)},
                   {"general.type", std::string("model")},
                   {"general.name", named.filename().string()},
                   {"general.file_type", file_type(most->first)}};
  if (blocks) plan.metadata.emplace_back("general.quantization_version", std::uint32_t{2});
  add_architecture(config, arch, plan);
  for (auto& pair : gguf_tokenizer(checkpoint.folder(), config, plan.notes)) plan.metadata.push_back(std::move(pair));
  return plan;
}

void export_gguf(const Checkpoint& checkpoint, const GgufPlan& plan, const fs::path& path, Context& context) {
  for (const std::string& note : plan.notes) context.progress->note(note);
  GgufWriter out(path, plan.metadata, plan.tensors);
  TensorWriter tensors(checkpoint, architecture(checkpoint.config(), checkpoint.folder().string()), out);
  context.progress->begin("export " + path.filename().string(), static_cast<std::int64_t>(plan.tensors.size()));
  for (std::size_t i = 0; i < plan.tensors.size(); ++i) {
    throw_if_interrupted(path.string(), "nothing was written; run the same command again");
    if (plan.sources[i].empty()) {
      const std::vector<float> divisors = rope_divisors(checkpoint.config());
      out.write(std::as_bytes(std::span(divisors)));
    } else {
      tensors.write(plan.sources[i], plan.tensors[i]);
    }
    context.progress->update(static_cast<std::int64_t>(i) + 1);
  }
  out.finish();
  context.progress->end();
  context.report.add({.stage = "gguf",
                      .metric = "file_bytes",
                      .before = {},
                      .after = static_cast<double>(fs::file_size(path)),
                      .unit = "bytes",
                      .standard_error = {}});
}

}  // namespace pare
