// The decoder in LibTorch, built from ModelConfig alone. Include only from .cpp files (LibTorch headers).
#pragma once

#include <torch/torch.h>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "core/config.h"
#include "model/block_stage.h"
#include "model/losses.h"

namespace pare {

// cos/sin tables [positions, rotated pairs] in float32, one pair for each RopeKind that the model has.
struct RopeTables {
  torch::Tensor cos, sin;                  // RopeKind::kGlobal
  torch::Tensor local_cos{}, local_sin{};  // RopeKind::kLocal
  torch::Tensor still_cos{}, still_sin{};  // RopeKind::kNone: 1 and 0
  torch::Tensor starts{};  // of packed_rope: AttentionForm::starts
};
// Of sequences of this length: where LongRoPE switches, tables of one side do not serve the other (rope_beyond).
RopeTables rope_tables(const ModelConfig& config, std::int64_t positions, const torch::Device& device);
// Of sequences that hold several documents: starts [batch, n] as Batch has them. Tables [batch, n, pairs], in which
// positions count from the beginning of the document, which also bounds what attention sees.
RopeTables packed_rope(const RopeTables& tables, const torch::Tensor& starts);

// One decoder block. Parameter names are the Hugging Face names inside the block: "self_attn.q_proj.weight", ...
class DecoderBlockImpl : public torch::nn::Module {
 public:
  // experts = false: their weights are [0, 0] until load_expert.
  DecoderBlockImpl(const ModelConfig& config, int layer, bool experts = true);
  // hidden [batch, positions, hidden_size] -> same shape; causal over positions 0..n-1.
  torch::Tensor forward(const torch::Tensor& hidden, const RopeTables& rope);

  // The sub-stages of forward, for calibration: each linear sees exactly these inputs. With experts mlp_mix and
  // mlp_output do not exist: expert_output is both.
  torch::Tensor attention_input(const torch::Tensor& hidden);                            // input_layernorm(hidden): q, k, v
  torch::Tensor attention_mix(const torch::Tensor& normed, const RopeTables& rope);      // softmax(q k) v, input of o_proj
  torch::Tensor attention_output(const torch::Tensor& hidden, const torch::Tensor& mix); // hidden + o_proj(mix)
  // post_attention_layernorm: gate, up. `hidden` is attention's output, or with parallel residuals the block's input.
  torch::Tensor mlp_input(const torch::Tensor& hidden);
  torch::Tensor mlp_mix(const torch::Tensor& normed);                                    // act(gate) * up, input of down_proj
  torch::Tensor mlp_output(const torch::Tensor& hidden, const torch::Tensor& mix);       // hidden + down_proj(mix)

  bool has_experts() const { return !experts_.empty(); }
  bool parallel_residual() const { return config_.parallel_residual; }
  torch::Tensor expert_output(const torch::Tensor& hidden,
                              const torch::Tensor& normed);  // hidden + chosen experts(normed)
  // What each token's output of each expert is multiplied by [tokens, experts]; 0 where the expert is not chosen.
  torch::Tensor expert_shares(const torch::Tensor& normed);
  torch::Tensor expert_mix(const torch::Tensor& rows, std::int64_t expert);  // act(gate) * up of rows [n, hidden_size]
  // sum [tokens, hidden_size] + what this expert adds for the tokens that chose it; all of them added to hidden are
  // expert_output.
  torch::Tensor add_expert(const torch::Tensor& sum, const torch::Tensor& normed, const torch::Tensor& shares,
                           std::int64_t expert);

  torch::Tensor weight(const std::string& module) const;  // "self_attn.q_proj" -> the parameter itself
  // Sees what the linears that share an input give [.., out], joined, as nodes of the graph; those of experts not. Called
  // on the thread that runs forward.
  using Observer = std::function<void(BlockStage stage, const torch::Tensor& output)>;
  void set_observer(Observer observer) { observer_ = std::move(observer); }
  bool is_observed() const { return static_cast<bool>(observer_); }
  // From now on this linear multiplies with inputs rounded to int8, one scale per token (codecs with int8_inputs).
  void round_inputs(const std::string& module) { rounded_.insert(module); }
  // From now on this linear adds scale * (x A^T) B^T: a [rank, in], b [out, rank]. Undefined ones take it away again.
  void adapt(const std::string& module, const torch::Tensor& a, const torch::Tensor& b, double scale);
  int layer() const { return layer_; }

  // What products are computed in: kFloat (default) or kBFloat16 (inputs rounded, sums in float32; for training speed).
  // A module in float64 ignores it.
  void set_matmul_dtype(torch::ScalarType dtype) { matmul_dtype_ = dtype; }

 private:
  struct Linear {
    torch::Tensor weight, bias;  // bias undefined when absent
    std::string module = {};
    torch::Tensor a = {}, b = {};  // see adapt
    double scale = 0;
  };
  struct Expert {
    Linear gate, up, down;
  };
  struct Norm {
    torch::Tensor weight, bias;  // no bias: RMSNorm
  };
  Linear add_linear(const std::string& module, std::int64_t out, std::int64_t in, bool bias);
  torch::Tensor add_weight(const std::string& module, std::int64_t out, std::int64_t in);
  torch::Tensor multiply(const torch::Tensor& x, const Linear& linear);
  Norm add_norm(const std::string& module, std::int64_t width, bool bias);
  torch::Tensor norm(const torch::Tensor& x, const Norm& norm);  // -> the products' dtype
  torch::Tensor project_packed(const torch::Tensor& x, const std::vector<Linear>& parts);
  torch::Tensor activated(const torch::Tensor& gate_up);  // up alone where there is no gate
  torch::Tensor add(const torch::Tensor& hidden, const torch::Tensor& delta, const Norm& post_norm);
  torch::ScalarType matmul_dtype() const;
  const torch::Tensor& observed(BlockStage stage, const torch::Tensor& output) const;
  const ModelConfig config_;
  int layer_;
  torch::ScalarType matmul_dtype_ = torch::kFloat;
  std::vector<Linear> qkv_, gate_up_;  // the separate ones, or one fused, or up alone
  Linear o_, down_;
  Norm attention_norm_, mlp_norm_, q_norm_, k_norm_, post_attention_norm_, post_mlp_norm_;  // or undefined
  torch::Tensor router_;
  std::vector<Expert> experts_;
  std::map<std::string, torch::Tensor> modules_;  // weights by module name
  Observer observer_;
  std::set<std::string, std::less<>> rounded_;    // modules whose inputs are rounded
};
TORCH_MODULE(DecoderBlock);

// The whole decoder. Parameters carry their full Hugging Face names ("model.layers.0.mlp.up_proj.weight").
class DecoderImpl : public torch::nn::Module {
 public:
  explicit DecoderImpl(ModelConfig config);
  const ModelConfig& config() const { return config_; }
  // [batch, n] int64 -> final-normed hidden [batch, n, hidden]. starts: several documents in a sequence, each as if it
  // were alone (Batch::starts). Exit 3 where LongRoPE's switch lies inside the sequence: documents would need two tables.
  torch::Tensor hidden(const torch::Tensor& ids, const torch::Tensor& starts = {});
  torch::Tensor head_logits(const torch::Tensor& hidden);      // [.., hidden] -> [.., vocab], capped where the model is
  torch::Tensor forward(const torch::Tensor& ids) { return head_logits(hidden(ids)); }
  // [batch, n] -> [batch, n, hidden]. Exit 3 where n is more than the learned positions.
  torch::Tensor embed(const torch::Tensor& ids, const torch::Tensor& starts = {});
  torch::Tensor final_norm(const torch::Tensor& hidden);
  torch::Tensor head_weight() const;                           // embedding when tied
  OutputHead output_head() const { return {head_weight(), config_.final_softcap}; }
  DecoderBlock block(int layer) const { return blocks_[static_cast<std::size_t>(layer)]; }
  // The block's forward, in which only its input is kept for the gradient where recompute_blocks says so.
  torch::Tensor through_block(int layer, const torch::Tensor& hidden, const RopeTables& rope);
  // Activation checkpointing (Chen et al. 2016): where gradients are taken, what lies inside a block is computed again on
  // the way back; the same gradients, bit for bit. Such a gradient can be taken once, by Tensor::backward.
  void recompute_blocks(bool on) { recompute_ = on; }
  torch::Tensor& tensor(const std::string& hf_name);           // a parameter by its checkpoint name
  void round_head_inputs() { round_head_ = true; }             // see DecoderBlockImpl::round_inputs; not if tied
  void set_matmul_dtype(torch::ScalarType dtype);              // see DecoderBlockImpl; hidden() returns this dtype
  const RopeTables& rope(std::int64_t positions);              // kept and grown on demand, on the module's device
  RopeTables rope(std::int64_t positions, const torch::Tensor& starts);  // packed where starts are defined

 private:
  ModelConfig config_;
  torch::ScalarType matmul_dtype_ = torch::kFloat;
  bool round_head_ = false, recompute_ = false;
  RopeTables rope_;
  bool rope_beyond_ = false;  // which side of LongRoPE's switch rope_ is for
  std::map<std::string, torch::Tensor> by_name_;
  torch::Tensor embed_, positions_, norm_, norm_bias_, lm_head_;
  std::vector<DecoderBlock> blocks_;
};
TORCH_MODULE(Decoder);

// Normal(0, 0.02) as the Llama family does (norms 1, biases 0), from the seed alone.
void initialize(Decoder& decoder, std::uint64_t seed);

// Float32 module from a checkpoint (codes are unpacked), every tensor used exactly once. float_inputs: as if no codec
// rounded the inputs of its linear.
Decoder load_decoder(const Checkpoint& checkpoint, const torch::Device& device, bool float_inputs = false);
// One block only: bounded memory for the block walk. experts = false: without their weights, which load_expert puts in
// and drop_expert takes out.
DecoderBlock load_block(const Checkpoint& checkpoint, int layer, const torch::Device& device, bool experts = true);
void load_expert(const Checkpoint& checkpoint, DecoderBlock& block, std::int64_t expert, const torch::Device& device);
void drop_expert(DecoderBlock& block, const ModelConfig& config, std::int64_t expert);
// x as w8a8 reads it: per row of the last dimension round(x * (127 / max|x|)) * (max|x| / 127), ties to even; a row
// with a value that is not finite is NaN. Gradients pass straight through.
torch::Tensor round_tokens(const torch::Tensor& x);
// What RMSNorm multiplies by: the weight, or 1 + weight.
torch::Tensor norm_factor(const ModelConfig& config, const torch::Tensor& weight);
// The model's norm over the last dimension of x: RMSNorm, or with a bias LayerNorm. -> `out` dtype.
torch::Tensor apply_norm(const ModelConfig& config, const torch::Tensor& x, const torch::Tensor& weight,
                         const torch::Tensor& bias, torch::ScalarType out);
torch::Tensor load_tensor(const Checkpoint& checkpoint, const std::string& name, const torch::Device& device);
// Writes a model folder (transaction). `like`: copy tokenizer and side files from there; dtype of the floats.
void save_decoder(Decoder& decoder, const std::string& dtype, const fs::path& like, const fs::path& out);
// The same into a folder that already exists, such as the work folder of a transaction the caller commits.
void write_decoder(Decoder& decoder, const std::string& dtype, const fs::path& like, const fs::path& folder);

// "cpu", "cuda", "cuda:1"; exit 5 when LibTorch has no such device.
torch::Device parse_device(const std::string& name);

}  // namespace pare
