#include "runtime/weights.h"

#include <string>

#include "core/error.h"
#include "core/safetensors.h"

namespace pare {
namespace {

PackedMatrix view_matrix(const CompactFile& file, const std::string& name, std::int64_t rows, std::int64_t cols) {
  const CompactTensor& tensor = file.tensor(name);
  const std::vector<std::int64_t> shape{rows, cols};
  const std::string place = file.path().string() + ": " + name;
  if (tensor.shape != shape) throw input_error(place, "shape " + shape_text(shape), shape_text(tensor.shape));
  return packed_matrix(tensor.codec, rows, cols, tensor.payload, place);
}

// Of rows that are looked up, or that decide between experts: no linear whose inputs a codec may round.
PackedMatrix view_table(const CompactFile& file, const std::string& name, std::int64_t rows, std::int64_t cols) {
  const PackedMatrix matrix = view_matrix(file, name, rows, cols);
  if (matrix.codec.int8_inputs)
    throw input_error(file.path().string() + ": " + name, "a codec for a table", matrix.codec.name());
  return matrix;
}

const float* view_vector(const CompactFile& file, const std::string& name, std::int64_t length) {
  const CompactTensor& tensor = file.tensor(name);
  const std::string place = file.path().string() + ": " + name;
  const std::vector<std::int64_t> shape{length};
  if (tensor.shape != shape) throw input_error(place, "shape " + shape_text(shape), shape_text(tensor.shape));
  if (tensor.codec.kind != CodecKind::kF32)
    throw input_error(place, "codec f32 (norms and biases)", tensor.codec.name());
  if (tensor.payload.size() < static_cast<std::size_t>(length) * 4) {
    throw input_error(place, std::to_string(length * 4) + " bytes", std::to_string(tensor.payload.size()));
  }
  return reinterpret_cast<const float*>(tensor.payload.data());
}

// Rows [first, first + count) of a matrix as one of their own.
PackedMatrix rows_of(const PackedMatrix& whole, std::int64_t first, std::int64_t count, const std::string& place) {
  PackedMatrix part = whole;
  part.rows = count;
  if (whole.codec.is_float()) {
    part.data += first * whole.cols * (whole.codec.kind == CodecKind::kF32 ? 4 : 2);
    return part;
  }
  if (first % kBlockRows != 0)
    throw input_error(place, "quantized q, k, v or gate, up whose rows are multiples of " + std::to_string(kBlockRows),
                      "one that begins at row " + std::to_string(first), "export this tensor as f32, f16 or bf16");
  const std::int64_t block = first / kBlockRows;
  part.data += block * whole.lines * 64;
  part.scales += block * whole.groups * kBlockRows;
  if (part.zeros != nullptr) part.zeros += block * whole.groups * 8;
  if (part.minima != nullptr) part.minima += block * whole.groups * kBlockRows;
  return part;
}

}  // namespace

Weights view_weights(const CompactFile& file) {
  const ModelConfig& c = file.config();
  for (int layer = 0; layer < c.num_layers; ++layer) {
    const BlockWidths widths = c.widths(layer);
    if (widths.kv_heads > 0 && widths.heads % widths.kv_heads == 0 && c.head_dim > 0 && c.rotated() % 2 == 0) continue;
    throw input_error(file.path().string(),
                      "attention heads a multiple of key/value heads, an even number of rotated dimensions",
                      std::to_string(widths.heads) + " heads, " + std::to_string(widths.kv_heads) +
                          " key/value heads, head_dim " + std::to_string(c.head_dim) + " in block " +
                          std::to_string(layer));
  }
  const std::int64_t h = c.hidden_size;
  Weights weights;
  const auto factors = [&](const std::string& name, std::int64_t width) {
    const float* stored = view_vector(file, name + ".weight", width);
    if (!c.norm_adds_one) return stored;
    FloatBuffer& sum = weights.owned.emplace_back();
    sum.reserve(width);
    for (std::int64_t i = 0; i < width; ++i) sum.data()[i] = 1.0f + stored[i];
    return static_cast<const float*>(sum.data());
  };
  const auto norm = [&](const std::string& name) {
    return NormWeights{factors(name, h), c.layer_norm ? view_vector(file, name + ".bias", h) : nullptr};
  };
  weights.embedding = view_table(file, "model.embed_tokens.weight", c.vocab_size, h);
  weights.head = c.tie_word_embeddings ? weights.embedding : view_matrix(file, "lm_head.weight", c.vocab_size, h);
  if (c.learned_positions)
    weights.positions = view_table(file, "model.embed_positions.weight", c.max_position_embeddings, h);
  weights.final_norm = norm("model.norm");
  for (int i = 0; i < c.num_layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    const BlockWidths widths = c.widths(i);
    const std::int64_t q = widths.heads * c.head_dim, kv = widths.kv_heads * c.head_dim, f = widths.inner;
    const auto linear = [&](const std::string& module, std::int64_t rows, std::int64_t cols, bool bias) {
      LinearWeights w;
      w.matrix = view_matrix(file, prefix + module + ".weight", rows, cols);
      if (bias) w.bias = view_vector(file, prefix + module + ".bias", rows);
      return w;
    };
    // One tensor for several linears that read the same input.
    const auto split = [&](const std::string& module,
                           std::initializer_list<std::pair<LinearWeights*, std::int64_t>> parts, std::int64_t cols,
                           bool bias) {
      std::int64_t rows = 0;
      for (const auto& [part, count] : parts) rows += count;
      const LinearWeights whole = linear(module, rows, cols, bias);
      std::int64_t first = 0;
      for (const auto& [part, count] : parts) {
        part->matrix = rows_of(whole.matrix, first, count, file.path().string() + ": " + prefix + module);
        part->bias = bias ? whole.bias + first : nullptr;
        first += count;
      }
    };
    BlockWeights b;
    if (c.fused_qkv) {
      split("self_attn.qkv_proj", {{&b.q, q}, {&b.k, kv}, {&b.v, kv}}, h, c.qkv_bias);
    } else {
      b.q = linear("self_attn.q_proj", q, h, c.qkv_bias);
      b.k = linear("self_attn.k_proj", kv, h, c.qkv_bias);
      b.v = linear("self_attn.v_proj", kv, h, c.qkv_bias);
    }
    b.o = linear("self_attn.o_proj", h, q, c.o_bias);
    if (c.qk_norm) {
      b.q_norm = factors(prefix + "self_attn.q_norm", c.head_dim);
      b.k_norm = factors(prefix + "self_attn.k_norm", c.head_dim);
    }
    if (c.has_experts()) {
      b.router.matrix = view_table(file, prefix + c.experts.module + ".gate.weight", c.experts.count, h);
      for (std::int64_t e = 0; e < c.experts.count; ++e) {
        const std::string expert = c.experts.module + ".experts." + std::to_string(e) + ".";
        b.experts.push_back({linear(expert + c.experts.gate, f, h, false), linear(expert + c.experts.up, f, h, false),
                             linear(expert + c.experts.down, h, f, false)});
      }
    } else {
      MlpWeights mlp;
      if (c.fused_gate_up) {
        split("mlp.gate_up_proj", {{&mlp.gate, f}, {&mlp.up, f}}, h, c.mlp_bias);
      } else {
        if (c.gated_mlp) mlp.gate = linear("mlp.gate_proj", f, h, c.mlp_bias);
        mlp.up = linear("mlp.up_proj", f, h, c.mlp_bias);
      }
      mlp.down = linear("mlp.down_proj", h, f, c.mlp_bias);
      b.mlp = mlp;
    }
    b.attention_norm = norm(prefix + "input_layernorm");
    if (c.post_norms) {
      b.post_attention_norm = norm(prefix + "post_attention_layernorm");
      b.mlp_norm = norm(prefix + "pre_feedforward_layernorm");
      b.post_mlp_norm = norm(prefix + "post_feedforward_layernorm");
    } else {
      b.mlp_norm = norm(prefix + "post_attention_layernorm");
    }
    weights.blocks.push_back(std::move(b));
  }
  return weights;
}

}  // namespace pare
