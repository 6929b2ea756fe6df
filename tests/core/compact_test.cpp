#include "core/compact.h"

#include <sys/resource.h>
#include <sys/wait.h>

#include <csignal>
#include <cstring>

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

std::vector<CompactWriter::Plan> plan_of(const ModelConfig& config) {
  static const char* kNames[] = {"q8c",   "q4g32", "q8",    "q4ag32", "f16",  "q4g64",
                                 "bf16",  "q4g128", "q3g32", "q2g32",  "w8a8", "q3g128", "q4mg32"};
  std::vector<CompactWriter::Plan> plan;
  std::size_t matrices = 0;
  for (const TensorSpec& spec : expected_tensors(config)) {
    Codec codec{CodecKind::kF32, 0};
    if (spec.shape.size() == 2) codec = Codec::parse(kNames[matrices++ % 13], "");
    if (!codec.fits(spec.shape.back())) codec = Codec::parse("q8", "");
    plan.push_back({spec.name, codec, spec.shape});
  }
  return plan;
}

std::vector<float> floats_of(const CompactWriter::Plan& tensor) {
  return values_of({tensor.name, tensor.shape, TensorRole::kNorm, -1, ""});
}

QuantizedTensor codes_of(const CompactWriter::Plan& tensor) {
  return random_codes(tensor.codec, tensor.shape[0], tensor.shape[1], static_cast<std::uint32_t>(tensor.name.size()));
}

class CompactTest : public ::testing::Test {
 protected:
  CompactTest() {
    Json json = small_config();
    json["vocab_size"] = 19;
    json["intermediate_size"] = 32;
    config_ = parse_config(json, nullptr, "config.json");
    embedded_ = {{"config.json", json.dump()}, {"tokenizer.json", "{\"odd\":1}"}, {"empty", ""}};
  }
  void add_all(CompactWriter& writer) const {
    for (const auto& tensor : plan_of(config_)) {
      if (tensor.codec.is_float()) writer.add(floats_of(tensor).data());
      else writer.add(codes_of(tensor));
    }
  }
  fs::path make(const std::string& name, const std::string& report = "[]\n") const {
    CompactWriter writer(scratch_ / name, plan_of(config_), embedded_);
    add_all(writer);
    writer.seal(report);
    return scratch_ / name;
  }
  Scratch scratch_;
  ModelConfig config_;
  std::map<std::string, std::string> embedded_;
};

TEST_F(CompactTest, EverythingComesBack) {
  const CompactFile file(make("m.pare", R"([{"stage":"s","metric":"m"}])"));
  EXPECT_TRUE(CompactFile::is_compact(file.path()));
  EXPECT_TRUE(file.verify().empty());
  EXPECT_EQ(file.version(), 1);
  EXPECT_EQ(file.embedded("tokenizer.json"), "{\"odd\":1}");
  EXPECT_EQ(file.embedded("empty"), "");
  EXPECT_EQ(file.embedded("report"), R"([{"stage":"s","metric":"m"}])");
  EXPECT_FALSE(file.embedded("nothing"));
  EXPECT_EQ(file.config().vocab_size, 19);
  std::uint64_t bytes = 0;
  for (const auto& tensor : plan_of(config_)) {
    const CompactTensor& read = file.tensor(tensor.name);
    bytes += read.payload.size();
    EXPECT_EQ(read.codec, tensor.codec);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(read.payload.data()) % 64, 0u);
    if (!tensor.codec.is_float()) {
      EXPECT_TRUE(same(unpack_payload(read.codec, tensor.shape[0], tensor.shape[1], read.payload, "x"), codes_of(tensor)));
      continue;
    }
    const std::vector<float> values = floats_of(tensor);
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (tensor.codec.kind == CodecKind::kF32) {
        ASSERT_EQ(std::memcmp(read.payload.data() + 4 * i, &values[i], 4), 0);
      } else {
        const std::uint16_t bits = tensor.codec.kind == CodecKind::kF16 ? f32_to_f16(values[i]) : f32_to_bf16(values[i]);
        ASSERT_EQ(std::memcmp(read.payload.data() + 2 * i, &bits, 2), 0);
      }
    }
  }
  EXPECT_EQ(file.tensor_bytes(), bytes);
}

TEST_F(CompactTest, TheSameInputsGiveTheSameBytes) {
  EXPECT_EQ(read_text(make("a.pare")), read_text(make("b.pare")));
}

TEST_F(CompactTest, TheFileCanBeMeasuredBeforeItIsSealed) {
  CompactWriter writer(scratch_ / "m.pare", plan_of(config_), embedded_);
  EXPECT_THROW(writer.seal("[]"), std::logic_error);
  add_all(writer);
  const fs::path temporary = writer.finish_payload();
  std::vector<std::string> hashes;
  {
    const CompactFile file(temporary);
    EXPECT_TRUE(file.verify().empty());
    EXPECT_EQ(file.embedded("report"), "");
    for (const CompactTensor& tensor : file.tensors()) hashes.push_back(tensor.hash);
  }
  EXPECT_FALSE(fs::exists(scratch_ / "m.pare"));
  writer.seal(std::string(100'000, ' ') + "[]");
  EXPECT_FALSE(fs::exists(temporary));
  const CompactFile file(scratch_ / "m.pare");
  EXPECT_TRUE(file.verify().empty());
  for (std::size_t i = 0; i < hashes.size(); ++i) EXPECT_EQ(file.tensors()[i].hash, hashes[i]);
}

TEST_F(CompactTest, NothingStaysWithoutSeal) {
  {
    CompactWriter writer(scratch_ / "m.pare", plan_of(config_), embedded_);
    add_all(writer);
    writer.finish_payload();
  }
  EXPECT_TRUE(fs::is_empty(scratch_.path()));
  make("m.pare");
  EXPECT_TRUE(error_of([&] { CompactWriter writer(scratch_ / "m.pare", plan_of(config_), embedded_); }).starts_with("2 "));
}

// One flipped bit anywhere: the file is refused or verify names the damage; in a payload it names that tensor.
TEST_F(CompactTest, EveryFlippedBitIsFound) {
  const std::string whole = read_text(make("m.pare"));
  const CompactFile intact(scratch_ / "m.pare");
  const auto base = intact.tensors().front().payload.data();
  std::uint64_t header = 0;
  std::memcpy(&header, whole.data(), 8);
  const std::size_t data_begin = 8 + header;
  const auto flip = [&](std::size_t byte, int bit) {
    std::string bytes = whole;
    bytes[byte] = static_cast<char>(bytes[byte] ^ (1 << bit));
    write_bytes(scratch_ / "flipped", bytes);
  };
  for (std::size_t byte = 0; byte < data_begin; byte += 61) {
    flip(byte, static_cast<int>(byte % 8));
    const std::string message = error_of([&] {
      const auto damaged = CompactFile(scratch_ / "flipped").verify();
      if (!damaged.empty()) throw input_error("verify", "intact", damaged.front());
    });
    EXPECT_TRUE(message.starts_with("3 ")) << byte << " " << message;
  }
  for (const CompactTensor& tensor : intact.tensors()) {
    for (const std::size_t inside : {std::size_t{0}, tensor.payload.size() / 2, tensor.payload.size() - 1}) {
      flip(data_begin + static_cast<std::size_t>(tensor.payload.data() - base) + inside, static_cast<int>(inside % 8));
      const auto damaged = CompactFile(scratch_ / "flipped").verify();
      EXPECT_EQ(damaged, (std::vector<std::string>{tensor.name, "file"})) << tensor.name;
    }
  }
  flip(whole.size() - 1, 0);
  EXPECT_EQ(CompactFile(scratch_ / "flipped").verify(), std::vector<std::string>{"pare.report"});
}

TEST_F(CompactTest, RefusesTruncationsAndForeignFiles) {
  const std::string whole = read_text(make("m.pare"));
  for (std::size_t length = 0; length < whole.size(); length += 1 + whole.size() / 200) {
    write_bytes(scratch_ / "cut", whole.substr(0, length));
    EXPECT_TRUE(error_of([&] { CompactFile file(scratch_ / "cut"); }).starts_with("3 ")) << length;
  }
  testing::write_folder(scratch_ / "folder", small_config());
  EXPECT_FALSE(CompactFile::is_compact(scratch_ / "folder"));
  EXPECT_FALSE(CompactFile::is_compact(scratch_ / "folder" / "model.safetensors"));
  EXPECT_TRUE(contains(error_of([&] { CompactFile file(scratch_ / "folder" / "model.safetensors"); }), "compact file"));
  const auto edited = [&](const std::string& from, const std::string& to) {
    std::string bytes = whole;
    const auto at = bytes.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    bytes.replace(at, from.size(), to);
    write_bytes(scratch_ / "edited", bytes);
    return error_of([&] { CompactFile file(scratch_ / "edited"); });
  };
  EXPECT_TRUE(contains(edited(R"(\"version\":1)", R"(\"version\":7)"), "version 7"));
  EXPECT_TRUE(contains(edited(R"(\"codec\":\"q4g32\")", R"(\"codec\":\"q9g32\")"), "codec"));
  EXPECT_TRUE(contains(edited(R"(\"codec\":\"q4g32\")", R"(\"codec\":\"q4g64\")"), "bytes instead of"));
  EXPECT_TRUE(contains(edited(R"(\"shape\":[19,128])", R"(\"shape\":[20,128])"), "another shape"));
  EXPECT_TRUE(contains(edited(R"("num_hidden_layers":2)", R"("num_hidden_layers":1)"), "left over"));
  EXPECT_TRUE(contains(edited(R"("num_hidden_layers":2)", R"("num_hidden_layers":3)"), "missing"));
}

TEST_F(CompactTest, RefusesNumbersTheCodecCannotHold) {
  auto plan = plan_of(config_);
  for (auto& tensor : plan)
    if (tensor.shape.size() == 2) tensor.codec = Codec{CodecKind::kF16, 0};
  CompactWriter writer(scratch_ / "m.pare", plan, embedded_);
  std::vector<float> values = floats_of(plan[0]);
  values[7] = NAN;
  EXPECT_TRUE(error_of([&] { writer.add(values.data()); }).starts_with("1 tensor model.embed_tokens.weight"));
}

TEST_F(CompactTest, AFullDiskLeavesNothing) {
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{40'000, 40'000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    int code = 99;
    try {
      make("m.pare");
    } catch (const Error& problem) {
      code = static_cast<int>(problem.code());
    }
    ::_exit(code);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(WEXITSTATUS(status), 1);
  EXPECT_TRUE(fs::is_empty(scratch_.path()));
}

}  // namespace
}  // namespace pare
