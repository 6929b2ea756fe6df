#include "core/config.h"

#include <algorithm>
#include <stdexcept>

#include "core/arch/arch.h"
#include "core/arch/rope.h"
#include "core/error.h"

namespace pare {
namespace {

constexpr std::int64_t kMaxWidth = 1 << 20, kMaxLayers = 10'000, kMaxVocabulary = 1 << 26, kMaxPositions = 1ll << 40;
constexpr std::int64_t kMaxExperts = 1 << 17;  // of all blocks

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

std::string out_activation(Activation activation) {
  if (activation == Activation::kGelu) return "gelu";
  return activation == Activation::kSilu ? "silu" : "gelu_pytorch_tanh";
}

// Names of transformers' ACT2FN. Gemma 1 says "gelu" and means the tanh form.
Activation read_activation(ConfigReader& reader, const Family& family) {
  const std::string name = reader.text(family.activation_key, family.default_activation);
  if (family.plain_gelu) {
    if (name == "gelu") return Activation::kGelu;
    if (name == "gelu_new" || name == "gelu_fast" || name == "gelu_pytorch_tanh") return Activation::kGeluTanh;
    reader.problem(std::string(family.activation_key) + " is \"" + name +
                   "\"; supported are gelu, gelu_new, gelu_fast and gelu_pytorch_tanh");
    return Activation::kGelu;
  }
  if (name == "silu" || name == "swish") return Activation::kSilu;
  if (name == "gelu_pytorch_tanh" || name == "gelu_new" || (name == "gelu" && family.gelu_is_tanh))
    return Activation::kGeluTanh;
  reader.problem(std::string(family.activation_key) + " is \"" + name + "\"; supported are silu and gelu_pytorch_tanh");
  return Activation::kSilu;
}

// A list in place of a number, with an entry for each block, as Gemma 3n spells widths. The largest of a list.
std::int64_t read_width(ConfigReader& reader, const std::string& key, std::optional<std::int64_t> fallback,
                        std::int64_t layers, std::vector<std::int64_t>& list) {
  if (!reader.present(key) || !reader[key].is_array()) return reader.integer(key, fallback, 1, kMaxWidth);
  const Json& values = reader[key];
  if (static_cast<std::int64_t>(values.size()) != layers) {
    reader.problem(key + " has " + std::to_string(values.size()) + " entries for " + std::to_string(layers) + " blocks");
    return 1;
  }
  for (const Json& value : values) {
    if (!value.is_number_integer() || value < 1 || value > kMaxWidth) {
      reader.problem(key + " has an entry " + value.dump() + ", not a whole number from 1 to " +
                     std::to_string(kMaxWidth));
      return 1;
    }
    list.push_back(value.get<std::int64_t>());
  }
  return *std::max_element(list.begin(), list.end());
}

struct WidthLists {
  std::vector<std::int64_t> heads, kv_heads, inner;  // empty: one number
};

void apply_lists(ConfigReader& reader, const WidthLists& lists, ModelConfig& out) {
  if (lists.heads.empty() && lists.kv_heads.empty() && lists.inner.empty()) return;
  std::vector<BlockWidths> widths;
  for (std::size_t i = 0; i < static_cast<std::size_t>(out.num_layers); ++i) {
    const auto entry = [&](const std::vector<std::int64_t>& list, std::int64_t one) {
      return list.empty() ? one : list[i];
    };
    widths.push_back({entry(lists.heads, out.num_heads), entry(lists.kv_heads, out.num_kv_heads),
                      entry(lists.inner, out.intermediate_size)});
    if (widths.back().heads % widths.back().kv_heads != 0)
      reader.problem("block " + std::to_string(i) + " has " + std::to_string(widths.back().heads) +
                     " heads, no multiple of its " + std::to_string(widths.back().kv_heads) +
                     " heads of keys and values");
  }
  if (!lists.inner.empty() && out.has_experts()) reader.problem("experts are as wide in every block");
  if (reader.intact()) out.set_widths(widths);
}

// Families that say how wide their heads are and how many of them share a key and value.
void read_heads(ConfigReader& reader, const Family& family, ModelConfig& out, WidthLists& lists) {
  const bool class_default = !reader.mentions("num_key_value_heads") && family.default_kv_heads > 0;
  out.num_kv_heads = read_width(reader, "num_key_value_heads",
                                class_default ? family.default_kv_heads : out.num_heads, out.num_layers, lists.kv_heads);
  if (!reader.present("num_key_value_heads") && !class_default) lists.kv_heads = lists.heads;
  const bool derived = !reader.present("head_dim") && (family.default_head_dim == 0 || reader.mentions("head_dim"));
  if (reader.intact() && derived && out.hidden_size % out.num_heads != 0)
    reader.problem("hidden_size " + std::to_string(out.hidden_size) + " is not divided by num_attention_heads " +
                   std::to_string(out.num_heads) + " and head_dim is missing");
  out.head_dim = reader.integer(
      "head_dim", derived ? std::max<std::int64_t>(1, out.hidden_size / out.num_heads) : family.default_head_dim, 1,
      kMaxWidth);
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
  const FamilyKeys& keys = family.keys;
  out.hidden_size = reader.integer(keys.hidden, std::nullopt, 1, kMaxWidth);
  const std::optional<std::int64_t> inner =
      family.inner_of_hidden > 0 ? std::optional(family.inner_of_hidden * out.hidden_size) : std::nullopt;
  out.num_layers = reader.integer(keys.layers, std::nullopt, 1, kMaxLayers);
  WidthLists lists;
  out.intermediate_size = read_width(reader, keys.inner, inner, out.num_layers, lists.inner);
  out.num_heads = family.heads_share_width ? reader.integer(keys.heads, std::nullopt, 1, kMaxWidth)
                                           : read_width(reader, keys.heads, std::nullopt, out.num_layers, lists.heads);
  if (family.heads_share_width) {
    out.num_kv_heads = out.num_heads;
    if (reader.intact() && out.hidden_size % out.num_heads != 0)
      reader.problem(std::string(keys.hidden) + " " + std::to_string(out.hidden_size) + " is not divided by " +
                     keys.heads + " " + std::to_string(out.num_heads));
    out.head_dim = std::max<std::int64_t>(1, out.hidden_size / out.num_heads);
    if (reader.integer("head_dim", out.head_dim, 1, kMaxWidth) != out.head_dim)
      reader.problem("head_dim is not " + std::to_string(out.head_dim) + ", the width over the heads, which " +
                     family.architecture + " computes with");
  } else {
    read_heads(reader, family, out, lists);
  }
  if (reader.intact() && out.head_dim % 2 != 0)
    reader.problem("head_dim " + std::to_string(out.head_dim) + " is odd: " +
                   (family.rotates ? "rotary embedding needs pairs" : "only even ones are supported"));
  const bool alike = lists.heads.empty() && lists.kv_heads.empty();
  if (reader.intact() && alike && out.num_heads % out.num_kv_heads != 0)
    reader.problem("num_attention_heads " + std::to_string(out.num_heads) + " is not a multiple of num_key_value_heads " +
                   std::to_string(out.num_kv_heads));
  if (reader.intact() && out.num_heads * out.head_dim > kMaxWidth)
    reader.problem("num_attention_heads times head_dim is above " + std::to_string(kMaxWidth));
  out.max_position_embeddings = reader.integer(keys.positions, family.default_max_positions, 1, kMaxPositions);
  out.rms_norm_eps = reader.number(keys.epsilon, family.default_rms_eps, 0.0, 1.0);
  out.tie_word_embeddings = reader.flag("tie_word_embeddings", family.default_tied);
  out.activation = read_activation(reader, family);
  if (family.rotates) read_rope(reader, family, out);
  if (!family.reads_layer_types) {  // the class ignores the list: one that asks for windows is not what it computes
    const auto types = read_layer_types(reader, out.num_layers);
    if (types && std::find(types->begin(), types->end(), 1) != types->end())
      reader.problem("layer_types has \"sliding_attention\", which " + std::string(family.architecture) +
                     " does not read");
  }
  if (reader.intact()) family.read(reader, out);  // lists with an entry per block need sane dimensions
  if (reader.intact()) apply_lists(reader, lists, out);
  if (out.experts.per_token > out.experts.count)  // also where the class's default meets fewer experts
    reader.problem("num_experts_per_tok is " + std::to_string(out.experts.per_token) + " of " +
                   std::to_string(out.experts.count) + " experts");
  if (out.experts.count * out.num_layers > kMaxExperts)
    reader.problem(std::to_string(out.experts.count * out.num_layers) + " experts in all, above " +
                   std::to_string(kMaxExperts));
  if (!reader.mentions("eos_token_id") && family.default_eos >= 0 && family.default_eos < out.vocab_size)
    out.eos_ids = {family.default_eos};
  read_eos(config, "", out.vocab_size, reader, out.eos_ids);
  read_eos(generation, "generation_config.json: ", out.vocab_size, reader, out.eos_ids);
  reader.finish();
  return out;
}

void ModelConfig::set_widths(const std::vector<BlockWidths>& widths) {
  if (static_cast<std::int64_t>(widths.size()) != num_layers || widths.empty())
    throw std::logic_error("set_widths: one entry for each block");
  num_heads = num_kv_heads = intermediate_size = 0;
  for (const BlockWidths& block : widths) {
    num_heads = std::max(num_heads, block.heads);
    num_kv_heads = std::max(num_kv_heads, block.kv_heads);
    intermediate_size = std::max(intermediate_size, block.inner);
  }
  layer_widths = widths;
  if (std::all_of(widths.begin(), widths.end(), [&](const BlockWidths& block) { return block == widths[0]; }))
    layer_widths.clear();
}

Json width_json(const ModelConfig& config, std::int64_t BlockWidths::*part) {
  const std::int64_t first = config.widths(0).*part;
  Json values = Json::array();
  for (const BlockWidths& block : config.layer_widths) values.push_back(block.*part);
  const bool alike = std::all_of(values.begin(), values.end(), [&](const Json& value) { return value == first; });
  return alike ? Json(first) : values;
}

std::string width_keys(const ModelConfig& config) {
  const FamilyKeys& keys = find_family(config.family)->keys;
  std::string text;
  for (const auto& [key, part] : {std::pair{keys.inner, &BlockWidths::inner}, {keys.heads, &BlockWidths::heads},
                                  {"num_key_value_heads", &BlockWidths::kv_heads}})
    if (width_json(config, part).is_array()) text += (text.empty() ? "" : ", ") + std::string(key);
  return text;
}

ModelConfig of_block(const ModelConfig& config, int layer) {
  if (config.layer_widths.empty()) return config;
  ModelConfig out = config;
  out.set_widths(std::vector<BlockWidths>(static_cast<std::size_t>(config.num_layers), config.widths(layer)));
  return out;
}

ModelConfig with_layers(const ModelConfig& config, const std::vector<int>& kept) {
  ModelConfig out = config;
  out.num_layers = static_cast<std::int64_t>(kept.size());
  for (auto* list : {&out.layer_slides, &out.layer_rotates}) {
    if (list->empty()) continue;
    std::vector<std::uint8_t> shortened;
    for (const int layer : kept) shortened.push_back((*list)[static_cast<std::size_t>(layer)]);
    *list = shortened;
  }
  if (!config.layer_widths.empty()) {
    std::vector<BlockWidths> widths;
    for (const int layer : kept) widths.push_back(config.widths(layer));
    out.set_widths(widths);
  }
  for (const char* key : {"layer_types", "no_rope_layers"}) {
    const auto found = out.source.find(key);
    if (found == out.source.end() || !found->is_array() ||
        static_cast<std::int64_t>(found->size()) != config.num_layers)
      continue;
    Json shortened = Json::array();
    for (const int layer : kept) shortened.push_back((*found)[static_cast<std::size_t>(layer)]);
    *found = shortened;
  }
  return out;
}

Json write_config(const ModelConfig& config, const std::string& dtype) {
  const Family* family = find_family(config.family);
  if (family == nullptr)
    throw failure("config.json", "a family of the architecture table", "\"" + config.family + "\"");
  for (const auto* list : {&config.layer_slides, &config.layer_rotates})
    if (!list->empty() && static_cast<std::int64_t>(list->size()) != config.num_layers)
      throw std::logic_error("write_config: a list with an entry for each block has others");
  if (!config.layer_widths.empty() && static_cast<std::int64_t>(config.layer_widths.size()) != config.num_layers)
    throw std::logic_error("write_config: widths of other blocks");
  Json out = config.source.is_object() ? config.source : Json::object();
  // Weights change between folders, code files are not copied.
  for (const char* gone : {"quantization_config", "auto_map"}) out.erase(gone);
  out["architectures"] = Json::array({family->architecture});
  out["model_type"] = family->name;
  out["vocab_size"] = config.vocab_size;
  const FamilyKeys& keys = family->keys;
  out[keys.hidden] = config.hidden_size;
  out[keys.inner] = config.intermediate_size;
  out[keys.layers] = config.num_layers;
  out[keys.heads] = config.num_heads;
  if (!family->heads_share_width) {
    out["num_key_value_heads"] = config.num_kv_heads;
    out["head_dim"] = config.head_dim;
  }
  out[keys.positions] = config.max_position_embeddings;
  out[keys.epsilon] = config.rms_norm_eps;
  out[family->activation_key] = out_activation(config.activation);
  out["tie_word_embeddings"] = config.tie_word_embeddings;
  if (family->rotates) write_rope(config, *family, out);
  if (family->reads_layer_types && out.contains("layer_types")) out["layer_types"] = layer_types_of(config);
  // A model built from dimensions alone has its end tokens only in eos_ids; a saved one keeps what it said.
  if (!config.source.is_object() || !config.source.contains("eos_token_id")) {
    if (config.eos_ids.size() == 1) out["eos_token_id"] = config.eos_ids[0];
    else if (!config.eos_ids.empty()) out["eos_token_id"] = config.eos_ids;
    else out["eos_token_id"] = nullptr;
  }
  out["torch_dtype"] = dtype;
  out["dtype"] = dtype;
  family->write(config, out);
  if (!config.layer_widths.empty()) {
    out[keys.inner] = width_json(config, &BlockWidths::inner);
    out[keys.heads] = width_json(config, &BlockWidths::heads);
    if (!family->heads_share_width) out["num_key_value_heads"] = width_json(config, &BlockWidths::kv_heads);
  }
  return out;
}

}  // namespace pare
