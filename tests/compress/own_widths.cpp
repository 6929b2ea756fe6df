// Blocks of different widths: the same function as the uniform model whose neurons and heads are switched off, by
// LibTorch, by the runtime, with codes, and through GGUF where an architecture has them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/arch/arch.h"
#include "core/error.h"
#include "core/gguf_file.h"
#include "model/logits.h"
#include "prune/cut.h"
#include "quantize/quantize.h"
#include "runtime/compatibility.h"
#include "runtime/engine.h"
#include "runtime/export.h"
#include "runtime/gguf_export.h"
#include "tests/compress/run_stage.h"
#include "tests/families.h"
#include "tests/scratch.h"

namespace pare {
namespace {

using testing::run_stage;

struct Quiet {
  Progress progress{true};
  Context context;
  Quiet() { context.progress = &progress; }
};

std::vector<float> logits_of(LogitsSource& source, std::span<const std::int32_t> ids) {
  std::vector<float> logits(ids.size() * static_cast<std::size_t>(source.vocab_size()));
  source.begin(ids);
  source.logits(0, static_cast<std::int64_t>(ids.size()), logits.data());
  return logits;
}

double largest(const std::vector<float>& a, const std::vector<float>& b) {
  double most = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    most = testing::larger(most, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  return most;
}

Kept first_of(std::int64_t count) { return all_of(count); }

// Block `layer` loses more, the further back it stands.
std::vector<BlockWidths> some_widths(const ModelConfig& config) {
  const bool heads = !find_family(config.family)->heads_share_width;
  std::vector<BlockWidths> widths;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    BlockWidths w = config.widths(layer);
    if (layer > 0 && !config.has_experts()) w.inner -= 16 * std::min<std::int64_t>(layer, 2);
    if (layer == config.num_layers - 1 && heads) {
      const BlockWidths before = w;
      const std::int64_t group = w.heads / w.kv_heads;
      if (w.kv_heads > 1) w = {w.kv_heads / 2 * group, w.kv_heads / 2, w.inner};
      else w.heads = (w.heads + 1) / 2;
      // Codes of fused rows are cut at whole blocks of them.
      const std::int64_t values = (w.heads + w.kv_heads) * config.head_dim;
      if (config.fused_qkv && (values % 16 != 0 || w.heads * config.head_dim % 16 != 0)) w = before;
    }
    widths.push_back(w);
  }
  return widths;
}

class OwnWidths : public ::testing::TestWithParam<std::string> {
 protected:
  OwnWidths() : scratch_("widths"), golden_(read_json(testing::golden_families() / (GetParam() + ".json"))) {
    for (const Json& id : golden_.at("texts").back().at("ids")) ids_.push_back(id.get<std::int32_t>());
    testing::make_family_folder(golden_.at("config"), scratch_ / "whole");
  }
  // The folder cut to `widths`, and the whole one with what went switched off.
  void make(const std::vector<BlockWidths>& widths) {
    const Checkpoint whole(scratch_ / "whole");
    const ModelConfig& config = whole.config();
    ModelConfig own = config;
    own.set_widths(widths);
    CheckpointWriter narrow(scratch_ / "narrow", own, "float32"), off(scratch_ / "off", config, "float32");
    for (const TensorSpec& spec : whole.tensors()) {
      std::vector<float> values = whole.read_f32(spec.name);
      const torch::Tensor tensor = torch::from_blob(values.data(), spec.shape, torch::kFloat);
      BlockCut cut;
      if (spec.layer >= 0) {
        const BlockWidths& w = widths[static_cast<std::size_t>(spec.layer)];
        cut = {first_of(w.heads), first_of(w.kv_heads), first_of(config.experts.count), {}};
        cut.neurons.assign(static_cast<std::size_t>(std::max<std::int64_t>(1, config.experts.count)),
                           first_of(w.inner));
      }
      const torch::Tensor cut_values =
          cut_tensor(config, spec, tensor, first_of(config.hidden_size), spec.layer < 0 ? nullptr : &cut, spec.expert)
              .contiguous();
      narrow.put(spec.name, cut_values.data_ptr<float>());
      const bool down = spec.module == "mlp.down_proj", o = spec.module == "self_attn.o_proj";
      if (spec.role == TensorRole::kLinear && (down || o)) {
        const BlockWidths& w = widths[static_cast<std::size_t>(spec.layer)];
        torch::Tensor gone = tensor.narrow(1, down ? w.inner : w.heads * config.head_dim,
                                           spec.shape[1] - (down ? w.inner : w.heads * config.head_dim));
        gone.zero_();
      }
      off.put(spec.name, values.data());
    }
    narrow.finish();
    off.finish();
  }
  fs::path exported(const fs::path& model) const {
    Quiet quiet;
    ExportOptions options;
    options.out = model.string() + ".pare";
    export_compact(Checkpoint(model), options, quiet.context);
    return options.out;
  }
  std::vector<float> by_torch(const fs::path& model) const {
    return logits_of(*torch_logits(Checkpoint(model), "cpu"), ids_);
  }
  std::vector<float> by_runtime(const fs::path& file) const {
    EngineOptions options;
    options.threads = 2;
    options.int8_activations = false;
    return logits_of(*runtime_logits(Engine::open(file, options)), ids_);
  }
  testing::Scratch scratch_;
  Json golden_;
  std::vector<std::int32_t> ids_;
};

TEST_P(OwnWidths, EqualTheUniformModelWithPartsSwitchedOff) {
  const ModelConfig whole = Checkpoint(scratch_ / "whole").config();
  const std::vector<BlockWidths> widths = some_widths(whole);
  make(widths);
  const Checkpoint narrow(scratch_ / "narrow");
  ASSERT_EQ(narrow.config().layer_widths, widths);
  EXPECT_LT(parameter_count(narrow.config()), parameter_count(whole));
  const std::vector<float> expected = by_torch(scratch_ / "off");
  double size = 0;
  for (const float x : expected) size = std::max(size, std::abs(static_cast<double>(x)));
  EXPECT_GT(largest(expected, by_torch(scratch_ / "whole")), 1e-3 * size) << "what went mattered";
  EXPECT_LT(largest(by_torch(scratch_ / "narrow"), expected), 2e-5 * size);
  const fs::path file = exported(scratch_ / "narrow");
  EXPECT_LT(largest(by_runtime(file), expected), 2e-5 * size);

  // In pieces, and from a saved session: caches have pages of every block's own heads.
  for (const char* kv : {"f32", "q8"}) {
    EngineOptions options;
    options.threads = 1;
    options.int8_activations = false;
    options.kv = kv;
    const auto engine = Engine::open(file, options);
    const std::size_t vocab = static_cast<std::size_t>(whole.vocab_size), half = ids_.size() / 2;
    std::vector<float> at_once(vocab), in_pieces(vocab);
    Session one(engine);
    one.feed(ids_);
    one.logits(static_cast<std::int64_t>(ids_.size()) - 1, 1, at_once.data());
    Session first(engine), second(engine);
    first.feed(std::span(ids_).first(half));
    std::vector<std::byte> state;
    first.save([&](std::span<const std::byte> bytes) { state.insert(state.end(), bytes.begin(), bytes.end()); });
    EXPECT_EQ(state.size(), first.state_bytes());
    second.load(state, "state");
    for (std::size_t i = half; i < ids_.size(); ++i) second.feed(std::span(ids_).subspan(i, 1));
    second.logits(0, 1, in_pieces.data());
    EXPECT_EQ(at_once, in_pieces) << kv;
  }
}

TEST_P(OwnWidths, ArePrunedToZerosQuantizedAndExported) {
  make(some_widths(Checkpoint(scratch_ / "whole").config()));
  const std::int64_t context = std::min<std::int64_t>(48, Checkpoint(scratch_ / "narrow").config().max_position_embeddings);
  run_stage(quantize_command(), {{"model", (scratch_ / "narrow").string()},
                                 {"out", (scratch_ / "small").string()},
                                 {"codec", "q4"},
                                 {"random-tokens", true},
                                 {"samples", 12},
                                 {"context", context}});
  const Checkpoint small(scratch_ / "small");
  EXPECT_EQ(small.config().layer_widths, Checkpoint(scratch_ / "narrow").config().layer_widths);
  EXPECT_LT(largest(by_torch(scratch_ / "small"), by_runtime(exported(scratch_ / "small"))), 1e-3);
  Quiet quiet;
  export_folder(Checkpoint::open(scratch_ / "small.pare"), scratch_ / "again", quiet.context);
  EXPECT_EQ(by_torch(scratch_ / "again"), by_torch(scratch_ / "small"));
}

TEST_P(OwnWidths, OtherProgramsAreToldApart) {
  make(some_widths(Checkpoint(scratch_ / "whole").config()));
  const Checkpoint narrow(scratch_ / "narrow");
  const bool llama = narrow.config().family == "llama" || narrow.config().family == "mistral";
  for (const Compatibility& answer : compatibility(narrow)) {
    const bool expected = answer.target == "pare" || (llama && answer.target == "llama.cpp");
    if (answer.target == "Ollama" || (llama && answer.target == "llama.cpp")) continue;
    EXPECT_EQ(answer.loads == Compatibility::Answer::kYes, expected) << answer.target;
    if (answer.target != "transformers") continue;
    ASSERT_FALSE(answer.reasons.empty());
    EXPECT_NE(answer.reasons[0].find(width_keys(narrow.config())), std::string::npos) << answer.reasons[0];
  }
  Quiet quiet;
  GgufOptions options{.out = scratch_ / "model.gguf"};
  if (!llama) {
    try {
      plan_gguf(narrow, options);
      ADD_FAILURE() << "GGUF of " << narrow.config().family;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput);
    }
    return;
  }
  const GgufPlan plan = plan_gguf(narrow, options);
  export_gguf(narrow, plan, options, quiet.context);
  const GgufFile file(options.out);
  EXPECT_EQ(file.text("general.architecture"), "deci");
  const auto widths = narrow.config().layer_widths;
  std::vector<std::int64_t> inner, heads, kv_heads;
  for (const BlockWidths& w : widths) {
    inner.push_back(w.inner);
    heads.push_back(w.heads);
    kv_heads.push_back(w.kv_heads);
  }
  EXPECT_EQ(file.integers("deci.feed_forward_length"), inner);
  EXPECT_EQ(file.integers("deci.attention.head_count"), heads);
  EXPECT_EQ(file.integers("deci.attention.head_count_kv"), kv_heads);
  EXPECT_EQ(Checkpoint::open(options.out).config().layer_widths, widths);
  if (narrow.config().sliding_window > 0) return;  // llama.cpp has none there: its context is shorter
  export_folder(Checkpoint::open(options.out), scratch_ / "back", quiet.context);
  const std::vector<float> expected = by_torch(scratch_ / "narrow");
  EXPECT_LT(largest(by_torch(scratch_ / "back"), expected), 1e-4);
}

// Uniform lists are numbers: transformers loads what it can load.
TEST_P(OwnWidths, WidthsThatAreAllAlikeAreNumbers) {
  const ModelConfig whole = Checkpoint(scratch_ / "whole").config();
  ModelConfig same = whole;
  same.set_widths(std::vector<BlockWidths>(static_cast<std::size_t>(whole.num_layers), whole.widths(0)));
  EXPECT_TRUE(same.layer_widths.empty());
  EXPECT_EQ(write_config(same, "float32"), write_config(whole, "float32"));
}

INSTANTIATE_TEST_SUITE_P(Goldens, OwnWidths, ::testing::ValuesIn(testing::family_names()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace pare
