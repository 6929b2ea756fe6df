#include "core/safetensors.h"

#include <cstring>

#include "core/codec.h"
#include "model_folder.h"

namespace pare {
namespace {

using testing::contains;
using testing::error_of;
using testing::safetensors_bytes;
using testing::Scratch;
using testing::write_bytes;

class SafetensorsTest : public ::testing::Test {
 protected:
  std::string refusal(const std::string& bytes) {
    write_bytes(scratch_ / "x.safetensors", bytes);
    return error_of([&] { SafetensorsFile file(scratch_ / "x.safetensors"); });
  }
  Scratch scratch_;
};

TEST_F(SafetensorsTest, ReadsShapesMetadataScalarsAndEmptyTensors) {
  const std::string header =
      R"({"__metadata__":{"format":"pt","k":"v"},"b":{"dtype":"U8","shape":[2,3],"data_offsets":[4,10]},)"
      R"("a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"e":{"dtype":"F16","shape":[0,7],"data_offsets":[10,10]}}  )";
  const float one = 1.5f;
  write_bytes(scratch_ / "x", safetensors_bytes(header, std::string(reinterpret_cast<const char*>(&one), 4) + "abcdef"));
  const SafetensorsFile file(scratch_ / "x");
  ASSERT_EQ(file.tensors().size(), 3u);
  EXPECT_EQ(file.tensors()[0].name, "a");
  EXPECT_EQ(file.metadata().at("k"), "v");
  float value = 0;
  to_f32(*file.find("a"), 0, 1, &value);
  EXPECT_EQ(value, 1.5f);
  EXPECT_EQ(file.find("e")->elements(), 0);
  EXPECT_EQ(file.find("nothing"), nullptr);
}

TEST_F(SafetensorsTest, RefusesEveryTruncationAndEveryExtraByte) {
  const std::string whole = safetensors_bytes(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", "12345678");
  write_bytes(scratch_ / "ok", whole);
  EXPECT_NO_THROW(SafetensorsFile(scratch_ / "ok"));
  for (std::size_t length = 0; length < whole.size(); ++length)
    EXPECT_TRUE(refusal(whole.substr(0, length)).starts_with("3 ")) << length;
  EXPECT_TRUE(contains(refusal(whole + "x"), "bytes follow"));
}

TEST_F(SafetensorsTest, RefusesMalformedHeaders) {
  const auto tensor = [](const std::string& body) { return R"({"a":)" + body + "}"; };
  const std::string four(4, 'x');
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"[]", "begins with {"},
      {" {}", "begins with {"},
      {"{", "valid JSON"},
      {"{}x", "valid JSON"},
      {"{\"a\xff\":{}}", "valid JSON"},
      {tensor("1"), "an object"},
      {tensor("[]"), "an object"},
      {tensor("{}"), "incomplete"},
      {tensor(R"({"dtype":"F32","shape":[1]})"), "incomplete"},
      {tensor(R"({"dtype":"F32","shape":[1],"data_offsets":[0]})"), "incomplete"},
      {tensor(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4,8]})"), "incomplete"},
      {tensor(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1})"), "keys dtype, shape"},
      {tensor(R"({"dtype":"F31","shape":[1],"data_offsets":[0,4]})"), "safetensors dtype"},
      {tensor(R"({"dtype":3,"shape":[1],"data_offsets":[0,4]})"), "dtype name"},
      {tensor(R"({"dtype":"F32","shape":[-1],"data_offsets":[0,4]})"), "whole numbers"},
      {tensor(R"({"dtype":"F32","shape":[1.0],"data_offsets":[0,4]})"), "whole numbers"},
      {tensor(R"({"dtype":"F32","shape":[[1]],"data_offsets":[0,4]})"), "whole numbers"},
      {tensor(R"({"dtype":"F32","shape":[null],"data_offsets":[0,4]})"), "whole numbers"},
      {tensor(R"({"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4]})"), "whole numbers"},
      {tensor(R"({"dtype":"F32","shape":[1],"dtype":"F32","data_offsets":[0,4]})"), "twice"},
      {R"({"__metadata__":{"a":1},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", "a text"},
      {R"({"__metadata__":{"a":{}},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", "a text"},
      {R"({"__metadata__":{"k":"1","k":"2"},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", "twice"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})", "twice"},
      {R"({"\u0061":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})", "twice"},
      // layout
      {tensor(R"({"dtype":"U8","shape":[3],"data_offsets":[1,4]})"), "hole"},
      {R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})", "overlap"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})", "hole"},
      {tensor(R"({"dtype":"U8","shape":[4],"data_offsets":[0,3]})"), "4 bytes for its shape"},
      {tensor(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})"), "cut off"},
      {R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}})", "3 "},
      {tensor(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]})"), "overflowing"},
      {tensor(R"({"dtype":"F32","shape":[9223372036854775807],"data_offsets":[0,4]})"), "overflowing"},
      {tensor(R"({"dtype":"F4","shape":[7],"data_offsets":[0,4]})"), "whole bytes"},
      {"{}", "bytes follow"},
  };
  for (const auto& [header, expected] : cases) {
    const std::string message = refusal(safetensors_bytes(header, four));
    EXPECT_TRUE(message.starts_with("3 ") && contains(message, expected)) << header << "\n  " << message;
  }
}

TEST_F(SafetensorsTest, RefusesLyingLengthsAndDeepNesting) {
  for (const std::uint64_t length : {std::uint64_t{100'000'001}, ~std::uint64_t{0}, ~std::uint64_t{0} - 7, std::uint64_t{1000}}) {
    std::string bytes(reinterpret_cast<const char*>(&length), 8);
    EXPECT_TRUE(refusal(bytes + "{}").starts_with("3 ")) << length;
  }
  EXPECT_TRUE(refusal(safetensors_bytes(R"({"a":)" + std::string(200'000, '['), "")).starts_with("3 "));
  EXPECT_TRUE(error_of([&] { SafetensorsFile file(scratch_.path()); }).starts_with("3 "));
  EXPECT_TRUE(error_of([&] { SafetensorsFile file(scratch_ / "missing"); }).starts_with("3 "));
}

TEST_F(SafetensorsTest, ManyTensorsStayFast) {
  std::vector<TensorDecl> decls;
  for (int i = 0; i < 50'000; ++i) decls.push_back({"tensor." + std::to_string(i), DType::kU8, {1}});
  SafetensorsWriter writer(scratch_ / "many", decls, {});
  writer.write(as_bytes(std::string(50'000, 'z')));
  writer.finish();
  EXPECT_EQ(SafetensorsFile(scratch_ / "many").tensors().size(), 50'000u);
}

TEST_F(SafetensorsTest, OddOffsetsReadTheSameFloats) {
  const float values[] = {1.0f, -2.5f, 65504.0f};
  const std::uint16_t halves[] = {0x3c00, 0xc100, 0x7bff}, brains[] = {0x3f80, 0xc020, 0x477f};
  const double wide[] = {1.0, -2.5, 65504.0};
  const auto raw = [](const auto& array) { return std::string(reinterpret_cast<const char*>(array), sizeof array); };
  const std::string header =
      R"({"pad":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"f":{"dtype":"F32","shape":[3],"data_offsets":[1,13]},)"
      R"("h":{"dtype":"F16","shape":[3],"data_offsets":[13,19]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[19,25]},)"
      R"("d":{"dtype":"F64","shape":[3],"data_offsets":[25,49]}})";
  write_bytes(scratch_ / "odd", safetensors_bytes(header, "p" + raw(values) + raw(halves) + raw(brains) + raw(wide)));
  const SafetensorsFile file(scratch_ / "odd");
  for (const char* name : {"f", "h", "d"}) {
    float out[2];
    to_f32(*file.find(name), 1, 2, out);
    EXPECT_EQ(out[0], -2.5f) << name;
    EXPECT_EQ(out[1], 65504.0f) << name;
  }
  float out[3];
  to_f32(*file.find("b"), 0, 3, out);
  EXPECT_EQ(out[1], -2.5f);
  EXPECT_EQ(out[2], bf16_to_f32(0x477f));
  EXPECT_THROW(to_f32(*file.find("pad"), 0, 1, out), Error);
}

TEST_F(SafetensorsTest, WriterStartsDataOn64BytesAndNeedsEveryByte) {
  {
    SafetensorsWriter writer(scratch_ / "w", {{"quote\"d", DType::kF32, {2}}, {"b", DType::kU8, {3}}}, {{"format", "pt"}});
    writer.write(as_bytes("12345678"));
    EXPECT_THROW(writer.finish(), std::logic_error);
    EXPECT_THROW(writer.write(as_bytes("toolong")), std::logic_error);
  }
  EXPECT_TRUE(fs::is_empty(scratch_.path()));
  SafetensorsWriter writer(scratch_ / "w", {{"quote\"d", DType::kF32, {2}}, {"b", DType::kU8, {3}}}, {{"format", "pt"}});
  writer.write(as_bytes("12345678abc"));
  writer.finish();
  const SafetensorsFile file(scratch_ / "w");
  EXPECT_EQ(file.data_begin() % 64, 0u);
  EXPECT_EQ(std::memcmp(file.find("b")->data.data(), "abc", 3), 0);
  EXPECT_EQ(file.find("quote\"d")->shape, std::vector<std::int64_t>{2});
}

class ShardsTest : public SafetensorsTest {
 protected:
  void shard(const std::string& file, const std::string& tensor) {
    SafetensorsWriter writer(scratch_ / file, {{tensor, DType::kU8, {1}}}, {{"format", "pt"}});
    writer.write(as_bytes("x"));
    writer.finish();
  }
  std::string open(const std::string& index) {
    write_bytes(scratch_ / "model.safetensors.index.json", index);
    return error_of([&] { ShardedTensors tensors(scratch_.path()); });
  }
};

TEST_F(ShardsTest, ReadsAnIndexAndIgnoresTotalSize) {
  shard("s1.safetensors", "a");
  shard("s2.safetensors", "b");
  write_bytes(scratch_ / "model.safetensors.index.json",
              R"({"metadata":{"total_size":3000000000,"x":1},"weight_map":{"a":"s1.safetensors","b":"s2.safetensors"}})");
  const ShardedTensors tensors(scratch_.path());
  EXPECT_EQ(tensors.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_NE(tensors.find("b"), nullptr);
  EXPECT_EQ(tensors.find("c"), nullptr);
}

TEST_F(ShardsTest, RefusesWrongIndexes) {
  EXPECT_TRUE(contains(error_of([&] { ShardedTensors tensors(scratch_.path()); }), "neither"));
  shard("s1.safetensors", "a");
  shard("s2.safetensors", "b");
  shard("twice.safetensors", "a");
  const auto map = [](const std::string& body) { return R"({"weight_map":{)" + body + "}}"; };
  for (const auto& [index, expected] : std::vector<std::pair<std::string, std::string>>{
           {"{}", "weight_map"},
           {R"({"weight_map":[]})", "weight_map"},
           {"{", "valid JSON"},
           {std::string(1000, '['), "3 "},
           {map(R"("a":"s9.safetensors")"), "s9.safetensors"},
           {map(R"("a":"../s1.safetensors")"), "plain file name"},
           {map(R"("a":"sub/s1.safetensors")"), "plain file name"},
           {map(R"("a":"..")"), "plain file name"},
           {map(R"("a":"/etc/passwd")"), "plain file name"},
           {map(R"("a":1)"), "file name"},
           {map(R"("a":"s1.safetensors","a":"s1.safetensors")"), "twice"},
           {map(R"("a":"s1.safetensors","c":"s1.safetensors")"), "c is not in s1"},
           {map(R"("a":"s2.safetensors")"), "a is not in s2"},
           {map(R"("a":"s1.safetensors","b":"twice.safetensors")"), "a is also in twice.safetensors"}}) {
    const std::string message = open(index);
    EXPECT_TRUE(message.starts_with("3 ") && contains(message, expected)) << index << "\n  " << message;
  }
}

}  // namespace
}  // namespace pare
