#include "model/fused.h"

#include <ATen/Parallel.h>
#include <malloc.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "model/fused_kernels.h"
#include "model/threads.h"
#include "model/split_products.h"

namespace pare {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr std::int64_t kRowShard = 64;  // rows per task: fixed, so that sums over rows never depend on the thread count

template <class T>
struct Storage;
template <>
struct Storage<float> {
  static float* of(const Tensor& t) { return t.data_ptr<float>(); }
};
template <>
struct Storage<Bf16> {
  static Bf16* of(const Tensor& t) { return reinterpret_cast<Bf16*>(t.data_ptr<at::BFloat16>()); }
};

bool has_kernel(const Tensor& t) {
  return t.device().is_cpu() && (t.scalar_type() == torch::kFloat || t.scalar_type() == torch::kBFloat16);
}

// Calls f with a float or Bf16 null pointer naming the storage of `dtype`.
template <class F>
void with_storage(torch::ScalarType dtype, F&& f) {
  if (dtype == torch::kBFloat16)
    f(static_cast<Bf16*>(nullptr));
  else
    f(static_cast<float*>(nullptr));
}

template <class F>
void for_shards(std::int64_t rows, F&& f) {
  const std::int64_t shards = (rows + kRowShard - 1) / kRowShard;
  at::parallel_for(0, shards, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t shard = begin; shard < end; ++shard)
      f(shard, shard * kRowShard, std::min(rows, (shard + 1) * kRowShard));
  });
}

struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x_any, const Tensor& weight, double eps,
                        std::int64_t out_dtype) {
    const auto dtype = static_cast<torch::ScalarType>(out_dtype);
    const Tensor x = x_any.contiguous();
    const std::int64_t width = x.size(-1), rows = x.numel() / width;
    Tensor out = torch::empty(x.sizes(), x.options().dtype(dtype)), rstd = torch::empty({rows}, x.options());
    with_storage(dtype, [&]<class T>(T*) {
      for_shards(rows, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
        row_kernels<T>().rms_forward(x.data_ptr<float>() + begin * width, weight.data_ptr<float>(),
                                     static_cast<float>(eps), end - begin, width,
                                     Storage<T>::of(out) + begin * width, rstd.data_ptr<float>() + begin);
      });
    });
    ctx->save_for_backward({x, weight, rstd});
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2];
    const Tensor g = grads[0].contiguous();
    const std::int64_t width = x.size(-1), rows = x.numel() / width, shards = (rows + kRowShard - 1) / kRowShard;
    Tensor gx = torch::empty_like(x), parts = torch::zeros({shards, width}, x.options());
    with_storage(g.scalar_type(), [&]<class T>(T*) {
      for_shards(rows, [&](std::int64_t shard, std::int64_t begin, std::int64_t end) {
        row_kernels<T>().rms_backward(x.data_ptr<float>() + begin * width, weight.data_ptr<float>(),
                                      rstd.data_ptr<float>() + begin, Storage<T>::of(g) + begin * width, end - begin,
                                      width, gx.data_ptr<float>() + begin * width,
                                      parts.data_ptr<float>() + shard * width);
      });
    });
    return {gx, parts.sum(0), Tensor(), Tensor()};
  }
};

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight) {
    const Tensor flat = x.reshape({-1, x.size(-1)}).contiguous(), w = weight.to(x.scalar_type());
    ctx->save_for_backward({flat, w});
    ctx->saved_data["weight_dtype"] = static_cast<std::int64_t>(weight.scalar_type());
    ctx->saved_data["want_x"] = x.requires_grad();
    ctx->saved_data["want_weight"] = weight.requires_grad();
    auto shape = x.sizes().vec();
    shape.back() = w.size(0);
    return torch::mm(flat, w.t()).view(shape);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &w = saved[1];
    const Tensor g = grads[0].reshape({-1, w.size(0)}).contiguous();
    auto shape = grads[0].sizes().vec();
    shape.back() = w.size(1);
    Tensor gx, gw;
    if (ctx->saved_data["want_x"].toBool()) gx = torch::mm(g, w).view(shape);
    if (ctx->saved_data["want_weight"].toBool())
      gw = torch::mm(g.t(), x).to(static_cast<torch::ScalarType>(ctx->saved_data["weight_dtype"].toInt()));
    return {gx, gw};
  }
};

struct SwigluFunction : torch::autograd::Function<SwigluFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_up_any) {
    const Tensor gate_up = gate_up_any.contiguous();
    const std::int64_t width = gate_up.size(-1) / 2, rows = gate_up.numel() / (2 * width);
    auto shape = gate_up.sizes().vec();
    shape.back() = width;
    Tensor out = torch::empty(shape, gate_up.options());
    with_storage(gate_up.scalar_type(), [&]<class T>(T*) {
      for_shards(rows, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
        row_kernels<T>().swiglu_forward(Storage<T>::of(gate_up) + begin * 2 * width, end - begin, width,
                                        Storage<T>::of(out) + begin * width);
      });
    });
    ctx->save_for_backward({gate_up});
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor gate_up = ctx->get_saved_variables()[0], g = grads[0].contiguous();
    const std::int64_t width = gate_up.size(-1) / 2, rows = gate_up.numel() / (2 * width);
    Tensor out = torch::empty_like(gate_up);
    with_storage(gate_up.scalar_type(), [&]<class T>(T*) {
      for_shards(rows, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
        row_kernels<T>().swiglu_backward(Storage<T>::of(gate_up) + begin * 2 * width,
                                         Storage<T>::of(g) + begin * width, end - begin, width,
                                         Storage<T>::of(out) + begin * 2 * width);
      });
    });
    return {out};
  }
};

struct AddFunction : torch::autograd::Function<AddFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x_any, const Tensor& delta_any) {
    const Tensor x = x_any.contiguous(), delta = delta_any.contiguous();
    ctx->saved_data["delta_dtype"] = static_cast<std::int64_t>(delta.scalar_type());
    Tensor out = torch::empty_like(x);
    const std::int64_t width = x.size(-1), rows = x.numel() / width;
    with_storage(delta.scalar_type(), [&]<class T>(T*) {
      for_shards(rows, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
        row_kernels<T>().add(x.data_ptr<float>() + begin * width, Storage<T>::of(delta) + begin * width,
                             (end - begin) * width, out.data_ptr<float>() + begin * width);
      });
    });
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {grads[0], grads[0].to(static_cast<torch::ScalarType>(ctx->saved_data["delta_dtype"].toInt()))};
  }
};

// starts: empty where every sequence is one document.
AttentionShape shape_of(const Tensor& qkv, const Tensor& cosine, const Tensor& starts, std::int64_t heads,
                        std::int64_t kv_heads, std::int64_t head_dim, double scale, double softcap,
                        std::int64_t window) {
  AttentionShape shape{qkv.size(1),
                       heads,
                       kv_heads,
                       head_dim,
                       2 * cosine.size(-1),
                       window,
                       static_cast<float>(scale),
                       static_cast<float>(softcap)};
  if (starts.numel() > 0) shape.starts = starts.data_ptr<std::int64_t>();
  if (cosine.dim() == 3) shape.table_rows = cosine.size(1);
  return shape;
}

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& qkv_any, const Tensor& cosine, const Tensor& sine,
                        const Tensor& starts, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
                        double scale, double softcap, std::int64_t window) {
    const Tensor qkv = qkv_any.contiguous();
    const AttentionShape shape = shape_of(qkv, cosine, starts, heads, kv_heads, head_dim, scale, softcap, window);
    const std::int64_t batch = qkv.size(0), n = qkv.size(1);
    Tensor mix = torch::empty({batch, n, heads * head_dim}, qkv.options());
    Tensor lse = torch::empty({batch, heads, n}, qkv.options().dtype(torch::kFloat));
    with_storage(qkv.scalar_type(), [&]<class T>(T*) {
      at::parallel_for(0, batch * kv_heads, 1, [&](std::int64_t begin, std::int64_t end) {
        std::vector<float> scratch(static_cast<std::size_t>(shape.forward_scratch()));
        for (std::int64_t i = begin; i < end; ++i)
          row_kernels<T>().attention_forward(shape, i / kv_heads, i % kv_heads, Storage<T>::of(qkv),
                                             cosine.data_ptr<float>(), sine.data_ptr<float>(), Storage<T>::of(mix),
                                             lse.data_ptr<float>(), scratch.data());
      });
    });
    ctx->save_for_backward({qkv, cosine, sine, mix, lse, starts});
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["kv_heads"] = kv_heads;
    ctx->saved_data["head_dim"] = head_dim;
    ctx->saved_data["window"] = window;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["softcap"] = softcap;
    return mix;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &qkv = saved[0], &cosine = saved[1], &sine = saved[2], &mix = saved[3], &lse = saved[4];
    const Tensor g = grads[0].contiguous();
    const std::int64_t kv_heads = ctx->saved_data["kv_heads"].toInt();
    const AttentionShape shape =
        shape_of(qkv, cosine, saved[5], ctx->saved_data["heads"].toInt(), kv_heads, ctx->saved_data["head_dim"].toInt(),
                 ctx->saved_data["scale"].toDouble(), ctx->saved_data["softcap"].toDouble(),
                 ctx->saved_data["window"].toInt());
    Tensor out = torch::empty_like(qkv);
    with_storage(qkv.scalar_type(), [&]<class T>(T*) {
      at::parallel_for(0, qkv.size(0) * kv_heads, 1, [&](std::int64_t begin, std::int64_t end) {
        std::vector<float> scratch(static_cast<std::size_t>(shape.backward_scratch()));
        for (std::int64_t i = begin; i < end; ++i)
          row_kernels<T>().attention_backward(shape, i / kv_heads, i % kv_heads, Storage<T>::of(qkv),
                                              cosine.data_ptr<float>(), sine.data_ptr<float>(), Storage<T>::of(mix),
                                              lse.data_ptr<float>(), Storage<T>::of(g), Storage<T>::of(out),
                                              scratch.data());
      });
    });
    variable_list gradients(10);
    gradients[0] = out;
    return gradients;
  }
};

void flush_denormals(bool on) {
  at::globalContext().setFlushDenormal(on);
  at::parallel_for(0, at::get_num_threads(), 1,
                   [on](std::int64_t, std::int64_t) { at::globalContext().setFlushDenormal(on); });
}

// x [batch, heads, positions, head_dim]: pairs (j, j + pairs) turned by the angle of their position.
Tensor rotate(const Tensor& x, const Tensor& cosine, const Tensor& sine) {
  const std::int64_t pairs = cosine.size(-1);
  const Tensor a = x.narrow(-1, 0, pairs), b = x.narrow(-1, pairs, pairs);
  const Tensor rest = x.narrow(-1, 2 * pairs, x.size(-1) - 2 * pairs);
  return torch::cat({a * cosine - b * sine, b * cosine + a * sine, rest}, -1);
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, MatmulDtype out) {
  if (x.device().is_cpu() && x.scalar_type() == torch::kFloat)
    return RmsNormFunction::apply(x, weight, eps, static_cast<std::int64_t>(out));
  const Tensor y = x * torch::rsqrt(x.pow(2).mean(-1, true) + eps) * weight;
  return out == torch::kBFloat16 ? y.to(out) : y;
}

Tensor project(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  Tensor y;
  if (split_products_wanted() && !torch::GradMode::is_enabled()) {
    const Tensor rows = x.reshape({-1, x.size(-1)}).contiguous();
    auto shape = x.sizes().vec();
    shape.back() = weight.size(0);
    y = torch::empty(shape, x.options());
    project_into(y.view({-1, weight.size(0)}), rows, weight);
  } else {
    y = LinearFunction::apply(x, weight);
  }
  return bias.defined() ? y + bias.to(y.scalar_type()) : y;
}

void project_into(Tensor out, const Tensor& x, const Tensor& weight) {
  const Tensor w = weight.detach().to(x.scalar_type());
  if (split_products_wanted() && x.device().is_cpu() && x.scalar_type() == torch::kFloat) {
    const Tensor rows = x.contiguous(), columns = w.contiguous();
    split_product(rows.data_ptr<float>(), rows.size(0), rows.size(1), columns.data_ptr<float>(), columns.size(0),
                  out.data_ptr<float>(), out.stride(0));
  } else {
    torch::mm_out(out, x, w.t());
  }
}

Tensor swiglu(const Tensor& gate_up) {
  if (has_kernel(gate_up)) return SwigluFunction::apply(gate_up);
  const auto halves = gate_up.chunk(2, -1);
  return torch::silu(halves[0]) * halves[1];
}

Tensor gelu_gated(const Tensor& gate_up) {
  const auto halves = gate_up.chunk(2, -1);
  return torch::gelu(halves[0], "tanh") * halves[1];
}

Tensor residual_add(const Tensor& x, const Tensor& delta) {
  if (x.device().is_cpu() && x.scalar_type() == torch::kFloat && has_kernel(delta)) return AddFunction::apply(x, delta);
  return x + delta.to(x.scalar_type());
}

Tensor rope_attention(const Tensor& qkv, const Tensor& cosine, const Tensor& sine, std::int64_t heads,
                      std::int64_t kv_heads, std::int64_t head_dim, const AttentionForm& form) {
  const std::int64_t batch = qkv.size(0), n = qkv.size(1);
  const double scale = form.scale > 0 ? form.scale : 1.0 / std::sqrt(static_cast<double>(head_dim));
  const std::int64_t window = form.window < n ? form.window : 0;
  if (has_kernel(qkv)) {
    const Tensor starts =
        form.starts.defined() ? form.starts.contiguous() : torch::empty({0}, torch::TensorOptions().dtype(torch::kLong));
    return AttentionFunction::apply(qkv, cosine.narrow(-2, 0, n).contiguous(), sine.narrow(-2, 0, n).contiguous(),
                                    starts, heads, kv_heads, head_dim, scale, form.softcap, window);
  }
  const auto type = qkv.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  Tensor c = cosine.narrow(-2, 0, n).to(type), s = sine.narrow(-2, 0, n).to(type);
  if (c.dim() == 3) {  // of each sequence its own, for all heads
    c = c.unsqueeze(1);
    s = s.unsqueeze(1);
  }
  const auto parts = qkv.to(type).view({batch, n, heads + 2 * kv_heads, head_dim}).transpose(1, 2).split_with_sizes(
      {heads, kv_heads, kv_heads}, 1);
  const std::int64_t group = heads / kv_heads;
  const Tensor q = rotate(parts[0], c, s), k = rotate(parts[1], c, s).repeat_interleave(group, 1);
  const Tensor v = parts[2].repeat_interleave(group, 1);
  const Tensor all = torch::ones({n, n}, torch::TensorOptions(qkv.device()).dtype(torch::kBool));
  Tensor mask = all.triu(1);
  if (window > 0) mask = mask.logical_or(all.tril(-window));
  if (form.starts.defined()) {
    const Tensor before = torch::arange(n, form.starts.options()).view({1, 1, n}) < form.starts.unsqueeze(2);
    mask = mask.logical_or(before).unsqueeze(1);  // [batch, 1, n, n]
  }
  Tensor scores = torch::matmul(q, k.transpose(-1, -2)) * scale;
  if (form.softcap > 0) scores = torch::tanh(scores / form.softcap) * form.softcap;
  scores = scores.masked_fill(mask, -std::numeric_limits<double>::infinity());
  return torch::matmul(torch::softmax(scores, -1), v)
      .transpose(1, 2)
      .reshape({batch, n, heads * head_dim})
      .to(qkv.scalar_type());
}

double sum_of_squares(const Tensor& flat) {
  if (!flat.device().is_cpu()) return flat.to(torch::kDouble).pow(2).sum().item<double>();
  constexpr std::int64_t kChunk = 1 << 16;
  const std::int64_t count = flat.numel(), chunks = (count + kChunk - 1) / kChunk;
  std::vector<double> parts(static_cast<std::size_t>(chunks));
  const float* data = flat.data_ptr<float>();
  at::parallel_for(0, chunks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      parts[static_cast<std::size_t>(i)] =
          optimizer_kernels().sum_of_squares(data + i * kChunk, std::min(kChunk, count - i * kChunk));
  });
  double total = 0;
  for (const double part : parts) total += part;
  return total;
}

void prepare_threads(int threads) {
#if defined(__GLIBC__)
  // Activations of one step are freed and asked for again in the next: given back to the system in between, they
  // cost a page fault per 4 KiB (measured: four fifths of the training time).
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
  if (threads > 0) set_library_threads(threads);
  flush_denormals(true);
}

PreparedThreads::PreparedThreads(int threads) : torch_before_(at::get_num_threads()), blas_before_(blas_threads()) {
  prepare_threads(threads);
}

PreparedThreads::~PreparedThreads() {
  flush_denormals(false);
  restore_library_threads(torch_before_, blas_before_);
}

}  // namespace pare
