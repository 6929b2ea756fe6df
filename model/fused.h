// The operations of a decoder step as single differentiable functions. On the CPU in float32 or bfloat16 they run
// our own kernels; on any other device or dtype (float64 above all: the reference of the tests) they are composed of
// ordinary LibTorch operations. Include only from .cpp files (LibTorch headers).
#pragma once

#include <torch/torch.h>

namespace pare {

// What products are computed in. kFloat: everything float32. kBFloat16: the inputs of every product are rounded to
// bfloat16 and sums kept in float32; weights, residual stream, norms, softmax, loss and optimizer stay float32.
using MatmulDtype = torch::ScalarType;

// x [.., width] float (or double), weight [width] -> `out` dtype.
torch::Tensor rms_norm(const torch::Tensor& x, const torch::Tensor& weight, double eps, MatmulDtype out);

// x [.., in] (already in the product's dtype) times weight [out, in]^T plus bias (may be undefined).
torch::Tensor project(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias);

// out [rows, outputs], whose lines may stand apart, becomes x [rows, in] times weight [out, in]^T, without gradients.
void project_into(torch::Tensor out, const torch::Tensor& x, const torch::Tensor& weight);

// gate_up [.., 2 width], gate first -> silu(gate) * up [.., width].
torch::Tensor swiglu(const torch::Tensor& gate_up);
// The same with the tanh form of GELU.
torch::Tensor gelu_gated(const torch::Tensor& gate_up);

// x float + delta (float or the product's dtype) -> x's dtype.
torch::Tensor residual_add(const torch::Tensor& x, const torch::Tensor& delta);

// What attention does besides the plain causal softmax(q k / sqrt(head_dim)) v.
struct AttentionForm {
  double scale = 0;         // of the scores; 0: 1 / sqrt(head_dim)
  double softcap = 0;       // > 0: scores become softcap * tanh(score / softcap)
  std::int64_t window = 0;  // > 0: position i sees j with i - j < window
  torch::Tensor starts = {};  // [batch, positions] int64, rising along a row: position i sees j >= starts[i]; or undefined
};

// qkv [batch, positions, (heads + 2 kv_heads) * head_dim], rows ordered q | k | v; cosine, sine [>= positions, pairs]:
// of each q and k head the dimensions j and j + pairs turn together (j < pairs), those from 2 * pairs on stay. They may
// be [batch, positions, pairs] too: of each row its own.
// -> [batch, positions, heads * head_dim].
torch::Tensor rope_attention(const torch::Tensor& qkv, const torch::Tensor& cosine, const torch::Tensor& sine,
                             std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
                             const AttentionForm& form = {});

// Sum of squares over fixed chunks, added in order: the same bits at any thread count.
double sum_of_squares(const torch::Tensor& flat);

// Sets the thread count of LibTorch and its BLAS (0: as it is) and flushes denormal numbers to zero on each thread.
void prepare_threads(int threads);

// prepare_threads while it lives: a later stage in this process computes as it would in a process of its own.
class PreparedThreads {
 public:
  explicit PreparedThreads(int threads);
  ~PreparedThreads();
  PreparedThreads(const PreparedThreads&) = delete;
  PreparedThreads& operator=(const PreparedThreads&) = delete;

 private:
  int torch_before_, blas_before_;
};

}  // namespace pare
