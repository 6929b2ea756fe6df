#include "model/fused_kernels.h"

#include "model/fused_attention.h"
#include "model/fused_lanes.h"

namespace pare {
namespace {

template <class T>
INLINE void rms_forward(const float* x, const float* w, float eps, std::int64_t rows, std::int64_t width, T* out,
                        float* rstd) {
  for (std::int64_t row = 0; row < rows; ++row, x += width, out += width) {
    F16 total = set(0);
    std::int64_t i = 0;
    for (; i + 16 <= width; i += 16) total += load(x + i) * load(x + i);
    float sum = sum_lanes(total);
    for (; i < width; ++i) sum += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
    rstd[row] = scale;
    for (i = 0; i + 16 <= width; i += 16) store(out + i, load(x + i) * scale * load(w + i));
    for (; i < width; ++i) store1(out + i, x[i] * scale * w[i]);
  }
}

template <class T>
INLINE void rms_backward(const float* x, const float* w, const float* rstd, const T* g, std::int64_t rows,
                         std::int64_t width, float* gx, float* gw) {
  for (std::int64_t row = 0; row < rows; ++row, x += width, g += width, gx += width) {
    const float scale = rstd[row];
    F16 total = set(0);
    std::int64_t i = 0;
    for (; i + 16 <= width; i += 16) total += load(g + i) * load(w + i) * load(x + i);
    float dot = sum_lanes(total);
    for (; i < width; ++i) dot += load1(g + i) * w[i] * x[i];
    const float pull = dot * scale * scale * scale / static_cast<float>(width);
    for (i = 0; i + 16 <= width; i += 16) {
      const F16 gi = load(g + i), xi = load(x + i);
      store(gx + i, gi * load(w + i) * scale - xi * pull);
      store(gw + i, load(gw + i) + gi * xi * scale);
    }
    for (; i < width; ++i) {
      const float gi = load1(g + i);
      gx[i] = gi * w[i] * scale - x[i] * pull;
      gw[i] += gi * x[i] * scale;
    }
  }
}

template <class T>
INLINE void swiglu_forward(const T* gate_up, std::int64_t rows, std::int64_t width, T* out) {
  for (std::int64_t row = 0; row < rows; ++row, gate_up += 2 * width, out += width) {
    const T* gate = gate_up;
    const T* up = gate_up + width;
    std::int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
      const F16 a = load(gate + i);
      store(out + i, a / (1.0f + exp16(-a)) * load(up + i));
    }
    for (; i < width; ++i) {
      const float a = load1(gate + i);
      store1(out + i, a / (1.0f + exp1(-a)) * load1(up + i));
    }
  }
}

template <class T>
INLINE void swiglu_backward(const T* gate_up, const T* g, std::int64_t rows, std::int64_t width, T* g_gate_up) {
  for (std::int64_t row = 0; row < rows; ++row, gate_up += 2 * width, g += width, g_gate_up += 2 * width) {
    std::int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
      const F16 a = load(gate_up + i), b = load(gate_up + width + i), gi = load(g + i);
      const F16 s = 1.0f / (1.0f + exp16(-a));
      store(g_gate_up + i, gi * b * s * (1.0f + a * (1.0f - s)));
      store(g_gate_up + width + i, gi * a * s);
    }
    for (; i < width; ++i) {
      const float a = load1(gate_up + i), b = load1(gate_up + width + i), gi = load1(g + i);
      const float s = 1.0f / (1.0f + exp1(-a));
      store1(g_gate_up + i, gi * b * s * (1.0f + a * (1.0f - s)));
      store1(g_gate_up + width + i, gi * a * s);
    }
  }
}

template <class T>
INLINE void add_rows(const float* x, const T* delta, std::int64_t count, float* sum) {
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(sum + i, load(x + i) + load(delta + i));
  for (; i < count; ++i) sum[i] = x[i] + load1(delta + i);
}

// ---- losses ------------------------------------------------------------------------------------------------------

template <class T>
INLINE void cross_entropy(T* logits, const std::int64_t* targets, std::int64_t rows, std::int64_t vocab, float scale,
                          float* losses) {
  for (std::int64_t row = 0; row < rows; ++row, logits += vocab) {
    const std::int64_t target = targets[row];
    losses[row] = 0;
    if (target < 0) {
      clear_row(logits, vocab);
      continue;
    }
    const float peak = row_max(logits, vocab);
    const float sum = row_exp_sum(logits, vocab, peak, 1.0f);
    const float lse = peak + std::log(sum);
    losses[row] = lse - load1(logits + target);
    const float hit = (exp1(load1(logits + target) - lse) - 1.0f) * scale;
    std::int64_t i = 0;
    for (; i + 16 <= vocab; i += 16) store(logits + i, exp16(load(logits + i) - lse) * scale);
    for (; i < vocab; ++i) store1(logits + i, exp1(load1(logits + i) - lse) * scale);
    store1(logits + target, hit);
  }
}

template <class T>
INLINE void distill_rows(T* student, T* teacher, const std::int64_t* targets, std::int64_t rows, std::int64_t vocab,
                         float tau, float kl_weight, float ce_weight, float scale, float* kl, float* ce) {
  const float inverse = 1.0f / tau;
  for (std::int64_t row = 0; row < rows; ++row, student += vocab, teacher += vocab) {
    const std::int64_t target = targets[row];
    kl[row] = ce[row] = 0;
    if (target < 0) {
      clear_row(student, vocab);
      continue;
    }
    const float s_peak = row_max(student, vocab), t_peak = row_max(teacher, vocab);
    const float s_lse = s_peak * inverse + std::log(row_exp_sum(student, vocab, s_peak, inverse));
    const float t_lse = t_peak * inverse + std::log(row_exp_sum(teacher, vocab, t_peak, inverse));
    const float hard_lse = s_peak + std::log(row_exp_sum(student, vocab, s_peak, 1.0f));
    ce[row] = hard_lse - load1(student + target);
    // d(tau^2 KL)/dz = tau (softmax(z / tau) - p_teacher)
    const float soft = scale * kl_weight * tau, hard = scale * ce_weight;
    const float hit = hard;
    F16 total = set(0);
    float tail = 0;
    std::int64_t i = 0;
    const float at_target = load1(student + target);
    for (; i + 16 <= vocab; i += 16) {
      const F16 z = load(student + i), log_q = z * inverse - s_lse, log_p = load(teacher + i) * inverse - t_lse;
      const F16 q = exp16(log_q), prob = exp16(log_p);
      total += prob * (log_p - log_q);
      F16 g = (q - prob) * soft;
      if (hard != 0) g += exp16(z - hard_lse) * hard;
      store(student + i, g);
    }
    for (; i < vocab; ++i) {
      const float z = load1(student + i), log_q = z * inverse - s_lse, log_p = load1(teacher + i) * inverse - t_lse;
      const float q = exp1(log_q), prob = exp1(log_p);
      tail += prob * (log_p - log_q);
      store1(student + i, (q - prob) * soft + (hard != 0 ? exp1(z - hard_lse) * hard : 0.0f));
    }
    kl[row] = sum_lanes(total) + tail;
    if (hard != 0) {
      const float z = at_target;
      const float q = exp1(z * inverse - s_lse), prob = exp1(load1(teacher + target) * inverse - t_lse);
      store1(student + target, (q - prob) * soft + exp1(z - hard_lse) * hard - hit);
    }
  }
}

// ---- optimizer ---------------------------------------------------------------------------------------------------

INLINE void adamw(const AdamStep& a, float decay, const std::uint8_t* keep, std::int64_t count, float* w, float* g,
                  float* m, float* v) {
  const float shrink = 1.0f - a.lr * decay, rate = a.lr / a.correction1, root = 1.0f / std::sqrt(a.correction2);
  for (std::int64_t i = 0; i < count; ++i) {
    const float gi = g[i] * a.clip;
    m[i] = a.beta1 * m[i] + (1.0f - a.beta1) * gi;
    v[i] = a.beta2 * v[i] + (1.0f - a.beta2) * gi * gi;
    w[i] = w[i] * shrink - rate * m[i] / (__builtin_sqrtf(v[i]) * root + a.eps);
  }
  if (keep != nullptr)
    for (std::int64_t i = 0; i < count; ++i)
      if (keep[i] == 0) w[i] = 0;
}

INLINE double sum_of_squares(const float* x, std::int64_t count) {
  double sum[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) sum[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
  double total = 0;
  for (int j = 0; j < 8; ++j) total += sum[j];
  for (; i < count; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return total;
}

// ---- one wrapper per instruction set -----------------------------------------------------------------------------

#define PARE_WRAPPERS(isa, attribute)                                                                                  \
  template <class T>                                                                                                   \
  attribute void rms_forward_##isa(const float* x, const float* w, float eps, std::int64_t rows, std::int64_t width,   \
                                   T* out, float* rstd) {                                                              \
    rms_forward<T>(x, w, eps, rows, width, out, rstd);                                                                 \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void rms_backward_##isa(const float* x, const float* w, const float* rstd, const T* g, std::int64_t rows,  \
                                    std::int64_t width, float* gx, float* gw) {                                        \
    rms_backward<T>(x, w, rstd, g, rows, width, gx, gw);                                                               \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void swiglu_forward_##isa(const T* gate_up, std::int64_t rows, std::int64_t width, T* out) {               \
    swiglu_forward<T>(gate_up, rows, width, out);                                                                      \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void swiglu_backward_##isa(const T* gate_up, const T* g, std::int64_t rows, std::int64_t width, T* out) {  \
    swiglu_backward<T>(gate_up, g, rows, width, out);                                                                  \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void add_##isa(const float* x, const T* delta, std::int64_t count, float* sum) {                           \
    add_rows<T>(x, delta, count, sum);                                                                                 \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void attention_forward_##isa(const AttentionShape& s, std::int64_t batch, std::int64_t kv, const T* qkv,   \
                                         const float* cosine, const float* sine, T* mix, float* lse,                   \
                                         float* scratch) {                                                             \
    attention_forward<T>(s, batch, kv, qkv, cosine, sine, mix, lse, scratch);                                          \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void attention_backward_##isa(const AttentionShape& s, std::int64_t batch, std::int64_t kv, const T* qkv,  \
                                          const float* cosine, const float* sine, const T* mix, const float* lse,      \
                                          const T* g_mix, T* g_qkv, float* scratch) {                                  \
    attention_backward<T>(s, batch, kv, qkv, cosine, sine, mix, lse, g_mix, g_qkv, scratch);                           \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void cross_entropy_##isa(T* logits, const std::int64_t* targets, std::int64_t rows, std::int64_t vocab,    \
                                     float scale, float* losses) {                                                     \
    cross_entropy<T>(logits, targets, rows, vocab, scale, losses);                                                     \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void distill_##isa(T* student, T* teacher, const std::int64_t* targets, std::int64_t rows,                 \
                               std::int64_t vocab, float tau, float kl_weight, float ce_weight, float scale,           \
                               float* kl, float* ce) {                                                                 \
    distill_rows<T>(student, teacher, targets, rows, vocab, tau, kl_weight, ce_weight, scale, kl, ce);                 \
  }                                                                                                                    \
  attribute void adamw_##isa(const AdamStep& step, float decay, const std::uint8_t* keep, std::int64_t count,          \
                             float* w, float* g, float* m, float* v) {                                                 \
    adamw(step, decay, keep, count, w, g, m, v);                                                                       \
  }                                                                                                                    \
  attribute double sum_of_squares_##isa(const float* x, std::int64_t count) { return sum_of_squares(x, count); }       \
  template <class T>                                                                                                   \
  RowKernels<T> rows_##isa() {                                                                                         \
    return {rms_forward_##isa<T>,       rms_backward_##isa<T>,       swiglu_forward_##isa<T>, swiglu_backward_##isa<T>, \
            add_##isa<T>,               attention_forward_##isa<T>,  attention_backward_##isa<T>,                      \
            cross_entropy_##isa<T>,     distill_##isa<T>};                                                             \
  }

PARE_WRAPPERS(plain, )
#if defined(__x86_64__)
PARE_WRAPPERS(avx2, __attribute__((target("avx2,fma"))))
PARE_WRAPPERS(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))))
#endif

}  // namespace

template <class T>
const RowKernels<T>& row_kernels() {
  static const RowKernels<T> table = [] {
#if defined(__x86_64__)
    if (instruction_set() == 2) return rows_avx512<T>();
    if (instruction_set() == 1) return rows_avx2<T>();
#endif
    return rows_plain<T>();
  }();
  return table;
}
template const RowKernels<float>& row_kernels<float>();
template const RowKernels<Bf16>& row_kernels<Bf16>();

const OptimizerKernels& optimizer_kernels() {
  static const OptimizerKernels table = [] {
#if defined(__x86_64__)
    if (instruction_set() == 2) return OptimizerKernels{adamw_avx512, sum_of_squares_avx512};
    if (instruction_set() == 1) return OptimizerKernels{adamw_avx2, sum_of_squares_avx2};
#endif
    return OptimizerKernels{adamw_plain, sum_of_squares_plain};
  }();
  return table;
}

}  // namespace pare
