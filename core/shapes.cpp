#include "core/shapes.h"

#include <algorithm>
#include <cctype>

namespace pare {
namespace {

constexpr Shape kShapes[] = {
    {"SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M", R"({
      "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
      "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
      "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000, "rope_scaling": null,
      "hidden_act": "silu", "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": true,
      "bos_token_id": 0, "eos_token_id": 0})"},
    {"SmolLM2-360M", "HuggingFaceTB/SmolLM2-360M", R"({
      "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 960,
      "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5,
      "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000, "rope_scaling": null,
      "hidden_act": "silu", "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": true,
      "bos_token_id": 0, "eos_token_id": 0})"},
    {"SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-1.7B", R"({
      "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 2048,
      "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32,
      "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 130000, "rope_scaling": null,
      "hidden_act": "silu", "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": true,
      "bos_token_id": 0, "eos_token_id": 0})"},
    {"Llama-3.2-1B", "meta-llama/Llama-3.2-1B", R"({
      "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
      "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
      "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
      "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 8192},
      "hidden_act": "silu", "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": true,
      "bos_token_id": 128000, "eos_token_id": 128001})"},
    {"Llama-3.1-8B", "meta-llama/Llama-3.1-8B", R"({
      "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
      "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
      "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
      "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 8192},
      "hidden_act": "silu", "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": false,
      "bos_token_id": 128000, "eos_token_id": 128001})"},
    {"Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", R"({
      "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
      "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
      "max_position_embeddings": 32768, "max_window_layers": 24, "sliding_window": 32768, "use_sliding_window": false,
      "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "hidden_act": "silu", "tie_word_embeddings": true,
      "bos_token_id": 151643, "eos_token_id": 151643})"},
    {"Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B", R"({
      "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536,
      "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
      "max_position_embeddings": 131072, "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": false,
      "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "hidden_act": "silu", "tie_word_embeddings": true,
      "bos_token_id": 151643, "eos_token_id": 151643})"},
    {"DeepSeek-R1-Distill-Qwen-1.5B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", R"({
      "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536,
      "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
      "max_position_embeddings": 131072, "max_window_layers": 21, "sliding_window": 4096, "use_sliding_window": false,
      "rms_norm_eps": 1e-06, "rope_theta": 10000, "hidden_act": "silu", "tie_word_embeddings": false,
      "bos_token_id": 151646, "eos_token_id": 151643})"},
};

}  // namespace

std::span<const Shape> shapes() { return kShapes; }

const Shape* find_shape(std::string_view name) {
  const auto same = [](char a, char b) {
    return std::tolower(static_cast<unsigned char>(a)) == std::tolower(static_cast<unsigned char>(b));
  };
  for (const Shape& shape : kShapes) {
    const std::string_view known = shape.name;
    if (std::equal(known.begin(), known.end(), name.begin(), name.end(), same)) return &shape;
  }
  return nullptr;
}

}  // namespace pare
