// GGUF files read back by a reader of this test's own, written from ggml's docs/gguf.md: header, key-value pairs,
// alignment, and every block format against the weights of the folder.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <map>

#include "core/error.h"
#include "runtime/gguf_export.h"
#include "tests/compress/tiny_model.h"
#include "tests/scratch.h"

namespace pare {
namespace {

using testing::Scratch;

class Reader {
 public:
  explicit Reader(const fs::path& path) : bytes_(read_text(path)) {
    EXPECT_EQ(number<std::uint32_t>(), 0x46554747u);
    EXPECT_EQ(number<std::uint32_t>(), 3u);
    const auto count = number<std::uint64_t>(), pairs = number<std::uint64_t>();
    for (std::uint64_t i = 0; i < pairs; ++i) {
      const std::string key = text();
      values[key] = value(number<std::uint32_t>());
    }
    for (std::uint64_t i = 0; i < count; ++i) {
      Tensor tensor;
      const std::string name = text();
      tensor.shape.resize(number<std::uint32_t>());
      for (auto& size : tensor.shape) size = number<std::int64_t>();  // fastest dimension first
      tensor.type = number<std::uint32_t>();
      tensor.offset = number<std::uint64_t>();
      EXPECT_EQ(tensor.offset % 32, 0u) << name;
      tensors[name] = tensor;
    }
    data_ = (at_ + 31) / 32 * 32;
  }

  struct Tensor {
    std::vector<std::int64_t> shape;
    std::uint32_t type = 0;
    std::uint64_t offset = 0;
  };
  std::map<std::string, Tensor> tensors;
  std::map<std::string, Json> values;

  // Values in file order, by the formulas of ggml-quants.c.
  std::vector<float> floats(const std::string& name) const {
    const Tensor& tensor = tensors.at(name);
    std::int64_t count = 1;
    for (const std::int64_t size : tensor.shape) count *= size;
    const char* from = bytes_.data() + data_ + tensor.offset;
    std::vector<float> out;
    const auto half = [&] {
      std::uint16_t bits;
      std::memcpy(&bits, from, 2);
      from += 2;
      return bits;
    };
    while (static_cast<std::int64_t>(out.size()) < count) {
      if (tensor.type == 0) {
        float value;
        std::memcpy(&value, from, 4);
        from += 4;
        out.push_back(value);
      } else if (tensor.type == 1) {
        out.push_back(f16_to_f32(half()));
      } else if (tensor.type == 30) {
        out.push_back(bf16_to_f32(half()));
      } else {
        const float scale = f16_to_f32(half()), minimum = tensor.type == 3 ? f16_to_f32(half()) : 0.0f;
        for (int i = 0; i < 32; ++i) {
          const auto byte = static_cast<unsigned char>(from[tensor.type == 8 ? i : i % 16]);
          const int nibble = i < 16 ? byte & 15 : byte >> 4;
          const float code = static_cast<float>(tensor.type == 8   ? static_cast<signed char>(byte)
                                                : tensor.type == 2 ? nibble - 8
                                                                   : nibble);
          out.push_back(code * scale + minimum);
        }
        from += tensor.type == 8 ? 32 : 16;
      }
    }
    EXPECT_LE(from, bytes_.data() + bytes_.size()) << name;
    return out;
  }

 private:
  template <class T>
  T number() {
    T value;
    std::memcpy(&value, bytes_.data() + at_, sizeof value);
    at_ += sizeof value;
    return value;
  }
  std::string text() {
    const auto length = number<std::uint64_t>();
    at_ += length;
    return bytes_.substr(at_ - length, length);
  }
  Json value(std::uint32_t type) {
    switch (type) {
      case 4: return number<std::uint32_t>();
      case 5: return number<std::int32_t>();
      case 6: return number<float>();
      case 7: return number<std::uint8_t>() != 0;
      case 8: return text();
      case 9: {
        const auto of = number<std::uint32_t>();
        Json list = Json::array();
        for (auto left = number<std::uint64_t>(); left > 0; --left) list.push_back(value(of));
        return list;
      }
      default: ADD_FAILURE() << "value type " << type; return nullptr;
    }
  }

  std::string bytes_;
  std::size_t at_ = 0, data_ = 0;
};

void write_gguf(const fs::path& folder, const fs::path& out, const std::string& codec) {
  Progress progress(true);
  Context context;
  context.progress = &progress;
  const Checkpoint checkpoint(folder);
  const GgufOptions options{out, codec};
  export_gguf(checkpoint, plan_gguf(checkpoint, options), options, context);
}

// Rows of a head in llama.cpp's order: (half, 2) of (2, half).
std::vector<float> neighbours(const std::vector<float>& rows, std::int64_t cols, std::int64_t head_dim) {
  std::vector<float> out(rows.size());
  for (std::int64_t r = 0; r < static_cast<std::int64_t>(rows.size()) / cols; ++r) {
    const std::int64_t head = r / head_dim, i = r % head_dim;
    const std::int64_t to = head * head_dim + i % (head_dim / 2) * 2 + i / (head_dim / 2);
    std::copy_n(rows.begin() + r * cols, cols, out.begin() + to * cols);
  }
  return out;
}

const std::map<std::string, std::string> kNames = {
    {"model.embed_tokens.weight", "token_embd.weight"},
    {"model.norm.weight", "output_norm.weight"},
    {"model.layers.1.self_attn.v_proj.weight", "blk.1.attn_v.weight"},
    {"model.layers.1.self_attn.o_proj.weight", "blk.1.attn_output.weight"},
    {"model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"},
    {"model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"},
    {"model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"},
    {"model.layers.1.self_attn.k_proj.weight", "blk.1.attn_k.weight"}};

TEST(Gguf, HoldsTheWeightsTheShapesAndTheTokens) {
  const Scratch scratch("gguf");
  testing::make_tiny_model(scratch / "model", {});
  const Checkpoint model(scratch / "model");
  // Largest error of a value, relative to the largest of its tensor: half a step of each format.
  const std::map<std::string, double> bounds = {
      {"keep", 0}, {"f32", 0}, {"f16", 1e-3}, {"bf16", 5e-3}, {"q8", 0.5 / 127 * 1.01}, {"q4", 1.0 / 7}};
  for (const auto& [codec, bound] : bounds) {
    const fs::path file = scratch / (codec + ".gguf");
    write_gguf(scratch / "model", file, codec);
    const Reader reader(file);
    EXPECT_EQ(reader.tensors.size(), model.tensors().size());
    for (const auto& [source, target] : kNames) {
      const TensorSpec& spec = model.spec(source);
      std::vector<float> wanted = model.read_f32(source);
      const bool turned = source.find("q_proj") != std::string::npos || source.find("k_proj") != std::string::npos;
      if (turned) wanted = neighbours(wanted, spec.shape[1], model.config().head_dim);
      const auto& tensor = reader.tensors.at(target);
      EXPECT_EQ(tensor.shape, std::vector<std::int64_t>(spec.shape.rbegin(), spec.shape.rend())) << target;
      const std::vector<float> found = reader.floats(target);
      ASSERT_EQ(found.size(), wanted.size());
      double largest = 0, error = 0;
      for (std::size_t i = 0; i < found.size(); ++i) {
        largest = std::max(largest, std::fabs(static_cast<double>(wanted[i])));
        error = std::max(error, std::fabs(static_cast<double>(found[i]) - static_cast<double>(wanted[i])));
      }
      const bool matrix = spec.shape.size() == 2;
      EXPECT_LE(error, matrix ? bound * largest : 0.0) << codec << " " << target;
      if (matrix && bound > 0) {
        EXPECT_GT(error, 0.0) << codec << " " << target;
      }
    }
    EXPECT_EQ(reader.values.at("general.architecture"), "llama");
    EXPECT_EQ(reader.values.at("llama.block_count"), 2);
    EXPECT_EQ(reader.values.at("llama.attention.head_count_kv"), 2);
    EXPECT_EQ(reader.values.at("tokenizer.ggml.model"), "gpt2");
    EXPECT_EQ(reader.values.at("tokenizer.ggml.tokens").size(), 400u);
    const Json vocab = read_json(scratch / "model" / "tokenizer.json").at("model").at("vocab");
    for (const auto& [piece, id] : vocab.items()) {
      EXPECT_EQ(reader.values.at("tokenizer.ggml.tokens").at(id.get<std::size_t>()), piece);
    }
  }
}

TEST(Gguf, CodesAreLaidOutAnewAndNotRoundedAgain) {
  const Scratch scratch("gguf-codes");
  testing::make_tiny_model(scratch / "model", {});
  const Checkpoint model(scratch / "model");
  for (const char* name : {"q4g64", "q8", "q4a", "q4m", "q4mg64", "q3", "q3g64", "q2", "w8a8"}) {
    const Codec codec = Codec::parse(name, "test");
    const CodeRange range = code_range(codec.kind);
    FolderTransaction folder(scratch / name);
    CheckpointWriter writer(folder.work(), model.config(), "float32");
    std::uint64_t state = 9;
    for (const TensorSpec& spec : model.tensors()) {
      if (spec.role != TensorRole::kLinear) {
        writer.put(spec.name, model.read_f32(spec.name).data());
        continue;
      }
      QuantizedTensor tensor;
      tensor.codec = codec;
      tensor.rows = spec.shape[0];
      tensor.cols = spec.shape[1];
      for (std::int64_t i = 0; i < tensor.rows * tensor.cols; ++i) {
        const auto random = static_cast<int>(testing::next_random(state) % 16);
        tensor.codes.push_back(static_cast<std::int8_t>(range.low + random * (range.high - range.low) / 15));
      }
      for (std::int64_t i = 0; i < tensor.rows * codec.groups(tensor.cols); ++i) {
        // Powers of two, so that zero * scale is a half.
        tensor.scales.push_back(f32_to_f16(std::ldexp(1.0f, -static_cast<int>(testing::next_random(state) % 9))));
        if (codec.kind == CodecKind::kQ4a) tensor.zeros.push_back(testing::next_random(state) % 16);
        if (codec.kind == CodecKind::kQ4m)  // any half serves
          tensor.minima.push_back(f32_to_f16(static_cast<float>(testing::next_random(state) % 1000) * -1.7e-4f));
      }
      writer.put_codes(spec.name, tensor);
    }
    writer.copy_side_files(scratch / "model");
    writer.finish();
    folder.commit();
    const Checkpoint codes(scratch / name);
    write_gguf(scratch / name, scratch / (std::string(name) + ".gguf"), "keep");
    const Reader reader(scratch / (std::string(name) + ".gguf"));
    for (const auto& [source, target] : kNames) {
      std::vector<float> wanted = codes.read_f32(source);
      if (source.find("q_proj") != std::string::npos || source.find("k_proj") != std::string::npos)
        wanted = neighbours(wanted, codes.spec(source).shape[1], codes.config().head_dim);
      EXPECT_EQ(reader.floats(target), wanted) << name << " " << target;
    }
    const std::vector<std::string> notes = plan_gguf(codes, {scratch / "x.gguf"}).notes;
    const bool said = std::any_of(notes.begin(), notes.end(), [&](const std::string& note) {
      return note.find(codec.int8_inputs ? "one scale per token" : "4.5 bits") != std::string::npos;
    });
    EXPECT_EQ(said, codec.int8_inputs || codec.bits() < 4) << name;
  }
}

TEST(Gguf, ValuesThatTheTypeCannotHoldAreRefusedAndLeaveNothing) {
  const Scratch scratch("gguf-values");
  testing::make_tiny_model(scratch / "model", {});
  const fs::path weights = scratch / "model" / "model.safetensors";
  std::ptrdiff_t offset = 0;
  {
    const SafetensorsFile file(weights);
    offset = file.find("model.layers.1.mlp.up_proj.weight")->data.data() - file.file().bytes().data();
  }
  const std::string good = read_text(weights);
  for (const auto& [value, codec] : std::map<float, std::string>{{1e5f, "f16"}, {INFINITY, "f32"}, {-INFINITY, "q8"}}) {
    std::string bad = good;
    std::memcpy(bad.data() + offset, &value, 4);
    write_text(weights, bad);
    try {
      write_gguf(scratch / "model", scratch / "out.gguf", codec);
      ADD_FAILURE() << codec << " took " << value;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput);
      EXPECT_NE(error.place().find("model.layers.1.mlp.up_proj.weight"), std::string::npos) << error.what();
    }
    EXPECT_FALSE(fs::exists(scratch / "out.gguf"));
  }
}

TEST(Gguf, TheDefaultOfNamedChatTemplatesIsTaken) {
  const Scratch scratch("gguf-chat");
  testing::make_tiny_model(scratch / "model", {});
  const Checkpoint model(scratch / "model");
  const auto chat = [&]() -> Json {
    for (const auto& [key, value] : plan_gguf(model, {scratch / "x.gguf"}).metadata)
      if (key == "tokenizer.chat_template") return std::get<std::string>(value);
    return nullptr;
  };
  EXPECT_EQ(chat(), nullptr);
  write_text(scratch / "model" / "tokenizer_config.json",
             R"({"chat_template": [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]})");
  EXPECT_EQ(chat(), "b");
  write_text(scratch / "model" / "chat_template.jinja", "c");
  EXPECT_EQ(chat(), "c");
}

}  // namespace
}  // namespace pare
