#include "core/shapes.h"

#include <algorithm>
#include <cctype>

namespace pare {
namespace {

constexpr PublishedShape kShapes[] = {
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
    {"Gemma-3-270M", "google/gemma-3-270m", R"({
      "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640,
      "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1,
      "head_dim": 256, "query_pre_attn_scalar": 256, "max_position_embeddings": 32768, "sliding_window": 512,
      "_sliding_window_pattern": 6, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
      "rope_scaling": null, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": false,
      "attn_logit_softcapping": null, "final_logit_softcapping": null, "tie_word_embeddings": true,
      "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0})"},
    {"Gemma-3-1B", "google/gemma-3-1b-pt", R"({
      "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152,
      "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
      "head_dim": 256, "query_pre_attn_scalar": 256, "max_position_embeddings": 32768, "sliding_window": 512,
      "_sliding_window_pattern": 6, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
      "rope_scaling": null, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": false,
      "attn_logit_softcapping": null, "final_logit_softcapping": null, "tie_word_embeddings": true,
      "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0})"},
    {"Phi-3-mini", "microsoft/Phi-3-mini-4k-instruct", R"({
      "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072,
      "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
      "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "sliding_window": 2047,
      "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "rope_scaling": null, "hidden_act": "silu",
      "attention_bias": false, "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 32000,
      "pad_token_id": 32000})"},
    {"Mistral-7B", "mistralai/Mistral-7B-v0.1", R"({
      "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
      "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
      "max_position_embeddings": 32768, "sliding_window": 4096, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
      "hidden_act": "silu", "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2})"},
    {"Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1", R"({
      "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096,
      "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
      "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768, "sliding_window": null,
      "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "hidden_act": "silu", "tie_word_embeddings": false,
      "bos_token_id": 1, "eos_token_id": 2})"},
    {"GPT-2", "openai-community/gpt2", R"({
      "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12,
      "n_head": 12, "n_positions": 1024, "n_ctx": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05,
      "initializer_range": 0.02, "bos_token_id": 50256, "eos_token_id": 50256})"},
    {"Pythia-160M", "EleutherAI/pythia-160m", R"({
      "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 768,
      "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 2048,
      "hidden_act": "gelu", "layer_norm_eps": 1e-05, "rotary_pct": 0.25, "rotary_emb_base": 10000,
      "use_parallel_residual": true, "initializer_range": 0.02, "tie_word_embeddings": false, "bos_token_id": 0,
      "eos_token_id": 0})"},
};

}  // namespace

std::span<const PublishedShape> shapes() { return kShapes; }

const PublishedShape* find_shape(std::string_view name) {
  const auto same = [](char a, char b) {
    return std::tolower(static_cast<unsigned char>(a)) == std::tolower(static_cast<unsigned char>(b));
  };
  for (const PublishedShape& shape : kShapes) {
    const std::string_view known = shape.name;
    if (std::equal(known.begin(), known.end(), name.begin(), name.end(), same)) return &shape;
  }
  return nullptr;
}

}  // namespace pare
