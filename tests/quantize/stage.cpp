#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>

#include "core/error.h"
#include "core/random_weights.h"
#include "quantize/options.h"
#include "quantize/q4_0.h"
#include "quantize/scales.h"
#include "tests/quantize/tiny_model.h"

namespace pare {
namespace {

using testing::folder_hash;
using testing::run_quantize;
using testing::ScratchFolder;
using testing::tiny_config;
using testing::write_tiny;

const fs::path kShared = fs::path(PARE_SOURCE_DIR) / ".." / "shared";

// Overwrites the first element of a float32 tensor with NaN: the writer would refuse to.
void break_weight(const fs::path& folder, const std::string& name) {
  const fs::path file = folder / "model.safetensors";
  std::ptrdiff_t offset = 0;
  {
    const SafetensorsFile opened(file);
    offset = opened.find(name)->data.data() - opened.file().bytes().data();
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
  stream.seekp(offset);
  stream.write(reinterpret_cast<const char*>(&nan), sizeof nan);
}

Error refused(const Json& given) {
  try {
    run_quantize(given);
  } catch (const Error& error) {
    return error;
  }
  return failure("test", "a refusal", "success");
}

// --rank-timeout is declared around the options of quantize itself.
TEST(QuantizeStage, PresetsCarryEveryOptionOfTheCommand) {
  const std::vector<OptionDecl> decls = quantize_command().options;
  for (const char* preset : {"fast", "balanced", "best"}) {
    const Options given(decls, {{"model", "m"}, {"out", "o"}, {"preset", preset}, {"rank-timeout", 7}}, "test");
    EXPECT_EQ(with_preset(given, tiny_config()).get<int>("rank-timeout"), 7) << preset;
  }
}

// How long ranks wait decides nothing about the result.
TEST(QuantizeStage, ARunThatWasKilledMayWaitLongerForItsRanks) {
  const ScratchFolder scratch;
  write_tiny(scratch / "m", tiny_config());
  const Command command = quantize_command();
  const auto run = [&](int timeout, const char* codec, bool dies) {
    Progress progress(true);
    Context context;
    context.json = true;
    context.progress = &progress;
    if (dies) context.before_commit = [] { throw failure("test", "", "killed"); };
    command.run(Options(command.options,
                        {{"model", (scratch / "m").string()}, {"out", (scratch / "out").string()}, {"preset", "fast"},
                         {"codec", codec}, {"rank-timeout", timeout}}, "test"), context);
  };
  EXPECT_THROW(run(5, "q4", true), Error);
  ASSERT_TRUE(fs::exists(scratch / "out.partial"));
  EXPECT_THROW(run(5, "q8", false), Error);
  run(7, "q4", false);
  EXPECT_TRUE(fs::exists(scratch / "out"));
}

TEST(QuantizeStage, StoriesGptqBeatsNearestOnEveryLinear) {
  const fs::path model = kShared / "models" / "stories260K",
                 text = kShared / "data" / "text" / "tinystories_sample.txt";
  if (!fs::exists(model) || !fs::exists(text)) GTEST_SKIP() << "SKIPPED: no stories260K beside the source folder";
  ScratchFolder scratch;
  const Json result = run_quantize({{"model", model.string()},
                                    {"out", (scratch / "out").string()},
                                    {"text", {text.string()}},
                                    {"samples", 8},
                                    {"context", 128}});
  int linears = 0, per_row = 0;
  for (const Json& row : result.at("linears")) {
    if (!row.contains("after")) continue;
    ++linears;
    EXPECT_LT(row.at("after").get<double>(), row.at("before").get<double>()) << row.dump();
    if (row.at("columns") == 172) {
      ++per_row;
      EXPECT_EQ(row.at("codec"), "q8c");
    }
  }
  EXPECT_EQ(linears, 35);
  EXPECT_EQ(per_row, 5);
  EXPECT_LT(result.at("layer_error_ratio").get<double>(), 0.8);
  ASSERT_EQ(result.at("fallbacks").size(), 1u);

  const Checkpoint original(model), out(scratch / "out");
  EXPECT_EQ(out.codec("model.embed_tokens.weight").name(), "q8");
  EXPECT_EQ(out.codec("model.layers.2.mlp.down_proj.weight").name(), "q8c");
  EXPECT_TRUE(fs::exists(scratch / "out" / "tokenizer.json"));
  EXPECT_FALSE(fs::exists(scratch / "out.partial"));
  for (const TensorSpec& spec : out.tensors()) {
    const std::vector<float> before = original.read_f32(spec.name), after = out.read_f32(spec.name);
    double energy = 0, difference = 0;
    for (std::size_t i = 0; i < before.size(); ++i) {
      energy += static_cast<double>(before[i]) * static_cast<double>(before[i]);
      difference += std::pow(static_cast<double>(before[i]) - static_cast<double>(after[i]), 2);
    }
    EXPECT_LT(difference, (out.codec(spec.name).kind == CodecKind::kQ4 ? 0.05 : 1e-3) * energy) << spec.name;
    if (spec.role == TensorRole::kNorm) {
      EXPECT_EQ(difference, 0.0);
    }
  }
}

TEST(QuantizeStage, SameBytesAtAnyThreadCount) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config(), "bfloat16");
  for (const char* method : {"gptq", "rtn", "rtn-absmax"}) {
    Json given = {{"model", (scratch / "in").string()},
                  {"method", method},
                  {"random-tokens", true},
                  {"samples", 9},
                  {"context", 33}};
    given["out"] = (scratch / (std::string(method) + "1")).string();
    run_quantize(given, 1);
    given["out"] = (scratch / (std::string(method) + "3")).string();
    run_quantize(given, 3);
    EXPECT_EQ(folder_hash(scratch / (std::string(method) + "1")), folder_hash(scratch / (std::string(method) + "3")))
        << method;
  }
}

TEST(QuantizeStage, EveryCodecAndThePolicy) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config(2, false));
  int number = 0;
  for (const char* codec :
       {"q4", "q4g64", "q4g128", "q4a", "q4ag64", "q4m", "q4mg64", "q8", "q8c", "q3", "q3g64", "q2", "q2g128",
        "w8a8"}) {
    const fs::path out = scratch / std::to_string(number++);
    const Json result =
        run_quantize({{"model", (scratch / "in").string()},
                      {"out", out.string()},
                      {"codec", codec},
                      {"random-tokens", true},
                      {"samples", 8},
                      {"context", 32},
                      {"policy", {"model.layers.1.self_attn.*=q8", "*.0.mlp.up_proj=keep", "lm_head=q4"}}});
    const Checkpoint quantized(out), original(scratch / "in");
    EXPECT_EQ(quantized.codec("model.layers.1.self_attn.v_proj.weight").name(), "q8");
    EXPECT_TRUE(quantized.codec("model.layers.0.mlp.up_proj.weight").is_float());
    EXPECT_EQ(quantized.read_f32("model.layers.0.mlp.up_proj.weight"),
              original.read_f32("model.layers.0.mlp.up_proj.weight"));
    EXPECT_EQ(quantized.codec("lm_head.weight"), Codec::parse("q4", "t"));
    const Codec q_proj = quantized.codec("model.layers.0.self_attn.q_proj.weight"), asked = Codec::parse(codec, "t");
    EXPECT_EQ(q_proj.kind, asked.kind);  // 64 columns: some groups fall back to smaller ones
    EXPECT_EQ(q_proj.int8_inputs, asked.int8_inputs);
    EXPECT_LT(result.at("layer_error").get<double>(), result.at("layer_error_before").get<double>()) << codec;
  }
}

TEST(QuantizeStage, WithoutCalibrationTheCodesAreThoseOfTheWeightsAlone) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config());
  run_quantize({{"model", (scratch / "in").string()}, {"out", (scratch / "out").string()}, {"method", "rtn"}});
  const Checkpoint original(scratch / "in"), out(scratch / "out");
  for (const TensorSpec& spec : out.tensors()) {
    if (!out.is_quantized(spec.name)) continue;
    const QuantizedTensor expected = round_to_nearest(original.read_f32(spec.name).data(), spec.shape[0], spec.shape[1],
                                                      out.codec(spec.name), ScaleRule::kSearched, {}, spec.name, 1);
    const QuantizedTensor stored = out.codes(spec.name);
    EXPECT_EQ(stored.codes, expected.codes) << spec.name;
    EXPECT_EQ(stored.scales, expected.scales) << spec.name;
  }
}

TEST(QuantizeStage, RoundsAsLlamaCppOnRequest) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config());
  const Json given = {{"model", (scratch / "in").string()}};
  const auto with = [&](Json more) {
    more.update(given);
    return more;
  };
  run_quantize(with({{"out", (scratch / "plain").string()}, {"method", "rtn-q4_0"}}));
  run_quantize(with({{"out", (scratch / "weighted").string()},
                     {"method", "rtn-imatrix"},
                     {"random-tokens", true},
                     {"samples", 8},
                     {"context", 32}}));
  const Checkpoint original(scratch / "in"), plain(scratch / "plain"), weighted(scratch / "weighted");
  int negative = 0, different = 0, others = 0;
  for (const TensorSpec& spec : plain.tensors()) {
    if (!plain.is_quantized(spec.name)) continue;
    const QuantizedTensor stored = plain.codes(spec.name);
    const std::vector<float> weight = original.read_f32(spec.name);
    const bool q4 = stored.codec.kind == CodecKind::kQ4;
    others += q4 ? 0 : 1;
    const std::int64_t rows = stored.rows, cols = stored.cols;
    const QuantizedTensor expected =
        q4 ? round_q4_0(weight.data(), rows, cols, stored.codec, nullptr, spec.name, 1)
           : round_to_nearest(weight.data(), rows, cols, stored.codec, ScaleRule::kSearched, {}, spec.name, 1);
    EXPECT_EQ(stored.codes, expected.codes) << spec.name;
    EXPECT_EQ(stored.scales, expected.scales) << spec.name;
    for (const std::uint16_t scale : stored.scales) negative += scale >> 15;
    different += weighted.codes(spec.name).scales != stored.scales ? 1 : 0;
  }
  EXPECT_EQ(others, 1);  // the embedding, in q8 under every method
  EXPECT_GT(negative, 100);
  EXPECT_EQ(different, 3 * 7);
  const auto refused = [&](Json more, const char* what) {
    try {
      run_quantize(with(std::move(more)));
      FAIL() << what;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage);
      EXPECT_NE(std::string(error.what()).find(what), std::string::npos) << error.what();
    }
  };
  const std::string out = (scratch / "refused").string();
  refused({{"out", out}, {"method", "rtn-imatrix"}}, "calibration text");
  refused({{"out", out}, {"method", "rtn-q4_0"}, {"codec", "q8"}}, "a tensor in q4");
}

TEST(QuantizeStage, PrunedWeightsStayZero) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config(), "float32", [](Decoder& decoder) {
    for (auto& item : decoder->named_parameters()) {
      if (item.value().dim() == 2) item.value().mul_(torch::rand(item.value().sizes()).gt(0.5));
    }
  });
  run_quantize({{"model", (scratch / "in").string()},
                {"out", (scratch / "out").string()},
                {"random-tokens", true},
                {"samples", 8},
                {"context", 32}});
  const Checkpoint original(scratch / "in"), out(scratch / "out");
  for (const TensorSpec& spec : out.tensors()) {
    if (spec.role != TensorRole::kLinear) continue;
    const std::vector<float> before = original.read_f32(spec.name), after = out.read_f32(spec.name);
    for (std::size_t i = 0; i < before.size(); ++i) {
      if (before[i] == 0.0f) {
        ASSERT_EQ(after[i], 0.0f) << spec.name << " " << i;
      }
    }
  }
}

TEST(QuantizeStage, RefusalsNameTheProblemAndLeaveNothing) {
  ScratchFolder scratch;
  const std::string in = (scratch / "in").string(), out = (scratch / "out").string();
  write_tiny(in, tiny_config());
  EXPECT_EQ(refused({{"model", in}, {"out", out}}).code(), ExitCode::kUsage);  // gptq without text
  EXPECT_EQ(refused({{"model", in}, {"out", out}, {"text", {(scratch / "none.txt").string()}}}).code(),
            ExitCode::kInput);
  EXPECT_EQ(refused({{"model", in}, {"out", out}, {"random-tokens", true}, {"context", 65}}).code(), ExitCode::kUsage);
  const Error groups =
      refused({{"model", in}, {"out", out}, {"method", "rtn"}, {"codec", "q4g128"}, {"fallback", "none"}});
  EXPECT_EQ(groups.code(), ExitCode::kInput);
  EXPECT_NE(groups.found().find("model.layers.2.mlp.down_proj.weight"), std::string::npos);
  EXPECT_FALSE(fs::exists(out));
  EXPECT_FALSE(fs::exists(out + ".partial"));

  for (const char* name : {"model.layers.1.mlp.up_proj.weight", "model.layers.1.post_attention_layernorm.weight",
                           "model.embed_tokens.weight", "model.norm.weight"}) {
    fs::remove_all(scratch / "nan");
    write_tiny(scratch / "nan", tiny_config());
    break_weight(scratch / "nan", name);
    for (const char* method : {"gptq", "rtn"}) {
      Json given = {{"model", (scratch / "nan").string()}, {"out", out}, {"method", method}};
      if (std::string_view(method) == "gptq") given.update({{"random-tokens", true}, {"samples", 2}});
      const Error damaged = refused(given);
      EXPECT_EQ(damaged.code(), ExitCode::kInput) << name;
      EXPECT_EQ(damaged.place(), name) << damaged.what();
      EXPECT_FALSE(fs::exists(out + ".partial"));
    }
  }

  run_quantize({{"model", in}, {"out", out}, {"method", "rtn"}});
  const std::string before = folder_hash(out);
  EXPECT_EQ(refused({{"model", in}, {"out", out}, {"method", "rtn"}}).code(), ExitCode::kUsage);
  EXPECT_EQ(folder_hash(out), before);
  const Error again = refused({{"model", out}, {"out", (scratch / "twice").string()}, {"method", "rtn"}});
  EXPECT_EQ(again.code(), ExitCode::kInput);
  EXPECT_FALSE(fs::exists(scratch / "twice.partial"));
}

TEST(QuantizeStage, ExpertsWithoutACodecAreWrittenAsTheyAre) {
  ScratchFolder scratch;
  const Json config = {{"architectures", {"MixtralForCausalLM"}},
                       {"model_type", "mixtral"},
                       {"vocab_size", 80},
                       {"hidden_size", 32},
                       {"intermediate_size", 64},
                       {"num_hidden_layers", 2},
                       {"num_attention_heads", 4},
                       {"num_key_value_heads", 2},
                       {"num_local_experts", 3},
                       {"num_experts_per_tok", 2},
                       {"max_position_embeddings", 64}};
  fs::create_directories(scratch / "in");
  Progress progress(true);
  Context context;
  context.progress = &progress;
  write_random_model(scratch / "in", parse_config(config, nullptr, "test"), 1, context);
  const Checkpoint in(scratch / "in");
  for (const char* method : {"rtn", "gptq"}) {
    for (const std::string kept : {"*experts.2.*=keep", "*experts.0.*=keep", "*experts*=keep"}) {
      Json given = {{"model", (scratch / "in").string()}, {"out", (scratch / "out").string()}, {"method", method}};
      given["policy"] = {kept};
      if (std::string(method) == "gptq") given["random-tokens"] = true, given["samples"] = 8, given["context"] = 32;
      run_quantize(given);
      const Checkpoint out(scratch / "out");
      for (const TensorSpec& spec : out.tensors()) {
        if (spec.role != TensorRole::kLinear) continue;
        const bool keeps = spec.expert >= 0 && (kept == "*experts*=keep" || spec.expert == kept[9] - '0');
        EXPECT_EQ(out.is_quantized(spec.name), !keeps) << method << kept << spec.name;
        if (keeps) {
          EXPECT_EQ(out.read_f32(spec.name), in.read_f32(spec.name)) << spec.name;
        }
      }
      fs::remove_all(scratch / "out");
    }
  }
}

TEST(QuantizeStage, MaxRamMovesActivationsToAFileOrRefuses) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config());
  Json given = {{"model", (scratch / "in").string()},
                {"out", (scratch / "out").string()},
                {"random-tokens", true},
                {"samples", 200},
                {"context", 64}};
  const Command command = quantize_command();
  const auto planned = [&] {
    return command.plan(Options(command.options, given, "test"), planned_model(Checkpoint(scratch / "in")));
  };
  const StagePlan roomy = planned();
  given["max-ram"] = std::to_string(roomy.peak_bytes);
  EXPECT_EQ(planned().peak_bytes, roomy.peak_bytes);
  const std::uint64_t activations = 3 * 200 * 64 * 64 * 4;  // both streams, and what is kept of one
  given["max-ram"] = std::to_string(roomy.peak_bytes - activations);
  const StagePlan tight = planned();
  EXPECT_EQ(tight.peak_bytes, roomy.peak_bytes - activations);
  EXPECT_NE(std::find_if(tight.notes.begin(), tight.notes.end(),
                         [](const std::string& note) { return note.find("HDF5") != std::string::npos; }),
            tight.notes.end());
  given["samples"] = 40;
  given["max-ram"] = std::to_string(roomy.peak_bytes - activations);
  run_quantize(given);
  const auto weights = [&] {
    return hash_file(scratch / "out" / "model.safetensors") + hash_file(scratch / "out" / "codes.pare");
  };
  const std::string spilled = weights();
  fs::remove_all(scratch / "out");
  given.erase("max-ram");
  run_quantize(given);
  EXPECT_EQ(weights(), spilled);

  given["out"] = (scratch / "no").string();
  given["max-ram"] = "100M";
  EXPECT_EQ(refused(given).code(), ExitCode::kResources);
  given["max-ram"] = "much";
  EXPECT_EQ(refused(given).code(), ExitCode::kUsage);
  EXPECT_FALSE(fs::exists(scratch / "no"));
  EXPECT_FALSE(fs::exists(scratch / "no.partial"));
}

TEST(QuantizeStage, AnotherCommandDoesNotContinueAnUnfinishedRun) {
  ScratchFolder scratch;
  const std::string in = (scratch / "in").string(), out = (scratch / "out").string();
  write_tiny(in, tiny_config());
  run_quantize({{"model", in}, {"out", out}, {"method", "rtn"}});
  fs::rename(out, out + ".partial");  // as a kill right before the rename leaves it
  const std::string whole = folder_hash(out + ".partial");
  const Error other = refused({{"model", in}, {"out", out}, {"method", "rtn"}, {"codec", "q8"}});
  EXPECT_EQ(other.code(), ExitCode::kUsage);
  EXPECT_NE(other.found().find("--codec"), std::string::npos) << other.what();
  EXPECT_EQ(folder_hash(out + ".partial"), whole);
  run_quantize({{"model", in}, {"out", out}, {"method", "rtn"}});
  EXPECT_EQ(folder_hash(out), whole);
}

TEST(QuantizeStage, FilesOfSomethingElseAreNotTakenForWork) {
  ScratchFolder scratch;
  const std::string in = (scratch / "in").string(), out = (scratch / "out").string();
  write_tiny(in, tiny_config());
  fs::create_directories(out + ".partial");
  write_text(out + ".partial/thesis.txt", "years");
  EXPECT_EQ(refused({{"model", in}, {"out", out}, {"method", "rtn"}}).code(), ExitCode::kUsage);
  EXPECT_EQ(read_text(out + ".partial/thesis.txt"), "years");
  fs::rename(out + ".partial/thesis.txt", out + ".partial/quantize.json.tmp-1");  // what a kill leaves
  run_quantize({{"model", in}, {"out", out}, {"method", "rtn"}});
  EXPECT_FALSE(fs::exists(out + "/quantize.json.tmp-1"));
}

TEST(QuantizeStage, PlanAnnouncesSizesAndFallbacks) {
  ScratchFolder scratch;
  const std::string in = (scratch / "in").string();
  write_tiny(in, tiny_config());
  const Command command = quantize_command();
  const Json given = {{"model", in}, {"out", (scratch / "out").string()}, {"codec", "q4g64"}, {"random-tokens", true}};
  const StagePlan plan = command.plan(Options(command.options, given, "test"), planned_model(Checkpoint(in)));
  EXPECT_FALSE(fs::exists(scratch / "out.partial"));
  ASSERT_GE(plan.notes.size(), 1u);
  EXPECT_EQ(plan.notes.at(0), "mlp.down_proj (3 tensors): q4g64 does not divide 96 columns, q4g32 instead");
  run_quantize({{"model", in},
                {"out", (scratch / "out").string()},
                {"codec", "q4g64"},
                {"random-tokens", true},
                {"samples", 4}});
  double bytes = 0;
  for (const char* file : {"model.safetensors", "codes.pare"})
    bytes += static_cast<double>(fs::file_size(scratch / "out" / file));
  EXPECT_NEAR(static_cast<double>(plan.out_bytes), bytes, 0.1 * bytes);
  const PlannedModel written = planned_model(Checkpoint(scratch / "out"));
  EXPECT_TRUE(plan.result.quantized && written.quantized);
  EXPECT_NEAR(static_cast<double>(plan.result.compact_bytes), static_cast<double>(written.compact_bytes),
              0.02 * static_cast<double>(written.compact_bytes));
}

TEST(QuantizeStage, PlansOnTheAnnouncedModelNotOnTheFolder) {
  ScratchFolder scratch;
  const std::string in = (scratch / "in").string();
  write_tiny(in, tiny_config());
  const Command command = quantize_command();
  const Options options(command.options, {{"model", in}, {"out", (scratch / "out").string()}, {"random-tokens", true}},
                        "test");
  PlannedModel input = planned_model(Checkpoint(in));
  const StagePlan whole = command.plan(options, input);
  input.config.num_layers -= 1;
  const StagePlan shorter = command.plan(options, input);
  EXPECT_LT(shorter.out_bytes, whole.out_bytes);
  EXPECT_LT(shorter.seconds, whole.seconds);
  EXPECT_EQ(shorter.result.config.num_layers, input.config.num_layers);
  input.quantized = true;
  EXPECT_THROW(command.plan(options, input), Error);
}

TEST(QuantizeStage, OptionsThatDoNothingAreRefused) {
  ScratchFolder scratch;
  const std::string in = (scratch / "in").string(), out = (scratch / "out").string();
  write_tiny(in, tiny_config());
  const std::vector<std::pair<Json, std::string>> cases = {
      {{{"method", "rtn"}, {"polish", 3}}, "--polish"},
      {{{"method", "rtn"}, {"damping", 0.1}}, "--damping"},
      {{{"method", "rtn"}, {"samples", 3}}, "--samples"},
      {{{"method", "rtn"}, {"context", 16}}, "--context"},
      {{{"random-tokens", true}, {"split", "x"}}, "--split"},
      {{{"random-tokens", true}, {"head-codec", "q4"}}, "--head-codec"}};
  EXPECT_EQ(
      refused({{"model", in}, {"out", out}, {"method", "rtn"}, {"codec", "keep"}, {"embedding-codec", "keep"}}).code(),
      ExitCode::kUsage);
  for (const auto& [options, name] : cases) {
    Json given = options;
    given["model"] = in;
    given["out"] = out;
    const Error error = refused(given);
    EXPECT_EQ(error.code(), ExitCode::kUsage) << error.what();
    EXPECT_NE(error.found().find(name + " has no use"), std::string::npos) << error.what();
    EXPECT_FALSE(fs::exists(out + ".partial"));
  }
}

}  // namespace
}  // namespace pare
