// Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): y = W x + alpha / rank * B (A x), W frozen, A and B trained.
// Include only from .cpp files (LibTorch headers).
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/file.h"
#include "model/decoder.h"

namespace pare {

struct LoraSettings {
  std::int64_t rank = 16;
  double alpha = 32;
  std::vector<std::string> targets = {};  // "q_proj", or "self_attn.q_proj"; empty: every linear of every block
};

class Lora {
 public:
  // Attaches an adapter to each target: A [rank, in] uniform within 1 / sqrt(in), as PEFT begins, from the seed alone;
  // B [out, rank] zero, so that nothing changes before the first step. Errors: exit 2 for a target that is no linear of
  // this model, naming those it has.
  Lora(Decoder decoder, const LoraSettings& settings, std::uint64_t seed, const torch::Device& device);
  const std::vector<torch::Tensor>& parameters() const { return parameters_; }  // A, B, A, B, .. float32, with gradient
  std::int64_t linears() const { return static_cast<std::int64_t>(places_.size()); }
  std::int64_t parameter_count() const;
  // The target with the largest share of exact zeros, and that share: what merging would fill.
  std::pair<std::string, double> most_zeros() const;
  // W += alpha / rank * B A in float32, of every target; the adapters are taken off the decoder.
  void merge();

 private:
  struct Place {
    int layer = 0;
    std::string module, tensor;  // "mlp.up_proj", "model.layers.0.mlp.up_proj.weight"
  };
  friend void write_peft_adapter(const Lora& lora, const fs::path& folder, const std::string& base_model);
  Decoder decoder_;
  LoraSettings settings_;
  std::vector<Place> places_;
  std::vector<torch::Tensor> parameters_;
};

// Whether PEFT would find these modules: transformers has them under the same names, one Linear each. Else exit 2.
void check_peft_names(const ModelConfig& config);
// adapter_config.json and adapter_model.safetensors as PEFT loads them, into an existing folder.
void write_peft_adapter(const Lora& lora, const fs::path& folder, const std::string& base_model);

}  // namespace pare
