#include "core/arch/rope.h"

#include <cmath>
#include <numbers>

namespace pare {
namespace {

constexpr std::int64_t kMaxPositions = 1ll << 40;
constexpr double kDefaultLocalTheta = 10000.0;

std::vector<double> read_factors(ConfigReader& rope, const std::string& key, std::int64_t pairs) {
  std::vector<double> factors;
  if (!rope.present(key) || !rope[key].is_array()) {
    rope.problem(key + (rope.present(key) ? " is not a list" : " is missing"));
    return factors;
  }
  for (const Json& value : rope[key]) {
    const double factor = value.is_number() ? value.get<double>() : 0;
    if (!(factor > 0 && factor < 1e9)) {
      rope.problem(key + " has an entry that is not a number above 0");
      return {};
    }
    factors.push_back(factor);
  }
  if (static_cast<std::int64_t>(factors.size()) != pairs)
    rope.problem(key + " has " + std::to_string(factors.size()) + " entries for " + std::to_string(pairs) +
                 " rotated pairs");
  return factors;
}

Llama3Rope read_llama3(ConfigReader& root, ConfigReader& rope) {
  Llama3Rope scaling;
  for (const char* name : {"factor", "low_freq_factor", "high_freq_factor"})
    if (!rope.present(name)) rope.problem(std::string(name) + " is missing");
  scaling.factor = rope.number("factor", 8, 1e-6, 1e6);
  scaling.low_freq_factor = rope.number("low_freq_factor", 1, 1e-6, 1e6);
  scaling.high_freq_factor = rope.number("high_freq_factor", 4, 1e-6, 1e6);
  const std::int64_t at_root = root.integer("original_max_position_embeddings", 0, 0, kMaxPositions);
  scaling.original_max_position = rope.integer("original_max_position_embeddings",
                                               at_root > 0 ? std::optional(at_root) : std::nullopt, 1, kMaxPositions);
  if (scaling.high_freq_factor <= scaling.low_freq_factor)
    rope.problem("high_freq_factor is not above low_freq_factor");
  return scaling;
}

// transformers takes original_max_position_embeddings from the root (class default 4096), whatever rope_parameters
// says.
LongRope read_long(ConfigReader& root, ConfigReader& rope, const ModelConfig& config) {
  LongRope scaling;
  scaling.original_max_position = root.integer("original_max_position_embeddings", 4096, 2, kMaxPositions);
  const std::int64_t inside =
      rope.integer("original_max_position_embeddings", scaling.original_max_position, 1, kMaxPositions);
  if (inside != scaling.original_max_position)
    rope.problem("original_max_position_embeddings is " + std::to_string(inside) + ", but " +
                 std::to_string(scaling.original_max_position) + " holds, from outside or by default");
  scaling.short_factor = read_factors(rope, "short_factor", config.rotated() / 2);
  scaling.long_factor = read_factors(rope, "long_factor", config.rotated() / 2);
  if (rope.present("factor")) scaling.said_factor = rope.number("factor", 1, 1e-6, 1e6);
  if (rope.present("attention_factor")) scaling.said_attention_factor = rope.number("attention_factor", 1, 1e-6, 1e6);
  const auto original = static_cast<double>(scaling.original_max_position);
  const double factor = scaling.said_factor.value_or(static_cast<double>(config.max_position_embeddings) / original);
  const double suggested = factor <= 1 ? 1 : std::sqrt(1 + std::log(factor) / std::log(original));
  scaling.attention_factor = scaling.said_attention_factor.value_or(suggested);
  return scaling;
}

void read_partial(ConfigReader& reader, const Family& family, const char* key, ModelConfig& config) {
  if (!reader.present(key) && family.default_partial == 1) return;
  const double factor = reader.number(key, family.default_partial, 0.0, 1.0);
  const auto rotated = static_cast<std::int64_t>(static_cast<double>(config.head_dim) * factor);
  if (rotated == config.head_dim) {
    config.rotary_dim = 0;
  } else if (!family.rotates_partly) {
    reader.problem(std::string(key) + " is not 1, which " + family.architecture + " does not compute");
  } else if (rotated < 2 || rotated % 2 != 0) {
    reader.problem(std::string(key) + " rotates " + std::to_string(rotated) + " of " +
                   std::to_string(config.head_dim) + " dimensions, not an even number of them");
  } else {
    config.rotary_dim = rotated;
  }
}

Json scaling_object(const ModelConfig& config) {
  Json rope = Json::object();
  if (config.rope_llama3) {
    const Llama3Rope& scaling = *config.rope_llama3;
    rope["rope_type"] = "llama3";
    rope["factor"] = scaling.factor;
    rope["low_freq_factor"] = scaling.low_freq_factor;
    rope["high_freq_factor"] = scaling.high_freq_factor;
    rope["original_max_position_embeddings"] = scaling.original_max_position;
  } else if (config.rope_long) {
    rope["rope_type"] = "longrope";
    rope["short_factor"] = config.rope_long->short_factor;
    rope["long_factor"] = config.rope_long->long_factor;
    if (config.rope_long->said_factor) rope["factor"] = *config.rope_long->said_factor;
    if (config.rope_long->said_attention_factor) rope["attention_factor"] = *config.rope_long->said_attention_factor;
  } else if (config.rope_linear_factor != 1.0) {
    rope["rope_type"] = "linear";
    rope["factor"] = config.rope_linear_factor;
  }
  return rope;
}

// rope_scaling of transformers 4: before 4.43 the key was "type"; its Phi-3 wants exactly "type" and the two lists.
Json old_scaling(const Json& scaling) {
  if (scaling.empty()) return nullptr;
  Json old = scaling;
  const std::string type = scaling["rope_type"].get<std::string>();
  if (type == "llama3") return old;
  if (type == "longrope") old.erase("rope_type");
  old["type"] = type;
  return old;
}

}  // namespace

void read_rope(ConfigReader& reader, const Family& family, ModelConfig& config) {
  constexpr const char* kPartial = "partial_rotary_factor";
  config.rope_theta = reader.number(family.keys.theta, family.default_theta, 1.0, 1e15);
  const auto said_in = [&](const char* key) {
    return reader.present(key) && reader[key].is_object() && reader[key].contains(kPartial) &&
           !reader[key][kPartial].is_null();
  };
  // A default that the class would not come to must not be judged.
  const bool inside = said_in(reader.present("rope_parameters") ? "rope_parameters" : "rope_scaling");
  if (!inside || family.default_partial == 1) read_partial(reader, family, family.keys.partial, config);
  if (family.rope_by_kind)
    config.rope_local_theta = reader.number("rope_local_base_freq", kDefaultLocalTheta, 1.0, 1e15);
  std::string key;
  if (reader.present("rope_parameters"))
    key = "rope_parameters";
  else if (reader.present("rope_scaling"))
    key = "rope_scaling";
  if (key.empty()) return;
  if (!reader[key].is_object()) {
    reader.problem(key + " is not an object");
    return;
  }
  const auto has_object = [&](const char* kind) { return reader[key].contains(kind) && reader[key][kind].is_object(); };
  ConfigReader outer = reader.nested(key);
  if (family.rope_by_kind && has_object("sliding_attention")) {
    ConfigReader local = outer.nested("sliding_attention");
    config.rope_local_theta = local.number("rope_theta", config.rope_local_theta, 1.0, 1e15);
    const std::string type = local.text("rope_type", local.text("type", "default"));
    if (type != "default")
      local.problem("sliding_attention has rope_type \"" + type + "\"; supported there is default");
    reader.take(local);
  }
  ConfigReader rope = has_object("full_attention") ? outer.nested("full_attention") : reader.nested(key);
  config.rope_theta = rope.number("rope_theta", config.rope_theta, 1.0, 1e15);
  if (rope.present(kPartial)) read_partial(rope, family, kPartial, config);
  const std::string type = rope.text("rope_type", rope.text("type", "default"));
  if (type == "linear") {
    if (!rope.present("factor")) rope.problem("factor is missing");
    config.rope_linear_factor = rope.number("factor", 1.0, 1e-6, 1e6);
  } else if (type == "llama3") {
    config.rope_llama3 = read_llama3(reader, rope);
  } else if (type == "longrope" || type == "su" || (type == "yarn" && rope.present("short_factor"))) {
    config.rope_long = read_long(reader, rope, config);
  } else if (type != "default") {
    rope.problem("rope_type is \"" + type + "\"; supported are default, linear, llama3 and longrope");
  }
  reader.take(rope);
}

void write_rope(const ModelConfig& config, const Family& family, Json& out) {
  const Json scaling = scaling_object(config);
  out[family.keys.theta] = config.rope_theta;
  out["rope_scaling"] = old_scaling(scaling);
  Json parameters = scaling;
  if (scaling.empty()) parameters["rope_type"] = "default";
  parameters["rope_theta"] = config.rope_theta;
  const char* partial = family.keys.partial;
  if (config.rotary_dim > 0 || out.contains(partial) || family.default_partial != 1) {
    const double factor = static_cast<double>(config.rotated()) / static_cast<double>(config.head_dim);
    // Keep the number that was read where it means the same: 0.75 must not become 0.7499.
    double said = out.contains(partial) && out[partial].is_number() ? out[partial].get<double>() : factor;
    if (static_cast<std::int64_t>(static_cast<double>(config.head_dim) * said) != config.rotated()) said = factor;
    if (static_cast<std::int64_t>(static_cast<double>(config.head_dim) * said) < config.rotated())
      said = std::nextafter(said, 2.0);
    out[partial] = said;
    parameters["partial_rotary_factor"] = said;
  }
  if (config.rope_long) parameters["original_max_position_embeddings"] = config.rope_long->original_max_position;
  if (!family.rope_by_kind) {
    out["rope_parameters"] = parameters;
    return;
  }
  out["rope_local_base_freq"] = config.rope_local_theta;
  out["rope_parameters"] = {{"full_attention", parameters},
                            {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", config.rope_local_theta}}}};
}

std::vector<double> rope_frequencies(const ModelConfig& config, RopeKind kind, std::int64_t positions) {
  std::vector<double> frequencies;
  const std::int64_t pairs = config.rotated() / 2;
  if (kind == RopeKind::kNone) return std::vector<double>(static_cast<std::size_t>(pairs), 0.0);
  const double theta = kind == RopeKind::kLocal ? config.rope_local_theta : config.rope_theta;
  for (std::int64_t i = 0; i < pairs; ++i) {
    double f = std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(config.rotated()));
    if (kind == RopeKind::kLocal) {
      frequencies.push_back(f);
      continue;
    }
    f /= config.rope_linear_factor;
    if (config.rope_long) {
      const bool beyond = rope_beyond(config, positions);
      f /= (beyond ? config.rope_long->long_factor : config.rope_long->short_factor)[static_cast<std::size_t>(i)];
    }
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

double rope_attention_factor(const ModelConfig& config, RopeKind kind) {
  return kind == RopeKind::kGlobal && config.rope_long ? config.rope_long->attention_factor : 1.0;
}

}  // namespace pare
