// Random small checkpoints of every family, through another format and back, byte for byte.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "core/arch/arch.h"
#include "core/error.h"
#include "core/gguf_file.h"
#include "runtime/export.h"
#include "runtime/gguf_export.h"
#include "tests/families.h"
#include "tests/scratch.h"

namespace pare::testing {

class Dice {
 public:
  explicit Dice(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}
  std::uint64_t bits() {
    state_ += 0x9e3779b97f4a7c15ull;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(high - low + 1));
  }
  template <class T>
  T one_of(std::initializer_list<T> list) {
    return *(list.begin() + between(0, static_cast<std::int64_t>(list.size()) - 1));
  }

 private:
  std::uint64_t state_;
};

// A config of a family that llama.cpp computes, of random dimensions.
inline Json random_config(Dice& dice) {
  const Family& family =
      *families()[static_cast<std::size_t>(dice.between(0, static_cast<std::int64_t>(families().size()) - 1))];
  const std::string name = family.name;
  const bool fixed = name == "qwen2" || name == "phi3";  // heads as wide together as the model
  const std::int64_t kv = dice.between(1, 2), heads = kv * dice.between(1, 2), head_dim = 2 * dice.between(1, 8);
  const std::int64_t hidden = fixed || family.heads_share_width ? heads * head_dim : dice.between(1, 24);
  Json config = {{"architectures", {family.architecture}}, {"model_type", name}};
  const auto set = [&](const char* key, const Json& value) { config[key] = value; };
  set("vocab_size", dice.between(4, 30));
  set(family.keys.hidden, hidden);
  set(family.keys.inner, dice.between(1, 20));
  set(family.keys.layers, dice.between(1, 3));
  set(family.keys.heads, heads);
  set(family.keys.positions, dice.between(8, 40));
  set(family.keys.epsilon, dice.one_of({1e-5, 1e-6}));
  set("eos_token_id", 2);
  set("torch_dtype", "float32");
  if (!family.heads_share_width) {
    set("num_key_value_heads", kv);
    set("head_dim", head_dim);
  }
  if (family.rotates) set(family.keys.theta, dice.one_of({10000.0, 500000.0}));
  const bool tied = name == "gemma" || name == "gemma2" || (name != "gpt_neox" && dice.between(0, 1) == 0);
  set("tie_word_embeddings", tied);
  if (name == "llama" && dice.between(0, 2) == 0) {
    set("attention_bias", true);
    set("mlp_bias", true);
  }
  if (name == "llama" && dice.between(0, 1) == 0)
    set("rope_scaling", {{"rope_type", "llama3"},
                         {"factor", dice.one_of({8.0, 32.0})},
                         {"low_freq_factor", 1.0},
                         {"high_freq_factor", 4.0},
                         {"original_max_position_embeddings", dice.one_of({16, 8192})}});
  if (name == "mistral" || name == "phi3") set("sliding_window", dice.between(0, 1) == 0 ? Json(nullptr) : Json(6));
  if (name == "phi3" && head_dim >= 4 && dice.between(0, 1) == 0) {
    Json factors = Json::array();
    for (std::int64_t i = 0; i < head_dim / 2; ++i) factors.push_back(1.0 + 0.05 * static_cast<double>(i));
    set("rope_scaling", {{"type", "longrope"}, {"short_factor", factors}, {"long_factor", factors}});
    set("original_max_position_embeddings", 8);
  }
  if (name == "gemma2" || name == "gemma3_text") {
    set("query_pre_attn_scalar", head_dim);
    set("sliding_window", dice.between(1, 8));
    set("hidden_activation", "gelu_pytorch_tanh");
  }
  if (name == "gpt_neox") set("rotary_pct", 1.0);
  if (name == "mixtral") {
    set("num_local_experts", dice.between(2, 3));
    set("num_experts_per_tok", 2);
    set("sliding_window", nullptr);
  }
  if (name == "qwen3_moe") {
    set("num_experts", dice.between(2, 3));
    set("num_experts_per_tok", 2);
    set("moe_intermediate_size", dice.between(1, 20));
    set("norm_topk_prob", true);
  }
  return config;
}

// Any bits at all: NaN with payloads, infinities, both zeros, subnormals; mostly ordinary numbers.
inline std::string random_payload(Dice& dice, DType dtype, std::int64_t elements, bool wild) {
  const std::size_t size = static_cast<std::size_t>(dtype_bits(dtype)) / 8;
  std::string bytes(static_cast<std::size_t>(elements) * size, '\0');
  for (std::size_t i = 0; i < static_cast<std::size_t>(elements); ++i) {
    const auto value = static_cast<float>(dice.between(-1000, 1000)) / 512.0f;
    if (dtype == DType::kF64) {  // finite, and nothing that 16 bits hold
      const double wide = static_cast<double>(value) + 3.0001;
      std::memcpy(bytes.data() + i * size, &wide, size);
      continue;
    }
    std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    if (dtype == DType::kF16) bits = f32_to_f16(value);
    if (dtype == DType::kBF16) bits = f32_to_bf16(value);
    if (wild && dice.between(0, 3) == 0) {
      const auto any = static_cast<std::uint32_t>(dice.bits());
      const std::uint32_t sign = size == 4 ? 0x80000000u : 0x8000u;
      const std::uint32_t full = dtype == DType::kF32 ? 0x7f800000u : dtype == DType::kF16 ? 0x7c00u : 0x7f80u;
      bits = dice.one_of<std::uint32_t>({any, sign, sign | full, full | any, full | 1u, any & ~full});
    }
    std::memcpy(bytes.data() + i * size, &bits, size);
  }
  return bytes;
}

// A folder of random tensors; each stored tensor has a type of its own where `mixed`, doubles too.
inline void make_random_folder(Dice& dice, const Json& config, const fs::path& folder) {
  fs::create_directories(folder);
  write_text(folder / "config.json", config.dump());
  const ModelConfig parsed = parse_config(config, nullptr, "random config");
  const std::vector<TensorSpec> specs = expected_tensors(parsed);
  const bool mixed = dice.between(0, 2) == 0, wild = dice.between(0, 1) == 0;
  const auto any = [&] { return dice.one_of({DType::kF32, DType::kF16, DType::kBF16, DType::kF64}); };
  const DType common = dice.one_of({DType::kF32, DType::kF16, DType::kBF16});
  std::map<std::string, DType> of_stack;  // experts of a block, which become one tensor, share a type
  std::vector<TensorDecl> decls;
  for (const StoredTensor& stored : stored_tensors(parsed, specs)) {
    const TensorSpec& first = *stored.parts[0];
    DType dtype = mixed ? any() : common;
    if (first.expert >= 0) {
      const std::string stack = std::to_string(first.layer) + first.module.substr(first.module.rfind('.'));
      dtype = of_stack.emplace(stack, dtype).first->second;
    }
    decls.push_back({stored.name, dtype, stored.shape});
  }
  SafetensorsWriter writer(folder / "model.safetensors", decls, {{"format", "pt"}});
  for (const TensorDecl& decl : decls) {
    std::int64_t elements = 1;
    for (const std::int64_t size : decl.shape) elements *= size;
    writer.write(as_bytes(random_payload(dice, decl.dtype, elements, wild)));
  }
  writer.finish();
}

// Names, types, shapes and payloads of all tensors; doubles are floats there.
inline void expect_same_tensors(const fs::path& wanted, const fs::path& found, const std::string& what) {
  const ShardedTensors a(wanted), b(found);
  EXPECT_EQ(a.names(), b.names()) << what;
  for (const std::string& name : a.names()) {
    const TensorView* x = a.find(name);
    const TensorView* y = b.find(name);
    if (y == nullptr) continue;
    EXPECT_EQ(x->shape, y->shape) << what << " " << name;
    if (x->dtype == DType::kF64) {
      std::vector<float> values(static_cast<std::size_t>(x->elements()));
      to_f32(*x, 0, x->elements(), values.data());
      EXPECT_EQ(y->dtype, DType::kF32) << what << " " << name;
      EXPECT_TRUE(std::ranges::equal(std::as_bytes(std::span(values)), y->data)) << what << " " << name;
      continue;
    }
    EXPECT_EQ(dtype_name(x->dtype), std::string(dtype_name(y->dtype))) << what << " " << name;
    EXPECT_TRUE(std::ranges::equal(x->data, y->data)) << what << " " << name;
  }
}

inline void write_gguf_file(const Checkpoint& model, const fs::path& out) {
  Context context;
  GgufOptions options;
  options.out = out;
  export_gguf(model, plan_gguf(model, options), options, context);
}

inline void write_compact_file(const Checkpoint& model, const fs::path& out) {
  Context context;
  ExportOptions options;
  options.out = out;
  export_compact(model, options, context);
}

// folder -> folder, folder -> GGUF -> folder and folder -> compact -> folder of one random model.
inline void round_trip(std::uint64_t seed) {
  Dice dice(seed);
  const Json config = random_config(dice);
  const std::string what = "seed " + std::to_string(seed) + " " + config.at("model_type").get<std::string>();
  const Scratch scratch("round");
  make_random_folder(dice, config, scratch / "model");
  const Checkpoint model(scratch / "model");
  try {
    Context context;
    export_folder(model, scratch / "again", context);
    expect_same_tensors(scratch / "model", scratch / "again", what + " folder");
    write_gguf_file(model, scratch / "model.gguf");
    export_folder(Checkpoint::open(scratch / "model.gguf"), scratch / "from-gguf", context);
    expect_same_tensors(scratch / "model", scratch / "from-gguf", what + " GGUF");
    write_compact_file(model, scratch / "model.pare");
    export_folder(Checkpoint::open(scratch / "model.pare"), scratch / "from-compact", context);
    expect_same_tensors(scratch / "model", scratch / "from-compact", what + " compact");
  } catch (const Error& problem) {
    ADD_FAILURE() << what << ": " << problem.what() << "\n" << config.dump();
  }
}

}  // namespace pare::testing
