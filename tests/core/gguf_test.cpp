// The GGUF reader: blocks against values of the gguf package, and files that nobody should trust.
#include <gtest/gtest.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>

#include "core/error.h"
#include "core/gguf_arch.h"
#include "core/gguf_file.h"
#include "core/tensor_store.h"
#include "core/tokenizer.h"
#include "tests/core/gguf_bytes.h"
#include "tests/core/model_folder.h"

namespace pare {
namespace {

using testing::contains;
using testing::error_of;
using testing::GgufBytes;
using testing::Scratch;
using testing::write_bytes;

TEST(GgufBlocks, ValuesAreThoseOfTheReference) {
  const Json golden = read_json(fs::path(PARE_SOURCE_DIR) / "tests/golden/gguf_blocks.json");
  ASSERT_EQ(golden.size(), 14u);
  for (const auto& [name, row] : golden.items()) {
    std::uint32_t number = 0;
    while (!is_ggml_type(number) || ggml_type_name(static_cast<GgmlType>(number)) != name) ASSERT_LT(number++, 64u);
    const auto type = static_cast<GgmlType>(number);
    const auto hex = row.at("blocks").get<std::string>();
    std::vector<std::byte> blocks;
    for (std::size_t i = 0; i < hex.size(); i += 2)
      blocks.push_back(static_cast<std::byte>(std::stoi(hex.substr(i, 2), nullptr, 16)));
    const auto wanted = row.at("values").get<std::vector<std::uint32_t>>();
    ASSERT_EQ(ggml_bytes(type, static_cast<std::int64_t>(wanted.size())), blocks.size()) << name;
    std::vector<float> found(wanted.size());
    ggml_to_f32(type, blocks.data(), static_cast<std::int64_t>(found.size()), found.data());
    for (std::size_t i = 0; i < found.size(); ++i)
      EXPECT_EQ(std::bit_cast<std::uint32_t>(found[i]), wanted[i]) << name << " " << i;
  }
}

TEST(GgufBlocks, CodesGoThereAndBack) {
  for (const char* name : {"q8", "q4", "q4a", "q4m"}) {
    const Codec codec = Codec::parse(name, "");
    QuantizedTensor tensor = testing::random_codes(codec, 7, 96, 3);
    if (codec.kind == CodecKind::kQ4a)  // powers of two, so that zero x scale is a half
      for (std::size_t i = 0; i < tensor.scales.size(); ++i)
        tensor.scales[i] = f32_to_f16(std::ldexp(1.0f, -static_cast<int>(i % 9)));
    const GgmlType type = codec.kind == CodecKind::kQ8   ? GgmlType::kQ8_0
                          : codec.kind == CodecKind::kQ4 ? GgmlType::kQ4_0
                                                         : GgmlType::kQ4_1;
    QuantizedTensor back = tensor;
    std::vector<float> row(96), floats(96);
    for (std::int64_t r = 0; r < 7; ++r) {
      std::vector<std::byte> blocks(ggml_bytes(type, 96));
      pack_ggml_row(type, tensor, r, blocks.data());
      ASSERT_TRUE(unpack_ggml_row(type, blocks.data(), back, r));
      tensor.unpack_row(r, row.data());
      ggml_to_f32(type, blocks.data(), 96, floats.data());
      EXPECT_EQ(row, floats) << name;
    }
    EXPECT_TRUE(testing::same(tensor, back)) << name;
  }
}

void put_half(std::vector<std::byte>& block, std::size_t at, std::uint16_t bits) {
  std::memcpy(block.data() + at, &bits, 2);
}

float half_at(const std::vector<std::byte>& block, std::size_t at) {
  std::uint16_t bits;
  std::memcpy(&bits, block.data() + at, 2);
  return f16_to_f32(bits);
}

QuantizedTensor one_block(CodecKind kind) {
  QuantizedTensor out{{kind, 32}, 1, 32, std::vector<std::int8_t>(32), {0}, {}, {}};
  if (kind == CodecKind::kQ4a) out.zeros = {0};
  if (kind == CodecKind::kQ4m) out.minima = {0};
  return out;
}

TEST(GgufBlocks, WhatCodesCannotHoldIsSaid) {
  std::vector<std::byte> block(34);
  QuantizedTensor q8 = one_block(CodecKind::kQ8), q4a = one_block(CodecKind::kQ4a), q4m = one_block(CodecKind::kQ4m);
  put_half(block, 0, f32_to_f16(-0.5f));  // a scale below 0: codes turn, the weights stay
  block[2] = static_cast<std::byte>(7);
  ASSERT_TRUE(unpack_ggml_row(GgmlType::kQ8_0, block.data(), q8, 0));
  EXPECT_EQ(q8.codes[0], -7);
  EXPECT_EQ(f16_to_f32(q8.scales[0]), 0.5f);
  block[5] = static_cast<std::byte>(0x80);
  EXPECT_FALSE(unpack_ggml_row(GgmlType::kQ8_0, block.data(), q8, 0));
  struct Case {
    float d, m;
    bool zero, minimum;  // q4a holds it, q4m holds it
  };
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const auto& [d, m, zero, minimum] : {Case{0.5f, -2.0f, true, true},
                                            {0.5f, -2.25f, false, true},
                                            {0.5f, 0.5f, false, true},
                                            {0.5f, -8.0f, false, true},
                                            {0.0f, 0.0f, true, true},
                                            {0.0f, -0.0f, true, true},
                                            {0.0f, -1.0f, false, true},
                                            {-0.0f, -1.0f, false, true},
                                            {-0.0f, 0.0f, true, true},
                                            {-0.0f, -0.0f, false, false},  // weights of -0
                                            {-0.5f, 1.0f, false, true},
                                            {-0.5f, -0.0f, false, false},
                                            {-0.5f, 2047.0f, false, false},  // 2039.5 is no half
                                            {-0.5f, 2055.5f, false, false},  // neither is 2048.5 ... 2055.5
                                            {-8000.0f, 60000.0f, false, true},
                                            {-8000.0f, -60000.0f, false, false},  // beyond the halves
                                            {kInfinity, 0.0f, false, false},
                                            {-kInfinity, 0.0f, false, false},
                                            {std::nanf(""), 0.0f, false, false},
                                            {0.5f, kInfinity, false, false},
                                            {0.5f, std::nanf(""), false, false}}) {
    put_half(block, 0, f32_to_f16(d));
    put_half(block, 2, f32_to_f16(m));
    EXPECT_EQ(unpack_ggml_row(GgmlType::kQ4_1, block.data(), q4a, 0), zero) << d << " " << m;
    EXPECT_EQ(unpack_ggml_row(GgmlType::kQ4_1, block.data(), q4m, 0), minimum) << d << " " << m;
    if (zero && d > 0) {
      EXPECT_EQ(q4a.zeros[0], 4);
    }
  }
}

// Whatever the two halves of a block are: codes with a minimum are the floats that the block stands for, bit for bit.
TEST(GgufBlocks, MinimaAreExact) {
  std::uint64_t state = 88172645463325252ull;
  const auto random = [&] { return state ^= state << 13, state ^= state >> 7, state ^= state << 17; };
  int held = 0, turned = 0;
  for (int round = 0; round < 20000; ++round) {
    std::vector<std::byte> block(20);
    for (std::byte& byte : block) byte = static_cast<std::byte>(random() >> 40);
    if (round % 2 == 0) {  // minima that are sums of scales, where turning a negative scale may be exact
      const float d = std::ldexp(static_cast<float>(random() >> 40 & 63) - 32, -8);
      put_half(block, 0, f32_to_f16(d));
      put_half(block, 2, f32_to_f16(d * (static_cast<float>(random() >> 40 & 63) - 32)));
    }
    const float d = half_at(block, 0), m = half_at(block, 2);
    for (const CodecKind kind : {CodecKind::kQ4a, CodecKind::kQ4m}) {
      QuantizedTensor codes = one_block(kind);
      if (!unpack_ggml_row(GgmlType::kQ4_1, block.data(), codes, 0)) {
        EXPECT_FALSE(kind == CodecKind::kQ4m && std::isfinite(d) && std::isfinite(m) && d > 0) << d << " " << m;
        continue;
      }
      codes.validate("block");
      float wanted[32], found[32];
      ggml_to_f32(GgmlType::kQ4_1, block.data(), 32, wanted);
      codes.unpack_row(0, found);
      EXPECT_EQ(std::memcmp(wanted, found, sizeof wanted), 0) << d << " " << m;
      ++held;
      turned += d < 0;
    }
  }
  EXPECT_GT(held, 10000);
  EXPECT_GT(turned, 1000);
}

// Blocks of a good model (all 0) with these bytes at the beginning of one tensor.
void write_with(const fs::path& path, const std::string& tensor, std::string_view bytes) {
  testing::GgufModelParts().write(path);
  const GgufFile file(path);
  std::string changed = read_text(path);
  changed.replace(static_cast<std::size_t>(file.find(tensor)->data.data() - file.file().bytes().data()), bytes.size(),
                  bytes);
  fs::remove(path);
  write_bytes(path, changed);
}

std::string two_halves(float d, float m) {
  return GgufBytes::number(f32_to_f16(d)) + GgufBytes::number(f32_to_f16(m));
}

TEST(GgufModel, TakesTheSmallestCodecThatHoldsABlockOfMinima) {
  const Scratch scratch("gguf");
  for (const auto& [d, m, codec] : {std::tuple(0.5f, -2.0f, "q4ag32"), {0.5f, 0.3f, "q4mg32"}, {-0.5f, -0.0f, "f32"}}) {
    write_with(scratch / "m.gguf", "blk.0.attn_output.weight", two_halves(d, m) + "\x21\x43");
    const auto model = open_gguf_model(scratch / "m.gguf");
    const TensorSpec spec{"model.layers.0.self_attn.o_proj.weight", {32, 32}, TensorRole::kLinear, 0, ""};
    ASSERT_EQ(model->codec(spec).name(), codec);
    std::vector<float> wanted(32 * 32), found(32 * 32);
    model->read_rows_f32(spec, 0, 32, wanted.data());
    if (!model->codec(spec).is_float()) {
      model->codes(spec).unpack(found.data());
      EXPECT_EQ(std::memcmp(wanted.data(), found.data(), wanted.size() * 4), 0) << codec;
    }
    const bool floats = contains(Json(model->notes()).dump(), "of Q4_1: taken as the floats");
    EXPECT_EQ(floats, std::string(codec) == "f32");
    fs::remove(scratch / "m.gguf");
  }
}

// A scale that is no number is damage in every type whose blocks may be codes.
TEST(GgufModel, ScalesThatAreNotFiniteAreRefused) {
  const Scratch scratch("gguf");
  using T = std::pair<const char*, const char*>;
  const std::string infinite = GgufBytes::number<std::uint16_t>(0xfc00), nan = GgufBytes::number<std::uint16_t>(0x7e00);
  for (const auto& [theirs, ours] :
       {T{"token_embd.weight", "model.embed_tokens.weight"}, {"blk.0.attn_q.weight", "self_attn.q_proj.weight"},
        {"blk.0.attn_output.weight", "self_attn.o_proj.weight"}}) {
    for (const std::string& bad : {infinite, nan, std::string("\1\0", 2) + nan}) {
      if (bad.size() > 2 && std::string_view(theirs) != "blk.0.attn_output.weight") continue;  // no minimum
      write_with(scratch / "m.gguf", theirs, bad);
      const auto model = open_gguf_model(scratch / "m.gguf");
      for (const TensorSpec& spec : expected_tensors(model->config())) {
        const std::string said = error_of([&] { model->codec(spec); });
        const bool here = spec.name.ends_with(ours);
        EXPECT_EQ(said.starts_with("3 ") && contains(said, theirs) && contains(said, "finite"), here) << said;
      }
      fs::remove(scratch / "m.gguf");
    }
  }
}

std::uint64_t resident_bytes() {
  std::uint64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages >> pages;
  return pages * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

// Opening reads no weights; whether blocks are codes is looked up tensor by tensor, and none of them stays in memory.
TEST(GgufModel, OpeningReadsNoWeights) {
  const Scratch scratch("gguf");
  testing::GgufModelParts parts;
  const std::int64_t inner = 1 << 20;  // 34 MiB a tensor
  parts.set("llama.feed_forward_length", static_cast<std::uint32_t>(inner));
  for (const char* name : {"gate", "up", "down"}) {
    const std::string tensor = std::string("blk.0.ffn_") + name + ".weight";
    parts.drop(tensor);
    parts.add(tensor, name == std::string("down") ? std::vector{std::int64_t{32}, inner} : std::vector{inner, std::int64_t{32}},
              GgmlType::kQ8_0);
  }
  parts.write(scratch / "m.gguf");
  const std::uint64_t before = resident_bytes();
  const auto model = open_gguf_model(scratch / "m.gguf");
  EXPECT_LT(resident_bytes(), before + (8u << 20));
  for (const TensorSpec& spec : expected_tensors(model->config()))
    if (contains(spec.name, "mlp.")) {
      EXPECT_EQ(model->codec(spec).name(), "q8");
    }
  EXPECT_LT(resident_bytes(), before + (20u << 20));
}

TEST(GgufFile, TextsAreCutBetweenCharacters) {
  const Scratch scratch("gguf");
  std::string text;
  for (int i = 0; i < 400; ++i) text += "€";  // three bytes each
  GgufBytes file;
  file.pair("k", 8, GgufBytes::text(text));
  file.pair("worse", 8, GgufBytes::text("\xff" + text));
  write_bytes(scratch / "m.gguf", file.bytes());
  const GgufFile read(scratch / "m.gguf");
  const auto shown = read.shown("k").get<std::string>();
  EXPECT_TRUE(shown.starts_with("€€") && shown.ends_with("...")) << shown;
  EXPECT_EQ(read.shown("worse"), "(1201 bytes)");
}

TEST(GgufFile, WhatAppearsMeanwhileIsNotReplaced) {
  const Scratch scratch("gguf");
  const fs::path path = scratch / "m.gguf";
  GgufWriter writer(path, {}, {{"t", GgmlType::kF32, {1}}});
  writer.write(std::vector<std::byte>(4));
  write_bytes(path, "mine");
  const std::string said = error_of([&] { writer.finish(); });
  EXPECT_TRUE(said.starts_with("2 ") && contains(said, "appeared meanwhile")) << said;
  EXPECT_EQ(read_text(path), "mine");
}

TEST(GgufFile, SaysWhatIsThere) {
  const Scratch scratch("gguf");
  GgufBytes good = GgufBytes::good();
  write_bytes(scratch / "good.gguf", good.bytes());
  EXPECT_TRUE(GgufFile::is_gguf(scratch / "good.gguf"));
  const GgufFile file(scratch / "good.gguf");
  EXPECT_EQ(file.version(), 3);
  ASSERT_EQ(file.tensors().size(), 2u);
  EXPECT_EQ(file.find("a.weight")->shape, (std::vector<std::int64_t>{3, 32}));
  EXPECT_EQ(file.find("b.weight")->type, GgmlType::kQ8_0);
  EXPECT_EQ(file.find("b.weight")->data.size(), 68u);
  EXPECT_EQ(file.text("general.architecture"), "none");
  EXPECT_EQ(file.integer("a.number"), 7);
  EXPECT_EQ(file.number("a.float"), 1e-6);  // and not 9.99999997e-07
  EXPECT_EQ(file.flag("a.flag"), true);
  EXPECT_EQ(file.texts("a.texts"), (std::vector<std::string>{"x", "", "yz"}));
  EXPECT_EQ(file.integer("nowhere"), std::nullopt);
  EXPECT_TRUE(contains(error_of([&] { file.integer("a.float"); }), "a.float: expected a whole number, found float32"));
  EXPECT_TRUE(contains(error_of([&] { file.texts("a.number"); }), "found uint32"));
  write_bytes(scratch / "other", "GGUX");
  EXPECT_FALSE(GgufFile::is_gguf(scratch / "other"));
  EXPECT_FALSE(GgufFile::is_gguf(scratch.path()));
}

struct Hostile {
  const char* name;
  std::function<std::string()> bytes;
  const char* says;
};

std::string with_pair(std::uint32_t type, const std::string& value, const char* key = "k") {
  GgufBytes file;
  file.pair(key, type, value);
  return file.bytes();
}

std::string with_tensor(const std::string& name, std::vector<std::int64_t> dimensions, std::uint32_t type,
                        std::uint64_t offset, std::size_t data = 1024) {
  GgufBytes file;
  file.tensor(name, std::move(dimensions), type, offset);
  return file.bytes(data);
}

constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();

const std::vector<Hostile>& hostile() {
  using B = GgufBytes;
  static const std::vector<Hostile> kCases = {
      {"Empty", [] { return std::string(); }, "4 bytes of the magic number"},
      {"OtherMagic", [] { return "GGML" + B().bytes().substr(4); }, "begins with GGUF"},
      {"NoVersion", [] { return std::string("GGUF\3\0", 6); }, "bytes of the version"},
      {"VersionOne", [] { return B(1).bytes(); }, "version 1"},
      {"VersionFour", [] { return B(4).bytes(); }, "version 4"},
      {"BigEndian", [] { return B(3u << 24).bytes(); }, "big-endian"},
      {"NoCounts", [] { return B().bytes().substr(0, 15); }, "number of tensors"},
      {"MoreTensorsThanBytes", [] { return B().counts(1ull << 40, 0).bytes(); }, "tensors in the rest of the file"},
      {"NegativeTensors", [] { return B().counts(~0ull, 0).bytes(); }, "tensors in the rest of the file"},
      {"MoreKeysThanBytes", [] { return B().counts(0, 1ull << 60).bytes(); }, "keys in the rest of the file"},
      {"KeysCutOff", [] { return B::good().bytes().substr(0, 110); }, "until the end of the file"},
      {"KeyBeyondTheEnd", [] { return B().counts(0, 1).raw(B::number<std::uint64_t>(~0ull) + std::string(40, 'k')); },
       "18446744073709551615 bytes of a key"},
      {"EmptyKey", [] { return with_pair(4, B::number<std::uint32_t>(1), ""); }, "a key that has a name"},
      {"KeyTooLong", [] { return with_pair(4, B::number<std::uint32_t>(1), std::string(70000, 'k').c_str()); },
       "at most 65535 bytes"},
      {"KeyNoUtf8", [] { return with_pair(4, B::number<std::uint32_t>(1), "\xff\xfe"); }, "in UTF-8"},
      {"KeyTwice",
       [] {
         B file;
         file.pair("k", 4, B::number<std::uint32_t>(1)).pair("k", 4, B::number<std::uint32_t>(1));
         return file.bytes();
       },
       "\"k\" twice"},
      {"UnknownValueType", [] { return with_pair(13, B::number<std::uint64_t>(1)); }, "a type of values from 0 to 12"},
      {"ValueCutOff", [] { return B().counts(0, 1).raw(B::text("k") + B::number<std::uint32_t>(10) + "1234"); },
       "8 bytes of a value"},
      {"TextBeyondTheEnd", [] { return with_pair(8, B::number<std::uint64_t>(1ull << 62) + "x"); },
       "4611686018427387904 bytes of a text"},
      {"BoolOfTwo", [] { return with_pair(7, "\2"); }, "0 or 1"},
      {"ArrayOfArrays", [] { return with_pair(9, B::number<std::uint32_t>(9) + B::number<std::uint64_t>(1)); },
       "an array of numbers or texts"},
      {"ArrayOfUnknown", [] { return with_pair(9, B::number<std::uint32_t>(77) + B::number<std::uint64_t>(1)); },
       "elements of type 77"},
      {"ArrayOverflow",
       [] { return with_pair(9, B::number<std::uint32_t>(10) + B::number<std::uint64_t>(1ull << 61) + "12345678"); },
       "elements in the rest of the file"},
      {"ArrayOfManyTexts",
       [] { return with_pair(9, B::number<std::uint32_t>(8) + B::number<std::uint64_t>(1ull << 60)); },
       "elements in the rest of the file"},
      {"AlignmentZero", [] { return with_pair(4, B::number<std::uint32_t>(0), "general.alignment"); },
       "a power of two"},
      {"AlignmentOdd", [] { return with_pair(4, B::number<std::uint32_t>(24), "general.alignment"); },
       "a power of two"},
      {"AlignmentHuge", [] { return with_pair(4, B::number<std::uint32_t>(1u << 31), "general.alignment"); },
       "a power of two"},
      {"AlignmentOfAnotherType", [] { return with_pair(10, B::number<std::uint64_t>(32), "general.alignment"); },
       "a 32-bit number"},
      {"TensorWithoutName", [] { return with_tensor("", {4}, 0, 0); }, "a tensor that has a name"},
      {"TensorNameTooLong", [] { return with_tensor(std::string(64, 'n'), {4}, 0, 0); }, "at most 63 bytes"},
      {"TensorTwice",
       [] {
         B file;
         file.tensor("t", {8}, 0, 0).tensor("t", {8}, 0, 32);
         return file.bytes(64);
       },
       "\"t\" twice"},
      {"NoDimensions", [] { return with_tensor("t", {}, 0, 0); }, "1 to 4 dimensions"},
      {"FiveDimensions",
       [] {
         return with_tensor("t", {1, 1, 1, 1, 1}, 0, 0);
       },
       "1 to 4 dimensions"},
      {"FourBillionDimensions",
       [] { return B().counts(1, 0).raw(B::text("t") + B::number<std::uint32_t>(~0u) + std::string(64, '\1')); },
       "1 to 4 dimensions"},
      {"DimensionZero",
       [] {
         return with_tensor("t", {0, 4}, 0, 0);
       },
       "dimensions above 0"},
      {"DimensionNegative",
       [] {
         return with_tensor("t", {4, -4}, 0, 0);
       },
       "dimensions above 0"},
      {"DimensionsOverflow",
       [] {
         return with_tensor("t", {kHuge, kHuge}, 0, 0);
       },
       "at most 2^56 elements"},
      {"DimensionsWrapToSmall",
       [] {
         return with_tensor("t", {1ll << 32, 1ll << 32, 1ll << 32}, 0, 0);
       },
       "at most 2^56 elements"},
      {"BytesOverflow", [] { return with_tensor("t", {1ll << 56}, 0, 0); }, "the file is cut off"},
      {"UnknownType", [] { return with_tensor("t", {32}, 250, 0); }, "type 250 of t"},
      {"RemovedType", [] { return with_tensor("t", {32}, 4, 0); }, "one of the types"},
      {"RowsOfHalfABlock",
       [] {
         return with_tensor("t", {48, 2}, 8, 0);
       },
       "rows of whole blocks of 32"},
      {"RowsOfHalfASuperBlock",
       [] {
         return with_tensor("t", {128, 4}, 14, 0);
       },
       "rows of whole blocks of 256"},
      {"OffsetNotAligned", [] { return with_tensor("t", {8}, 0, 4); }, "an offset of 0"},
      {"OffsetBeyondTheEnd", [] { return with_tensor("t", {8}, 0, 1ull << 63); }, "an offset of 0"},
      {"Overlap",
       [] {
         B file;
         file.tensor("t", {64}, 0, 0).tensor("u", {64}, 0, 128);
         return file.bytes(512);
       },
       "an offset of 256"},
      {"Gap",
       [] {
         B file;
         file.tensor("t", {64}, 0, 0).tensor("u", {64}, 0, 512);
         return file.bytes(1024);
       },
       "an offset of 256"},
      {"SameBytesTwice",
       [] {
         B file;
         file.tensor("t", {64}, 0, 0).tensor("u", {64}, 0, 0);
         return file.bytes(512);
       },
       "overlap or leave gaps"},
      {"DataCutOff", [] { return with_tensor("t", {512}, 0, 0, 100); }, "the file is cut off"},
      {"BytesBehindTheLastTensor", [] { return with_tensor("t", {8}, 0, 0, 4096); }, "ends with its last tensor"},
  };
  return kCases;
}

class HostileGguf : public ::testing::TestWithParam<std::size_t> {};

TEST_P(HostileGguf, IsRefusedWithPlaceAndReason) {
  const Hostile& given = hostile()[GetParam()];
  const Scratch scratch("gguf");
  write_bytes(scratch / "bad.gguf", given.bytes());
  const std::string said = error_of([&] { GgufFile file(scratch / "bad.gguf"); });
  EXPECT_TRUE(said.starts_with("3 ")) << said;
  EXPECT_TRUE(contains(said, "bad.gguf")) << said;
  EXPECT_TRUE(contains(said, given.says)) << said;
  EXPECT_EQ(error_of([&] { open_gguf_model(scratch / "bad.gguf"); }), said);
}

INSTANTIATE_TEST_SUITE_P(Files, HostileGguf, ::testing::Range<std::size_t>(0, hostile().size()),
                         [](const auto& given) { return hostile()[given.param].name; });

// Keys and tensors of a small Llama, one thing wrong in each.
struct WrongModel {
  const char* name;
  std::function<void(testing::GgufModelParts&)> change;
  const char* says;
};

const std::vector<WrongModel>& wrong_models() {
  using P = testing::GgufModelParts;
  static const std::vector<WrongModel> kCases = {
      {"NoArchitecture", [](P& p) { p.erase("general.architecture"); }, "the key general.architecture"},
      {"ArchitectureOfAnotherType", [](P& p) { p.set("general.architecture", std::uint32_t{3}); }, "a text"},
      {"UnknownArchitecture", [](P& p) { p.set("general.architecture", std::string("mamba")); }, "mamba"},
      {"PartOfAModel", [](P& p) { p.set("split.count", std::uint32_t{3}); }, "one of 3 parts"},
      {"NoBlocks", [](P& p) { p.set("llama.block_count", std::uint32_t{0}); }, "block_count"},
      {"MoreBlocksThanTensors", [](P& p) { p.set("llama.block_count", std::uint32_t{4000000000u}); }, "block_count"},
      {"OneBlockTooMany", [](P& p) { p.set("llama.block_count", std::uint32_t{2}); },
       "blk.1.attn_norm.weight is missing"},
      {"NegativeHeads", [](P& p) { p.set("llama.attention.head_count", std::int32_t{-4}); }, "head_count"},
      {"MoreHeadsThanDimensions", [](P& p) { p.set("llama.attention.head_count", std::uint32_t{999}); }, "heads"},
      {"HeadsNotDivided", [](P& p) { p.set("llama.attention.head_count_kv", std::uint32_t{3}); }, "multiple"},
      {"HeadsOfEachBlock",
       [](P& p) {
         p.set("llama.attention.head_count", std::vector<std::int32_t>{4, 2});
       },
       "one number for all blocks"},
      {"OtherWidth",
       [](P& p) {
         p.set("llama.embedding_length", std::uint32_t{64}), p.set("llama.rope.dimension_count", std::uint32_t{16});
       },
       "instead of"},
      {"HugeWidth", [](P& p) { p.set("llama.feed_forward_length", std::uint32_t{1u << 20}); },
       "parameters of its keys"},
      {"EpsilonNotANumber",
       [](P& p) { p.set("llama.attention.layer_norm_rms_epsilon", std::numeric_limits<float>::quiet_NaN()); },
       "a finite number"},
      {"ThetaBelowOne", [](P& p) { p.set("llama.rope.freq_base", -1.0f); }, "in its range"},
      {"OddRotation", [](P& p) { p.set("llama.rope.dimension_count", std::uint32_t{7}); }, "an even number"},
      {"UnknownScaling", [](P& p) { p.set("llama.rope.scaling.type", std::string("yarn")); }, "yarn"},
      {"TensorMissing", [](P& p) { p.drop("blk.0.ffn_up.weight"); }, "blk.0.ffn_up.weight is missing"},
      {"TensorLeftOver", [](P& p) { p.add("blk.0.mystery.weight", {32}); }, "left over"},
      {"TensorMisshapen", [](P& p) { p.drop("output_norm.weight"), p.add("output_norm.weight", {16}); },
       "instead of [32]"},
      {"NormAsMatrix",
       [](P& p) {
         p.drop("output_norm.weight"), p.add("output_norm.weight", {1, 32});
       },
       "[1, 32]"},
      {"EmbeddingAsVector", [](P& p) { p.drop("token_embd.weight"), p.add("token_embd.weight", {32}); }, "a matrix"},
      {"RotaryDivisorsTooFew", [](P& p) { p.add("rope_freqs.weight", {3}); }, "4 values of F32"},
      {"RotaryDivisorsOfAnotherArchitecture",
       [](P& p) {
         p.become("qwen3"), p.add("rope_factors_long.weight", {4}), p.add("rope_factors_short.weight", {4});
       },
       "no such tensor in this architecture"},
      {"RotaryDivisorsOfZero", [](P& p) { p.add("rope_freqs.weight", {4}); }, "numbers above 0"},
      {"EndBeyondTheVocabulary", [](P& p) { p.set("tokenizer.ggml.eos_token_id", std::uint32_t{40}); },
       "an id below 40"},
      {"TypesOfNoModel", [](P& p) { p.set("pare.dtypes", std::string("[1")); }, "pare.dtypes"},
      {"TypesUnknown", [](P& p) { p.set("pare.dtypes", std::string(R"({"model.norm.weight":"I8"})")); },
       "F32, F16 or BF16"},
  };
  return kCases;
}

class WrongGgufModel : public ::testing::TestWithParam<std::size_t> {};

TEST_P(WrongGgufModel, IsRefusedWithPlaceAndReason) {
  const WrongModel& given = wrong_models()[GetParam()];
  const Scratch scratch("gguf");
  testing::GgufModelParts parts;
  parts.write(scratch / "good.gguf");
  EXPECT_EQ(open_gguf_model(scratch / "good.gguf")->config().num_layers, 1);
  given.change(parts);
  parts.write(scratch / "bad.gguf");
  const std::string said = error_of([&] { open_gguf_model(scratch / "bad.gguf"); });
  EXPECT_TRUE(said.starts_with("3 ")) << said;
  EXPECT_TRUE(contains(said, "bad.gguf")) << said;
  EXPECT_TRUE(contains(said, given.says)) << said;
}

INSTANTIATE_TEST_SUITE_P(Models, WrongGgufModel, ::testing::Range<std::size_t>(0, wrong_models().size()),
                         [](const auto& given) { return wrong_models()[given.param].name; });

const std::vector<WrongModel>& wrong_tokenizers() {
  using P = testing::GgufModelParts;
  using Texts = std::vector<std::string>;
  static const std::vector<WrongModel> kCases = {
      {"UnknownKind", [](P& p) { p.set("tokenizer.ggml.model", std::string("bert")); }, "gpt2 or llama"},
      {"NoTokens", [](P& p) { p.erase("tokenizer.ggml.tokens"); }, "a list of tokens"},
      {"TokensOfNumbers", [](P& p) { p.set("tokenizer.ggml.tokens", std::vector<std::int32_t>{1}); },
       "an array of texts"},
      {"TokensTwice",
       [](P& p) {
         p.set("tokenizer.ggml.tokens", Texts{"a", "b", "a"});
       },
       "\"a\" twice"},
      {"MoreTokensThanRows", [](P& p) { p.set("tokenizer.ggml.tokens", Texts(41, "x")); }, "at most 40 tokens"},
      {"TokenTooLong", [](P& p) { p.set("tokenizer.ggml.tokens", Texts{std::string(5000, 'x')}); },
       "at most 1024 bytes"},
      {"TokenNoUtf8", [](P& p) { p.set("tokenizer.ggml.tokens", Texts{"\xc3"}); }, "UTF-8"},
      {"TypesTooFew", [](P& p) { p.set("tokenizer.ggml.token_type", std::vector<std::int32_t>{1}); }, "elements"},
      {"TypeUnknown", [](P& p) { p.set("tokenizer.ggml.token_type", std::vector<std::int32_t>(40, 9)); },
       "types from 0 to 6"},
      {"PreUnknown", [](P& p) { p.set("tokenizer.ggml.pre", std::string("mine")); }, "mine"},
      {"NoMerges", [](P& p) { p.erase("tokenizer.ggml.merges"); }, "a list of merges"},
      {"MergeOfOne", [](P& p) { p.set("tokenizer.ggml.merges", Texts{"ab"}); }, "two pieces"},
      {"MergeOfUnknown", [](P& p) { p.set("tokenizer.ggml.merges", Texts{"never seen"}); }, "never"},
      {"BeginBeyondTheTokens",
       [](P& p) {
         p.set("tokenizer.ggml.add_bos_token", true), p.set("tokenizer.ggml.bos_token_id", std::uint32_t{77});
       },
       "an id below"},
      {"SentencePieceWithoutScores", [](P& p) { p.set("tokenizer.ggml.model", std::string("llama")); },
       "a list of scores"},
      {"ScoresTooFew",
       [](P& p) {
         p.set("tokenizer.ggml.model", std::string("llama")), p.set("tokenizer.ggml.scores", std::vector<float>{1});
       },
       "elements"},
      {"ScoreNotANumber",
       [](P& p) {
         p.set("tokenizer.ggml.model", std::string("llama")),
             p.set("tokenizer.ggml.scores", std::vector<float>(40, std::nanf("")));
       },
       "NaN"},
  };
  return kCases;
}

class WrongGgufTokenizer : public ::testing::TestWithParam<std::size_t> {};

// The weights of such a file are worth reading all the same: it opens, and the tokenizer is refused when asked for.
TEST_P(WrongGgufTokenizer, IsRefusedWithPlaceAndReason) {
  const WrongModel& given = wrong_tokenizers()[GetParam()];
  const Scratch scratch("gguf");
  testing::GgufModelParts parts;
  given.change(parts);
  parts.write(scratch / "bad.gguf");
  const auto model = open_gguf_model(scratch / "bad.gguf");
  const std::string said =
      error_of([&] { Tokenizer::from_text(model->side_file("tokenizer.json").value(), "bad.gguf: tokenizer"); });
  EXPECT_TRUE(said.starts_with("3 ")) << said;
  EXPECT_TRUE(contains(said, "bad.gguf")) << said;
  EXPECT_TRUE(contains(said, given.says)) << said;
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, WrongGgufTokenizer, ::testing::Range<std::size_t>(0, wrong_tokenizers().size()),
                         [](const auto& given) { return wrong_tokenizers()[given.param].name; });

// Whatever a file holds: read, or refused with exit code 3.
void open_or_refuse(const fs::path& path) {
  const std::string said = error_of([&] {
    const GgufFile file(path);
    for (const std::string& key : file.keys()) file.shown(key);
    const auto model = open_gguf_model(path);
    for (const TensorSpec& spec : expected_tensors(model->config())) {
      std::vector<float> row(static_cast<std::size_t>(spec.shape.size() == 2 ? spec.shape[1] : 1));
      if (model->codec(spec).is_float())
        model->read_rows_f32(spec, spec.shape[0] - 1, 1, row.data());
      else
        model->codes(spec);
    }
    for (const char* name : {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"})
      if (const auto text = model->side_file(name); text && std::string_view(name) == "tokenizer.json")
        Tokenizer::from_text(*text, "tokenizer");
  });
  EXPECT_TRUE(said == "no error" || said.starts_with("3 ")) << said;
}

TEST(GgufFuzz, EveryLengthIsReadOrRefused) {
  const Scratch scratch("gguf");
  testing::GgufModelParts().write(scratch / "good.gguf");
  const std::string good = read_text(scratch / "good.gguf");
  for (std::size_t length = 0; length < good.size(); length += length < 2600 ? 7 : 211) {
    write_bytes(scratch / "cut.gguf", std::string_view(good).substr(0, length));
    EXPECT_TRUE(error_of([&] { open_gguf_model(scratch / "cut.gguf"); }).starts_with("3 ")) << length;
  }
}

TEST(GgufFuzz, DamagedFilesAreReadOrRefused) {
  const Scratch scratch("gguf");
  testing::GgufModelParts().write(scratch / "good.gguf");
  const std::string good = read_text(scratch / "good.gguf");
  std::uint64_t state = 88172645463325252ull;
  const auto random = [&](std::uint64_t below) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state % below;
  };
  const char* rounds = std::getenv("PARE_FUZZ_ROUNDS");
  const int count = rounds != nullptr ? std::atoi(rounds) : 400;
  for (int round = 0; round < count; ++round) {
    std::string bad = good;
    for (std::uint64_t change = random(3) + 1; change > 0; --change) {
      const std::size_t at = random(random(4) == 0 ? bad.size() : 2600);  // mostly in the header
      static constexpr std::uint64_t kNumbers[] = {0, 1, 31, 255, 65536, 1ull << 31, 1ull << 32, 1ull << 62, ~0ull};
      const std::uint64_t number = kNumbers[random(std::size(kNumbers))];
      const std::size_t width = std::min<std::size_t>(random(2) == 0 ? 4 : 8, bad.size() - at);
      switch (random(4)) {
        case 0:
          bad[at] = static_cast<char>(bad[at] ^ (1 << random(8)));
          break;
        case 1:
          std::memcpy(bad.data() + at, &number, width);
          break;
        case 2:
          bad.erase(at, random(40));
          break;
        default:
          bad.insert(at, bad.substr(random(bad.size()), random(40)));
      }
    }
    write_bytes(scratch / "bad.gguf", bad);
    open_or_refuse(scratch / "bad.gguf");
  }
}

}  // namespace
}  // namespace pare
