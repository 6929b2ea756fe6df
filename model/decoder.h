// The Llama-style decoder in LibTorch, built from ModelConfig alone. Include only from .cpp files (LibTorch headers).
#pragma once

#include <torch/torch.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "core/config.h"

namespace pare {

// cos/sin tables [positions, head_dim / 2] in float32.
struct RopeTables {
  torch::Tensor cos, sin;
};
RopeTables rope_tables(const ModelConfig& config, std::int64_t positions, const torch::Device& device);

// One decoder block. Parameter names are the Hugging Face names inside the block: "self_attn.q_proj.weight", ...
class DecoderBlockImpl : public torch::nn::Module {
 public:
  DecoderBlockImpl(const ModelConfig& config, int layer);
  // hidden [batch, positions, hidden_size] -> same shape; causal over positions 0..n-1.
  torch::Tensor forward(const torch::Tensor& hidden, const RopeTables& rope);

  // The sub-stages of forward, for calibration: each linear sees exactly these inputs.
  torch::Tensor attention_input(const torch::Tensor& hidden);                            // input_layernorm(hidden): q, k, v
  torch::Tensor attention_mix(const torch::Tensor& normed, const RopeTables& rope);      // softmax(q k) v, input of o_proj
  torch::Tensor attention_output(const torch::Tensor& hidden, const torch::Tensor& mix); // hidden + o_proj(mix)
  torch::Tensor mlp_input(const torch::Tensor& hidden);                                  // post_attention_layernorm: gate, up
  torch::Tensor mlp_mix(const torch::Tensor& normed);                                    // act(gate) * up, input of down_proj
  torch::Tensor mlp_output(const torch::Tensor& hidden, const torch::Tensor& mix);       // hidden + down_proj(mix)

  torch::Tensor weight(const std::string& module) const;  // "self_attn.q_proj" -> the parameter itself
  int layer() const { return layer_; }

  // What products are computed in: kFloat (default) or kBFloat16 (inputs rounded, sums in float32; for training speed).
  // A module in float64 ignores it.
  void set_matmul_dtype(torch::ScalarType dtype) { matmul_dtype_ = dtype; }

 private:
  torch::ScalarType matmul_dtype() const;
  const ModelConfig config_;
  int layer_;
  torch::ScalarType matmul_dtype_ = torch::kFloat;
  torch::Tensor q_, k_, v_, o_, gate_, up_, down_, norm1_, norm2_;
  torch::Tensor q_bias_, k_bias_, v_bias_, o_bias_, gate_bias_, up_bias_, down_bias_;  // undefined when absent
};
TORCH_MODULE(DecoderBlock);

// The whole decoder. Parameters carry their full Hugging Face names ("model.layers.0.mlp.up_proj.weight").
class DecoderImpl : public torch::nn::Module {
 public:
  explicit DecoderImpl(ModelConfig config);
  const ModelConfig& config() const { return config_; }
  torch::Tensor hidden(const torch::Tensor& ids);              // [batch, n] int64 -> final-normed hidden [batch, n, hidden]
  torch::Tensor head_logits(const torch::Tensor& hidden);      // [.., hidden] -> [.., vocab]
  torch::Tensor forward(const torch::Tensor& ids) { return head_logits(hidden(ids)); }
  torch::Tensor embed(const torch::Tensor& ids);               // [batch, n] -> [batch, n, hidden]
  torch::Tensor final_norm(const torch::Tensor& hidden);
  torch::Tensor head_weight() const;                           // embedding when tied
  DecoderBlock block(int layer) const { return blocks_[static_cast<std::size_t>(layer)]; }
  torch::Tensor& tensor(const std::string& hf_name);           // a parameter by its checkpoint name
  void set_matmul_dtype(torch::ScalarType dtype);              // see DecoderBlockImpl; hidden() returns this dtype
  const RopeTables& rope(std::int64_t positions);              // kept and grown on demand, on the module's device

 private:
  ModelConfig config_;
  torch::ScalarType matmul_dtype_ = torch::kFloat;
  RopeTables rope_;
  std::map<std::string, torch::Tensor> by_name_;
  torch::Tensor embed_, norm_, lm_head_;
  std::vector<DecoderBlock> blocks_;
};
TORCH_MODULE(Decoder);

// Normal(0, 0.02) as the Llama family does (norms 1, biases 0), from the seed alone.
void initialize(Decoder& decoder, std::uint64_t seed);

// Float32 module from a checkpoint (codes are unpacked), every tensor used exactly once.
Decoder load_decoder(const Checkpoint& checkpoint, const torch::Device& device);
// One block only: bounded memory for the block walk.
DecoderBlock load_block(const Checkpoint& checkpoint, int layer, const torch::Device& device);
torch::Tensor load_tensor(const Checkpoint& checkpoint, const std::string& name, const torch::Device& device);
// Writes a model folder (transaction). `like`: copy tokenizer and side files from there; dtype of the floats.
void save_decoder(Decoder& decoder, const std::string& dtype, const fs::path& like, const fs::path& out);
// The same into a folder that already exists, such as the work folder of a transaction the caller commits.
void write_decoder(Decoder& decoder, const std::string& dtype, const fs::path& like, const fs::path& folder);

// "cpu", "cuda", "cuda:1"; exit 5 when LibTorch has no such device.
torch::Device parse_device(const std::string& name);

}  // namespace pare
