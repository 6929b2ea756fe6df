// Every value of every family's config.json replaced by hostile ones: read as something sane, or refused with exit 3.
#include <gtest/gtest.h>

#include <cmath>

#include "core/config.h"
#include "core/error.h"
#include "core/file.h"

namespace pare {
namespace {

std::vector<Json> hostile_values() {
  return {nullptr, true, 0, -1, 1, 3, 1ll << 40, 9223372036854775807ll, 18446744073709551615ull, 0.5, -0.0, 1e308, "",
          "x", "sliding_attention", Json::array(), Json::array({1}), Json::array({-1, "x", nullptr}), Json::object(),
          Json::object({{"rope_type", "spiral"}}), Json::array({Json::array(), Json::object()})};
}

// What every reader of a ModelConfig takes for granted.
void expect_sane(const ModelConfig& c, const std::string& what) {
  EXPECT_TRUE(c.vocab_size > 0 && c.hidden_size > 0 && c.intermediate_size > 0 && c.num_layers > 0) << what;
  EXPECT_TRUE(c.num_heads > 0 && c.num_kv_heads > 0 && c.num_heads % c.num_kv_heads == 0) << what;
  EXPECT_TRUE(c.head_dim > 0 && c.rotated() > 0 && c.rotated() <= c.head_dim && c.rotated() % 2 == 0) << what;
  EXPECT_TRUE(c.max_position_embeddings > 0 && c.rms_norm_eps >= 0 && c.attention_scale >= 0) << what;
  EXPECT_TRUE(std::isfinite(c.embedding_scale) && c.attention_softcap >= 0 && c.final_softcap >= 0) << what;
  for (const auto* list : {&c.layer_slides, &c.layer_rotates})
    EXPECT_TRUE(list->empty() || static_cast<std::int64_t>(list->size()) == c.num_layers) << what;
  EXPECT_TRUE(c.layer_slides.empty() || c.sliding_window > 0) << what;
  EXPECT_TRUE(!c.learned_positions || c.max_position_embeddings <= 1 << 24) << what;
  EXPECT_TRUE(c.activation != Activation::kGelu || !c.gated_mlp) << what;
  EXPECT_TRUE(!c.has_experts() || (c.experts.per_token > 0 && c.experts.per_token <= c.experts.count)) << what;
  for (const std::int64_t positions : {1, 1 << 20}) {
    for (const RopeKind kind : {RopeKind::kGlobal, RopeKind::kLocal, RopeKind::kNone}) {
      if (kind == RopeKind::kLocal && c.rope_local_theta == 0) continue;
      const auto frequencies = rope_frequencies(c, kind, positions);
      EXPECT_EQ(static_cast<std::int64_t>(frequencies.size()), c.rotated() / 2) << what;
      for (const double f : frequencies) EXPECT_TRUE(std::isfinite(f) && f >= 0) << what;
    }
  }
  EXPECT_GT(rope_attention_factor(c), 0) << what;
  EXPECT_GT(parameter_count(c), 0) << what;
}

void try_config(const Json& config, const std::string& what, int& read, int& refused) {
  try {
    const ModelConfig parsed = parse_config(config, nullptr, "hostile");
    ++read;
    expect_sane(parsed, what);
    const ModelConfig again = parse_config(write_config(parsed, "float32"), nullptr, "written " + what);
    EXPECT_EQ(again.layer_slides, parsed.layer_slides) << what;
    EXPECT_EQ(again.layer_rotates, parsed.layer_rotates) << what;
    EXPECT_EQ(rope_frequencies(again), rope_frequencies(parsed)) << what;
    EXPECT_EQ(parameter_count(again), parameter_count(parsed)) << what;
    EXPECT_TRUE(again.rotated() == parsed.rotated() && again.activation == parsed.activation &&
                again.parallel_residual == parsed.parallel_residual && again.rms_norm_eps == parsed.rms_norm_eps &&
                again.attention_scale == parsed.attention_scale) << what;
  } catch (const Error& error) {
    ++refused;
    EXPECT_EQ(error.code(), ExitCode::kInput) << what << ": " << error.what();
    EXPECT_FALSE(error.place().starts_with("written")) << what << ": " << error.what();
    EXPECT_FALSE(error.expected().empty() || error.found().empty()) << what;
  } catch (const std::exception& error) {
    ADD_FAILURE() << what << ": " << error.what();
  }
}

TEST(HostileConfig, EveryKeyOfEveryFamily) {
  int read = 0, refused = 0;
  for (const auto& entry : fs::directory_iterator(fs::path(PARE_SOURCE_DIR) / "tests/golden/families")) {
    const Json config = read_json(entry.path()).at("config");
    const std::string name = entry.path().stem().string();
    std::vector<std::string> keys = {"sliding_window", "rope_scaling", "rope_parameters", "partial_rotary_factor",
                                     "layer_types", "head_dim", "text_config", "num_experts", "no_rope_layers",
                                     "original_max_position_embeddings", "rope_theta", "num_key_value_heads",
                                     "rotary_pct", "rotary_emb_base", "n_inner", "hidden_size"};
    for (const auto& [key, value] : config.items()) keys.push_back(key);
    for (const std::string& key : keys) {
      Json without = config;
      without.erase(key);
      try_config(without, name + " without " + key, read, refused);
      for (const Json& value : hostile_values()) {
        Json changed = config;
        changed[key] = value;
        try_config(changed, name + " with " + key + " " + value.dump(), read, refused);
        for (const char* scaling : {"rope_scaling", "rope_parameters"}) {  // and inside
          if (key != scaling || !config.contains(scaling) || !config[scaling].is_object()) continue;
          for (const auto& [inner, ignored] : config[scaling].items()) {
            changed = config;
            changed[scaling][inner] = value;
            try_config(changed, name + " with " + key + "." + inner + " " + value.dump(), read, refused);
          }
        }
      }
    }
  }
  EXPECT_GT(read, 1000);
  EXPECT_GT(refused, 1000);
}

}  // namespace
}  // namespace pare
