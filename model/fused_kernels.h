// Row and head kernels of the training path: plain loops over memory, chosen once per process for this CPU.
// T is the storage of activations: float, or Bf16 (the upper half of a float). All arithmetic is float32.
#pragma once

#include <cstdint>

namespace pare {

struct Bf16 {
  std::uint16_t bits;
};

// Geometry of one attention call. qkv rows are [q heads | k heads | v heads] x head_dim; row b * positions + t.
struct AttentionShape {
  std::int64_t positions = 0, heads = 0, kv_heads = 0, head_dim = 0;
  std::int64_t rotary = 0;  // leading dimensions of a head that rotate
  std::int64_t window = 0;  // position i sees j with i - j < window; 0: everything before it
  float scale = 1;          // of the scores
  float softcap = 0;        // > 0: scores become softcap * tanh(score / softcap)
  const std::int64_t* starts = nullptr;  // [batch, positions]: position i sees j >= starts[i]; they rise
  std::int64_t table_rows = 0;           // rows of cosine and sine from one sequence to the next; 0: all share them
  // The first position that `row` sees; of rows beyond the last, as the last one.
  std::int64_t first_seen(std::int64_t batch, std::int64_t row) const {
    std::int64_t seen = window > 0 && row >= window ? row - window + 1 : 0;
    if (starts != nullptr) {
      const std::int64_t own = starts[batch * positions + (row < positions ? row : positions - 1)];
      seen = own > seen ? own : seen;
    }
    return seen;
  }
  std::int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
  std::int64_t padded_positions() const { return (positions + 31) / 32 * 32; }
  std::int64_t padded_dim() const { return (head_dim + 31) / 32 * 32; }
  // Floats of scratch that one call of attention_forward / attention_backward needs.
  std::int64_t forward_scratch() const { return padded_positions() * (3 * padded_dim() + 8) + 8 * padded_dim(); }
  std::int64_t backward_scratch() const { return padded_positions() * (8 * padded_dim() + 16) + 16 * padded_dim(); }
};

struct AdamStep {
  float lr = 0, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f;
  float correction1 = 1, correction2 = 1;  // 1 - beta^t
  float clip = 1;                          // factor on the gradient
};

template <class T>
struct RowKernels {
  // out = x * rstd * w; rstd [rows] is kept for the gradient.
  void (*rms_forward)(const float* x, const float* w, float eps, std::int64_t rows, std::int64_t width, T* out,
                      float* rstd);
  // gx = d/dx; gw [width] is added to.
  void (*rms_backward)(const float* x, const float* w, const float* rstd, const T* g, std::int64_t rows,
                       std::int64_t width, float* gx, float* gw);
  // gate_up [rows, 2 * width] -> silu(gate) * up [rows, width].
  void (*swiglu_forward)(const T* gate_up, std::int64_t rows, std::int64_t width, T* out);
  void (*swiglu_backward)(const T* gate_up, const T* g, std::int64_t rows, std::int64_t width, T* g_gate_up);
  // sum = x + delta.
  void (*add)(const float* x, const T* delta, std::int64_t count, float* sum);
  // Causal attention with rotary positions of kv head `kv` of sequence `batch` and of the query heads that share it.
  // cosine, sine [positions, rotary / 2]; mix [rows, heads * head_dim]; lse [batch, heads, positions].
  void (*attention_forward)(const AttentionShape& shape, std::int64_t batch, std::int64_t kv, const T* qkv,
                            const float* cosine, const float* sine, T* mix, float* lse, float* scratch);
  void (*attention_backward)(const AttentionShape& shape, std::int64_t batch, std::int64_t kv, const T* qkv,
                             const float* cosine, const float* sine, const T* mix, const float* lse, const T* g_mix,
                             T* g_qkv, float* scratch);
  // logits [rows, vocab] become scale * d(-log p[target])/d(logits); rows with target < 0 become 0. losses [rows].
  void (*cross_entropy)(T* logits, const std::int64_t* targets, std::int64_t rows, std::int64_t vocab, float scale,
                        float* losses);
  // student [rows, vocab] becomes scale * d/d(student) of  kl_weight * tau^2 * KL(p_teacher^(1/tau) || p_student^(1/tau))
  // + ce_weight * CE(target). teacher is overwritten. Rows with target < 0 become 0 (and count nothing).
  void (*distill)(T* student, T* teacher, const std::int64_t* targets, std::int64_t rows, std::int64_t vocab,
                  float tau, float kl_weight, float ce_weight, float scale, float* kl, float* ce);
};

template <class T>
const RowKernels<T>& row_kernels();

struct OptimizerKernels {
  // AdamW with decoupled decay (lr * decay); kept zeros: where keep != nullptr and keep[i] == 0 the weight stays 0.
  void (*adamw)(const AdamStep& step, float decay, const std::uint8_t* keep, std::int64_t count, float* w, float* g,
                float* m, float* v);
  double (*sum_of_squares)(const float* x, std::int64_t count);
};
const OptimizerKernels& optimizer_kernels();

}  // namespace pare
