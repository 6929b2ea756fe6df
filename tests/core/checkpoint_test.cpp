#include "core/checkpoint.h"

#include <sys/resource.h>
#include <sys/wait.h>

#include <csignal>
#include <cstring>
#include <functional>

#include "core/compressed_tensors.h"
#include "model_folder.h"

namespace pare {
namespace {

using testing::contains;
using testing::error_of;
using testing::random_codes;
using testing::same;
using testing::Scratch;
using testing::small_config;
using testing::values_of;
using testing::write_bytes;
using testing::write_folder;

std::map<std::string, std::string> contents(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    files[fs::relative(entry.path(), folder).string()] = entry.is_regular_file() ? read_text(entry.path()) : "folder";
  return files;
}

ModelConfig small() { return parse_config(small_config(), nullptr, "config.json"); }

TEST(Checkpoint, ReadsFloatsAndDropsWhatTransformersDrops) {
  const Scratch scratch;
  auto specs = expected_tensors(small());
  specs.push_back({"lm_head.weight", {50, 128}, TensorRole::kHead, -1, "lm_head"});
  specs.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", {16}, TensorRole::kNorm, 0, ""});
  write_folder(scratch / "m", small_config(), specs);
  const Checkpoint model(scratch / "m");
  EXPECT_EQ(model.float_dtype(), "float32");
  EXPECT_FALSE(model.has("lm_head.weight"));
  for (const TensorSpec& spec : model.tensors()) EXPECT_EQ(model.read_f32(spec.name), values_of(spec));
  EXPECT_EQ(model.tensor_bytes(), 4u * static_cast<std::uint64_t>(parameter_count(model.config())));
  const std::string hash = model.content_hash();
  EXPECT_EQ(hash, Checkpoint(scratch / "m").content_hash());
  write_bytes(scratch.path() / "m" / "tokenizer.json", "{}");
  EXPECT_NE(hash, Checkpoint(scratch / "m").content_hash());
}

TEST(Checkpoint, ListsAllProblemsAtOnce) {
  const Scratch scratch;
  auto specs = expected_tensors(small());
  specs[1].shape = {127};
  specs.erase(specs.begin() + 3);
  specs.push_back({"model.layers.7.mlp.up_proj.weight", {2, 2}, TensorRole::kLinear, 7, ""});
  write_folder(scratch / "m", small_config(), specs);
  const std::string message = error_of([&] { Checkpoint model(scratch / "m"); });
  EXPECT_TRUE(message.starts_with("3 ") && contains(message, "3 problems") && contains(message, "instead of F32 [128]") &&
              contains(message, "self_attn.k_proj.weight is missing") && contains(message, "layers.7.mlp.up_proj.weight F32 [2, 2] is left over"))
      << message;
  EXPECT_TRUE(error_of([&] { Checkpoint model(scratch / "none"); }).starts_with("3 "));
  fs::create_directories(scratch / "empty");
  EXPECT_TRUE(contains(error_of([&] { Checkpoint model(scratch / "empty"); }), "config.json"));
}

// Codes for every 2-D tensor, mixing all codecs; norms as floats.
void put_one(CheckpointWriter& writer, const TensorSpec& spec, std::size_t index) {
  static const char* kNames[] = {"q4g32", "q8", "q4ag32", "q8c", "q4g64", "q3g32", "q4ag64", "w8a8", "q2g64", "q4mg32"};
  if (spec.shape.size() == 1 || index % 8 == 7) {
    writer.put(spec.name, values_of(spec).data());
    return;
  }
  Codec codec = Codec::parse(kNames[index % 10], "");
  if (!codec.fits(spec.shape[1])) codec = Codec::parse("q8c", "");
  writer.put_codes(spec.name, random_codes(codec, spec.shape[0], spec.shape[1], static_cast<std::uint32_t>(index)));
}

TEST(Checkpoint, CodesComeBackTheVerySame) {
  for (const bool tied : {true, false}) {
    const Scratch scratch;
    ModelConfig config = small();
    config.tie_word_embeddings = tied;
    const auto specs = expected_tensors(config);
    std::map<std::string, QuantizedTensor> put;
    CheckpointWriter writer(scratch.path(), config, "float32");
    for (std::size_t i = 0; i < specs.size(); ++i) {
      if (specs[i].shape.size() == 1) {
        writer.put(specs[i].name, values_of(specs[i]).data());
        continue;
      }
      static const char* kNames[] = {"q4g32", "q8",    "q4ag32", "q8c",  "q4g64",  "q4g128", "q4ag128",
                                     "q3g32", "q2g32", "q3g64",  "w8a8", "q2g128", "q3g128", "q4mg64"};
      Codec codec = Codec::parse(kNames[put.size() % 14], "");
      if (!codec.fits(specs[i].shape[1])) codec = Codec::parse("q8", "");
      put[specs[i].name] = random_codes(codec, specs[i].shape[0], specs[i].shape[1], static_cast<std::uint32_t>(i));
      writer.put_codes(specs[i].name, put[specs[i].name]);
    }
    writer.finish();
    EXPECT_FALSE(fs::exists(scratch / "pieces"));
    const Checkpoint model(scratch.path());
    for (const auto& [name, tensor] : put) {
      EXPECT_TRUE(same(model.codes(name), tensor)) << name;
      std::vector<float> unpacked(tensor.codes.size());
      tensor.unpack(unpacked.data());
      EXPECT_EQ(model.read_f32(name), unpacked);
    }
    const Json quantization = read_json(scratch / "config.json")["quantization_config"];
    EXPECT_EQ(quantization["quant_method"], "compressed-tensors");
    // The unpacked copy beside codes.pare is what any other program reads.
    const ShardedTensors shards(scratch.path());
    std::vector<float> copy(50 * 128);
    to_f32(*shards.find("model.embed_tokens.weight"), 0, 50 * 128, copy.data());
    EXPECT_EQ(copy, model.read_f32("model.embed_tokens.weight"));
    // A codec that nobody knows is damage of the folder, not a mistake on the command line.
    std::string side = read_text(scratch / "codes.pare");
    const std::size_t at = side.find("q4g32");
    ASSERT_NE(at, std::string::npos);
    write_bytes(scratch / "codes.pare", side.replace(at, 5, "q4g33"));
    const std::string message = error_of([&] { Checkpoint damaged(scratch.path()); });
    EXPECT_TRUE(message.starts_with("3 ") && contains(message, "codes.pare") && contains(message, "q4g33")) << message;
  }
}

// Words written from the specification of compressed-tensors: dense bit stream, low bits first, plus 2^(bits-1).
TEST(Checkpoint, PackedWordsFollowTheSpecification) {
  for (const char* name : {"q4g32", "q8", "q3g32", "q2g32"}) {
    const QuantizedTensor tensor = random_codes(Codec::parse(name, ""), 3, 96, 4);
    const int bits = tensor.codec.bits();
    const std::vector<std::int32_t> words = pack_weight(tensor);
    QuantizedTensor back{tensor.codec, 3, 96, {}, tensor.scales, {}, {}};
    unpack_weight({"x", DType::kI32, {3, 3 * bits}, std::as_bytes(std::span(words))}, back);
    EXPECT_TRUE(same(back, tensor)) << name;
    ASSERT_EQ(words.size(), static_cast<std::size_t>(3 * 96 * bits / 32));
    for (int row = 0; row < 3; ++row)
      for (int bit = 0; bit < 96 * bits; ++bit) {
        const int code = tensor.codes[static_cast<std::size_t>(row * 96 + bit / bits)] + (1 << (bits - 1));
        const auto word = static_cast<std::uint32_t>(words[static_cast<std::size_t>(row * 96 * bits / 32 + bit / 32)]);
        ASSERT_EQ((word >> (bit % 32)) & 1u, static_cast<unsigned>(code >> (bit % bits)) & 1u);
      }
  }
}

TEST(Checkpoint, ReadsForeignAsymmetricFoldersAndPatternTargets) {
  const Scratch scratch;
  Json config = small_config();
  config["quantization_config"] = Json::parse(R"({"quant_method":"compressed-tensors","format":"pack-quantized","ignore":["lm_head"],
    "config_groups":{"group_0":{"targets":["re:.*q_proj$"],"weights":{"num_bits":4,"type":"int","symmetric":false,"strategy":"group","group_size":64}}}})");
  const std::string stem = "model.layers.0.self_attn.q_proj";
  const QuantizedTensor tensor = random_codes(Codec::parse("q4ag64", ""), 128, 128, 3);
  const auto write = [&](const Json& json, bool bad_scale) {
    fs::remove_all(scratch / "m");
    fs::create_directories(scratch / "m");
    write_bytes(scratch.path() / "m" / "config.json", json.dump());
    std::vector<TensorDecl> decls;
    std::string data;
    const auto add = [&](const std::string& name, DType dtype, std::vector<std::int64_t> shape, std::span<const std::byte> bytes) {
      decls.push_back({name, dtype, shape});
      data.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    };
    for (const TensorSpec& spec : expected_tensors(small())) {
      if (spec.name != stem + ".weight") {
        const auto values = values_of(spec);
        add(spec.name, DType::kF32, spec.shape, std::as_bytes(std::span(values)));
        continue;
      }
      std::vector<std::uint32_t> words(128 * 16), zeros(16 * 2);
      std::vector<float> scales;
      for (std::size_t i = 0; i < 128 * 128; ++i) words[i / 8] |= static_cast<std::uint32_t>(tensor.codes[i]) << (i % 8 * 4);
      for (std::size_t r = 0; r < 128; ++r)
        for (std::size_t g = 0; g < 2; ++g) zeros[r / 8 * 2 + g] |= static_cast<std::uint32_t>(tensor.zeros[r * 2 + g]) << (r % 8 * 4);
      for (const std::uint16_t scale : tensor.scales) scales.push_back(f16_to_f32(scale));
      if (bad_scale) scales[3] = 0.1f;
      const std::int64_t shape[2] = {128, 128};
      add(stem + ".weight_packed", DType::kI32, {128, 16}, std::as_bytes(std::span(words)));
      add(stem + ".weight_scale", DType::kF32, {128, 2}, std::as_bytes(std::span(scales)));
      add(stem + ".weight_shape", DType::kI64, {2}, std::as_bytes(std::span(shape)));
      add(stem + ".weight_zero_point", DType::kI32, {16, 2}, std::as_bytes(std::span(zeros)));
    }
    SafetensorsWriter writer(scratch / "m" / "model.safetensors", decls, {{"format", "pt"}});
    writer.write(as_bytes(data));
    writer.finish();
  };
  write(config, false);
  EXPECT_TRUE(same(Checkpoint(scratch / "m").codes(stem + ".weight"), tensor));
  write(config, true);
  const Checkpoint inexact(scratch / "m");
  EXPECT_TRUE(contains(error_of([&] { inexact.codes(stem + ".weight"); }), "half precision"));

  const auto refused = [&](const std::function<void(Json&)>& change) {
    Json other = config;
    change(other["quantization_config"]);
    write(other, false);
    return error_of([&] { Checkpoint model(scratch / "m"); });
  };
  const auto weights = [](Json& q) -> Json& { return q["config_groups"]["group_0"]["weights"]; };
  EXPECT_TRUE(contains(refused([](Json& q) { q["quant_method"] = "awq"; }), "awq"));
  EXPECT_TRUE(contains(refused([](Json& q) { q["format"] = "float-quantized"; }), "float-quantized"));
  EXPECT_TRUE(contains(refused([&](Json& q) { weights(q)["num_bits"] = 3; }), "int 3 bits, asymmetric"));
  EXPECT_TRUE(contains(refused([&](Json& q) { weights(q)["num_bits"] = 5; }), "int 5 bits"));
  const Json three = {{"num_bits", 3}, {"group_size", 64}, {"strategy", "group"}};
  EXPECT_TRUE(contains(refused([&](Json& q) { weights(q) = three; }), "instead of"));
  EXPECT_TRUE(contains(refused([&](Json& q) { weights(q)["group_size"] = 32; }), "instead of"));
  EXPECT_TRUE(contains(refused([](Json& q) { q["config_groups"]["group_0"]["targets"] = {"re:("}; }), "regular expression"));
  EXPECT_TRUE(contains(refused([](Json& q) { q["config_groups"]["group_0"]["targets"] = {"nobody"}; }), "targets it"));
  EXPECT_TRUE(contains(refused([](Json& q) { q["config_groups"]["group_0"]["input_activations"] = {{"num_bits", 8}}; }), "activations"));
}

// int-quantized as other programs write it: bytes for codes, scales in any float, pattern targets, inputs per token.
TEST(Checkpoint, ReadsForeignInt8FoldersWithRoundedInputs) {
  const Scratch scratch;
  Json config = small_config();
  config["quantization_config"] = Json::parse(R"({
    "quant_method":"compressed-tensors","format":"int-quantized","ignore":["lm_head"],
    "config_groups":{"group_0":{"targets":["re:.*q_proj$"],
      "weights":{"num_bits":8,"type":"int","symmetric":true,"strategy":"channel"},
      "input_activations":{"num_bits":8,"type":"int","symmetric":true,"strategy":"token","dynamic":true}}}})");
  const std::string name = "model.layers.0.self_attn.q_proj.weight";
  const QuantizedTensor tensor = random_codes(Codec::parse("w8a8", ""), 128, 128, 3);
  const auto write = [&](const Json& json, bool scales_there) {
    fs::remove_all(scratch / "m");
    fs::create_directories(scratch / "m");
    write_bytes(scratch.path() / "m" / "config.json", json.dump());
    std::vector<TensorDecl> decls;
    std::string data;
    const auto add = [&](const std::string& text, DType dtype, std::vector<std::int64_t> shape,
                         std::span<const std::byte> bytes) {
      decls.push_back({text, dtype, shape});
      data.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    };
    for (const TensorSpec& spec : expected_tensors(small())) {
      if (spec.name != name) {
        const auto values = values_of(spec);
        add(spec.name, DType::kF32, spec.shape, std::as_bytes(std::span(values)));
        continue;
      }
      add(name, DType::kI8, {128, 128}, std::as_bytes(std::span(tensor.codes)));
      if (scales_there) add(name + "_scale", DType::kF16, {128, 1}, std::as_bytes(std::span(tensor.scales)));
    }
    SafetensorsWriter writer(scratch / "m" / "model.safetensors", decls, {{"format", "pt"}});
    writer.write(as_bytes(data));
    writer.finish();
  };
  write(config, true);
  {
    const Checkpoint folder(scratch / "m");
    EXPECT_EQ(folder.codec(name).name(), "w8a8");
    EXPECT_TRUE(same(folder.codes(name), tensor));
  }
  const auto refused = [&](const std::function<void(Json&)>& change, bool scales_there = true) {
    Json other = config;
    change(other["quantization_config"]["config_groups"]["group_0"]);
    write(other, scales_there);
    return error_of([&] { Checkpoint model(scratch / "m"); });
  };
  EXPECT_EQ(refused([](Json&) {}), "no error");
  EXPECT_EQ(refused([](Json& g) { g["input_activations"] = nullptr; }), "no error");
  EXPECT_EQ(Checkpoint(scratch / "m").codec(name).name(), "q8c");
  EXPECT_TRUE(contains(refused([](Json&) {}, false), "weight_scale is missing"));
  for (const auto& [key, value] : std::map<std::string, Json>{
           {"num_bits", 4}, {"type", "float"}, {"symmetric", false}, {"strategy", "tensor"}, {"dynamic", false}}) {
    const std::string message = refused([&](Json& g) { g["input_activations"][key] = value; });
    EXPECT_TRUE(message.starts_with("3 ") && contains(message, "per token")) << key << ": " << message;
  }
  EXPECT_TRUE(contains(refused([](Json& g) { g["weights"]["num_bits"] = 4; }), "inputs are rounded"));
  EXPECT_TRUE(contains(refused([](Json& g) { g["output_activations"] = g["input_activations"]; }), "output_activ"));
  EXPECT_TRUE(contains(refused([](Json& g) {
                         g["input_activations"] = nullptr;
                         g["weights"] = {{"num_bits", 4}, {"group_size", 32}, {"strategy", "group"}};
                       }), "a byte a code"));
  Json plain = config;
  plain.erase("quantization_config");
  write(plain, true);
  EXPECT_TRUE(contains(error_of([&] { Checkpoint model(scratch / "m"); }), "without a quantization_config"));
}

TEST(Checkpoint, TablesCannotRoundInputs) {
  const Scratch scratch;
  const ModelConfig config = small();
  CheckpointWriter writer(scratch.path(), config, "float32");
  for (const TensorSpec& spec : expected_tensors(config)) {
    if (spec.role != TensorRole::kEmbedding) writer.put(spec.name, values_of(spec).data());
    else writer.put_codes(spec.name, random_codes(Codec::parse("w8a8", ""), spec.shape[0], spec.shape[1], 1));
  }
  const std::string message = error_of([&] { writer.finish(); });
  EXPECT_TRUE(message.starts_with("3 ") && contains(message, "embed_tokens") && contains(message, "w8a8")) << message;
}

TEST(CheckpointWriter, InterruptionsLeaveNoTrace) {
  const Scratch scratch;
  const ModelConfig config = small();
  const auto specs = expected_tensors(config);
  fs::create_directories(scratch / "straight");
  {
    CheckpointWriter writer(scratch / "straight", config, "bfloat16");
    for (std::size_t i = 0; i < specs.size(); ++i) put_one(writer, specs[i], i);
    writer.finish();
  }
  // The same in pieces, killed at every possible point: a fresh writer goes on each time.
  fs::create_directories(scratch / "broken");
  const auto piece_of = [](const TensorSpec& spec) { return "block " + std::to_string(spec.layer); };
  int rounds = 0;
  for (bool done = false; !done; ++rounds) {
    ASSERT_LT(rounds, 20);
    CheckpointWriter writer(scratch / "broken", config, "bfloat16");
    write_bytes(scratch.path() / "broken" / "pieces" / "x.piece.tmp-123", "half written");
    done = true;
    for (const int layer : {1, -1, 0}) {
      const std::string piece = "block " + std::to_string(layer);
      if (writer.has_piece(piece)) continue;
      writer.begin_piece(piece);
      for (std::size_t i = 0; i < specs.size(); ++i)
        if (piece_of(specs[i]) == piece) put_one(writer, specs[i], i);
      if (rounds % 2 == 1) writer.end_piece();  // even rounds die with the piece open
      done = false;
      break;
    }
    if (done) writer.finish();
  }
  EXPECT_EQ(rounds, 7);
  EXPECT_EQ(contents(scratch / "straight"), contents(scratch / "broken"));
  {  // finished, but not yet renamed by the transaction
    CheckpointWriter again(scratch / "broken", config, "bfloat16");
    EXPECT_TRUE(again.has(specs[0].name) && again.has_piece("block 0"));
    again.finish();
  }
  EXPECT_EQ(contents(scratch / "straight"), contents(scratch / "broken"));
  ModelConfig other = config;
  other.intermediate_size = 64;
  EXPECT_TRUE(error_of([&] { CheckpointWriter writer(scratch / "broken", other, "bfloat16"); }).starts_with("2 "));
}

TEST(CheckpointWriter, RefusesWhatItCannotHold) {
  const Scratch scratch;
  const ModelConfig config = small();
  const TensorSpec norm = expected_tensors(config).back();
  auto values = values_of(norm);
  CheckpointWriter writer(scratch.path(), config, "float16");
  values[3] = 70000.0f;
  EXPECT_TRUE(contains(error_of([&] { writer.put(norm.name, values.data()); }), "float16"));
  EXPECT_FALSE(writer.has(norm.name));
  EXPECT_THROW(writer.put("nothing", values.data()), std::logic_error);
  EXPECT_THROW(writer.finish(), std::logic_error);
  EXPECT_TRUE(error_of([&] { CheckpointWriter bad(scratch / "x", config, "float8"); }).starts_with("2 "));
}

TEST(CheckpointWriter, AFullDiskEndsWithAnErrorAndNoFinalFile) {
  const Scratch scratch;
  const ModelConfig config = small();
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{60'000, 60'000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    int code = 99;
    try {
      CheckpointWriter writer(scratch.path(), config, "float32");
      for (const TensorSpec& spec : expected_tensors(config)) writer.put(spec.name, values_of(spec).data());
      writer.finish();
    } catch (const Error& problem) {
      code = static_cast<int>(problem.code());
    }
    ::_exit(code);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(WEXITSTATUS(status), 1);
  EXPECT_FALSE(fs::exists(scratch / "model.safetensors"));
  EXPECT_FALSE(fs::exists(scratch / "config.json"));
}

}  // namespace
}  // namespace pare
