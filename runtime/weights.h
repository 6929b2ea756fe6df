// The weights of a compact file as the forward pass takes them: views into the mapped file.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/compact.h"
#include "runtime/kernels.h"

namespace pare {

// 64-byte aligned floats, grown without keeping the content.
class FloatBuffer {
 public:
  float* data() { return data_.get(); }
  const float* data() const { return data_.get(); }
  void reserve(std::int64_t count);
  std::int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(float* p) const;
  };
  std::unique_ptr<float[], Free> data_;
  std::int64_t size_ = 0;
};

struct LinearWeights {
  PackedMatrix matrix;
  const float* bias = nullptr;
};

struct MlpWeights {
  LinearWeights gate, up, down;  // without a gate: up and down alone
};

// What RMSNorm multiplies by; with a bias: LayerNorm. Without a weight: no norm.
struct NormWeights {
  const float *weight = nullptr, *bias = nullptr;
};

// Fused tensors of the file are views on their parts here. Null: the model has none.
struct BlockWeights {
  LinearWeights q, k, v, o;
  MlpWeights mlp;        // or
  LinearWeights router;  // [experts, hidden]
  std::vector<MlpWeights> experts;
  NormWeights attention_norm, mlp_norm, post_attention_norm, post_mlp_norm;
  const float *q_norm = nullptr, *k_norm = nullptr;
};

// The file must outlive them.
struct Weights {
  PackedMatrix embedding, head;
  PackedMatrix positions;  // learned ones: [max_position_embeddings, hidden]
  std::vector<BlockWeights> blocks;
  NormWeights final_norm;
  std::vector<FloatBuffer> owned;  // 1 + weight, where norms are kept that way
};
// Errors: exit 3 for a tensor that is missing, mis-shaped or in a codec that its role does not allow.
Weights view_weights(const CompactFile& file);

}  // namespace pare
