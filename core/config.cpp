#include "core/config.h"

#include <cmath>
#include <numbers>

#include "core/arch/arch.h"
#include "core/error.h"

namespace pare {
namespace {

constexpr std::int64_t kMaxWidth = 1 << 20, kMaxLayers = 10'000, kMaxVocabulary = 1 << 26, kMaxPositions = 1ll << 40;

std::string supported_architectures() {
  std::string text;
  for (const Family* family : families()) text += (text.empty() ? "" : ", ") + std::string(family->architecture);
  return text;
}

const Family& family_of(const Json& config, const std::string& place) {
  std::string architecture, model_type;
  if (config.contains("architectures") && config["architectures"].is_array() && !config["architectures"].empty() &&
      config["architectures"][0].is_string())
    architecture = config["architectures"][0].get<std::string>();
  if (config.contains("model_type") && config["model_type"].is_string())
    model_type = config["model_type"].get<std::string>();
  for (const Family* family : families())
    if (architecture.empty() ? model_type == family->name : architecture == family->architecture) return *family;
  const std::string found = !architecture.empty() ? architecture : !model_type.empty() ? model_type : "no architecture";
  throw input_error(place, "one of the architectures " + supported_architectures(), found,
                    "this family is not supported");
}

// transformers 5 writes rope_parameters (with rope_theta inside), transformers 4 rope_theta and rope_scaling.
void read_rope(ConfigReader& reader, ModelConfig& out) {
  out.rope_theta = reader.number("rope_theta", 10000.0, 1.0, 1e15);
  std::string key;
  if (reader.present("rope_parameters")) key = "rope_parameters";
  else if (reader.present("rope_scaling")) key = "rope_scaling";
  if (reader.number("partial_rotary_factor", 1.0, 0.0, 1.0) != 1.0)
    reader.problem("partial_rotary_factor is not 1: rotating a part of each head is not supported");
  if (key.empty()) return;
  if (!reader[key].is_object()) {
    reader.problem(key + " is not an object");
    return;
  }
  const bool per_kind = reader[key].contains("full_attention") && reader[key]["full_attention"].is_object();
  ConfigReader outer = reader.nested(key);
  ConfigReader rope = per_kind ? outer.nested("full_attention") : reader.nested(key);
  out.rope_theta = rope.number("rope_theta", out.rope_theta, 1.0, 1e15);
  if (rope.number("partial_rotary_factor", 1.0, 0.0, 1.0) != 1.0)
    rope.problem("partial_rotary_factor is not 1: rotating a part of each head is not supported");
  const std::string type = rope.text("rope_type", rope.text("type", "default"));
  if (type == "linear") {
    if (!rope.present("factor")) rope.problem("factor is missing");
    out.rope_linear_factor = rope.number("factor", 1.0, 1e-6, 1e6);
  } else if (type == "llama3") {
    Llama3Rope scaling;
    for (const char* name : {"factor", "low_freq_factor", "high_freq_factor"})
      if (!rope.present(name)) rope.problem(std::string(name) + " is missing");
    scaling.factor = rope.number("factor", 8, 1e-6, 1e6);
    scaling.low_freq_factor = rope.number("low_freq_factor", 1, 1e-6, 1e6);
    scaling.high_freq_factor = rope.number("high_freq_factor", 4, 1e-6, 1e6);
    const std::int64_t at_root = reader.integer("original_max_position_embeddings", 0, 0, kMaxPositions);
    scaling.original_max_position = rope.integer(
        "original_max_position_embeddings", at_root > 0 ? std::optional(at_root) : std::nullopt, 1, kMaxPositions);
    if (scaling.high_freq_factor <= scaling.low_freq_factor)
      rope.problem("high_freq_factor is not above low_freq_factor");
    out.rope_llama3 = scaling;
  } else if (type != "default") {
    rope.problem("rope_type is \"" + type + "\"; supported are default, linear and llama3");
  }
  reader.take(rope);
}

void read_eos(const Json& from, const std::string& where, std::int64_t vocab, ConfigReader& reader,
              std::vector<std::int64_t>& out) {
  if (!from.is_object() || !from.contains("eos_token_id") || from["eos_token_id"].is_null()) return;
  const Json& value = from["eos_token_id"];
  const Json list = value.is_array() ? value : Json::array({value});
  std::vector<std::int64_t> ids;
  for (const Json& id : list) {
    if (!id.is_number_integer() || id.get<std::int64_t>() < -1 || id.get<std::int64_t>() >= kMaxVocabulary) {
      reader.problem(where + "eos_token_id is " + value.dump() + ", not a token id or a list of them");
      return;
    }
    // Ids beyond the vocabulary (or -1) can never be produced; transformers accepts them too.
    if (id.get<std::int64_t>() >= 0 && id.get<std::int64_t>() < vocab) ids.push_back(id.get<std::int64_t>());
  }
  out = ids;
}

Json rope_object(const ModelConfig& config) {
  Json rope = Json::object();
  if (config.rope_llama3) {
    const Llama3Rope& scaling = *config.rope_llama3;
    rope["rope_type"] = "llama3";
    rope["factor"] = scaling.factor;
    rope["low_freq_factor"] = scaling.low_freq_factor;
    rope["high_freq_factor"] = scaling.high_freq_factor;
    rope["original_max_position_embeddings"] = scaling.original_max_position;
  } else if (config.rope_linear_factor != 1.0) {
    rope["rope_type"] = "linear";
    rope["type"] = "linear";  // spelling of transformers before 4.43
    rope["factor"] = config.rope_linear_factor;
  }
  return rope;
}

}  // namespace

ModelConfig parse_config(const Json& config, const Json& generation, const std::string& place) {
  if (!config.is_object()) throw input_error(place, "a JSON object", config.type_name());
  const Family& family = family_of(config, place);
  ConfigReader reader(config, place);
  ModelConfig out;
  out.family = family.name;
  out.source = config;
  out.vocab_size = reader.integer("vocab_size", std::nullopt, 1, kMaxVocabulary);
  out.hidden_size = reader.integer("hidden_size", std::nullopt, 1, kMaxWidth);
  out.intermediate_size = reader.integer("intermediate_size", std::nullopt, 1, kMaxWidth);
  out.num_layers = reader.integer("num_hidden_layers", std::nullopt, 1, kMaxLayers);
  out.num_heads = reader.integer("num_attention_heads", std::nullopt, 1, kMaxWidth);
  const bool class_default = !reader.mentions("num_key_value_heads") && family.default_kv_heads > 0;
  out.num_kv_heads = reader.integer("num_key_value_heads", class_default ? family.default_kv_heads : out.num_heads, 1,
                                    kMaxWidth);
  if (reader.intact() && !reader.present("head_dim") && out.hidden_size % out.num_heads != 0)
    reader.problem("hidden_size " + std::to_string(out.hidden_size) + " is not divided by num_attention_heads " +
                   std::to_string(out.num_heads) + " and head_dim is missing");
  out.head_dim = reader.integer("head_dim", std::max<std::int64_t>(1, out.hidden_size / out.num_heads), 1, kMaxWidth);
  if (reader.intact() && out.head_dim % 2 != 0)
    reader.problem("head_dim " + std::to_string(out.head_dim) + " is odd: rotary embedding needs pairs");
  if (reader.intact() && out.num_heads % out.num_kv_heads != 0)
    reader.problem("num_attention_heads " + std::to_string(out.num_heads) + " is not a multiple of num_key_value_heads " +
                   std::to_string(out.num_kv_heads));
  if (reader.intact() && out.num_heads * out.head_dim > kMaxWidth)
    reader.problem("num_attention_heads times head_dim is above " + std::to_string(kMaxWidth));
  out.max_position_embeddings =
      reader.integer("max_position_embeddings", family.default_max_positions, 1, kMaxPositions);
  out.rms_norm_eps = reader.number("rms_norm_eps", 1e-6, 0.0, 1.0);
  out.tie_word_embeddings = reader.flag("tie_word_embeddings", false);
  const std::string activation = reader.text("hidden_act", "silu");
  if (activation != "silu" && activation != "swish")
    reader.problem("hidden_act is \"" + activation + "\"; supported is silu");
  read_rope(reader, out);
  if (reader.present("layer_types")) {
    const Json& types = reader["layer_types"];
    if (!types.is_array()) reader.problem("layer_types is not a list");
    else if (static_cast<std::int64_t>(types.size()) != out.num_layers)
      reader.problem("layer_types has " + std::to_string(types.size()) + " entries for " +
                     std::to_string(out.num_layers) + " layers");
    for (const Json& type : types) {
      if (type == "full_attention") continue;
      reader.problem("layer_types has " + type.dump(-1, ' ', false, Json::error_handler_t::replace) +
                     "; supported is full_attention");
      break;
    }
  }
  family.read(reader, out);
  if (!reader.mentions("eos_token_id") && family.default_eos >= 0 && family.default_eos < out.vocab_size)
    out.eos_ids = {family.default_eos};
  read_eos(config, "", out.vocab_size, reader, out.eos_ids);
  read_eos(generation, "generation_config.json: ", out.vocab_size, reader, out.eos_ids);
  reader.finish();
  return out;
}

Json write_config(const ModelConfig& config, const std::string& dtype) {
  const Family* family = find_family(config.family);
  if (family == nullptr)
    throw failure("config.json", "a family of the architecture table", "\"" + config.family + "\"");
  Json out = config.source.is_object() ? config.source : Json::object();
  // Weights change between folders, code files are not copied.
  for (const char* gone : {"quantization_config", "auto_map"}) out.erase(gone);
  out["architectures"] = Json::array({family->architecture});
  out["model_type"] = family->name;
  out["vocab_size"] = config.vocab_size;
  out["hidden_size"] = config.hidden_size;
  out["intermediate_size"] = config.intermediate_size;
  out["num_hidden_layers"] = config.num_layers;
  out["num_attention_heads"] = config.num_heads;
  out["num_key_value_heads"] = config.num_kv_heads;
  out["head_dim"] = config.head_dim;
  out["max_position_embeddings"] = config.max_position_embeddings;
  out["rms_norm_eps"] = config.rms_norm_eps;
  out["hidden_act"] = "silu";
  out["tie_word_embeddings"] = config.tie_word_embeddings;
  const Json scaling = rope_object(config);
  out["rope_theta"] = config.rope_theta;
  out["rope_scaling"] = scaling.empty() ? Json(nullptr) : scaling;
  Json parameters = scaling;
  parameters.erase("type");
  if (scaling.empty()) parameters["rope_type"] = "default";
  parameters["rope_theta"] = config.rope_theta;
  out["rope_parameters"] = parameters;
  if (out.contains("layer_types")) {
    Json types = Json::array();
    for (std::int64_t layer = 0; layer < config.num_layers; ++layer) types.push_back("full_attention");
    out["layer_types"] = types;
  }
  // A model built from dimensions alone has its end tokens only in eos_ids; a saved one keeps what it said.
  if (!config.source.is_object() || !config.source.contains("eos_token_id")) {
    if (config.eos_ids.size() == 1) out["eos_token_id"] = config.eos_ids[0];
    else if (!config.eos_ids.empty()) out["eos_token_id"] = config.eos_ids;
    else out["eos_token_id"] = nullptr;
  }
  out["torch_dtype"] = dtype;
  out["dtype"] = dtype;
  family->write(config, out);
  return out;
}

std::vector<TensorSpec> expected_tensors(const ModelConfig& config) {
  std::vector<TensorSpec> specs;
  const std::int64_t hidden = config.hidden_size, inner = config.intermediate_size;
  const std::int64_t queries = config.num_heads * config.head_dim, keys = config.num_kv_heads * config.head_dim;
  specs.push_back({"model.embed_tokens.weight", {config.vocab_size, hidden}, TensorRole::kEmbedding, -1, "embed_tokens"});
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const auto norm = [&](const std::string& module) {
      specs.push_back({prefix + module + ".weight", {hidden}, TensorRole::kNorm, layer, module});
    };
    const auto linear = [&](const std::string& module, std::int64_t out, std::int64_t in, bool bias) {
      specs.push_back({prefix + module + ".weight", {out, in}, TensorRole::kLinear, layer, module});
      if (bias) specs.push_back({prefix + module + ".bias", {out}, TensorRole::kBias, layer, module});
    };
    norm("input_layernorm");
    linear("self_attn.q_proj", queries, hidden, config.qkv_bias);
    linear("self_attn.k_proj", keys, hidden, config.qkv_bias);
    linear("self_attn.v_proj", keys, hidden, config.qkv_bias);
    linear("self_attn.o_proj", hidden, queries, config.o_bias);
    norm("post_attention_layernorm");
    linear("mlp.gate_proj", inner, hidden, config.mlp_bias);
    linear("mlp.up_proj", inner, hidden, config.mlp_bias);
    linear("mlp.down_proj", hidden, inner, config.mlp_bias);
  }
  specs.push_back({"model.norm.weight", {hidden}, TensorRole::kNorm, -1, "norm"});
  if (!config.tie_word_embeddings)
    specs.push_back({"lm_head.weight", {config.vocab_size, hidden}, TensorRole::kHead, -1, "lm_head"});
  return specs;
}

std::int64_t parameter_count(const ModelConfig& config) {
  std::int64_t count = 0;
  for (const TensorSpec& spec : expected_tensors(config)) {
    std::int64_t elements = 1;
    for (const std::int64_t size : spec.shape) elements *= size;
    count += elements;
  }
  return count;
}

std::vector<double> rope_frequencies(const ModelConfig& config) {
  std::vector<double> frequencies;
  for (std::int64_t i = 0; i < config.head_dim / 2; ++i) {
    double f = std::pow(config.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(config.head_dim));
    f /= config.rope_linear_factor;
    if (config.rope_llama3) {
      const Llama3Rope& s = *config.rope_llama3;
      const auto original = static_cast<double>(s.original_max_position);
      const double wavelength = 2 * std::numbers::pi / f;
      if (wavelength > original / s.low_freq_factor) {
        f /= s.factor;
      } else if (wavelength >= original / s.high_freq_factor) {
        const double smooth = (original / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
        f = (1 - smooth) * f / s.factor + smooth * f;
      }
    }
    frequencies.push_back(f);
  }
  return frequencies;
}

}  // namespace pare
