#include "runtime/export.h"

#include "../core/gguf_bytes.h"
#include "core/compact.h"
#include "core/tensor_store.h"
#include "core/tokenizer.h"
#include "core/tokenizer_sentencepiece.h"
#include "runtime/round_to_nearest.h"
#include "runtime/verbs/cli.h"

namespace pare {
namespace {

using testing::contains;
using testing::error_of;
using testing::random_codes;
using testing::same;
using testing::Scratch;
using testing::small_config;
using testing::values_of;

class ExportTest : public ::testing::Test {
 protected:
  ExportTest() { context_.progress = &progress_; context_.quiet = context_.json = true; }
  Json run(const Command& command, const Json& given) {
    return command.run(Options(command.options, given, command.name), context_);
  }
  Scratch scratch_;
  Progress progress_{true};
  Context context_;
};

TEST_F(ExportTest, RoundToNearestIsNearest) {
  for (const char* name : {"q8", "q8c", "w8a8", "q4g32", "q4g64", "q4ag32", "q4ag128", "q4mg32", "q4mg128", "q3g32",
                           "q3g128", "q2g32"}) {
    const Codec codec = Codec::parse(name, "");
    std::vector<float> values = values_of({"x", {6, 128}, TensorRole::kLinear, 0, ""});
    std::fill(values.begin(), values.begin() + 128, 0.0f);                               // a row of zeros
    for (std::size_t i = 128; i < 256; ++i) values[i] = std::abs(values[i]);             // one-sided
    for (std::size_t i = 256; i < 384; ++i) values[i] *= 1e-9f;                          // scales underflow
    for (std::size_t i = 384; i < 512; ++i) values[i] *= 1e4f;
    const QuantizedTensor tensor = round_to_nearest(codec, 6, 128, values.data(), "t");
    tensor.validate("t");
    std::vector<float> back(values.size());
    tensor.unpack(back.data());
    const auto [low, high] = code_range(codec.kind);
    const auto groups = static_cast<std::size_t>(codec.groups(128));
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::size_t at = i / 128 * groups + i % 128 / (128 / groups);
      const double scale = f16_to_f32(tensor.scales[at]);
      const int zero = tensor.zeros.empty() ? 0 : tensor.zeros[at];
      const double base = tensor.minima.empty() ? 0.0 : static_cast<double>(f16_to_f32(tensor.minima[at]));
      double best = 1e30;  // brute force over every code
      for (int code = low; code <= high; ++code)
        best = std::min(best, std::abs(values[i] - base - (code - zero) * scale));
      ASSERT_LE(std::abs(values[i] - back[i]), best * (1 + 1e-5) + 1e-12) << name << " " << i;
    }
  }
  std::vector<float> bad(32, 1.0f);
  bad[5] = INFINITY;
  EXPECT_TRUE(error_of([&] { round_to_nearest(Codec::parse("q8", ""), 1, 32, bad.data(), "t"); }).starts_with("3 "));
  bad[5] = 1e30f;
  EXPECT_TRUE(error_of([&] { round_to_nearest(Codec::parse("q8", ""), 1, 32, bad.data(), "t"); }).starts_with("1 "));
}

TEST_F(ExportTest, CodesAreNeverRoundedAgain) {
  const ModelConfig config = parse_config(small_config(), nullptr, "config.json");
  CheckpointWriter writer(scratch_.path(), config, "float32");
  std::map<std::string, QuantizedTensor> put;
  for (const TensorSpec& spec : expected_tensors(config)) {
    if (spec.shape.size() == 1 || spec.module == "mlp.up_proj") {
      writer.put(spec.name, values_of(spec).data());
    } else {
      static const char* kNames[] = {"q4g32", "q4ag32", "q4mg32", "q3g32", "q2g32", "q8c", "w8a8"};
      Codec codec = Codec::parse(kNames[put.size() % 7], "");
      if (spec.role == TensorRole::kEmbedding) codec = codec.layout();
      put[spec.name] = random_codes(codec, spec.shape[0], spec.shape[1], 7);
      writer.put_codes(spec.name, put[spec.name]);
    }
  }
  writer.finish();
  const Checkpoint folder(scratch_.path());
  for (const char* codec : {"keep", "q8", "f16"}) {
    const fs::path out = scratch_ / (std::string(codec) + ".pare");
    export_compact(folder, {.out = out, .codec = codec}, context_);
    const CompactFile file(out);
    EXPECT_TRUE(file.verify().empty());
    for (const auto& [name, tensor] : put)
      EXPECT_TRUE(same(unpack_payload(tensor.codec, tensor.rows, tensor.cols, file.tensor(name).payload, name), tensor));
    EXPECT_EQ(file.tensor("model.layers.1.mlp.up_proj.weight").codec.name(), codec == std::string("keep") ? "f32" : codec);
    EXPECT_EQ(file.tensor("model.norm.weight").codec.name(), "f32");
  }
}

// A compact file is a way through, not an end: its codes in a folder again are the codes of the first folder.
TEST_F(ExportTest, CodesSurviveFolderToCompactToFolder) {
  Json json = small_config();
  json["tie_word_embeddings"] = false;
  const ModelConfig config = parse_config(json, nullptr, "config.json");
  const auto written = [&](const fs::path& path, const auto& codes_of) {
    fs::create_directories(path);
    CheckpointWriter writer(path, config, "float32");
    for (const TensorSpec& spec : expected_tensors(config)) {
      if (spec.shape.size() == 1) writer.put(spec.name, values_of(spec).data());
      else writer.put_codes(spec.name, codes_of(spec));
    }
    writer.finish();
  };
  for (const char* name : {"q3g32", "q2g32", "w8a8", "q8c", "q8", "q4g32", "q4ag32", "q4mg32"}) {
    const fs::path first = scratch_ / (std::string(name) + "-1"), second = scratch_ / (std::string(name) + "-2");
    const fs::path compact = scratch_ / (std::string(name) + ".pare");
    written(first, [&](const TensorSpec& spec) {
      Codec codec = Codec::parse(name, "");
      if (spec.role == TensorRole::kEmbedding) codec = codec.layout();
      return random_codes(codec, spec.shape[0], spec.shape[1], 9);
    });
    export_compact(Checkpoint(first), {.out = compact}, context_);
    const CompactFile file(compact);
    written(second, [&](const TensorSpec& spec) {
      const CompactTensor& tensor = file.tensor(spec.name);
      return unpack_payload(tensor.codec, tensor.shape[0], tensor.shape[1], tensor.payload, spec.name);
    });
    const Checkpoint a(first), b(second);
    for (const TensorSpec& spec : a.tensors()) {
      ASSERT_EQ(a.codec(spec.name), b.codec(spec.name)) << name << " " << spec.name;
      if (!a.is_quantized(spec.name)) continue;
      EXPECT_TRUE(same(a.codes(spec.name), b.codes(spec.name))) << name << " " << spec.name;
    }
    EXPECT_EQ(read_text(first / "model.safetensors"), read_text(second / "model.safetensors")) << name;
    EXPECT_EQ(read_text(first / "config.json"), read_text(second / "config.json")) << name;
  }
}

TEST_F(ExportTest, RowsThatDoNotFitFallBackOrFail) {
  testing::write_folder(scratch_ / "m", small_config());  // down_proj has rows of 96
  const Checkpoint folder(scratch_ / "m");
  const ExportPlan plan = plan_export(folder, {.out = scratch_ / "a", .codec = "q4g64"});
  EXPECT_EQ(plan.notes.size(), 3u);  // two layers, and no tokenizer
  EXPECT_TRUE(contains(plan.notes[0], "layers.0.mlp.down_proj.weight") && contains(plan.notes[0], "q8c"));
  EXPECT_TRUE(error_of([&] { plan_export(folder, {.out = scratch_ / "a", .codec = "q4g64", .fallback = false}); }).starts_with("3 "));
  EXPECT_TRUE(error_of([&] { plan_export(folder, {.out = scratch_ / "a", .codec = "q5"}); }).starts_with("2 "));
}

// Doubles, `last` in each tensor behind ordinary numbers.
void write_doubles(const fs::path& folder, double last) {
  fs::create_directories(folder);
  testing::write_bytes(folder / "config.json", small_config().dump());
  const auto specs = expected_tensors(parse_config(small_config(), nullptr, "config.json"));
  std::vector<TensorDecl> decls;
  for (const TensorSpec& spec : specs) decls.push_back({spec.name, DType::kF64, spec.shape});
  SafetensorsWriter writer(folder / "model.safetensors", decls, {{"format", "pt"}});
  for (const TensorSpec& spec : specs) {
    const std::vector<float> values = values_of(spec);
    std::vector<double> wide(values.begin(), values.end());
    for (double& value : wide) value /= 3;
    wide.back() = last;
    writer.write(std::as_bytes(std::span(wide)));
  }
  writer.finish();
}

TEST_F(ExportTest, DoublesBecomeFloatsAndThatIsSaid) {
  write_doubles(scratch_ / "m", 0.1);
  const std::string model = (scratch_ / "m").string();
  for (const char* to : {"folder", "compact", "gguf"}) {
    const fs::path out = scratch_ / to;
    const Json result = run(export_command(), {{"model", model}, {"to", to}, {"out", out.string()}});
    context_.report = {};
    EXPECT_TRUE(contains(result["notes"].dump(), "of F64: stored in F32")) << to << result["notes"];
    const Checkpoint doubles(model), floats = Checkpoint::open(out);
    for (const TensorSpec& spec : doubles.tensors()) {
      EXPECT_EQ(floats.dtype(spec.name), DType::kF32);
      EXPECT_EQ(floats.read_f32(spec.name), doubles.read_f32(spec.name));
    }
  }
  const float value = 0;
  EXPECT_THROW(holds_exactly(DType::kF64, {&value, 1}), std::logic_error);
  // What no float holds is refused, and leaves nothing that would stand in the way of the next attempt.
  write_doubles(scratch_ / "huge", 1e300);
  const std::string said = error_of([&] {
    run(export_command(),
        {{"model", (scratch_ / "huge").string()}, {"to", "folder"}, {"out", (scratch_ / "o").string()}});
  });
  EXPECT_TRUE(said.starts_with("3 ") && contains(said, "finite")) << said;
  EXPECT_FALSE(fs::exists(scratch_ / "o") || fs::exists(scratch_ / "o.partial"));
  run(export_command(), {{"model", model}, {"to", "folder"}, {"out", (scratch_ / "o").string()}});
}

// Work that another command left unfinished is neither taken up nor removed.
TEST_F(ExportTest, UnfinishedWorkOfOthersStays) {
  testing::write_folder(scratch_ / "m", small_config());
  const ModelConfig config = Checkpoint(scratch_ / "m").config();
  const std::string out = (scratch_ / "o").string();
  {
    CheckpointWriter writer(out + ".partial", config, "float32");
    for (const TensorSpec& spec : expected_tensors(config)) {
      const std::vector<float> zeros(values_of(spec).size());
      writer.put(spec.name, zeros.data());
    }
    writer.finish();
  }
  const std::string said =
      error_of([&] { run(export_command(), {{"model", (scratch_ / "m").string()}, {"to", "folder"}, {"out", out}}); });
  EXPECT_TRUE(said.starts_with("2 ") && contains(said, "o.partial")) << said;
  EXPECT_FALSE(fs::exists(out));
  EXPECT_TRUE(fs::exists(out + ".partial/model.safetensors"));
  fs::remove_all(out + ".partial");
  fs::create_directory(out + ".partial");  // an empty one holds no work
  run(export_command(), {{"model", (scratch_ / "m").string()}, {"to", "folder"}, {"out", out + "/"}});
  EXPECT_EQ(Checkpoint(out).read_f32("model.norm.weight"),
            Checkpoint(scratch_ / "m").read_f32("model.norm.weight"));
}

TEST_F(ExportTest, OptionsWithoutEffectAreRefused) {
  testing::write_folder(scratch_ / "m", small_config());
  for (const char* option : {"requantize", "no-fallback"}) {
    const std::string said = error_of([&] {
      run(export_command(), {{"model", (scratch_ / "m").string()},
                             {"to", "folder"},
                             {"out", (scratch_ / "o").string()},
                             {option, true}});
    });
    EXPECT_TRUE(said.starts_with("2 ") && contains(said, option)) << said;
  }
}

TEST_F(ExportTest, TheVerbsWorkTogether) {
  testing::write_folder(scratch_ / "m", small_config());
  testing::write_bytes(scratch_.path() / "m" / "tokenizer.json", "{\"a\": 1}");
  const std::string model = (scratch_ / "m").string(), out = (scratch_ / "m.pare").string();
  const Json exported = run(export_command(), {{"model", model}, {"codec", "q8"}, {"out", out}});
  EXPECT_EQ(exported["file_bytes"], fs::file_size(out));
  EXPECT_TRUE(contains(error_of([&] { run(export_command(), {{"model", model}, {"out", out}}); }), "2 "));
  const Json seen = run(inspect_command(), {{"path", out}});
  EXPECT_EQ(seen["kind"], "compact");
  EXPECT_EQ(seen["tensors"].size(), 20u);
  EXPECT_EQ(seen["tensors"][0]["codec"], "q8");
  EXPECT_EQ(seen["config"]["layers"], 2);
  EXPECT_EQ(run(inspect_command(), {{"path", model}})["kind"], "folder");
  EXPECT_EQ(run(inspect_command(), {{"path", model + "/model.safetensors"}})["kind"], "safetensors");
  EXPECT_EQ(CompactFile(out).embedded("tokenizer.json"), "{\"a\": 1}");
  EXPECT_EQ(run(verify_command(), {{"path", out}})["intact"], true);
  EXPECT_EQ(run(verify_command(), {{"path", model}})["intact"], true);
  std::string bytes = read_text(out);
  const CompactFile file(out);
  const auto& damaged = file.tensor("model.layers.1.self_attn.o_proj.weight");
  const SafetensorsFile whole(out);
  bytes[static_cast<std::size_t>(whole.find(damaged.name)->data.data() - whole.file().bytes().data()) + 5] ^= 1;
  testing::write_bytes(scratch_ / "bad.pare", bytes);
  const std::string message = error_of([&] { run(verify_command(), {{"path", (scratch_ / "bad.pare").string()}}); });
  EXPECT_TRUE(message.starts_with("3 ") && contains(message, damaged.name)) << message;
  EXPECT_TRUE(error_of([&] { run(verify_command(), {{"path", (scratch_ / "none").string()}}); }).starts_with("3 "));
  testing::GgufModelParts().write(scratch_ / "m.gguf");
  EXPECT_TRUE(contains(error_of([&] { run(verify_command(), {{"path", (scratch_ / "m.gguf").string()}}); }), "no hashes"));
}

// The runtime knows tokenizer.json alone: a folder's tokenizer.model travels as what it means.
TEST_F(ExportTest, SentencepieceModelsAreEmbeddedAsTokenizerJson) {
  testing::write_folder(scratch_ / "m", small_config());
  const fs::path golden = fs::path(PARE_SOURCE_DIR) / "tests/golden/sentencepiece";
  fs::copy_file(golden / "llama.model", scratch_ / "m" / "tokenizer.model");
  const std::string model = (scratch_ / "m").string(), out = (scratch_ / "m.pare").string();
  run(export_command(), {{"model", model}, {"codec", "q8"}, {"out", out}});
  const auto embedded = CompactFile(out).embedded("tokenizer.json");
  if (!tok::reads_sentencepiece()) {
    EXPECT_FALSE(embedded.has_value());
    EXPECT_TRUE(contains(plan_export(Checkpoint(model), {.out = out, .codec = "q8"}).notes.back(), "libsentencepiece"));
    GTEST_SKIP() << "SKIPPED: built without libsentencepiece";
  }
  ASSERT_TRUE(embedded.has_value());
  EXPECT_EQ(Tokenizer::from_text(*embedded, "").encode("Hello world"),
            Tokenizer::from_file(golden / "llama.model").encode("Hello world"));
  EXPECT_EQ(run(tokenize_command(), {{"tokenizer", out}, {"text", "Hello world"}})["ids"],
            run(tokenize_command(), {{"tokenizer", model}, {"text", "Hello world"}})["ids"]);
  EXPECT_TRUE(plan_export(Checkpoint(model), {.out = out, .codec = "q8"}).notes.empty());
  // One that cannot be read: the weights are worth a file, and the plan says what it will lack.
  fs::remove(scratch_ / "m" / "tokenizer.model");
  fs::copy_file(golden / "unigram.model", scratch_ / "m" / "tokenizer.model");
  const auto notes = plan_export(Checkpoint(model), {.out = out, .codec = "q8"}).notes;
  ASSERT_EQ(notes.size(), 1u);
  EXPECT_TRUE(contains(notes[0], "UNIGRAM") && contains(notes[0], "not given text")) << notes[0];
  run(export_command(), {{"model", model}, {"codec", "q8"}, {"out", out + "2"}});
  EXPECT_FALSE(CompactFile(out + "2").embedded("tokenizer.json").has_value());
}

}  // namespace
}  // namespace pare
