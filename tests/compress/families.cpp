// The whole chain on the tiny models of every family: prune, quantize, export, verify, run.
#include "tests/compress/run_stage.h"
#include "tests/families.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "core/arch/arch.h"
#include "core/compact.h"
#include "core/context.h"
#include "core/error.h"
#include "core/tokenizer.h"
#include "model/decoder.h"
#include "model/logits.h"
#include "prune/prune.h"
#include "prune/shape.h"
#include "quantize/quantize.h"
#include "runtime/engine.h"
#include "runtime/export.h"
#include "tests/scratch.h"

namespace pare {
namespace {

using testing::run_stage;

std::vector<float> all_logits(LogitsSource& source, std::span<const std::int32_t> ids) {
  std::vector<float> logits(ids.size() * static_cast<std::size_t>(source.vocab_size()));
  source.begin(ids);
  source.logits(0, static_cast<std::int64_t>(ids.size()), logits.data());
  return logits;
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (!(difference <= largest)) largest = difference;  // NaN stays
  }
  return largest;
}

std::string tiny_text() {
  std::string text;
  for (int i = 0; i < 300; ++i) text += "the " + std::to_string(i * 7919 % 1000) + " small models run here\n";
  return text;
}

const std::string& tiny_tokenizer() {  // of 300 tokens
  static const std::string json = [] {
    TokenizerTraining training;
    training.vocab_size = 300;
    return train_tokenizer({tiny_text()}, training);
  }();
  return json;
}

// |a - b| over |b| of whole sets of logits.
double relative_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, power = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    power += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(difference / power);
}

class FamilyChain : public ::testing::TestWithParam<std::string> {
 protected:
  FamilyChain()
      : scratch_("chain"), golden_(read_json(testing::golden_families() / (GetParam() + ".json"))) {
    for (const Json& id : golden_.at("texts").back().at("ids")) ids_.push_back(id.get<std::int32_t>());
  }
  fs::path file_of(const fs::path& model) const {
    Progress progress(true);
    Context context;
    context.progress = &progress;
    ExportOptions options;
    options.out = model.string() + ".pare";
    export_compact(Checkpoint(model), options, context);
    return options.out;
  }
  // Logits of the folder by LibTorch and of its file by the runtime; both from the same codes.
  std::pair<std::vector<float>, std::vector<float>> both(const fs::path& model) const {
    const auto torch = torch_logits(Checkpoint(model), "cpu");
    EngineOptions options;
    options.threads = 1;
    options.int8_activations = false;
    const auto runtime = runtime_logits(Engine::open(file_of(model), options));
    return {all_logits(*torch, ids_), all_logits(*runtime, ids_)};
  }
  testing::Scratch scratch_;
  Json golden_;
  std::vector<std::int32_t> ids_;
};

TEST_P(FamilyChain, GptqExportVerifyRun) {
  const fs::path model = scratch_ / "model", small = scratch_ / "small";
  testing::make_family_folder(golden_.at("config"), model);
  const ModelConfig config = Checkpoint(model).config();
  const Json result = run_stage(quantize_command(),
                                {{"model", model.string()},
                                 {"out", small.string()},
                                 {"codec", "q4"},
                                 {"random-tokens", true},
                                 {"samples", 24},
                                 {"context", std::min<std::int64_t>(48, config.max_position_embeddings)}});
  EXPECT_LT(result.at("layer_error").get<double>(), result.at("layer_error_before").get<double>());
  const Checkpoint quantized(small);
  std::map<CodecKind, int> codecs;
  for (const TensorSpec& spec : quantized.tensors()) ++codecs[quantized.codec(spec.name).kind];
  EXPECT_GT(codecs[CodecKind::kQ4], 0);

  const auto [folder, file] = both(small);
  EXPECT_LT(largest_difference(folder, file), 1e-3) << "the file computes what the folder says";
  const auto original = torch_logits(Checkpoint(model), "cpu");
  const double off = relative_difference(folder, all_logits(*original, ids_));
  EXPECT_GT(off, 0.0);
  EXPECT_LT(off, 0.5) << "four bits, but the same model";
  RecordProperty("difference", std::to_string(largest_difference(folder, file) * 1e6));

  const fs::path compact = small.string() + ".pare";
  EXPECT_TRUE(CompactFile(compact).verify().empty());
  // As users run it: int8 activations, greedy, from a prompt to beyond any window and LongRoPE's switch.
  EngineOptions options;
  options.threads = 2;
  Session session(Engine::open(compact, options));
  std::vector<float> row(static_cast<std::size_t>(config.vocab_size));
  std::vector<std::int32_t> next(ids_.begin(), ids_.begin() + 4);
  const std::int64_t length = std::min<std::int64_t>(56, config.max_position_embeddings);
  while (session.position() + static_cast<std::int64_t>(next.size()) <= length) {
    session.feed(next);
    session.logits(static_cast<std::int64_t>(next.size()) - 1, 1, row.data());
    for (const float x : row) ASSERT_TRUE(std::isfinite(x));
    next = {static_cast<std::int32_t>(std::max_element(row.begin(), row.end()) - row.begin())};
  }
  EXPECT_EQ(session.position(), length);
}

// What prune leaves of a model whose tokenizer can read text runs in both forwards.
TEST_P(FamilyChain, PrunedToASmallerShapeBothForwardsAgree) {
  const fs::path model = scratch_ / "model";
  Json json = golden_.at("config");
  json["vocab_size"] = 300;
  testing::make_family_folder(json, model);
  write_text(model / "tokenizer.json", tiny_tokenizer());
  write_text(scratch_ / "text.txt", tiny_text());
  const ModelConfig config = Checkpoint(model).config();
  const auto prune = [&](const std::string& method, const Json& more) {
    Json given = {{"model", model.string()}, {"out", (scratch_ / method).string()}, {"method", method},
                  {"text", {(scratch_ / "text.txt").string()}}, {"samples", 6}, {"context", 40}};
    given.update(more);
    return run_stage(prune_command(), given);
  };
  prune("wanda", {{"sparsity", 0.25}});
  Json solved = {{"sparsity", 0.25}, {"reconstruct", true}};
  if (!config.has_experts()) solved["allocation"] = "owl";
  prune("sparsegpt", solved);
  if (config.has_experts()) {
    solved["allocation"] = "owl";
    solved["out"] = (scratch_ / "owl").string();
    EXPECT_THROW(prune("sparsegpt", solved), Error) << "how often an expert is chosen would decide";
  }
  std::vector<std::string> outs = {"wanda", "sparsegpt"};
  const auto shape = [&](const std::string& out, Json asked) {
    asked["out"] = (scratch_ / out).string();
    if (asked.contains("ffn")) asked["multiple-of"] = 4;
    prune("shape", asked);
    outs.push_back(out);
    return Checkpoint(scratch_ / out).config();
  };
  EXPECT_EQ(shape("shorter", {{"layers", config.num_layers - 1}}).num_layers, config.num_layers - 1);
  EXPECT_EQ(shape("narrower", {{"ffn", 16}}).intermediate_size, 16);
  // Everything at once. Without a width of heads in config.json the channels follow the heads.
  const bool shares = find_family(config.family)->heads_share_width;
  const std::int64_t group = config.num_heads / config.num_kv_heads;
  const std::int64_t kv = config.num_kv_heads > 1 ? config.num_kv_heads / 2 : 1;
  const std::int64_t heads = config.num_kv_heads > 1 ? kv * group : group / 2;
  const std::int64_t hidden = shares ? heads * config.head_dim : config.hidden_size / 4 * 3;
  Json all = {{"layers", config.num_layers - 1}, {"ffn", 16}, {"heads", heads}, {"hidden", hidden}};
  if (kv < config.num_kv_heads) all["kv-heads"] = kv;
  if (config.experts.count > config.experts.per_token) all["experts"] = config.experts.count - 1;
  const ModelConfig small = shape("smaller", all);
  EXPECT_EQ(shape_of(small), (Shape{config.num_layers - 1, heads, kv, 16, hidden,
                                    config.experts.count - (all.contains("experts") ? 1 : 0)}));
  EXPECT_EQ(small.head_dim, config.head_dim);
  for (const std::string& out : outs) {
    const auto [folder, file] = both(scratch_ / out);
    EXPECT_LT(largest_difference(folder, file), 1e-3) << out;
  }
  if (shares) {
    all.erase("hidden");
    all["out"] = (scratch_ / "refused").string();
    EXPECT_THROW(prune("shape", all), Error) << "config.json cannot say how wide these heads are";
    EXPECT_FALSE(fs::exists(scratch_ / "refused"));
  }
}

// A Phi-3 without rotary tricks is a Llama whose q, k, v and gate, up stand in one tensor each: what narrows the one
// must choose the same neurons of the other.
TEST(FusedFamily, NarrowsLikeSeparateTensors) {
  const testing::Scratch scratch("fused");
  Json json = read_json(testing::golden_families() / "phi3_window.json").at("config");
  json["sliding_window"] = nullptr;
  json["vocab_size"] = 300;
  testing::make_family_folder(json, scratch / "fused");
  const Checkpoint fused(scratch / "fused");
  json["architectures"] = {"LlamaForCausalLM"};
  json["model_type"] = "llama";
  const ModelConfig config = parse_config(json, nullptr, "test");
  {
    CheckpointWriter writer(scratch / "apart", config, "float32");
    for (const TensorSpec& spec : expected_tensors(config)) {
      const std::size_t row = static_cast<std::size_t>(config.hidden_size);
      const auto q = static_cast<std::size_t>(config.num_heads * config.head_dim) * row;
      const auto kv = static_cast<std::size_t>(config.num_kv_heads * config.head_dim) * row;
      const auto inner = static_cast<std::size_t>(config.intermediate_size) * row;
      const std::map<std::string, std::tuple<std::string, std::size_t, std::size_t>> parts = {
          {"self_attn.q_proj", {"self_attn.qkv_proj", 0, q}},     {"self_attn.k_proj", {"self_attn.qkv_proj", q, kv}},
          {"self_attn.v_proj", {"self_attn.qkv_proj", q + kv, kv}}, {"mlp.gate_proj", {"mlp.gate_up_proj", 0, inner}},
          {"mlp.up_proj", {"mlp.gate_up_proj", inner, inner}}};
      const auto part = parts.find(spec.module);
      if (part == parts.end()) {
        writer.put(spec.name, fused.read_f32(spec.name).data());
        continue;
      }
      const auto& [module, first, count] = part->second;
      const auto whole = fused.read_f32("model.layers." + std::to_string(spec.layer) + "." + module + ".weight");
      ASSERT_LE(first + count, whole.size());
      writer.put(spec.name, whole.data() + first);
    }
    writer.finish();
  }
  std::vector<std::int32_t> ids;
  for (int i = 0; i < 30; ++i) ids.push_back(i * 7 % 64);
  const auto logits_of = [&](const fs::path& folder) {
    return all_logits(*torch_logits(Checkpoint(folder), "cpu"), ids);
  };
  EXPECT_LT(largest_difference(logits_of(scratch / "fused"), logits_of(scratch / "apart")), 1e-5);
  std::vector<std::vector<float>> narrow;
  for (const std::string name : {"fused", "apart"}) {
    write_text(scratch / name / "tokenizer.json", tiny_tokenizer());
    write_text(scratch / "text.txt", tiny_text());
    run_stage(prune_command(), {{"model", (scratch / name).string()},
                                {"out", (scratch / ("pruned-" + name)).string()},
                                {"method", "shape"},
                                {"ffn", 20},
                                {"multiple-of", 1},
                                {"text", {(scratch / "text.txt").string()}},
                                {"samples", 6},
                                {"context", 40}});
    narrow.push_back(logits_of(scratch / ("pruned-" + name)));
  }
  EXPECT_LT(largest_difference(narrow[0], narrow[1]), 1e-3);
  EXPECT_GT(largest_difference(narrow[0], logits_of(scratch / "fused")), 1e-2);
}

INSTANTIATE_TEST_SUITE_P(Goldens, FamilyChain, ::testing::ValuesIn(testing::family_names()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace pare
