#include "model/decoder.h"

#include <cmath>
#include <numbers>
#include <utility>

#include "core/error.h"
#include "model/fused.h"

namespace pare {
namespace {

using torch::Tensor;

// A named level of the Hugging Face parameter tree: "self_attn", "q_proj", ...
struct LevelImpl : torch::nn::Module {};

// Registers `value` under a dotted path, making the levels on the way.
Tensor add_parameter(torch::nn::Module& root, const std::string& path, Tensor value) {
  const std::size_t dot = path.find('.');
  if (dot == std::string::npos) return root.register_parameter(path, std::move(value));
  const std::string level = path.substr(0, dot);
  const auto children = root.named_children();
  const auto child =
      children.contains(level) ? children[level] : root.register_module(level, std::make_shared<LevelImpl>());
  return add_parameter(*child, path.substr(dot + 1), std::move(value));
}

Tensor matrix(std::int64_t out, std::int64_t in) { return torch::zeros({out, in}); }

// Packs the rows of several projections into one product; the gradient is split again by cat's own backward.
Tensor packed(const std::vector<Tensor>& parts) { return torch::cat(parts, 0); }

}  // namespace

RopeTables rope_tables(const ModelConfig& config, std::int64_t positions, const torch::Device& device) {
  const auto frequencies = rope_frequencies(config);
  const auto half = static_cast<std::int64_t>(frequencies.size());
  RopeTables tables{torch::empty({positions, half}), torch::empty({positions, half})};
  for (std::int64_t t = 0; t < positions; ++t)
    for (std::int64_t j = 0; j < half; ++j) {
      const double angle = static_cast<double>(t) * frequencies[static_cast<std::size_t>(j)];
      tables.cos.data_ptr<float>()[t * half + j] = static_cast<float>(std::cos(angle));
      tables.sin.data_ptr<float>()[t * half + j] = static_cast<float>(std::sin(angle));
    }
  tables.cos = tables.cos.to(device);
  tables.sin = tables.sin.to(device);
  return tables;
}

DecoderBlockImpl::DecoderBlockImpl(const ModelConfig& config, int layer) : config_(config), layer_(layer) {
  const std::int64_t h = config.hidden_size, f = config.intermediate_size;
  const std::int64_t q = config.num_heads * config.head_dim, kv = config.num_kv_heads * config.head_dim;
  q_ = add_parameter(*this, "self_attn.q_proj.weight", matrix(q, h));
  k_ = add_parameter(*this, "self_attn.k_proj.weight", matrix(kv, h));
  v_ = add_parameter(*this, "self_attn.v_proj.weight", matrix(kv, h));
  o_ = add_parameter(*this, "self_attn.o_proj.weight", matrix(h, q));
  if (config.qkv_bias) {
    q_bias_ = add_parameter(*this, "self_attn.q_proj.bias", torch::zeros({q}));
    k_bias_ = add_parameter(*this, "self_attn.k_proj.bias", torch::zeros({kv}));
    v_bias_ = add_parameter(*this, "self_attn.v_proj.bias", torch::zeros({kv}));
  }
  if (config.o_bias) o_bias_ = add_parameter(*this, "self_attn.o_proj.bias", torch::zeros({h}));
  gate_ = add_parameter(*this, "mlp.gate_proj.weight", matrix(f, h));
  up_ = add_parameter(*this, "mlp.up_proj.weight", matrix(f, h));
  down_ = add_parameter(*this, "mlp.down_proj.weight", matrix(h, f));
  if (config.mlp_bias) {
    gate_bias_ = add_parameter(*this, "mlp.gate_proj.bias", torch::zeros({f}));
    up_bias_ = add_parameter(*this, "mlp.up_proj.bias", torch::zeros({f}));
    down_bias_ = add_parameter(*this, "mlp.down_proj.bias", torch::zeros({h}));
  }
  norm1_ = add_parameter(*this, "input_layernorm.weight", torch::ones({h}));
  norm2_ = add_parameter(*this, "post_attention_layernorm.weight", torch::ones({h}));
}

torch::ScalarType DecoderBlockImpl::matmul_dtype() const {
  return norm1_.scalar_type() == torch::kFloat ? matmul_dtype_ : norm1_.scalar_type();
}

Tensor DecoderBlockImpl::attention_input(const Tensor& hidden) {
  return rms_norm(hidden, norm1_, config_.rms_norm_eps, matmul_dtype());
}

Tensor DecoderBlockImpl::attention_mix(const Tensor& normed, const RopeTables& rope) {
  const Tensor bias = q_bias_.defined() ? packed({q_bias_, k_bias_, v_bias_}) : Tensor();
  const Tensor qkv = project(normed, packed({q_, k_, v_}), bias);
  return rope_attention(qkv, rope.cos, rope.sin, config_.num_heads, config_.num_kv_heads, config_.head_dim);
}

Tensor DecoderBlockImpl::attention_output(const Tensor& hidden, const Tensor& mix) {
  return residual_add(hidden, project(mix, o_, o_bias_));
}

Tensor DecoderBlockImpl::mlp_input(const Tensor& hidden) {
  return rms_norm(hidden, norm2_, config_.rms_norm_eps, matmul_dtype());
}

Tensor DecoderBlockImpl::mlp_mix(const Tensor& normed) {
  const Tensor bias = gate_bias_.defined() ? packed({gate_bias_, up_bias_}) : Tensor();
  return swiglu(project(normed, packed({gate_, up_}), bias));
}

Tensor DecoderBlockImpl::mlp_output(const Tensor& hidden, const Tensor& mix) {
  return residual_add(hidden, project(mix, down_, down_bias_));
}

Tensor DecoderBlockImpl::forward(const Tensor& hidden, const RopeTables& rope) {
  const Tensor middle = attention_output(hidden, attention_mix(attention_input(hidden), rope));
  return mlp_output(middle, mlp_mix(mlp_input(middle)));
}

Tensor DecoderBlockImpl::weight(const std::string& module) const {
  const std::pair<const char*, const Tensor*> table[] = {
      {"self_attn.q_proj", &q_}, {"self_attn.k_proj", &k_}, {"self_attn.v_proj", &v_}, {"self_attn.o_proj", &o_},
      {"mlp.gate_proj", &gate_}, {"mlp.up_proj", &up_},     {"mlp.down_proj", &down_}, {"input_layernorm", &norm1_},
      {"post_attention_layernorm", &norm2_}};
  for (const auto& [name, tensor] : table)
    if (module == name) return *tensor;
  throw failure("decoder block " + std::to_string(layer_), "a module of the block", module);
}

DecoderImpl::DecoderImpl(ModelConfig config) : config_(std::move(config)) {
  embed_ = add_parameter(*this, "model.embed_tokens.weight", matrix(config_.vocab_size, config_.hidden_size));
  const auto model = named_children()["model"];
  const auto layers = model->register_module("layers", std::make_shared<LevelImpl>());
  for (int i = 0; i < config_.num_layers; ++i) {
    blocks_.emplace_back(config_, i);
    layers->register_module(std::to_string(i), blocks_.back().ptr());
  }
  norm_ = add_parameter(*this, "model.norm.weight", torch::ones({config_.hidden_size}));
  if (!config_.tie_word_embeddings)
    lm_head_ = add_parameter(*this, "lm_head.weight", matrix(config_.vocab_size, config_.hidden_size));
  for (const auto& item : named_parameters()) by_name_[item.key()] = item.value();
}

Tensor DecoderImpl::embed(const Tensor& ids) { return torch::embedding(embed_, ids); }

Tensor DecoderImpl::final_norm(const Tensor& hidden) {
  const auto dtype = norm_.scalar_type() == torch::kFloat ? matmul_dtype_ : norm_.scalar_type();
  return rms_norm(hidden, norm_, config_.rms_norm_eps, dtype);
}

Tensor DecoderImpl::head_weight() const { return lm_head_.defined() ? lm_head_ : embed_; }

Tensor DecoderImpl::head_logits(const Tensor& hidden) { return project(hidden, head_weight(), Tensor()); }

const RopeTables& DecoderImpl::rope(std::int64_t positions) {
  if (!rope_.cos.defined() || rope_.cos.size(0) < positions || rope_.cos.device() != norm_.device())
    rope_ = rope_tables(config_, positions, norm_.device());
  return rope_;
}

Tensor DecoderImpl::hidden(const Tensor& ids) {
  const RopeTables& tables = rope(ids.size(1));
  Tensor x = embed(ids);
  for (auto& block : blocks_) x = block->forward(x, tables);
  return final_norm(x);
}

Tensor& DecoderImpl::tensor(const std::string& hf_name) {
  const auto found = by_name_.find(hf_name);
  if (found == by_name_.end()) throw failure("decoder", "a parameter of the model", hf_name);
  return found->second;
}

void DecoderImpl::set_matmul_dtype(torch::ScalarType dtype) {
  matmul_dtype_ = dtype;
  for (auto& block : blocks_) block->set_matmul_dtype(dtype);
}

void initialize(Decoder& decoder, std::uint64_t seed) {
  const torch::NoGradGuard no_grad;
  std::uint64_t state = seed;
  const auto next = [&state] {  // SplitMix64
    std::uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  };
  for (const TensorSpec& spec : expected_tensors(decoder->config())) {
    Tensor& parameter = decoder->tensor(spec.name);
    if (spec.role == TensorRole::kNorm) {
      parameter.fill_(1.0);
    } else if (spec.role == TensorRole::kBias) {
      parameter.zero_();
    } else {
      Tensor values = torch::empty(parameter.sizes());
      float* out = values.data_ptr<float>();
      for (std::int64_t i = 0; i < values.numel(); i += 2) {  // Box-Muller
        const double u = (static_cast<double>(next() >> 11) + 0.5) * 0x1p-53;
        const double angle = 2 * std::numbers::pi * (static_cast<double>(next() >> 11) * 0x1p-53);
        const double radius = 0.02 * std::sqrt(-2 * std::log(u));
        out[i] = static_cast<float>(radius * std::cos(angle));
        if (i + 1 < values.numel()) out[i + 1] = static_cast<float>(radius * std::sin(angle));
      }
      parameter.copy_(values);
    }
  }
}

torch::Device parse_device(const std::string& name) {
  torch::Device device(torch::kCPU);
  try {
    device = torch::Device(name);
  } catch (const c10::Error&) {
    throw usage_error("--device", "cpu, cuda or cuda:N", name);
  }
  if (device.is_cpu()) return device;
  if (!device.is_cuda()) throw usage_error("--device", "cpu, cuda or cuda:N", name);
  const auto count = torch::cuda::is_available() ? static_cast<std::int64_t>(torch::cuda::device_count()) : 0;
  if (count == 0 || device.index() >= count)
    throw Error(ExitCode::kResources, "--device " + name, "a CUDA device that this LibTorch can use",
                std::to_string(count) + " devices", "use --device cpu");
  return device;
}

}  // namespace pare
