// Families whose folders keep tensors under other names, transposed, or several in one.
#include "core/placement.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "core/random_weights.h"
#include "tests/core/model_folder.h"
#include "tests/families.h"

namespace pare {
namespace {

using testing::contains;
using testing::error_of;
using testing::random_codes;
using testing::Scratch;

Json golden_config(const std::string& name) {
  return read_json(testing::golden_families() / (name + ".json")).at("config");
}

const std::vector<std::string> kPlaced = {"gpt2", "gpt2_inner", "gpt_neox", "gpt_neox_sequential"};

std::vector<float> stored_values(const fs::path& folder, const std::string& name) {
  const ShardedTensors tensors(folder);
  const TensorView* view = tensors.find(name);
  if (view == nullptr) throw std::runtime_error(name + " is not there");
  std::vector<float> values(static_cast<std::size_t>(view->elements()));
  to_f32(*view, 0, view->elements(), values.data());
  return values;
}

bool same(const QuantizedTensor& a, const QuantizedTensor& b) {
  return a.codec == b.codec && a.rows == b.rows && a.cols == b.cols && a.codes == b.codes && a.scales == b.scales &&
         a.zeros == b.zeros && a.minima == b.minima;
}

// The tensors of a folder again in one file, changed.
void rewrite(const fs::path& folder,
             const std::function<void(std::vector<TensorDecl>&, std::vector<std::vector<float>>&)>& change) {
  std::vector<TensorDecl> decls;
  std::vector<std::vector<float>> values;
  {
    const SafetensorsFile file(folder / "model.safetensors");
    for (const TensorView& view : file.tensors()) {
      decls.push_back({view.name, view.dtype, view.shape});
      values.emplace_back(static_cast<std::size_t>(view.elements()));
      to_f32(view, 0, view.elements(), values.back().data());
    }
  }
  change(decls, values);
  SafetensorsWriter writer(folder / "model.safetensors", decls, {{"format", "pt"}});
  for (const auto& tensor : values) writer.write(std::as_bytes(std::span<const float>(tensor)));
  writer.finish();
}

// transformers: Conv1D computes x W + b with W [in, out]; c_attn's output is split in thirds.
TEST(Placement, Gpt2IsTransposedAndInThirds) {
  const Scratch scratch;
  testing::make_family_folder(golden_config("gpt2"), scratch / "model");
  const Checkpoint model(scratch / "model");
  const auto fused = stored_values(scratch / "model", "transformer.h.1.attn.c_attn.weight");  // [32, 96]
  const auto bias = stored_values(scratch / "model", "transformer.h.1.attn.c_attn.bias");
  const auto down = stored_values(scratch / "model", "transformer.h.1.mlp.c_proj.weight");  // [128, 32]
  const std::string block = "model.layers.1.";
  for (std::size_t part = 0; part < 3; ++part) {
    const std::string module = block + "self_attn." + "qkv"[part] + "_proj";
    const auto weight = model.read_f32(module + ".weight"), offset = model.read_f32(module + ".bias");
    for (std::size_t out = 0; out < 32; ++out) {
      ASSERT_EQ(offset[out], bias[part * 32 + out]);
      for (std::size_t in = 0; in < 32; ++in) ASSERT_EQ(weight[out * 32 + in], fused[in * 96 + part * 32 + out]);
    }
    std::vector<float> rows(5 * 32);
    model.read_rows_f32(module + ".weight", 7, 5, rows.data());
    EXPECT_TRUE(std::equal(rows.begin(), rows.end(), weight.begin() + 7 * 32));
  }
  const auto weight = model.read_f32(block + "mlp.down_proj.weight");
  for (std::size_t out = 0; out < 32; ++out)
    for (std::size_t in = 0; in < 128; ++in) ASSERT_EQ(weight[out * 128 + in], down[in * 32 + out]);
}

// transformers: the output viewed as [heads, 3 * head_dim], cut in q, k and v within each head.
TEST(Placement, GptNeoXAlternatesByHead) {
  const Scratch scratch;
  testing::make_family_folder(golden_config("gpt_neox"), scratch / "model");
  const Checkpoint model(scratch / "model");
  const auto fused = stored_values(scratch / "model", "gpt_neox.layers.0.attention.query_key_value.weight");
  const auto bias = stored_values(scratch / "model", "gpt_neox.layers.0.attention.query_key_value.bias");
  for (std::size_t part = 0; part < 3; ++part) {
    const std::string module = std::string("model.layers.0.self_attn.") + "qkv"[part] + "_proj";
    const auto weight = model.read_f32(module + ".weight"), offset = model.read_f32(module + ".bias");
    for (std::size_t head = 0; head < 4; ++head)
      for (std::size_t d = 0; d < 8; ++d) {
        const std::size_t own = head * 8 + d, there = head * 24 + part * 8 + d;
        ASSERT_EQ(offset[own], bias[there]);
        for (std::size_t in = 0; in < 32; ++in) ASSERT_EQ(weight[own * 32 + in], fused[there * 32 + in]);
      }
  }
}

// Reading and writing undo each other: the written file has the names, shapes and bytes of the one that was read.
TEST(Placement, WrittenFoldersAreThoseThatWereRead) {
  for (const std::string& name : kPlaced) {
    const Scratch scratch;
    testing::make_family_folder(golden_config(name), scratch / "model");
    const Checkpoint model(scratch / "model");
    CheckpointWriter writer(scratch / "again", model.config(), "float32");
    for (const TensorSpec& spec : model.tensors()) writer.put(spec.name, model.read_f32(spec.name).data());
    writer.finish();
    const ShardedTensors before(scratch / "model"), after(scratch / "again");
    ASSERT_EQ(before.names(), after.names()) << name;
    for (const std::string& tensor : before.names()) {
      EXPECT_EQ(before.find(tensor)->shape, after.find(tensor)->shape) << tensor;
      EXPECT_TRUE(std::ranges::equal(before.find(tensor)->data, after.find(tensor)->data)) << tensor;
    }
    EXPECT_EQ(Checkpoint(scratch / "again").tensor_bytes(), model.tensor_bytes());
  }
}

TEST(Placement, NamesWithoutThePrefixAndOldBuffersAreRead) {
  for (const auto& [name, prefix, mask] : {std::tuple("gpt2", "transformer.", "h.0.attn.bias"),
                                           std::tuple("gpt_neox", "gpt_neox.", "layers.1.attention.masked_bias")}) {
    const Scratch scratch;
    testing::make_family_folder(golden_config(name), scratch / "model");
    testing::make_family_folder(golden_config(name), scratch / "bare");
    const std::string cut = prefix, buffer = mask;
    rewrite(scratch / "bare", [&](std::vector<TensorDecl>& decls, std::vector<std::vector<float>>& values) {
      for (TensorDecl& decl : decls)
        if (decl.name.starts_with(cut)) decl.name = decl.name.substr(cut.size());
      decls.push_back({buffer, DType::kF32, {1, 1, 4, 4}});
      values.push_back(std::vector<float>(16, 1.0f));
    });
    const Checkpoint model(scratch / "model"), bare(scratch / "bare");
    for (const TensorSpec& spec : model.tensors()) EXPECT_EQ(model.read_f32(spec.name), bare.read_f32(spec.name));
    // Half and half is damage.
    rewrite(scratch / "bare", [&](std::vector<TensorDecl>& decls, std::vector<std::vector<float>>&) {
      for (TensorDecl& decl : decls)
        if (decl.name.ends_with(".weight") && decl.name.find("ln_f") == std::string::npos &&
            decl.name.find("final_layer_norm") == std::string::npos)
          decl.name = cut + decl.name;
    });
    const std::string message = error_of([&] { Checkpoint mixed(scratch / "bare"); });
    EXPECT_TRUE(message.starts_with("3 ") && contains(message, "is missing") && contains(message, "is left over"))
        << message;
  }
}

// A stored tensor that is damaged is named once, though three of ours are made of it.
TEST(Placement, DamageIsNamedOnceAndByItsNameInTheFile) {
  for (const auto& [name, fused] : {std::pair("gpt2", "transformer.h.0.attn.c_attn.weight"),
                                    std::pair("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight")}) {
    for (const bool missing : {true, false}) {
      const Scratch scratch;
      testing::make_family_folder(golden_config(name), scratch / "model");
      const std::string damaged = fused;
      rewrite(scratch / "model", [&](std::vector<TensorDecl>& decls, std::vector<std::vector<float>>& values) {
        for (std::size_t i = 0; i < decls.size(); ++i) {
          if (decls[i].name != damaged) continue;
          if (!missing) {  // as many elements in another shape
            decls[i].shape = {decls[i].shape[0] / 2, decls[i].shape[1] * 2};
            continue;
          }
          decls.erase(decls.begin() + static_cast<std::ptrdiff_t>(i));
          values.erase(values.begin() + static_cast<std::ptrdiff_t>(i));
          break;
        }
      });
      const std::string message = error_of([&] { Checkpoint model(scratch / "model"); });
      EXPECT_TRUE(message.starts_with("3 ") && contains(message, "1 problem: " + damaged) &&
                  contains(message, missing ? "is missing" : "instead of")) << message;
    }
  }
}

TEST(Placement, CodesComeBackTheVerySame) {
  for (const std::string& name : kPlaced) {
    for (const bool mixed : {false, true}) {  // one codec for q, k and v, or several and floats among them
      const Scratch scratch;
      const ModelConfig config = parse_config(golden_config(name), nullptr, name);
      const auto specs = expected_tensors(config);
      static const char* kNames[] = {"q4g32", "q8", "q4ag32", "q8c", "float", "w8a8", "q4mg32", "q3g32"};
      std::map<std::string, QuantizedTensor> put;
      std::map<std::string, std::vector<float>> floats;
      CheckpointWriter writer(scratch.path(), config, "bfloat16");
      std::size_t index = 0;
      for (const TensorSpec& spec : specs) {
        const bool codable = spec.role == TensorRole::kLinear || spec.role == TensorRole::kEmbedding ||
                             spec.role == TensorRole::kHead;
        const std::string codec_name = mixed ? kNames[index++ % 8] : "q4g32";
        if (!codable || codec_name == "float") {
          auto values = testing::values_of(spec);
          for (float& x : values) x = bf16_to_f32(f32_to_bf16(x));
          writer.put(spec.name, values.data());
          floats[spec.name] = values;
          continue;
        }
        Codec codec = Codec::parse(codec_name, "");
        if (!codec.fits(spec.shape[1])) codec = Codec::parse("q8c", "");
        put[spec.name] = random_codes(codec, spec.shape[0], spec.shape[1], static_cast<std::uint32_t>(put.size() + 1));
        writer.put_codes(spec.name, put[spec.name]);
      }
      writer.finish();
      const Checkpoint model(scratch.path());
      for (const auto& [tensor, codes] : put) {
        EXPECT_TRUE(same(model.codes(tensor), codes)) << name << " " << tensor;
        std::vector<float> unpacked(codes.codes.size());
        codes.unpack(unpacked.data());
        EXPECT_EQ(model.read_f32(tensor), unpacked) << name << " " << tensor;
      }
      for (const auto& [tensor, values] : floats) EXPECT_EQ(model.read_f32(tensor), values) << name << " " << tensor;

      // Conv1D has no packed form, query_key_value one for all its rows.
      const bool neox = config.family == "gpt_neox", packed = fs::exists(scratch / "model.safetensors");
      ASSERT_TRUE(packed);
      const ShardedTensors shards(scratch.path());
      const std::string qkv = "gpt_neox.layers.0.attention.query_key_value.weight";
      EXPECT_EQ(shards.find(qkv + "_packed") != nullptr, neox && !mixed);
      EXPECT_EQ(shards.find(qkv) != nullptr, neox && mixed);
      EXPECT_EQ(shards.find("transformer.h.0.mlp.c_fc.weight") != nullptr, !neox);
      if (!neox) {  // the float copy, which other programs read, is transposed too
        const auto copy = stored_values(scratch.path(), "transformer.h.0.mlp.c_fc.weight");
        const auto own = model.read_f32("model.layers.0.mlp.up_proj.weight");
        const auto inner = static_cast<std::size_t>(config.intermediate_size);
        for (std::size_t out = 0; out < inner; ++out)
          for (std::size_t in = 0; in < 32; ++in) ASSERT_EQ(own[out * 32 + in], copy[in * inner + out]);
      }
    }
  }
}

TEST(Placement, RandomModelsOpen) {
  for (const std::string& name : kPlaced) {
    const Scratch scratch;
    Progress quiet(true);
    Context context;
    context.progress = &quiet;
    write_random_model(scratch.path(), parse_config(golden_config(name), nullptr, name), 3, context);
    const Checkpoint model(scratch.path());
    for (const float w : model.read_f32("model.norm.weight")) ASSERT_EQ(w, 1.0f);
    for (const float w : model.read_f32("model.norm.bias")) ASSERT_EQ(w, 0.0f);
    const auto q = model.read_f32("model.layers.0.self_attn.q_proj.weight");
    EXPECT_GT(std::set<float>(q.begin(), q.end()).size(), 100u);
    EXPECT_NE(q, model.read_f32("model.layers.0.self_attn.k_proj.weight"));
  }
}

}  // namespace
}  // namespace pare
