// "<arch>.*" keys -> ModelConfig.
#include <algorithm>
#include <cmath>

#include "core/arch/arch.h"
#include "core/error.h"
#include "core/gguf_arch.h"
#include "core/gguf_file.h"

namespace pare {
namespace {

constexpr std::int64_t kMost = 1ll << 40;

class Keys {
 public:
  Keys(const GgufFile& file, const GgufArchitecture& arch)
      : file_(file), prefix_(std::string(arch.name) + "."), place_(file.path().string()) {}

  // A whole number, or an array with an entry for each block of which all are the same.
  std::optional<std::int64_t> count(const std::string& key, std::int64_t minimum, std::int64_t maximum) const {
    const std::string name = prefix_ + key;
    std::optional<std::int64_t> value;
    if (file_.is_array(name)) {
      const std::vector<std::int64_t> list = file_.integers(name).value();
      if (list.empty() || std::any_of(list.begin(), list.end(), [&](std::int64_t x) { return x != list[0]; }))
        throw input_error(place_ + ": " + name, "one number for all blocks",
                          std::to_string(list.size()) + " that differ", "blocks of different shapes are not supported");
      value = list[0];
    } else {
      value = file_.integer(name);
    }
    if (value && (*value < minimum || *value > maximum))
      throw input_error(place_ + ": " + name,
                        "a number from " + std::to_string(minimum) + " to " + std::to_string(maximum),
                        std::to_string(*value));
    return value;
  }
  // One number, or one for each of `blocks`; every one at least 1.
  std::optional<std::vector<std::int64_t>> widths(const std::string& key, std::int64_t blocks) const {
    const std::string name = prefix_ + key;
    if (!file_.is_array(name)) {
      const auto value = count(key, 1, 1 << 20);
      if (!value) return std::nullopt;
      return std::vector<std::int64_t>(static_cast<std::size_t>(blocks), *value);
    }
    const std::vector<std::int64_t> list = file_.integers(name).value();
    if (static_cast<std::int64_t>(list.size()) != blocks)
      throw input_error(place_ + ": " + name, "a number for each of " + std::to_string(blocks) + " blocks",
                        std::to_string(list.size()));
    for (const std::int64_t value : list)
      if (value < 1 || value > 1 << 20)
        throw input_error(place_ + ": " + name, "numbers from 1 to " + std::to_string(1 << 20), std::to_string(value),
                          "blocks without attention or without an MLP are not supported");
    return list;
  }
  std::int64_t needed(const std::string& key, std::int64_t maximum) const {
    const auto value = count(key, 1, maximum);
    if (!value) throw input_error(place_, "the key " + prefix_ + key, "none");
    return *value;
  }
  std::optional<double> number(const std::string& key, double minimum, double maximum) const {
    const auto value = file_.number(prefix_ + key);
    if (value && !(*value >= minimum && *value <= maximum))
      throw input_error(place_ + ": " + prefix_ + key, "a number in its range", std::to_string(*value));
    return value;
  }
  std::optional<bool> flag(const std::string& key) const { return file_.flag(prefix_ + key); }
  std::optional<std::string> text(const std::string& key) const { return file_.text(prefix_ + key); }
  const std::string& prefix() const { return prefix_; }

 private:
  const GgufFile& file_;
  std::string prefix_, place_;
};

// A vector of `length` finite numbers above 0.
std::vector<float> divisors(const GgufFile& file, const std::string& name, std::int64_t length) {
  const GgufView* view = file.find(name);
  const std::string place = file.path().string() + ": " + name;
  if (view == nullptr) throw input_error(place, "a tensor", "none");
  if (view->type != GgmlType::kF32 || view->elements() != length)
    throw input_error(place, std::to_string(length) + " values of F32",
                      std::to_string(view->elements()) + " of " + ggml_type_name(view->type));
  std::vector<float> values(static_cast<std::size_t>(length));
  ggml_to_f32(GgmlType::kF32, view->data.data(), length, values.data());
  for (const float value : values)
    if (!(value > 0 && value < 1e9f)) throw input_error(place, "finite numbers above 0", std::to_string(value));
  return values;
}

std::vector<double> shortest(const std::vector<float>& values) {
  std::vector<double> out;
  for (const float value : values) out.push_back(shortest_double(value));
  return out;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  for (std::size_t i = 0; i < a.size(); ++i)
    if (std::abs(a[i] - b[i]) > 4e-7f * std::abs(b[i])) return false;
  return a.size() == b.size();
}

double rounded(double value) {
  const double whole = std::round(value);
  return whole >= 1 && std::abs(value / whole - 1) < 1e-3 ? whole : value;
}

// The divisors of llama3 scaling, whose numbers a file does not have: 1 for short wavelengths, the factor for long
// ones, and between them a ramp that is linear in the inverse of the wavelength w. Two points of the ramp give orig /
// (high - low) and low / (high - low); low_freq_factor 1 fixes the rest.
bool read_llama3(const std::vector<float>& wanted, ModelConfig& config) {
  const double factor = rounded(*std::max_element(wanted.begin(), wanted.end()));
  if (!(factor > 1)) return false;
  const std::vector<double> base = rope_frequencies(config);
  struct Point {
    double inverse, smooth;  // 1 / w = f / 2 pi
  };
  std::vector<Point> ramp;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const double smooth = (1 / static_cast<double>(wanted[i]) - 1 / factor) / (1 - 1 / factor);
    if (smooth > 1e-5 && smooth < 1 - 1e-5) ramp.push_back({base[i] / (2 * M_PI), smooth});
  }
  const auto fits = [&](double low, double high, double original) {
    if (!(high > low && low > 0 && original >= 1 && original < 1e12)) return false;
    ModelConfig trial = config;
    trial.rope_llama3 = Llama3Rope{factor, low, high, std::llround(original)};
    if (!same(gguf_rope_tensors(trial)[0].second, wanted)) return false;
    config.rope_llama3 = trial.rope_llama3;
    return true;
  };
  if (fits(1, 4, 8192)) return true;  // what all published models have
  if (ramp.size() < 2) return false;
  const Point& a = ramp.front();
  const Point& b = ramp.back();
  const double slope = (b.smooth - a.smooth) / (b.inverse - a.inverse), start = a.smooth - slope * a.inverse;
  if (!(slope > 0 && start < 0)) return false;
  const double high = rounded(1 - 1 / start);
  return fits(1, high, std::round(slope * (high - 1)));
}

void read_rope(const GgufFile& file, const Keys& keys, const GgufArchitecture& arch, ModelConfig& out) {
  const std::string place = file.path().string() + ": " + keys.prefix() + "rope.scaling.type";
  out.rope_theta = keys.number("rope.freq_base", 1, 1e15).value_or(10000.0);
  const std::int64_t rotated = keys.count("rope.dimension_count", 2, out.head_dim).value_or(out.head_dim);
  if (rotated % 2 != 0)
    throw input_error(file.path().string() + ": " + keys.prefix() + "rope.dimension_count", "an even number",
                      std::to_string(rotated));
  out.rotary_dim = rotated == out.head_dim ? 0 : rotated;
  const bool divided = file.find("rope_freqs.weight") != nullptr;
  const bool two = file.find("rope_factors_long.weight") != nullptr;
  if (two && !arch.long_rope)
    throw input_error(file.path().string() + ": rope_factors_long.weight", "no such tensor in this architecture",
                      "one");
  const std::string type = keys.text("rope.scaling.type").value_or(two ? "longrope" : "none");
  const double old = keys.number("rope.scale_linear", 1e-6, 1e6).value_or(1.0);
  const double factor = keys.number("rope.scaling.factor", 1e-6, 1e6).value_or(old);
  if (type == "linear" || (type == "none" && old != 1)) {
    out.rope_linear_factor = factor;
  } else if (type != "none" && type != "longrope") {
    throw input_error(place, "none, linear or longrope", type, "this scaling of rotary positions is not supported");
  }
  if (two) {
    LongRope scaling;
    scaling.long_factor = shortest(divisors(file, "rope_factors_long.weight", rotated / 2));
    scaling.short_factor = shortest(divisors(file, "rope_factors_short.weight", rotated / 2));
    scaling.original_max_position =
        keys.count("rope.scaling.original_context_length", 2, kMost).value_or(out.max_position_embeddings);
    scaling.attention_factor = keys.number("rope.scaling.attn_factor", 1e-6, 1e6).value_or(1.0);
    scaling.said_attention_factor = scaling.attention_factor;
    out.rope_long = scaling;
  } else if (type == "longrope") {
    throw input_error(place, "the tensors rope_factors_long.weight and rope_factors_short.weight", "none");
  }
  if (!divided) return;
  const std::vector<float> values = divisors(file, "rope_freqs.weight", rotated / 2);
  if (std::all_of(values.begin(), values.end(), [](float x) { return x == 1.0f; })) return;
  if (two || !arch.llama3_rope)
    throw input_error(file.path().string() + ": rope_freqs.weight", "no such tensor in this architecture", "one");
  if (read_llama3(values, out)) return;
  // Any divisors at all: those of LongRoPE on both sides of its switch.
  LongRope scaling;
  scaling.short_factor = scaling.long_factor = shortest(values);
  scaling.original_max_position = std::max<std::int64_t>(2, out.max_position_embeddings);
  scaling.said_attention_factor = 1.0;
  out.rope_long = scaling;
}

void read_windows(const Keys& keys, const GgufArchitecture& arch, ModelConfig& out) {
  const std::string_view name = arch.name;
  const auto window = keys.count("attention.sliding_window", 0, kMost);
  const auto blocks = static_cast<std::size_t>(out.num_layers);
  if (arch.slides) {
    const std::int64_t size = window.value_or(name == "gemma2" ? 4096 : 0);
    const std::int64_t usual = name == "gemma2" ? 2 : 6;
    const std::int64_t period = keys.count("attention.sliding_window_pattern", 0, kMost).value_or(usual);
    std::vector<std::uint8_t> slides(blocks, 0);
    for (std::size_t layer = 0; layer < blocks; ++layer)
      slides[layer] = period == 0 || static_cast<std::int64_t>(layer) % period < period - 1 ? 1 : 0;
    if (size == 0 || std::find(slides.begin(), slides.end(), 1) == slides.end()) return;
    out.sliding_window = size;
    out.layer_slides = slides;
  } else if (name == "phi3" && window.value_or(0) > 0 && *window < out.max_position_embeddings) {
    out.sliding_window = *window;  // which the model has, whether llama.cpp computes it or not
    out.layer_slides.assign(blocks, 1);
  }
}

void read_ends(const GgufFile& file, ModelConfig& out) {
  for (const char* key :
       {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"}) {
    const auto id = file.integer(key);
    if (!id || *id == UINT32_MAX) continue;  // which means none
    if (*id < 0 || *id >= out.vocab_size)
      throw input_error(file.path().string() + ": " + key, "an id below " + std::to_string(out.vocab_size),
                        std::to_string(*id));
    if (std::find(out.eos_ids.begin(), out.eos_ids.end(), *id) == out.eos_ids.end()) out.eos_ids.push_back(*id);
  }
}

}  // namespace

ModelConfig gguf_config(const GgufFile& file, const GgufArchitecture& arch) {
  const std::string place = file.path().string();
  const Family& family = *find_family(arch.family);
  const std::string_view name = arch.name;
  const Keys keys(file, arch);
  ModelConfig out;
  out.family = arch.family;
  // Lists with an entry for each block are made below: not more blocks than there are tensors.
  out.num_layers = keys.needed("block_count", static_cast<std::int64_t>(file.tensors().size()));
  out.hidden_size = keys.needed("embedding_length", 1 << 20);
  out.max_position_embeddings = keys.needed("context_length", kMost);
  std::vector<BlockWidths> widths;  // of the architecture whose blocks may differ
  if (name == "deci") {
    const auto heads = keys.widths("attention.head_count", out.num_layers);
    const auto inner = keys.widths("feed_forward_length", out.num_layers);
    if (!heads || !inner)
      throw input_error(place, "the keys deci.attention.head_count and deci.feed_forward_length", "not both");
    const auto kv_heads = keys.widths("attention.head_count_kv", out.num_layers).value_or(*heads);
    for (std::size_t i = 0; i < heads->size(); ++i) widths.push_back({(*heads)[i], kv_heads[i], (*inner)[i]});
    out.set_widths(widths);
    out.num_heads = widths[0].heads;  // by which a missing width of a head is told
  } else {
    out.num_heads = keys.needed("attention.head_count", 1 << 20);
    out.num_kv_heads = keys.count("attention.head_count_kv", 1, 1 << 20).value_or(out.num_heads);
  }
  out.head_dim = keys.count("attention.key_length", 1, 1 << 20).value_or(out.hidden_size / out.num_heads);
  if (keys.count("attention.value_length", 1, 1 << 20).value_or(out.head_dim) != out.head_dim)
    throw input_error(place + ": " + keys.prefix() + "attention.value_length",
                      "key_length, " + std::to_string(out.head_dim), "another width");
  out.rms_norm_eps =
      keys.number(family.plain_gelu ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon", 0, 1)
          .value_or(1e-5);
  const GgufView* embedding = file.find("token_embd.weight");
  if (embedding == nullptr || embedding->shape.size() != 2)
    throw input_error(place + ": token_embd.weight", "a matrix", embedding == nullptr ? "none" : "another shape");
  out.vocab_size = embedding->shape[0];
  out.tie_word_embeddings = file.find("output.weight") == nullptr;
  if (out.tie_word_embeddings && !arch.tied) throw input_error(place, "the tensor output.weight", "none");
  out.activation = family.activation_key == std::string_view("hidden_act") && !family.gelu_is_tanh
                       ? Activation::kSilu
                       : Activation::kGeluTanh;
  const auto has = [&](const char* tensor) { return file.find(std::string("blk.0.") + tensor) != nullptr; };
  if (family.plain_gelu) {
    out.layer_norm = true;
    out.gated_mlp = false;
    out.activation = gguf_usual_gelu(arch);
    if (const auto said = file.text("pare.activation")) {
      if (*said != "gelu" && *said != "gelu_tanh")
        throw input_error(place + ": pare.activation", "gelu or gelu_tanh", *said);
      out.activation = *said == "gelu" ? Activation::kGelu : Activation::kGeluTanh;
    }
  }
  out.qkv_bias = has("attn_q.bias") || has("attn_qkv.bias");
  out.o_bias = has("attn_output.bias");
  out.mlp_bias = has("ffn_down.bias");
  if (file.find("blk.0.ffn_gate_inp.weight") != nullptr) {
    out.experts.count = keys.needed("expert_count", 4096);
    // A row of each router for every expert: so many must be there before lists of them are made.
    for (std::int64_t layer = 0; layer < out.num_layers; ++layer) {
      const std::string router = "blk." + std::to_string(layer) + ".ffn_gate_inp.weight";
      const GgufView* view = file.find(router);
      if (view == nullptr || view->shape.size() != 2 || view->shape[0] != out.experts.count)
        throw input_error(place + ": " + router,
                          "a matrix with a row for each of " + std::to_string(out.experts.count) + " experts",
                          view == nullptr ? "none" : "another shape");
    }
    out.experts.per_token = keys.needed("expert_used_count", 4096);
    if (keys.count("expert_shared_count", 0, 4096).value_or(0) != 0)
      throw input_error(place + ": " + keys.prefix() + "expert_shared_count", "experts that are chosen, all of them",
                        "shared ones");
  }
  if (out.head_dim < 1)
    throw input_error(place + ": " + keys.prefix() + "attention.head_count", "no more heads than dimensions",
                      std::to_string(out.num_heads));
  const bool own_width = name == "qwen3moe" && file.has(keys.prefix() + "expert_feed_forward_length");
  if (widths.empty())
    out.intermediate_size = keys.needed(own_width ? "expert_feed_forward_length" : "feed_forward_length", 1 << 20);
  else
    out.set_widths(widths);
  if (own_width)
    out.source["intermediate_size"] = keys.count("feed_forward_length", 0, 1 << 20).value_or(out.intermediate_size);
  if (name == "gpt2") {
    out.learned_positions = true;
  } else {
    read_rope(file, keys, arch, out);
  }
  if (name == "gptneox") out.parallel_residual = keys.flag("use_parallel_residual").value_or(true);
  read_windows(keys, arch, out);
  if (name == "smollm3")
    for (std::int64_t layer = 0; layer < out.num_layers; ++layer)
      out.layer_rotates.push_back((layer + 1) % 4 != 0 ? 1 : 0);
  if (arch.slides) {
    out.attention_scale = gguf_attention_scale(out, arch);
    out.rope_local_theta = name == "gemma3" ? keys.number("rope.freq_base_swa", 1, 1e15).value_or(10000.0) : 0.0;
    if (name == "gemma2") out.attention_softcap = keys.number("attn_logit_softcapping", 0, 1e6).value_or(50.0);
    out.final_softcap = keys.number("final_logit_softcapping", 0, 1e6).value_or(name == "gemma2" ? 30.0 : 0.0);
  }
  read_ends(file, out);
  if (out.rope_long) out.source["original_max_position_embeddings"] = out.rope_long->original_max_position;
  // The table of families has the last word, as with every other model.
  const Json json = write_config(out, "float32");
  return parse_config(json, nullptr, place);
}

}  // namespace pare
