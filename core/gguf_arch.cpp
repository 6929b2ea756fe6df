#include "core/gguf_arch.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "core/error.h"

namespace pare {
namespace {

constexpr const char* kOwnWidths = "deci";

constexpr GgufArchitecture kArchitectures[] = {
    {.family = "llama",
     .name = "llama",
     .neighbours = true,
     .llama3_rope = true,
     .long_rope = true,
     .o_bias = true,
     .mlp_bias = true},
    {.family = "mistral", .name = "llama", .neighbours = true, .llama3_rope = true, .long_rope = true},
    {.family = "mixtral", .name = "llama", .neighbours = true, .llama3_rope = true, .long_rope = true},
    // Llama's blocks, each with widths of its own.
    {.family = "llama", .name = kOwnWidths, .neighbours = true, .llama3_rope = true, .o_bias = true, .mlp_bias = true},
    {.family = "mistral", .name = kOwnWidths, .neighbours = true, .llama3_rope = true},
    {.family = "qwen2", .name = "qwen2", .free_heads = false},
    {.family = "qwen3", .name = "qwen3"},
    {.family = "qwen3_moe", .name = "qwen3moe"},
    {.family = "gemma", .name = "gemma", .untied = false},
    {.family = "gemma2", .name = "gemma2", .slides = true, .untied = false},
    {.family = "gemma3_text", .name = "gemma3", .slides = true},
    {.family = "phi3", .name = "phi3", .free_heads = false, .long_rope = true},
    {.family = "smollm3", .name = "smollm3", .neighbours = true},
    {.family = "gpt2", .name = "gpt2", .free_heads = false, .joined_qkv = true, .o_bias = true, .mlp_bias = true},
    {.family = "gpt_neox",
     .name = "gptneox",
     .free_heads = false,
     .joined_qkv = true,
     .o_bias = true,
     .mlp_bias = true,
     .tied = false}};

constexpr std::int64_t kNoRopeStep = 4;  // of smollm3, written into llama.cpp

// il % p < p - 1 slides; 0: all do. nullopt: no period gives these blocks.
std::optional<std::int64_t> sliding_period(const ModelConfig& config, std::int64_t usual) {
  const auto holds = [&](std::int64_t period) {
    for (int layer = 0; layer < config.num_layers; ++layer)
      if (config.slides(layer) != (period == 0 || layer % period < period - 1)) return false;
    return true;
  };
  if (holds(usual)) return usual;
  for (std::int64_t period = 0; period <= config.num_layers; ++period)
    if (holds(period)) return period;
  return std::nullopt;
}

std::int64_t usual_period(const GgufArchitecture& arch) {
  return std::string_view(arch.name) == "gemma2" ? 2 : 6;
}

bool any_slides(const ModelConfig& config) {
  return config.sliding_window > 0 &&
         std::find(config.layer_slides.begin(), config.layer_slides.end(), 1) != config.layer_slides.end();
}

void check(const ModelConfig& config, const GgufArchitecture& arch, const std::string& place) {
  std::string problems;
  const auto refuse = [&](const std::string& text) { problems += (problems.empty() ? "" : "; ") + text; };
  const std::string_view name = arch.name;
  if (!arch.free_heads && config.num_heads * config.head_dim != config.hidden_size)
    refuse("heads x head_dim is " + std::to_string(config.num_heads * config.head_dim) +
           ", which has to be hidden_size " + std::to_string(config.hidden_size));
  if (config.rope_llama3 && !arch.llama3_rope) refuse("llama3 scaling of rotary positions is not computed");
  if (config.rope_long && !arch.long_rope) refuse("LongRoPE is not computed");
  if (config.rotary_dim > 0 && name != "phi3" && name != "gptneox") refuse("all dimensions of a head rotate");
  if (config.o_bias && !arch.o_bias) refuse("attention output has no bias");
  if (config.mlp_bias && !arch.mlp_bias) refuse("MLPs have no bias");
  if (arch.joined_qkv && !config.qkv_bias) refuse("attention has biases");
  if (!arch.untied && !config.tie_word_embeddings) refuse("the head is the embedding");
  if (!arch.tied && config.tie_word_embeddings) refuse("the head is a tensor of its own");
  if (config.has_experts() && !config.experts.renormalize)
    refuse("weights of the chosen experts are made to sum to 1 (norm_topk_prob)");
  if (arch.slides && any_slides(config) && !sliding_period(config, usual_period(arch)))
    refuse("sliding blocks follow a period: others full of each so many");
  if (config.attention_scale > 0 && std::abs(config.attention_scale / gguf_attention_scale(config, arch) - 1) > 1e-6)
    refuse("attention is scaled by 1 / sqrt(head_dim)");
  if (name == "gemma2" && (config.attention_softcap == 0 || config.final_softcap == 0))
    refuse("scores and logits are capped (attn_logit_softcapping, final_logit_softcapping)");
  if (name == "smollm3")
    for (int layer = 0; layer < config.num_layers; ++layer)
      if ((config.rope_kind(layer) == RopeKind::kNone) != ((layer + 1) % kNoRopeStep == 0)) {
        refuse("exactly every fourth block is without rotary positions");
        break;
      }
  if (!problems.empty())
    throw input_error(place, "a model that llama.cpp's " + std::string(name) + " computes", problems,
                      "--to compact keeps it as it is");
}

const std::map<std::string, std::string, std::less<>> kNames = {{"embed_tokens", "token_embd"},
                                                                {"embed_positions", "position_embd"},
                                                                {"norm", "output_norm"},
                                                                {"lm_head", "output"},
                                                                {"input_layernorm", "attn_norm"},
                                                                {"self_attn.q_proj", "attn_q"},
                                                                {"self_attn.k_proj", "attn_k"},
                                                                {"self_attn.v_proj", "attn_v"},
                                                                {"self_attn.qkv_proj", "attn_qkv"},
                                                                {"self_attn.q_norm", "attn_q_norm"},
                                                                {"self_attn.k_norm", "attn_k_norm"},
                                                                {"self_attn.o_proj", "attn_output"},
                                                                {"post_attention_layernorm", "ffn_norm"},
                                                                {"pre_feedforward_layernorm", "ffn_norm"},
                                                                {"post_feedforward_layernorm", "post_ffw_norm"},
                                                                {"mlp.gate_proj", "ffn_gate"},
                                                                {"mlp.up_proj", "ffn_up"},
                                                                {"mlp.gate_up_proj", "ffn_up"},
                                                                {"mlp.down_proj", "ffn_down"}};

std::string stem_of(const ModelConfig& config, const GgufArchitecture& arch, const TensorSpec& spec) {
  const Experts& experts = config.experts;
  if (spec.role == TensorRole::kRouter) return "ffn_gate_inp";
  if (spec.expert >= 0) {
    const std::string part = spec.module.substr(spec.module.rfind('.') + 1);
    return part == experts.gate ? "ffn_gate_exps" : part == experts.up ? "ffn_up_exps" : "ffn_down_exps";
  }
  if (config.post_norms && spec.module == "post_attention_layernorm") return "post_attention_norm";
  const bool qkv =
      spec.module == "self_attn.q_proj" || spec.module == "self_attn.k_proj" || spec.module == "self_attn.v_proj";
  if (qkv && arch.joined_qkv) return "attn_qkv";
  const auto found = kNames.find(spec.module);
  if (found == kNames.end()) throw std::logic_error("no GGUF name for " + spec.name);
  return found->second;
}

}  // namespace

double gguf_attention_scale(const ModelConfig& config, const GgufArchitecture& arch) {
  const std::string_view name = arch.name;
  const bool largest = (name == "gemma2" && config.num_layers == 46) || (name == "gemma3" && config.num_layers == 62);
  const std::int64_t width = largest ? config.hidden_size / config.num_heads : config.head_dim;
  return 1.0 / std::sqrt(static_cast<double>(width));
}

const GgufArchitecture& gguf_architecture(const ModelConfig& config, const std::string& place) {
  std::string known;
  for (const GgufArchitecture& row : kArchitectures) {
    known += (known.empty() ? "" : ", ") + std::string(row.family);
    if (config.family != row.family || config.layer_widths.empty() == (std::string_view(row.name) == kOwnWidths))
      continue;
    check(config, row, place);
    return row;
  }
  if (!config.layer_widths.empty())
    throw input_error(place, "blocks that are all as wide, or those of a Llama or Mistral: llama.cpp's deci has the others",
                      config.family + " with blocks of different widths", "--to compact keeps it as it is");
  throw input_error(place, "a family that can be written as GGUF (" + known + ")", config.family);
}

const GgufArchitecture& gguf_architecture_named(const std::string& name, bool experts, const std::string& place) {
  std::string known;
  for (const GgufArchitecture& row : kArchitectures) {
    if (known.find(row.name) == std::string::npos) known += (known.empty() ? "" : ", ") + std::string(row.name);
    const std::string_view family = row.family;
    if (name == row.name && experts == (family == "mixtral" || family == "qwen3_moe")) return row;
  }
  throw input_error(place + ": general.architecture", "one of " + known, name + (experts ? " with experts" : ""),
                    "this architecture is not supported");
}

Activation gguf_usual_gelu(const GgufArchitecture& arch) {
  return std::string_view(arch.name) == "gptneox" ? Activation::kGelu : Activation::kGeluTanh;
}

std::vector<GgufPlacement> gguf_placements(const ModelConfig& config, const GgufArchitecture& arch,
                                           const std::vector<TensorSpec>& specs) {
  std::vector<GgufPlacement> out;
  std::map<std::string, std::size_t> known;
  for (const TensorSpec& spec : specs) {
    const std::string block = spec.layer < 0 ? "" : "blk." + std::to_string(spec.layer) + ".";
    const std::string name = block + stem_of(config, arch, spec) + spec.name.substr(spec.name.rfind('.'));
    const auto [found, added] = known.emplace(name, out.size());
    if (!added) {
      GgufPlacement& there = out[found->second];
      there.parts.push_back(&spec);
      if (spec.expert < 0) there.shape[0] += spec.shape[0];
      continue;
    }
    GgufPlacement place{name, spec.shape, {&spec}};
    if (spec.expert >= 0) place.shape.insert(place.shape.begin(), config.experts.count);
    place.neighbours = arch.neighbours && (spec.module == "self_attn.q_proj" || spec.module == "self_attn.k_proj");
    place.adds_one = spec.role == TensorRole::kNorm && config.norm_adds_one;
    place.always_f32 = spec.shape.size() == 1 || spec.role == TensorRole::kRouter || spec.role == TensorRole::kPosition;
    out.push_back(std::move(place));
  }
  return out;
}

std::int64_t row_behind(std::int64_t row, std::int64_t head_dim) {
  const std::int64_t head = row / head_dim, within = row % head_dim;
  return head * head_dim + (within % 2) * (head_dim / 2) + within / 2;
}

std::int64_t row_before(std::int64_t row, std::int64_t head_dim) {
  const std::int64_t head = row / head_dim, within = row % head_dim, half = head_dim / 2;
  return head * head_dim + within % half * 2 + within / half;
}

std::vector<std::pair<std::string, std::vector<float>>> gguf_rope_tensors(const ModelConfig& config) {
  std::vector<std::pair<std::string, std::vector<float>>> out;
  if (config.rope_llama3) {  // what llama.cpp divides the rotary frequencies by
    ModelConfig plain = config;
    plain.rope_llama3.reset();
    const auto scaled = rope_frequencies(config), base = rope_frequencies(plain);
    std::vector<float> divisors(scaled.size());
    for (std::size_t i = 0; i < scaled.size(); ++i) divisors[i] = static_cast<float>(base[i] / scaled[i]);
    out.emplace_back("rope_freqs.weight", std::move(divisors));
  }
  if (config.rope_long) {
    const auto floats = [](const std::vector<double>& from) { return std::vector<float>(from.begin(), from.end()); };
    out.emplace_back("rope_factors_long.weight", floats(config.rope_long->long_factor));
    out.emplace_back("rope_factors_short.weight", floats(config.rope_long->short_factor));
  }
  return out;
}

GgufPairs gguf_config_keys(const ModelConfig& config, const GgufArchitecture& arch, std::vector<std::string>& notes) {
  GgufPairs out;
  const std::string prefix = std::string(arch.name) + ".";
  const auto count = [&](const char* key, std::int64_t value) {
    out.emplace_back(prefix + key, static_cast<std::uint32_t>(std::min<std::int64_t>(value, UINT32_MAX)));
  };
  const auto number = [&](const char* key, double value) { out.emplace_back(prefix + key, static_cast<float>(value)); };
  const auto width = [&](const char* key, std::int64_t value, std::int64_t BlockWidths::*part) {
    if (config.layer_widths.empty()) return count(key, value);
    std::vector<std::int32_t> list;
    for (const BlockWidths& block : config.layer_widths) list.push_back(static_cast<std::int32_t>(block.*part));
    out.emplace_back(prefix + key, std::move(list));
  };
  std::int64_t context = config.max_position_embeddings;
  if (any_slides(config) && !arch.slides && config.sliding_window < context) {
    context = config.sliding_window;
    notes.push_back("llama.cpp's " + std::string(arch.name) + " has no sliding window: the file says " +
                    std::to_string(context) + " positions, up to which the window of that length makes no difference");
  }
  count("context_length", context);
  count("embedding_length", config.hidden_size);
  count("block_count", config.num_layers);
  std::int64_t inner = config.intermediate_size;
  if (config.family == "qwen3_moe") {  // whose blocks without experts, which are none here, have a width of their own
    count("expert_feed_forward_length", inner);
    const auto said = config.source.find("intermediate_size");
    if (said != config.source.end() && said->is_number_unsigned()) inner = said->get<std::int64_t>();
  }
  width("feed_forward_length", inner, &BlockWidths::inner);
  width("attention.head_count", config.num_heads, &BlockWidths::heads);
  width("attention.head_count_kv", config.num_kv_heads, &BlockWidths::kv_heads);
  count("attention.key_length", config.head_dim);
  count("attention.value_length", config.head_dim);
  count("vocab_size", config.vocab_size);
  number(config.layer_norm ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon", config.rms_norm_eps);
  if (!config.learned_positions) {
    count("rope.dimension_count", config.rotated());
    number("rope.freq_base", config.rope_theta);
  }
  if (config.rope_linear_factor != 1.0) {
    out.emplace_back(prefix + "rope.scaling.type", std::string("linear"));
    number("rope.scaling.factor", config.rope_linear_factor);
  }
  if (config.rope_long) {
    out.emplace_back(prefix + "rope.scaling.type", std::string("longrope"));
    number("rope.scaling.attn_factor", config.rope_long->attention_factor);
    count("rope.scaling.original_context_length", config.rope_long->original_max_position);
    notes.push_back("llama.cpp takes LongRoPE's long factors for every sequence where its context (-c) is above " +
                    std::to_string(config.rope_long->original_max_position) + ", not for those alone that are longer");
  }
  if (config.has_experts()) {
    count("expert_count", config.experts.count);
    count("expert_used_count", config.experts.per_token);
  }
  if (arch.slides) {
    const std::int64_t period = any_slides(config) ? sliding_period(config, usual_period(arch)).value() : 1;
    if (any_slides(config)) count("attention.sliding_window", config.sliding_window);
    count("attention.sliding_window_pattern", period);
  }
  if (config.rope_local_theta > 0) number("rope.freq_base_swa", config.rope_local_theta);
  if (config.attention_softcap > 0) number("attn_logit_softcapping", config.attention_softcap);
  if (config.final_softcap > 0) number("final_logit_softcapping", config.final_softcap);
  if (std::string_view(arch.name) == "gptneox")
    out.emplace_back(prefix + "use_parallel_residual", config.parallel_residual);
  if (config.layer_norm && config.activation != gguf_usual_gelu(arch))
    out.emplace_back("pare.activation", std::string(config.activation == Activation::kGelu ? "gelu" : "gelu_tanh"));
  if (config.activation == Activation::kGelu)
    notes.push_back("llama.cpp computes GELU by its tanh form, this model by erf: small differences in its logits");
  return out;
}

}  // namespace pare
