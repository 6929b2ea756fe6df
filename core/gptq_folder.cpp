#include "core/gptq_folder.h"

#include <cmath>
#include <cstring>

#include "core/error.h"

namespace pare {
namespace {

constexpr int kWord = 32;
constexpr std::int64_t kMostGroup = 1 << 20;  // more inputs than any linear has
constexpr std::int64_t kMultiple = 32;  // of inputs and outputs: what the kernels of these folders take

std::uint32_t word(const TensorView& view, std::int64_t at) {
  std::uint32_t value;
  std::memcpy(&value, view.data.data() + at * 4, sizeof value);
  return value;
}

std::uint32_t part(std::uint32_t packed, std::int64_t at, int bits) {
  return packed >> (at % (kWord / bits) * bits) & ((1u << bits) - 1);
}

// What makes a signed code the unsigned one of the file; q4a codes are unsigned already.
int offset_of(const Codec& codec) { return codec.kind == CodecKind::kQ4a ? 0 : 1 << (codec.bits() - 1); }

int zero_of(const QuantizedTensor& tensor, std::int64_t row, std::int64_t group) {
  if (tensor.codec.kind != CodecKind::kQ4a) return offset_of(tensor.codec);
  return tensor.zeros[static_cast<std::size_t>(row * tensor.codec.groups(tensor.cols) + group)];
}

}  // namespace

bool GptqScheme::is_gptq(const Json& config) {
  return config.is_object() && config.contains("quant_method") && config["quant_method"] == "gptq";
}

GptqScheme GptqScheme::parse(const Json& config, const std::string& place) {
  GptqScheme scheme;
  const auto given = [&](const char* key) { return config.contains(key) && !config[key].is_null(); };
  const auto whole = [&](const char* key) -> std::int64_t {
    if (!given(key) || !config[key].is_number_integer())
      throw input_error(place + "." + key, "a whole number", given(key) ? config[key].dump() : "none");
    if (config[key].is_number_unsigned() && config[key].get<std::uint64_t>() > INT64_MAX)
      throw input_error(place + "." + key, "a whole number of 64 bits", config[key].dump());
    return config[key].get<std::int64_t>();
  };
  const std::int64_t bits = whole("bits");
  if (bits != 4 && bits != 8)
    throw input_error(place + ".bits", "4 or 8", std::to_string(bits), "start from the float model");
  scheme.bits = static_cast<int>(bits);
  scheme.group = whole("group_size");
  if (scheme.group != Codec::kPerRow && (scheme.group < 1 || scheme.group > kMostGroup))
    throw input_error(place + ".group_size", "-1 or a number from 1 to " + std::to_string(kMostGroup),
                      std::to_string(scheme.group), "-1 is one group for all inputs");
  const Json format = given("checkpoint_format") ? config["checkpoint_format"] : Json("gptq");
  if (format != "gptq" && format != "gptq_v2")
    throw input_error(place + ".checkpoint_format", "gptq or gptq_v2", format.dump(), "start from the float model");
  scheme.less_one = format == "gptq";
  if (given("is_marlin_format") && config["is_marlin_format"] != false)
    throw input_error(place + ".is_marlin_format", "false", config["is_marlin_format"].dump());
  if (given("pack_dtype") && config["pack_dtype"] != "int32")
    throw input_error(place + ".pack_dtype", "int32", config["pack_dtype"].dump());
  if (given("dynamic")) {
    if (!config["dynamic"].is_object()) throw input_error(place + ".dynamic", "an object", config["dynamic"].dump());
    for (const auto& [pattern, change] : config["dynamic"].items())  // "-:" leaves modules in floats, as they are found
      if (!pattern.starts_with("-:") && change != Json::object())
        throw input_error(place + ".dynamic." + pattern, "the same bits and groups for all modules", change.dump());
  }
  return scheme;
}

std::int64_t GptqScheme::groups(std::int64_t inputs) const {
  return group == Codec::kPerRow ? 1 : (inputs + group - 1) / group;
}

GptqLinear::GptqLinear(const GptqScheme& scheme, const GptqViews& views, std::int64_t outputs, std::int64_t inputs,
                       const std::string& place)
    : scheme_(scheme), views_(views), outputs_(outputs), inputs_(inputs) {
  const std::int64_t groups = scheme.groups(inputs);
  group_of_.resize(static_cast<std::size_t>(inputs));
  for (std::int64_t i = 0; i < inputs; ++i) {
    const auto plain = static_cast<std::int32_t>(scheme.group == Codec::kPerRow ? 0 : i / scheme.group);
    auto& group = group_of_[static_cast<std::size_t>(i)];
    group = views.order != nullptr ? static_cast<std::int32_t>(word(*views.order, i)) : plain;
    if (group < 0 || group >= groups)
      throw input_error(place + "." + kGptqOrder, "groups from 0 to " + std::to_string(groups - 1),
                        std::to_string(group) + " of input " + std::to_string(i));
    reordered_ = reordered_ || group != plain;
  }
  choose(place);
}

std::uint32_t GptqLinear::code(std::int64_t output, std::int64_t input) const {
  return part(word(*views_.weight, input * scheme_.bits / kWord * outputs_ + output), input, scheme_.bits);
}

std::int32_t GptqLinear::zero(std::int64_t group, std::int64_t output) const {
  const std::uint32_t packed = word(*views_.zeros, group * scheme_.words(outputs_) + output * scheme_.bits / kWord);
  return static_cast<std::int32_t>(part(packed, output, scheme_.bits)) + (scheme_.less_one ? 1 : 0);
}

float GptqLinear::scale(std::int64_t group, std::int64_t output) const {
  float value;
  to_f32(*views_.scales, group * outputs_ + output, 1, &value);
  return value;
}

void GptqLinear::choose(const std::string& place) {
  const std::int64_t groups = scheme_.groups(inputs_);
  const int middle = 1 << (scheme_.bits - 1), beyond = 1 << scheme_.bits;
  bool symmetric = true, halves = true, negative = false;
  for (std::int64_t g = 0; g < groups; ++g) {
    for (std::int64_t row = 0; row < outputs_; ++row) {
      const std::int32_t at = zero(g, row);
      const float by = scale(g, row);
      const auto where = [&] { return " in group " + std::to_string(g) + " of output " + std::to_string(row); };
      if (at == beyond)
        throw input_error(place + "." + kGptqZeros, "zero points from 1 to " + std::to_string(beyond - 1),
                          "a stored " + std::to_string(beyond - 1) + where(),
                          "in version 1 readers take it for " + std::to_string(beyond) +
                              " or for 0; save the model as gptq_v2, or start from the float one");
      if (!std::isfinite(by))
        throw input_error(place + "." + kGptqScales, "finite scales", std::to_string(by) + where(),
                          "the file is damaged");
      symmetric = symmetric && at == middle;
      halves = halves && f16_to_f32(f32_to_f16(by)) == by;
      negative = negative || by < 0;
    }
  }
  codec_ = {};
  if (reordered_ || !halves) return;
  const bool per_row = groups == 1;
  const auto dividing = [&]() -> std::int64_t {  // the scale of a longer group is repeated
    for (const std::int64_t size : {128, 64, 32})
      if (inputs_ % size == 0 && (per_row || scheme_.group % size == 0)) return size;
    return 0;
  };
  if (scheme_.bits == 4) {
    if (dividing() > 0 && (symmetric || !negative)) codec_ = {symmetric ? CodecKind::kQ4 : CodecKind::kQ4a, dividing()};
    return;
  }
  const bool in_32s = scheme_.group != Codec::kPerRow && dividing() > 0;
  if (!symmetric || negative || (!in_32s && !per_row)) return;
  for (std::size_t i = 0; i < views_.weight->data.size(); ++i)
    if (views_.weight->data[i] == std::byte{0}) return;  // -128
  codec_ = {CodecKind::kQ8, in_32s ? 32 : Codec::kPerRow};
}

QuantizedTensor GptqLinear::codes() const {
  QuantizedTensor out;
  out.codec = codec_;
  out.rows = outputs_;
  out.cols = inputs_;
  const std::int64_t groups = codec_.groups(inputs_), width = inputs_ / groups;
  const int offset = offset_of(codec_);
  out.codes.resize(static_cast<std::size_t>(outputs_ * inputs_));
  out.scales.resize(static_cast<std::size_t>(outputs_ * groups));
  if (codec_.kind == CodecKind::kQ4a) out.zeros.resize(out.scales.size());
  const std::int64_t per_word = kWord / scheme_.bits;
  for (std::int64_t first = 0; first < inputs_; first += per_word) {  // in the order of the file
    for (std::int64_t row = 0; row < outputs_; ++row) {
      const std::uint32_t packed = word(*views_.weight, first / per_word * outputs_ + row);
      std::int8_t* to = out.codes.data() + row * inputs_ + first;
      for (std::int64_t i = 0; i < per_word; ++i)
        to[i] = static_cast<std::int8_t>(static_cast<int>(part(packed, i, scheme_.bits)) - offset);
    }
  }
  for (std::int64_t row = 0; row < outputs_; ++row) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t stored = group_of_[static_cast<std::size_t>(g * width)];
      const auto at = static_cast<std::size_t>(row * groups + g);
      const std::uint16_t bits = f32_to_f16(scale(stored, row));
      out.scales[at] = bits == 0x8000u ? std::uint16_t{0} : bits;  // -0 means 0
      if (!out.zeros.empty()) out.zeros[at] = static_cast<std::uint8_t>(zero(stored, row));
    }
  }
  return out;
}

void GptqLinear::read_row(std::int64_t output, float* out) const {
  const std::int64_t groups = scheme_.groups(inputs_);
  std::vector<float> scales(static_cast<std::size_t>(groups));
  std::vector<std::int32_t> zeros(static_cast<std::size_t>(groups));
  for (std::int64_t g = 0; g < groups; ++g) {
    scales[static_cast<std::size_t>(g)] = scale(g, output);
    zeros[static_cast<std::size_t>(g)] = zero(g, output);
  }
  for (std::int64_t i = 0; i < inputs_; ++i) {
    const auto g = static_cast<std::size_t>(group_of_[static_cast<std::size_t>(i)]);
    out[i] = static_cast<float>(static_cast<std::int32_t>(code(output, i)) - zeros[g]) * scales[g];
  }
}

std::string gptq_obstacle(const Codec& codec, std::int64_t outputs, std::int64_t inputs) {
  if (codec.kind == CodecKind::kQ4m) return "q4m has a minimum where GPTQ has a zero point that is a whole number";
  if (codec.int8_inputs) return "w8a8 rounds inputs, which GPTQ cannot say; quantize with q8c";
  if (codec.kind != CodecKind::kQ4 && codec.kind != CodecKind::kQ4a && codec.kind != CodecKind::kQ8)
    return codec.name() + " has " + std::to_string(codec.bits()) + " bits, not 4 or 8";
  if (outputs % kMultiple != 0 || inputs % kMultiple != 0)
    return std::to_string(outputs) + " outputs and " + std::to_string(inputs) +
           " inputs: both have to be multiples of 32";
  return "";
}

std::vector<std::int32_t> pack_gptq_weight(const QuantizedTensor& tensor) {
  const int bits = tensor.codec.bits(), per_word = kWord / bits, offset = offset_of(tensor.codec);
  std::vector<std::uint32_t> out(static_cast<std::size_t>(tensor.cols / per_word * tensor.rows));
  for (std::int64_t row = 0; row < tensor.rows; ++row)
    for (std::int64_t i = 0; i < tensor.cols; ++i) {
      const int code = tensor.codes[static_cast<std::size_t>(row * tensor.cols + i)] + offset;
      out[static_cast<std::size_t>(i / per_word * tensor.rows + row)] |=
          static_cast<std::uint32_t>(code) << (i % per_word * bits);
    }
  return {out.begin(), out.end()};
}

std::vector<std::int32_t> pack_gptq_zeros(const QuantizedTensor& tensor, bool less_one) {
  const int bits = tensor.codec.bits(), per_word = kWord / bits;
  const std::int64_t groups = tensor.codec.groups(tensor.cols), words = tensor.rows / per_word;
  std::vector<std::uint32_t> out(static_cast<std::size_t>(groups * words));
  for (std::int64_t g = 0; g < groups; ++g)
    for (std::int64_t row = 0; row < tensor.rows; ++row)
      out[static_cast<std::size_t>(g * words + row / per_word)] |=
          static_cast<std::uint32_t>(zero_of(tensor, row, g) - (less_one ? 1 : 0)) << (row % per_word * bits);
  return {out.begin(), out.end()};
}

std::vector<std::uint16_t> pack_gptq_scales(const QuantizedTensor& tensor) {
  const std::int64_t groups = tensor.codec.groups(tensor.cols);
  std::vector<std::uint16_t> out(tensor.scales.size());
  for (std::int64_t row = 0; row < tensor.rows; ++row)
    for (std::int64_t g = 0; g < groups; ++g)
      out[static_cast<std::size_t>(g * tensor.rows + row)] = tensor.scales[static_cast<std::size_t>(row * groups + g)];
  return out;
}

std::vector<std::int32_t> gptq_order(const Codec& codec, std::int64_t inputs) {
  std::vector<std::int32_t> out(static_cast<std::size_t>(inputs));
  for (std::int64_t i = 0; i < inputs; ++i)
    out[static_cast<std::size_t>(i)] = codec.group == Codec::kPerRow ? 0 : static_cast<std::int32_t>(i / codec.group);
  return out;
}

Json gptq_config(const Codec& codec, bool less_one, bool head, const std::vector<std::string>& floats) {
  Json config = {{"quant_method", "gptq"},
                 {"bits", codec.bits()},
                 {"group_size", codec.group},
                 {"desc_act", false},
                 {"sym", codec.kind != CodecKind::kQ4a},
                 {"lm_head", head},
                 {"checkpoint_format", less_one ? "gptq" : "gptq_v2"},
                 {"pack_dtype", "int32"}};
  for (const std::string& module : floats) {
    std::string pattern = "-:^";
    for (const char c : module) pattern += c == '.' ? std::string("\\.") : std::string(1, c);
    config["dynamic"][pattern + "$"] = Json::object();
  }
  return config;
}

}  // namespace pare
