#include "core/compressed_tensors.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstring>

#include "core/error.h"

namespace pare {
namespace {

// The lowest code of a symmetric integer of that width; q4a codes are already unsigned.
int offset_of(const Codec& codec) { return codec.kind == CodecKind::kQ4a ? 0 : 1 << (codec.bits() - 1); }

constexpr const char* kPackedFormat = "pack-quantized";
constexpr const char* kIntFormat = "int-quantized";
constexpr const char* kMixedFormat = "mixed-precision";

// What rounds inputs at run time: int8, symmetric, one scale per token, found from the token itself.
bool rounds_tokens(const Json& inputs) {
  const auto is = [&](const char* key, const Json& value) { return inputs.contains(key) && inputs[key] == value; };
  const auto absent = [&](const char* key) { return !inputs.contains(key) || inputs[key].is_null(); };
  return inputs.is_object() && is("num_bits", 8) && (absent("type") || is("type", "int")) &&
         (absent("symmetric") || is("symmetric", true)) && is("strategy", "token") && is("dynamic", true) &&
         absent("group_size") && absent("scale_dtype");
}

// Python's re.match: anchored at the start only.
bool matches(const std::string& pattern, const std::string& text, const std::string& place) {
  int code = 0;
  PCRE2_SIZE at = 0;
  pcre2_code* compiled = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), PCRE2_ANCHORED,
                                       &code, &at, nullptr);
  if (compiled == nullptr)
    throw input_error(place, "a regular expression after re:", "\"" + pattern + "\", wrong at " + std::to_string(at));
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  const int result = pcre2_match(compiled, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), 0, 0, data, nullptr);
  pcre2_match_data_free(data);
  pcre2_code_free(compiled);
  if (result < PCRE2_ERROR_NOMATCH)
    throw input_error(place, "a regular expression that can be evaluated", "\"" + pattern + "\"");
  return result >= 0;
}

Codec codec_of_scheme(const Json& group, const std::string& place) {
  if (!group.is_object() || !group.contains("weights") || !group["weights"].is_object())
    throw input_error(place, "a scheme with weights", "none");
  if (group.contains("output_activations") && !group["output_activations"].is_null())
    throw input_error(place + ".output_activations", "null", "quantized activations");
  const bool int8_inputs = group.contains("input_activations") && !group["input_activations"].is_null();
  if (int8_inputs && !rounds_tokens(group["input_activations"]))
    throw input_error(place + ".input_activations", "null, or dynamic symmetric int 8 bits per token",
                      group["input_activations"].dump());
  if (group.contains("format") && !group["format"].is_null() && group["format"] != kPackedFormat &&
      group["format"] != kIntFormat)
    throw input_error(place + ".format", std::string(kPackedFormat) + " or " + kIntFormat, group["format"].dump());
  const Json& weights = group["weights"];
  const auto text = [&](const char* key) {
    return weights.contains(key) && weights[key].is_string() ? weights[key].get<std::string>() : std::string();
  };
  const auto whole = [&](const char* key) -> std::int64_t {
    return weights.contains(key) && weights[key].is_number_integer() ? weights[key].get<std::int64_t>() : 0;
  };
  const bool symmetric = !weights.contains("symmetric") || weights["symmetric"] != false;
  const std::int64_t bits = whole("num_bits"), size = whole("group_size");
  const std::string type = text("type").empty() ? "int" : text("type");
  std::string strategy = text("strategy");
  if (strategy.empty()) strategy = size > 0 ? "group" : "channel";
  if (type == "int") {
    if (bits == 8 && symmetric && strategy == "channel") return {CodecKind::kQ8, Codec::kPerRow, int8_inputs};
    if (int8_inputs)
      throw input_error(place, "symmetric int 8 bits per channel where inputs are rounded",
                        std::to_string(bits) + " bits, " + strategy);
    if (bits == 8 && symmetric && strategy == "group" && size == 32) return {CodecKind::kQ8, 32};
    if (strategy == "group" && (size == 32 || size == 64 || size == 128)) {
      if (bits == 4) return {symmetric ? CodecKind::kQ4 : CodecKind::kQ4a, size};
      if (bits == 3 && symmetric) return {CodecKind::kQ3, size};
      if (bits == 2 && symmetric) return {CodecKind::kQ2, size};
    }
  }
  throw input_error(place + ".weights",
                    "int 4, or symmetric int 3 or 2 bits in groups of 32, 64 or 128, or symmetric int 8 bits per "
                    "channel or in groups of 32",
                    type + " " + std::to_string(bits) + " bits, " + (symmetric ? "symmetric, " : "asymmetric, ") +
                        strategy + (size > 0 ? " of " + std::to_string(size) : ""));
}

}  // namespace

std::int64_t packed_words(std::int64_t count, int bits) { return (count * bits + 31) / 32; }

std::vector<std::int32_t> pack_weight(const QuantizedTensor& tensor) {
  const int bits = tensor.codec.bits(), offset = offset_of(tensor.codec);
  const std::int64_t words = packed_words(tensor.cols, bits);
  std::vector<std::int32_t> out(static_cast<std::size_t>(tensor.rows * words));
  for (std::int64_t row = 0; row < tensor.rows; ++row) {
    const std::int8_t* codes = tensor.codes.data() + row * tensor.cols;
    std::int32_t* to = out.data() + row * words;
    std::uint64_t waiting = 0;
    int held = 0;  // bits
    for (std::int64_t col = 0; col < tensor.cols; ++col) {
      waiting |= static_cast<std::uint64_t>(codes[col] + offset) << held;
      held += bits;
      if (held < 32) continue;
      *to++ = static_cast<std::int32_t>(static_cast<std::uint32_t>(waiting));
      waiting >>= 32;
      held -= 32;
    }
    if (held > 0) *to = static_cast<std::int32_t>(static_cast<std::uint32_t>(waiting));
  }
  return out;
}

void unpack_weight(const TensorView& packed, QuantizedTensor& tensor) {
  const int bits = tensor.codec.bits(), offset = offset_of(tensor.codec);
  const std::uint32_t mask = (1u << bits) - 1;
  const std::int64_t words = packed_words(tensor.cols, bits);
  tensor.codes.resize(static_cast<std::size_t>(tensor.rows * tensor.cols));
  for (std::int64_t row = 0; row < tensor.rows; ++row) {
    const std::byte* from = packed.data.data() + row * words * 4;
    std::int8_t* codes = tensor.codes.data() + row * tensor.cols;
    std::uint64_t waiting = 0;
    int held = 0;  // bits
    for (std::int64_t col = 0; col < tensor.cols; ++col) {
      if (held < bits) {
        std::uint32_t word;
        std::memcpy(&word, from, 4);
        from += 4;
        waiting |= static_cast<std::uint64_t>(word) << held;
        held += 32;
      }
      codes[col] = static_cast<std::int8_t>(static_cast<int>(static_cast<std::uint32_t>(waiting) & mask) - offset);
      waiting >>= bits;
      held -= bits;
    }
  }
}

void unpack_zero_points(const TensorView& packed, QuantizedTensor& tensor) {
  const std::int64_t groups = tensor.codec.groups(tensor.cols);
  tensor.zeros.resize(static_cast<std::size_t>(tensor.rows * groups));
  for (std::int64_t row = 0; row < tensor.rows; ++row) {
    for (std::int64_t g = 0; g < groups; ++g) {
      std::uint32_t word;
      std::memcpy(&word, packed.data.data() + (row / 8 * groups + g) * 4, 4);
      tensor.zeros[static_cast<std::size_t>(row * groups + g)] = static_cast<std::uint8_t>((word >> (row % 8 * 4)) & 15u);
    }
  }
}

Json quantization_config(const std::map<std::string, Codec>& modules, const std::vector<std::string>& ignored) {
  std::map<std::string, std::vector<std::string>> by_codec;  // ordered, so that the same model gives the same text
  for (const auto& [module, codec] : modules) by_codec[codec.name()].push_back(module);
  Json groups = Json::object();
  std::string format;
  for (const auto& [name, targets] : by_codec) {
    const Codec codec = Codec::parse(name, "quantization_config");
    const bool channel = codec.group == Codec::kPerRow;
    Json weights = {{"num_bits", codec.bits()},
                    {"type", "int"},
                    {"symmetric", true},
                    {"strategy", channel ? "channel" : "group"},
                    {"group_size", channel ? Json(nullptr) : Json(codec.group)},
                    {"dynamic", false},
                    {"actorder", nullptr},
                    {"block_structure", nullptr},
                    {"observer", "minmax"},
                    {"observer_kwargs", Json::object()}};
    const Json inputs = {{"num_bits", 8},          {"type", "int"},         {"symmetric", true},
                         {"strategy", "token"},    {"group_size", nullptr}, {"dynamic", true},
                         {"actorder", nullptr},    {"observer", nullptr},   {"block_structure", nullptr},
                         {"observer_kwargs", Json::object()}};
    const std::string own = codec.int8_inputs ? kIntFormat : kPackedFormat;
    groups["group_" + std::to_string(groups.size())] = {
        {"targets", targets},
        {"weights", weights},
        {"input_activations", codec.int8_inputs ? inputs : Json(nullptr)},
        {"output_activations", nullptr},
        {"format", own}};
    format = format.empty() || format == own ? own : kMixedFormat;
  }
  return {{"quant_method", "compressed-tensors"},
          {"format", format},
          {"quantization_status", "compressed"},
          {"global_compression_ratio", nullptr},
          {"kv_cache_scheme", nullptr},
          {"ignore", ignored},
          {"config_groups", groups}};
}

QuantizationSchemes::QuantizationSchemes(const Json& config, const std::string& place) : place_(place) {
  if (!config.is_object()) throw input_error(place, "an object", config.type_name());
  const auto text = [&](const char* key) {
    return config.contains(key) && config[key].is_string() ? config[key].get<std::string>() : std::string();
  };
  if (text("quant_method") != "compressed-tensors")
    throw input_error(place + ".quant_method", "compressed-tensors or gptq", "\"" + text("quant_method") + "\"",
                      "other quantized folders are not supported; start from the float model");
  const std::string format = text("format");
  if (format != kPackedFormat && format != kIntFormat && format != kMixedFormat)
    throw input_error(place + ".format", std::string(kPackedFormat) + ", " + kIntFormat + " or " + kMixedFormat,
                      "\"" + format + "\"");
  if (config.contains("kv_cache_scheme") && !config["kv_cache_scheme"].is_null())
    throw input_error(place + ".kv_cache_scheme", "null", "a quantized key-value cache");
  if (!config.contains("config_groups") || !config["config_groups"].is_object())
    throw input_error(place + ".config_groups", "an object of schemes", "none");
  for (const auto& [name, group] : config["config_groups"].items()) {
    const std::string where = place + ".config_groups." + name;
    const Codec codec = codec_of_scheme(group, where);
    if (!group.contains("targets") || !group["targets"].is_array())
      throw input_error(where + ".targets", "a list of modules", "none");
    for (const Json& target : group["targets"]) {
      if (!target.is_string()) throw input_error(where + ".targets", "texts", target.type_name());
      const auto module = target.get<std::string>();
      if (module.starts_with("re:")) {
        matches(module.substr(3), "", where);  // a bad pattern is refused here and not at first use
        patterns_.push_back({module.substr(3), codec});
      } else if (module == "Linear") {
        linear_.push_back(codec);
      } else if (!exact_.emplace(module, codec).second) {
        throw input_error(where + ".targets", "every module once", module + " twice");
      }
    }
  }
}

Codec QuantizationSchemes::codec(const std::string& module) const {
  if (const auto found = exact_.find(module); found != exact_.end()) return found->second;
  for (const Target& target : patterns_)
    if (matches(target.pattern, module, place_)) return target.codec;
  if (!linear_.empty()) return linear_.front();
  throw input_error(place_, "a scheme for module " + module, "none that targets it");
}

}  // namespace pare
