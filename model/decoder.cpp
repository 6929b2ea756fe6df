#include "model/decoder.h"

#include <algorithm>
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

void fill_tables(const ModelConfig& config, RopeKind kind, std::int64_t positions, const torch::Device& device,
                 Tensor& cosine, Tensor& sine) {
  const auto frequencies = rope_frequencies(config, kind, positions);
  const double factor = rope_attention_factor(config, kind);
  const auto half = static_cast<std::int64_t>(frequencies.size());
  Tensor c = torch::empty({positions, half}), s = torch::empty({positions, half});
  for (std::int64_t t = 0; t < positions; ++t)
    for (std::int64_t j = 0; j < half; ++j) {
      const double angle = static_cast<double>(t) * frequencies[static_cast<std::size_t>(j)];
      c.data_ptr<float>()[t * half + j] = static_cast<float>(std::cos(angle) * factor);
      s.data_ptr<float>()[t * half + j] = static_cast<float>(std::sin(angle) * factor);
    }
  cosine = c.to(device);
  sine = s.to(device);
}

// A function of x and of leaves, whose inside is not kept: backward computes it again. Gradients of the leaves are added
// to theirs by the inner backward, as LibTorch does for any leaf.
struct Recomputed : torch::autograd::Function<Recomputed> {
  using Inside = std::function<Tensor(const Tensor&)>;
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Inside& inside) {
    context->save_for_backward({x});
    context->saved_data["inside"] = c10::IValue::make_capsule(c10::make_intrusive<Kept>(inside));
    const torch::AutoGradMode enabled(true);  // products go other ways without it: the bits would differ
    return inside(x.detach().requires_grad_()).detach();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const torch::AutoGradMode enabled(true);
    const Tensor x = context->get_saved_variables()[0].detach().requires_grad_();
    const auto kept = context->saved_data["inside"].toCapsule();
    static_cast<const Kept&>(*kept).inside(x).backward(gradients[0]);
    return {x.grad(), Tensor()};
  }

 private:
  struct Kept : torch::CustomClassHolder {
    explicit Kept(Inside inside) : inside(std::move(inside)) {}
    Inside inside;
  };
};

}  // namespace

Tensor round_tokens(const Tensor& x) {
  const Tensor exact = x.detach().to(torch::kFloat);
  const Tensor peak = exact.abs().amax(-1, true);
  const Tensor inverse = torch::where(peak > 1e-30, 127.0 / peak, torch::zeros_like(peak));
  const Tensor rounded = (torch::round(exact * inverse) * (peak / 127.0)).to(x.scalar_type());
  return x.requires_grad() ? x + (rounded - x.detach()) : rounded;
}

Tensor norm_factor(const ModelConfig& config, const Tensor& weight) {
  return config.norm_adds_one ? weight + 1 : weight;
}

// LayerNorm is RMSNorm of the differences from the mean, plus a bias: so it has the same kernels.
Tensor apply_norm(const ModelConfig& config, const Tensor& x, const Tensor& weight, const Tensor& bias,
                  torch::ScalarType out) {
  const Tensor factor = norm_factor(config, weight);
  if (!bias.defined()) return rms_norm(x, factor, config.rms_norm_eps, out);
  return (rms_norm(x - x.mean(-1, true), factor, config.rms_norm_eps, x.scalar_type()) + bias).to(out);
}

RopeTables rope_tables(const ModelConfig& config, std::int64_t positions, const torch::Device& device) {
  RopeTables tables;
  fill_tables(config, RopeKind::kGlobal, positions, device, tables.cos, tables.sin);
  bool local = false, none = false;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    local = local || config.rope_kind(layer) == RopeKind::kLocal;
    none = none || config.rope_kind(layer) == RopeKind::kNone;
  }
  if (local) fill_tables(config, RopeKind::kLocal, positions, device, tables.local_cos, tables.local_sin);
  if (none) fill_tables(config, RopeKind::kNone, positions, device, tables.still_cos, tables.still_sin);
  return tables;
}

RopeTables packed_rope(const RopeTables& tables, const Tensor& starts) {
  const std::int64_t batch = starts.size(0), n = starts.size(1);
  const Tensor positions = (torch::arange(n, starts.options()).unsqueeze(0) - starts).reshape({-1});
  const auto rows = [&](const Tensor& table) {
    return table.defined() ? table.index_select(0, positions).view({batch, n, table.size(1)}) : table;
  };
  return {rows(tables.cos),       rows(tables.sin),       rows(tables.local_cos), rows(tables.local_sin),
          rows(tables.still_cos), rows(tables.still_sin), starts};
}

DecoderBlockImpl::DecoderBlockImpl(const ModelConfig& config, int layer, bool experts)
    : config_(of_block(config, layer)), layer_(layer) {
  const std::int64_t h = config.hidden_size, f = config_.intermediate_size;
  const std::int64_t q = config_.num_heads * config.head_dim, kv = config_.num_kv_heads * config.head_dim;
  if (config.fused_qkv) {
    qkv_ = {add_linear("self_attn.qkv_proj", q + 2 * kv, h, config.qkv_bias)};
  } else {
    qkv_ = {add_linear("self_attn.q_proj", q, h, config.qkv_bias),
            add_linear("self_attn.k_proj", kv, h, config.qkv_bias),
            add_linear("self_attn.v_proj", kv, h, config.qkv_bias)};
  }
  o_ = add_linear("self_attn.o_proj", h, q, config.o_bias);
  if (config.has_experts()) {
    const Experts& names = config.experts;
    router_ = modules_[names.module + ".gate"] =
        add_parameter(*this, names.module + ".gate.weight", matrix(names.count, h));
    for (std::int64_t e = 0; e < names.count; ++e) {
      const std::string expert = names.module + ".experts." + std::to_string(e) + ".";
      const std::int64_t inner = experts ? f : 0, outer = experts ? h : 0;
      experts_.push_back({add_linear(expert + names.gate, inner, outer, false),
                          add_linear(expert + names.up, inner, outer, false),
                          add_linear(expert + names.down, outer, inner, false)});
    }
  } else {
    if (config.fused_gate_up) {
      gate_up_ = {add_linear("mlp.gate_up_proj", 2 * f, h, config.mlp_bias)};
    } else if (!config.gated_mlp) {
      gate_up_ = {add_linear("mlp.up_proj", f, h, config.mlp_bias)};
    } else {
      gate_up_ = {add_linear("mlp.gate_proj", f, h, config.mlp_bias), add_linear("mlp.up_proj", f, h, config.mlp_bias)};
    }
    down_ = add_linear("mlp.down_proj", h, f, config.mlp_bias);
  }
  const bool bias = config.layer_norm;
  attention_norm_ = add_norm("input_layernorm", h, bias);
  if (config.post_norms) {
    post_attention_norm_ = add_norm("post_attention_layernorm", h, bias);
    mlp_norm_ = add_norm("pre_feedforward_layernorm", h, bias);
    post_mlp_norm_ = add_norm("post_feedforward_layernorm", h, bias);
  } else {
    mlp_norm_ = add_norm("post_attention_layernorm", h, bias);
  }
  if (config.qk_norm) {
    q_norm_ = add_norm("self_attn.q_norm", config.head_dim, false);
    k_norm_ = add_norm("self_attn.k_norm", config.head_dim, false);
  }
}

DecoderBlockImpl::Linear DecoderBlockImpl::add_linear(const std::string& module, std::int64_t out, std::int64_t in,
                                                      bool bias) {
  Linear linear{add_weight(module, out, in), Tensor(), module};
  if (bias) linear.bias = add_parameter(*this, module + ".bias", torch::zeros({out}));
  return linear;
}

Tensor DecoderBlockImpl::add_weight(const std::string& module, std::int64_t out, std::int64_t in) {
  return modules_[module] = add_parameter(*this, module + ".weight", matrix(out, in));
}

DecoderBlockImpl::Norm DecoderBlockImpl::add_norm(const std::string& module, std::int64_t width, bool bias) {
  const Tensor start = config_.norm_adds_one ? torch::zeros({width}) : torch::ones({width});
  Norm norm{add_parameter(*this, module + ".weight", start), Tensor()};
  if (bias) norm.bias = add_parameter(*this, module + ".bias", torch::zeros({width}));
  modules_[module] = norm.weight;
  return norm;
}

torch::ScalarType DecoderBlockImpl::matmul_dtype() const {
  const auto own = attention_norm_.weight.scalar_type();
  return own == torch::kFloat ? matmul_dtype_ : own;
}

Tensor DecoderBlockImpl::norm(const Tensor& x, const Norm& norm) {
  const Tensor exact = x.scalar_type() == torch::kBFloat16 ? x.to(torch::kFloat) : x;
  return apply_norm(config_, exact, norm.weight, norm.bias, matmul_dtype());
}

Tensor DecoderBlockImpl::multiply(const Tensor& x, const Linear& linear) {
  const Tensor y = project(rounded_.contains(linear.module) ? round_tokens(x) : x, linear.weight, linear.bias);
  return linear.a.defined() ? y + project(project(x, linear.a, Tensor()), linear.b, Tensor()) * linear.scale : y;
}

void DecoderBlockImpl::adapt(const std::string& module, const Tensor& a, const Tensor& b, double scale) {
  std::vector<Linear*> all = {&o_, &down_};
  for (Linear& linear : qkv_) all.push_back(&linear);
  for (Linear& linear : gate_up_) all.push_back(&linear);
  for (Expert& expert : experts_) all.insert(all.end(), {&expert.gate, &expert.up, &expert.down});
  for (Linear* linear : all) {
    if (linear->module != module) continue;
    linear->a = a;
    linear->b = b;
    linear->scale = scale;
    return;
  }
  throw failure("decoder block " + std::to_string(layer_), "a linear of the block", module);
}

// The rows of several projections as one product; the gradient is split again by cat's own backward.
Tensor DecoderBlockImpl::project_packed(const Tensor& x, const std::vector<Linear>& parts) {
  if (parts.size() == 1) return multiply(x, parts[0]);
  const bool adapted = std::any_of(parts.begin(), parts.end(), [](const Linear& part) { return part.a.defined(); });
  if (!torch::GradMode::is_enabled() && rounded_.empty() && !adapted) {  // each into its place
    std::int64_t width = 0;
    for (const Linear& part : parts) width += part.weight.size(0);
    const Tensor rows = x.reshape({-1, x.size(-1)}).contiguous();
    Tensor joined = torch::empty({rows.size(0), width}, x.options());
    std::int64_t begin = 0;
    for (const Linear& part : parts) {
      Tensor result = joined.narrow(1, begin, part.weight.size(0));
      project_into(result, rows, part.weight);
      if (part.bias.defined()) result.add_(part.bias.detach().to(x.scalar_type()));
      begin += part.weight.size(0);
    }
    auto shape = x.sizes().vec();
    shape.back() = width;
    return joined.view(shape);
  }
  if (!rounded_.empty() || adapted) {
    std::vector<Tensor> results;
    for (const Linear& part : parts) results.push_back(multiply(x, part));
    return torch::cat(results, -1);
  }
  std::vector<Tensor> weights, biases;
  for (const Linear& part : parts) {
    weights.push_back(part.weight);
    if (part.bias.defined()) biases.push_back(part.bias);
  }
  return project(x, torch::cat(weights, 0), biases.empty() ? Tensor() : torch::cat(biases, 0));
}

Tensor DecoderBlockImpl::activated(const Tensor& gate_up) {
  if (!config_.gated_mlp) return torch::gelu(gate_up, config_.activation == Activation::kGelu ? "none" : "tanh");
  return config_.activation == Activation::kSilu ? swiglu(gate_up) : gelu_gated(gate_up);
}

const Tensor& DecoderBlockImpl::observed(BlockStage stage, const Tensor& output) const {
  if (observer_) observer_(stage, output);
  return output;
}

Tensor DecoderBlockImpl::add(const Tensor& hidden, const Tensor& delta, const Norm& post_norm) {
  return residual_add(hidden, post_norm.weight.defined() ? norm(delta, post_norm) : delta);
}

Tensor DecoderBlockImpl::attention_input(const Tensor& hidden) {
  return norm(hidden, attention_norm_);
}

Tensor DecoderBlockImpl::attention_mix(const Tensor& normed, const RopeTables& rope) {
  const std::int64_t heads = config_.num_heads, kv_heads = config_.num_kv_heads, dim = config_.head_dim;
  Tensor qkv = observed(BlockStage::kQkv, project_packed(normed, qkv_));
  if (config_.qk_norm) {
    const std::int64_t batch = qkv.size(0), n = qkv.size(1);
    const auto parts = qkv.view({batch, n, heads + 2 * kv_heads, dim}).split_with_sizes({heads, kv_heads, kv_heads}, 2);
    qkv = torch::cat({norm(parts[0], q_norm_), norm(parts[1], k_norm_), parts[2]}, 2).view({batch, n, -1});
  }
  const RopeKind kind = config_.rope_kind(layer_);
  const Tensor& cosine = kind == RopeKind::kGlobal  ? rope.cos
                         : kind == RopeKind::kLocal ? rope.local_cos
                                                    : rope.still_cos;
  const Tensor& sine = kind == RopeKind::kGlobal  ? rope.sin
                       : kind == RopeKind::kLocal ? rope.local_sin
                                                  : rope.still_sin;
  return rope_attention(qkv, cosine, sine, heads, kv_heads, dim,
                        {config_.attention_scale, config_.attention_softcap, config_.window(layer_), rope.starts});
}

Tensor DecoderBlockImpl::attention_output(const Tensor& hidden, const Tensor& mix) {
  return add(hidden, observed(BlockStage::kO, multiply(mix, o_)), post_attention_norm_);
}

Tensor DecoderBlockImpl::mlp_input(const Tensor& hidden) {
  return norm(hidden, mlp_norm_);
}

Tensor DecoderBlockImpl::mlp_mix(const Tensor& normed) {
  return activated(observed(BlockStage::kGateUp, project_packed(normed, gate_up_)));
}

Tensor DecoderBlockImpl::mlp_output(const Tensor& hidden, const Tensor& mix) {
  return add(hidden, observed(BlockStage::kDown, multiply(mix, down_)), post_mlp_norm_);
}

Tensor DecoderBlockImpl::expert_shares(const Tensor& normed) {
  const Tensor x = normed.reshape({-1, config_.hidden_size});
  const auto type = x.scalar_type() == torch::kBFloat16 ? torch::kFloat : x.scalar_type();
  const auto [share, chosen] =
      torch::softmax(project(x, router_, Tensor()).to(type), -1).topk(config_.experts.per_token, -1);
  const Tensor weights = config_.experts.renormalize ? share / share.sum(-1, true) : share;
  return torch::zeros({x.size(0), config_.experts.count}, weights.options()).scatter(1, chosen, weights);
}

Tensor DecoderBlockImpl::expert_mix(const Tensor& rows, std::int64_t expert) {
  const Expert& e = experts_[static_cast<std::size_t>(expert)];
  return activated(project_packed(rows, {e.gate, e.up}));
}

Tensor DecoderBlockImpl::add_expert(const Tensor& sum, const Tensor& normed, const Tensor& shares,
                                    std::int64_t expert) {
  const Tensor share = shares.select(1, expert);
  const Tensor rows = share.detach().nonzero().squeeze(1);
  if (rows.numel() == 0) return sum;
  const Tensor x = normed.reshape({-1, config_.hidden_size}).index_select(0, rows);
  const Tensor out = multiply(expert_mix(x, expert), experts_[static_cast<std::size_t>(expert)].down);
  return sum.index_add(0, rows, (out * share.index_select(0, rows).unsqueeze(1)).to(sum.scalar_type()));
}

Tensor DecoderBlockImpl::expert_output(const Tensor& hidden, const Tensor& normed) {
  const Tensor shares = expert_shares(normed);
  Tensor sum = torch::zeros({shares.size(0), config_.hidden_size}, hidden.options());
  for (std::int64_t e = 0; e < config_.experts.count; ++e) sum = add_expert(sum, normed, shares, e);
  return residual_add(hidden, sum.view(hidden.sizes()));
}

Tensor DecoderBlockImpl::forward(const Tensor& hidden, const RopeTables& rope) {
  const Tensor middle = attention_output(hidden, attention_mix(attention_input(hidden), rope));
  const Tensor normed = mlp_input(config_.parallel_residual ? hidden : middle);
  return experts_.empty() ? mlp_output(middle, mlp_mix(normed)) : expert_output(middle, normed);
}

Tensor DecoderBlockImpl::weight(const std::string& module) const {
  const auto found = modules_.find(module);
  if (found == modules_.end())
    throw failure("decoder block " + std::to_string(layer_), "a module of the block", module);
  return found->second;
}

DecoderImpl::DecoderImpl(ModelConfig config) : config_(std::move(config)) {
  embed_ = add_parameter(*this, "model.embed_tokens.weight", matrix(config_.vocab_size, config_.hidden_size));
  const auto model = named_children()["model"];
  if (config_.learned_positions)
    positions_ = add_parameter(*this, "model.embed_positions.weight",
                               matrix(config_.max_position_embeddings, config_.hidden_size));
  const auto layers = model->register_module("layers", std::make_shared<LevelImpl>());
  for (int i = 0; i < config_.num_layers; ++i) {
    blocks_.emplace_back(config_, i);
    layers->register_module(std::to_string(i), blocks_.back().ptr());
  }
  norm_ =
      add_parameter(*this, "model.norm.weight",
                    config_.norm_adds_one ? torch::zeros({config_.hidden_size}) : torch::ones({config_.hidden_size}));
  if (config_.layer_norm) norm_bias_ = add_parameter(*this, "model.norm.bias", torch::zeros({config_.hidden_size}));
  if (!config_.tie_word_embeddings)
    lm_head_ = add_parameter(*this, "lm_head.weight", matrix(config_.vocab_size, config_.hidden_size));
  for (const auto& item : named_parameters()) by_name_[item.key()] = item.value();
}

Tensor DecoderImpl::embed(const Tensor& ids, const Tensor& starts) {
  const Tensor rows = torch::embedding(embed_, ids);
  if (positions_.defined()) {
    require_positions(config_, ids.size(1), "decoder");
    if (starts.defined())
      return rows + torch::embedding(positions_, torch::arange(ids.size(1), ids.options()).unsqueeze(0) - starts);
    return rows + positions_.narrow(0, 0, ids.size(1));
  }
  return config_.embedding_scale == 1 ? rows : rows * config_.embedding_scale;
}

Tensor DecoderImpl::final_norm(const Tensor& hidden) {
  const auto dtype = norm_.scalar_type() == torch::kFloat ? matmul_dtype_ : norm_.scalar_type();
  const Tensor normed = apply_norm(config_, hidden, norm_, norm_bias_, dtype);
  return round_head_ ? round_tokens(normed) : normed;  // the head alone reads it
}

Tensor DecoderImpl::head_weight() const { return lm_head_.defined() ? lm_head_ : embed_; }

Tensor DecoderImpl::head_logits(const Tensor& hidden) {
  const Tensor logits = project(hidden, head_weight(), Tensor());
  const double cap = config_.final_softcap;
  return cap > 0 ? torch::tanh(logits / cap) * cap : logits;
}

const RopeTables& DecoderImpl::rope(std::int64_t positions) {
  const bool beyond = rope_beyond(config_, positions);
  if (!rope_.cos.defined() || rope_.cos.size(0) < positions || rope_.cos.device() != norm_.device() ||
      rope_beyond_ != beyond) {
    rope_ = rope_tables(config_, positions, norm_.device());
    rope_beyond_ = beyond;
  }
  return rope_;
}

RopeTables DecoderImpl::rope(std::int64_t positions, const Tensor& starts) {
  if (!starts.defined()) return rope(positions);
  if (rope_beyond(config_, positions))
    throw input_error("decoder", "documents packed into at most " +
                      std::to_string(config_.rope_long->original_max_position) + " positions, where LongRoPE switches",
                      std::to_string(positions), "lower --context");
  return packed_rope(rope(positions), starts);
}

Tensor DecoderImpl::hidden(const Tensor& ids, const Tensor& starts) {
  const RopeTables tables = rope(ids.size(1), starts);
  Tensor x = embed(ids, starts);
  for (int l = 0; l < config_.num_layers; ++l) x = through_block(l, x, tables);
  return final_norm(x);
}

Tensor DecoderImpl::through_block(int layer, const Tensor& hidden, const RopeTables& rope) {
  const std::shared_ptr<DecoderBlockImpl> block = blocks_[static_cast<std::size_t>(layer)].ptr();
  // An observer wants nodes of the graph that training goes back through.
  if (!recompute_ || block->is_observed() || !torch::GradMode::is_enabled()) return block->forward(hidden, rope);
  return Recomputed::apply(hidden.requires_grad() ? hidden : hidden.detach().requires_grad_(),
                           [block, rope](const Tensor& x) { return block->forward(x, rope); });
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
      parameter.fill_(decoder->config().norm_adds_one ? 0.0 : 1.0);
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
