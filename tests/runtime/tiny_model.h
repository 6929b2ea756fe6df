// Tiny random models for the runtime's tests: a compact file on disk, and an independent forward pass in double on
// exactly the weights that the file holds.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "core/compact.h"
#include "core/config.h"
#include "core/tokenizer.h"

namespace pare::testing {

// A folder that goes away with the test.
struct ScratchFolder {
  ScratchFolder() {
    std::string name = (fs::temp_directory_path() / "pare_runtime_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
    path = name;
  }
  ~ScratchFolder() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
  fs::path path;
};

struct TinyModel {
  ModelConfig config;
  Codec codec;
  std::map<std::string, std::vector<double>> weights;  // as the file holds them

  // Which tensors meet int8 activations.
  bool quantized(const std::string& name) const {
    return !codec.is_float() && weights.at(name).size() > 0 && name.find("norm") == std::string::npos &&
           name.find(".bias") == std::string::npos;
  }
};

inline ModelConfig tiny_config(const std::string& family, std::int64_t hidden, std::int64_t inter, std::int64_t heads,
                               std::int64_t kv_heads, std::int64_t head_dim, std::int64_t vocab, bool tied) {
  ModelConfig c;
  c.family = family;
  c.vocab_size = vocab;
  c.hidden_size = hidden;
  c.intermediate_size = inter;
  c.num_layers = 2;
  c.num_heads = heads;
  c.num_kv_heads = kv_heads;
  c.head_dim = head_dim;
  c.max_position_embeddings = 300;
  c.rms_norm_eps = 1e-5;
  c.tie_word_embeddings = tied;
  c.qkv_bias = family == "qwen2";
  c.eos_ids = {2};
  return c;
}

// Round to nearest with scales rounded to half first: enough of a quantizer for a test.
inline QuantizedTensor round_to_nearest(const Codec& codec, std::int64_t rows, std::int64_t cols, const float* values) {
  QuantizedTensor q;
  q.codec = codec;
  q.rows = rows;
  q.cols = cols;
  const std::int64_t groups = codec.groups(cols), width = cols / groups;
  q.codes.resize(static_cast<std::size_t>(rows * cols));
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const float* in = values + r * cols + g * width;
      const float low = std::min(0.0f, *std::min_element(in, in + width));
      const float high = std::max(0.0f, *std::max_element(in, in + width));
      const bool asymmetric = codec.kind == CodecKind::kQ4a, lowest = codec.kind == CodecKind::kQ4m;
      const CodeRange range = code_range(codec.kind);
      const float ideal =
          asymmetric || lowest ? (high - low) / 15 : std::max(high, -low) / static_cast<float>(range.high);
      const std::uint16_t bits = f32_to_f16(ideal);
      const float scale = f16_to_f32(bits);
      const float inverse = scale > 0 ? 1 / scale : 0;
      const float zero = asymmetric ? std::clamp(std::round(-low * inverse), 0.0f, 15.0f) : 0.0f;
      q.scales.push_back(bits);
      if (asymmetric) q.zeros.push_back(static_cast<std::uint8_t>(zero));
      if (lowest) q.minima.push_back(f32_to_f16(low));
      const float base = lowest ? f16_to_f32(q.minima.back()) : 0.0f;
      for (std::int64_t i = 0; i < width; ++i) {
        const float code = std::round((in[i] - base) * inverse) + zero;
        const float bounded = std::clamp(code, static_cast<float>(range.low), static_cast<float>(range.high));
        q.codes[static_cast<std::size_t>(r * cols + g * width + i)] = static_cast<std::int8_t>(bounded);
      }
    }
  }
  return q;
}

// Writes the file and returns what it holds. Every matrix gets `codec`.
inline TinyModel write_tiny_model(const fs::path& path, const ModelConfig& config, const Codec& codec,
                                  std::uint32_t seed, std::map<std::string, std::string> embedded = {}) {
  TinyModel model{config, codec, {}};
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<CompactWriter::Plan> plan;
  const std::vector<TensorSpec> specs = expected_tensors(config);
  for (const TensorSpec& spec : specs) {
    const Codec own = spec.role == TensorRole::kEmbedding ? codec.layout() : codec;
    plan.push_back({spec.name, spec.shape.size() == 2 ? own : Codec{}, spec.shape});
  }
  embedded["config.json"] = write_config(config, "float32").dump();
  CompactWriter writer(path, plan, embedded);
  for (const TensorSpec& spec : specs) {
    const std::int64_t rows = spec.shape[0], cols = spec.shape.size() == 2 ? spec.shape[1] : 1;
    std::vector<float> values(static_cast<std::size_t>(rows * cols));
    const float spread = spec.role == TensorRole::kNorm        ? 0.2f
                         : spec.role == TensorRole::kBias      ? 0.3f
                         : spec.role == TensorRole::kEmbedding ? 1.0f
                                                               : 1.5f / std::sqrt(static_cast<float>(cols));
    for (float& v : values) v = (spec.role == TensorRole::kNorm ? 1.0f : 0.0f) + spread * normal(rng);
    std::vector<double>& held = model.weights[spec.name];
    if (spec.shape.size() == 2 && !codec.is_float()) {
      const Codec own = spec.role == TensorRole::kEmbedding ? codec.layout() : codec;
      const QuantizedTensor q = round_to_nearest(own, rows, cols, values.data());
      writer.add(q);
      std::vector<float> row(static_cast<std::size_t>(cols));
      for (std::int64_t r = 0; r < rows; ++r) {
        q.unpack_row(r, row.data());
        held.insert(held.end(), row.begin(), row.end());
      }
    } else {
      if (spec.shape.size() == 2 && codec.kind != CodecKind::kF32) {
        for (float& v : values) {
          v = codec.kind == CodecKind::kF16 ? f16_to_f32(f32_to_f16(v)) : bf16_to_f32(f32_to_bf16(v));
        }
      }
      writer.add(values.data());
      held.assign(values.begin(), values.end());
    }
  }
  writer.finish_payload();
  writer.seal("{\"rows\":[]}");
  return model;
}

// The Llama-style decoder by its definition, in double, one position after the other, no cache.
class BruteForce {
 public:
  // round_tokens false: codecs with int8_inputs as if they had none.
  BruteForce(const TinyModel& model, bool int8_activations, bool round_tokens = true)
      : m_(model), c_(model.config), int8_(int8_activations), round_tokens_(round_tokens && model.codec.int8_inputs) {}

  // Logits [ids, vocab].
  std::vector<std::vector<double>> logits(const std::vector<std::int32_t>& ids) const {
    const auto n = ids.size();
    const std::int64_t h = c_.hidden_size, d = c_.head_dim;
    std::vector<std::vector<double>> x;
    const std::vector<double>& embedding = m_.weights.at("model.embed_tokens.weight");
    for (const std::int32_t id : ids) x.emplace_back(embedding.begin() + id * h, embedding.begin() + (id + 1) * h);
    const std::vector<double> frequencies = rope_frequencies(c_);
    for (std::int64_t layer = 0; layer < c_.num_layers; ++layer) {
      const std::string p = "model.layers." + std::to_string(layer) + ".";
      std::vector<std::vector<double>> q, k, v;
      for (std::size_t t = 0; t < n; ++t) {
        const auto normed = norm(x[t], p + "input_layernorm.weight");
        q.push_back(linear(normed, p + "self_attn.q_proj"));
        k.push_back(linear(normed, p + "self_attn.k_proj"));
        v.push_back(linear(normed, p + "self_attn.v_proj"));
        rotate(q[t], static_cast<double>(t), frequencies);
        rotate(k[t], static_cast<double>(t), frequencies);
      }
      for (std::size_t t = 0; t < n; ++t) {
        std::vector<double> mixed(q[t].size(), 0.0);
        for (std::int64_t head = 0; head < c_.num_heads; ++head) {
          const std::int64_t kv = head / (c_.num_heads / c_.num_kv_heads);
          std::vector<double> s(t + 1);
          for (std::size_t u = 0; u <= t; ++u) {
            for (std::int64_t i = 0; i < d; ++i) {
              s[u] += q[t][static_cast<std::size_t>(head * d + i)] * k[u][static_cast<std::size_t>(kv * d + i)];
            }
            s[u] /= std::sqrt(static_cast<double>(d));
          }
          const double peak = *std::max_element(s.begin(), s.end());
          double sum = 0;
          for (double& value : s) sum += value = std::exp(value - peak);
          for (std::size_t u = 0; u <= t; ++u) {
            for (std::int64_t i = 0; i < d; ++i) {
              mixed[static_cast<std::size_t>(head * d + i)] += s[u] / sum * v[u][static_cast<std::size_t>(kv * d + i)];
            }
          }
        }
        add(x[t], linear(mixed, p + "self_attn.o_proj"));
      }
      for (std::size_t t = 0; t < n; ++t) {
        const auto normed = norm(x[t], p + "post_attention_layernorm.weight");
        std::vector<double> gate = linear(normed, p + "mlp.gate_proj");
        const std::vector<double> up = linear(normed, p + "mlp.up_proj");
        for (std::size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
        add(x[t], linear(gate, p + "mlp.down_proj"));
      }
    }
    std::vector<std::vector<double>> out;
    for (std::size_t t = 0; t < n; ++t) {
      out.push_back(matrix(norm(x[t], "model.norm.weight"),
                           c_.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight"));
    }
    return out;
  }

 private:
  static void add(std::vector<double>& to, const std::vector<double>& what) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] += what[i];
  }
  std::vector<double> norm(const std::vector<double>& x, const std::string& name) const {
    double squares = 0;
    for (const double v : x) squares += v * v;
    const double scale = 1 / std::sqrt(squares / static_cast<double>(x.size()) + c_.rms_norm_eps);
    std::vector<double> out(x.size());
    const std::vector<double>& w = m_.weights.at(name);
    for (std::size_t i = 0; i < x.size(); ++i) out[i] = x[i] * scale * w[i];
    return out;
  }
  void rotate(std::vector<double>& v, double position, const std::vector<double>& frequencies) const {
    const std::int64_t d = c_.head_dim, half = d / 2;
    for (std::size_t head = 0; head < v.size() / static_cast<std::size_t>(d); ++head) {
      double* x = v.data() + static_cast<std::int64_t>(head) * d;
      for (std::int64_t i = 0; i < half; ++i) {
        const double angle = position * frequencies[static_cast<std::size_t>(i)];
        const double a = x[i], b = x[i + half];
        x[i] = a * std::cos(angle) - b * std::sin(angle);
        x[i + half] = b * std::cos(angle) + a * std::sin(angle);
      }
    }
  }
  std::vector<double> linear(const std::vector<double>& x, const std::string& module) const {
    std::vector<double> y = matrix(x, module + ".weight");
    const auto bias = m_.weights.find(module + ".bias");
    if (bias != m_.weights.end()) add(y, bias->second);
    return y;
  }
  std::vector<double> matrix(std::vector<double> x, const std::string& name) const {
    if (round_tokens_ && m_.quantized(name) && name != "model.embed_tokens.weight") {
      double peak = 0;
      for (const double v : x) peak = std::max(peak, std::abs(v));
      for (double& v : x) v = peak > 0 ? std::nearbyint(v * (127 / peak)) * (peak / 127) : 0;
    } else if (int8_ && m_.quantized(name)) {
      for (std::size_t g = 0; g < x.size(); g += 32) {
        const std::size_t end = std::min(x.size(), g + 32);
        double peak = 0;
        for (std::size_t i = g; i < end; ++i) peak = std::max(peak, std::abs(x[i]));
        for (std::size_t i = g; i < end && peak > 0; ++i) x[i] = std::nearbyint(x[i] * (127 / peak)) * (peak / 127);
      }
    }
    const std::vector<double>& w = m_.weights.at(name);
    std::vector<double> y(w.size() / x.size(), 0.0);
    for (std::size_t r = 0; r < y.size(); ++r) {
      for (std::size_t i = 0; i < x.size(); ++i) y[r] += w[r * x.size() + i] * x[i];
    }
    return y;
  }

  const TinyModel& m_;
  const ModelConfig& c_;
  bool int8_, round_tokens_;
};

inline std::vector<std::int32_t> random_ids(std::int64_t count, std::int64_t vocab, std::uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<std::int32_t> ids;
  for (std::int64_t i = 0; i < count; ++i)
    ids.push_back(static_cast<std::int32_t>(rng() % static_cast<std::uint32_t>(vocab)));
  return ids;
}

}  // namespace pare::testing
