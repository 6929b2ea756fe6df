// A small random model folder that a test may edit tensor by tensor, and one call of the prune command.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "core/context.h"
#include "core/error.h"
#include "core/tokenizer.h"
#include "prune/prune.h"
#include "tests/scratch.h"

namespace pare::testing {

using Folder = Scratch;

struct SmallModel {
  std::string architecture = "LlamaForCausalLM", type = "llama";
  std::int64_t hidden = 32, intermediate = 96, layers = 4, heads = 4, kv_heads = 2;
  bool tied = true, mlp_bias = false;
  std::string dtype = "float32";
  unsigned seed = 1;
  Json config = Json();  // in place of all above but the seed
};

inline std::string small_text() {
  static const char* words[] = {"river", "stone",   "quiet",  "letter", "north",
                                "opens", "carries", "garden", "seven",  "blue"};
  std::mt19937 engine(5);
  std::string text;
  for (int i = 0; i < 3000; ++i) text += std::string(words[engine() % 10]) + (engine() % 9 == 0 ? ".\n" : " ");
  return text;
}

using Edit = std::function<void(const TensorSpec&, std::vector<float>&)>;

inline void make_model(const fs::path& out, const SmallModel& m = {}, const Edit& edit = {}) {
  static const std::string tokenizer = [] {
    TokenizerTraining training;
    training.vocab_size = 300;
    return train_tokenizer({small_text()}, training);
  }();
  Json json = {{"architectures", {m.architecture}}, {"model_type", m.type}, {"vocab_size", 300},
               {"hidden_size", m.hidden}, {"intermediate_size", m.intermediate}, {"num_hidden_layers", m.layers},
               {"num_attention_heads", m.heads}, {"num_key_value_heads", m.kv_heads},
               {"max_position_embeddings", 128}, {"rms_norm_eps", 1e-5}, {"rope_theta", 10000.0},
               {"hidden_act", "silu"}, {"tie_word_embeddings", m.tied}, {"torch_dtype", m.dtype}};
  if (m.mlp_bias) json["mlp_bias"] = true;
  if (!m.config.is_null()) json = m.config;
  const ModelConfig config = parse_config(json, nullptr, "small model");
  FolderTransaction folder(out);
  CheckpointWriter writer(folder.work(), config, m.dtype);
  std::mt19937 engine(m.seed);
  for (const TensorSpec& spec : expected_tensors(config)) {
    std::int64_t count = 1;
    for (const std::int64_t size : spec.shape) count *= size;
    const float spread =
        spec.role == TensorRole::kEmbedding ? 0.4f : 1.0f / std::sqrt(static_cast<float>(spec.shape.back()));
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& x : values) {
      float sum = 0;  // near enough to normal, and the same with every standard library
      for (int i = 0; i < 4; ++i) sum += static_cast<float>(engine() >> 8) / 16777216.0f - 0.5f;
      x = spec.role == TensorRole::kNorm ? 1.0f + 0.3f * sum : 1.7320508f * spread * sum;
    }
    if (edit) edit(spec, values);
    writer.put(spec.name, values.data());
  }
  writer.finish();
  write_text(folder.work() / "tokenizer.json", tokenizer);
  folder.commit();
}

struct Outcome {
  Json summary;
  Report report;
  double after(const std::string& metric) const {
    for (const ReportRow& row : report.rows())
      if (row.metric == metric) return row.after.value();
    ADD_FAILURE() << "no row " << metric;
    return NAN;
  }
};

inline Outcome run_prune(const Json& given, int threads = 1, std::uint64_t seed = 0) {
  const Command command = prune_command();
  const Options options(command.options, given, "test");
  Progress progress(true);
  Context context;
  context.json = true;
  context.quiet = true;
  context.threads = threads;
  context.seed = seed;
  context.progress = &progress;
  Outcome outcome;
  outcome.summary = command.run(options, context);
  outcome.report = context.report;
  return outcome;
}

inline ExitCode failing_code(const Json& given) {
  try {
    run_prune(given);
  } catch (const Error& error) {
    return error.code();
  }
  return ExitCode::kOk;
}

inline Json base(const fs::path& model, const fs::path& out, const std::string& method) {
  return {{"model", model.string()}, {"out", out.string()}, {"method", method}};
}

inline Json with_text(Json options, const fs::path& text) {
  write_text(text, small_text());
  options["text"] = {text.string()};
  options["samples"] = 12;
  options["context"] = 40;
  return options;
}

}  // namespace pare::testing
