// A random model with a real tokenizer, so that tests need no data of others.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "core/config.h"
#include "core/file.h"
#include "core/json.h"
#include "core/tokenizer.h"

namespace pare::testing {

struct TinyModel {
  std::int64_t hidden = 64, intermediate = 128, layers = 2, heads = 4, kv_heads = 2, vocab = 400;
  bool tied = true;
  std::uint64_t seed = 1;
  std::string dtype = "float32";
};

// splitmix64: https://prng.di.unimi.it/splitmix64.c
inline std::uint64_t next_random(std::uint64_t& state) {
  std::uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// English-like documents from a small grammar.
inline std::string tiny_text(std::uint64_t seed, int documents, const std::string& separator = "<|endoftext|>") {
  static const char* subjects[] = {"The river",        "A small house",       "My brother",
                                   "The old compiler", "Every morning light", "Nobody"};
  static const char* verbs[] = {"follows", "remembers", "opens", "carries", "understands", "paints", "measures"};
  static const char* objects[] = {"the quiet garden", "a letter from the north", "seven blue stones", "its own shadow",
                                  "the last page", "an honest number", "the wind over the hill"};
  std::uint64_t state = seed;
  std::string text;
  for (int d = 0; d < documents; ++d) {
    const auto sentences = 4 + next_random(state) % 8;
    for (std::uint64_t s = 0; s < sentences; ++s)
      text += std::string(subjects[next_random(state) % 6]) + " " + verbs[next_random(state) % 7] + " " +
              objects[next_random(state) % 7] + (next_random(state) % 5 == 0 ? ", and then rests.\n" : ". ");
    text += "\n" + separator + "\n";
  }
  return text;
}

// Writes the folder as a transaction. Embeddings are spread enough that logits are not flat.
inline void make_tiny_model(const fs::path& out, const TinyModel& m) {
  TokenizerTraining training;
  training.vocab_size = m.vocab;
  const std::string tokenizer = train_tokenizer({tiny_text(7, 60)}, training);
  const Json json = {{"architectures", {"LlamaForCausalLM"}},
                     {"model_type", "llama"},
                     {"vocab_size", m.vocab},
                     {"hidden_size", m.hidden},
                     {"intermediate_size", m.intermediate},
                     {"num_hidden_layers", m.layers},
                     {"num_attention_heads", m.heads},
                     {"num_key_value_heads", m.kv_heads},
                     {"max_position_embeddings", 512},
                     {"rms_norm_eps", 1e-5},
                     {"rope_theta", 10000.0},
                     {"hidden_act", "silu"},
                     {"tie_word_embeddings", m.tied},
                     {"eos_token_id", parse_json(tokenizer, "tokenizer.json").at("added_tokens").at(0).at("id")},
                     {"torch_dtype", m.dtype}};
  const ModelConfig config = parse_config(json, nullptr, "tiny model");
  FolderTransaction folder(out);
  CheckpointWriter writer(folder.work(), config, m.dtype);
  std::uint64_t state = m.seed;
  for (const auto& spec : expected_tensors(config)) {
    std::int64_t count = 1;
    for (const auto d : spec.shape) count *= d;
    std::vector<float> values(static_cast<std::size_t>(count));
    const float spread =
        spec.role == TensorRole::kEmbedding ? 0.4f : 1.0f / std::sqrt(static_cast<float>(spec.shape.back()));
    for (auto& v : values) {
      if (spec.role == TensorRole::kNorm) {
        v = 1.0f;
        continue;
      }
      float sum = 0;  // near enough to normal
      for (int i = 0; i < 4; ++i) sum += static_cast<float>(next_random(state) >> 40) / 16777216.0f - 0.5f;
      v = sum * 1.7320508f * spread;
    }
    writer.put(spec.name, values.data());
  }
  writer.finish();
  write_text(folder.work() / "tokenizer.json", tokenizer);
  folder.commit();
}

}  // namespace pare::testing
