// pare export --to gptq and gptq_v2, and back.
#include <algorithm>
#include <cstring>

#include "core/gptq_folder.h"
#include "runtime/compatibility.h"
#include "runtime/export.h"
#include "runtime/verbs/cli.h"
#include "tests/core/model_folder.h"

namespace pare {
namespace {

using testing::contains;
using testing::error_of;
using testing::random_codes;
using testing::same;
using testing::Scratch;
using testing::small_config;
using testing::values_of;

class GptqExport : public ::testing::Test {
 protected:
  GptqExport() { context_.quiet = context_.json = true; }
  // All linears in `codec`, but those that `other` gives one ("": floats); vectors and the embedding floats.
  fs::path model(const std::string& codec, const std::map<std::string, std::string>& other = {},
                 bool zero_of_0 = true) {
    const fs::path path = scratch_ / ("m" + std::to_string(++count_));
    fs::create_directories(path);
    const ModelConfig config = parse_config(small_config(), nullptr, "");
    CheckpointWriter writer(path, config, "float32");
    for (const TensorSpec& spec : expected_tensors(config)) {
      const auto found = other.find(spec.name);
      const std::string name = found != other.end() ? found->second : spec.role == TensorRole::kLinear ? codec : "";
      if (name.empty()) {
        writer.put(spec.name, values_of(spec).data());
        continue;
      }
      QuantizedTensor tensor = random_codes(Codec::parse(name, ""), spec.shape[0], spec.shape[1], 5);
      if (!zero_of_0)
        for (std::uint8_t& zero : tensor.zeros) zero = std::max<std::uint8_t>(zero, 1);
      writer.put_codes(spec.name, tensor);
    }
    writer.finish();
    return path;
  }
  fs::path out() { return scratch_ / ("out" + std::to_string(++count_)); }
  // A GPT-NeoX, whose q, k and v stand in one tensor; `floats`: linears that stay so.
  fs::path fused(const std::vector<std::string>& floats) {
    const fs::path path = scratch_ / ("m" + std::to_string(++count_));
    fs::create_directories(path);
    const Json json = Json::parse(R"({"architectures":["GPTNeoXForCausalLM"],"model_type":"gpt_neox","hidden_size":128,
      "intermediate_size":96,"num_hidden_layers":2,"num_attention_heads":4,"vocab_size":50,"rotary_pct":0.25,
      "max_position_embeddings":64,"layer_norm_eps":1e-05,"hidden_act":"gelu","tie_word_embeddings":false})");
    const ModelConfig config = parse_config(json, nullptr, "");
    CheckpointWriter writer(path, config, "float32");
    for (const TensorSpec& spec : expected_tensors(config)) {
      if (spec.role == TensorRole::kLinear && std::find(floats.begin(), floats.end(), spec.name) == floats.end())
        writer.put_codes(spec.name, random_codes(Codec::parse("q4g32", ""), spec.shape[0], spec.shape[1], 5));
      else
        writer.put(spec.name, values_of(spec).data());
    }
    writer.finish();
    return path;
  }
  std::string refusal(const fs::path& from, FolderForm form = FolderForm::kGptq) {
    const fs::path to = out();
    const std::string said = error_of([&] { export_folder(Checkpoint(from), to, context_, form); });
    EXPECT_FALSE(fs::exists(to));
    EXPECT_FALSE(fs::exists(to.string() + ".partial"));
    return said;
  }
  Scratch scratch_;
  Context context_;
  int count_ = 0;
};

TEST_F(GptqExport, CodesComeBackTheVerySame) {
  const auto first = FolderForm::kGptq, second = FolderForm::kGptqV2;
  for (const auto& [name, form] :
       {std::pair("q4g32", first), {"q4ag32", first}, {"q4ag32", second}, {"q8", first}, {"q8c", second}}) {
    const fs::path from = model(name, {}, form == second), to = out(), back = out();
    EXPECT_TRUE(plan_folder(Checkpoint(from), form).empty());
    export_folder(Checkpoint(from), to, context_, form);
    const Checkpoint a(from), b(to);
    EXPECT_TRUE(b.is_gptq());
    EXPECT_FALSE(fs::exists(to / "codes.pare"));
    for (const TensorSpec& spec : a.tensors()) {
      ASSERT_EQ(a.codec(spec.name), b.codec(spec.name)) << name << " " << spec.name;
      if (a.is_quantized(spec.name)) {
        EXPECT_TRUE(same(a.codes(spec.name), b.codes(spec.name))) << name << " " << spec.name;
      }
      EXPECT_EQ(a.read_f32(spec.name), b.read_f32(spec.name));
    }
    export_folder(b, back, context_);  // as it was
    EXPECT_EQ(read_text(back / "model.safetensors"), read_text(from / "model.safetensors")) << name;
    EXPECT_EQ(read_text(back / "config.json"), read_text(from / "config.json")) << name;
  }
}

TEST_F(GptqExport, WhatStandsInTheFolder) {
  const fs::path to = out();
  export_folder(Checkpoint(model("q4g32")), to, context_, FolderForm::kGptq);
  const Json config = read_json(to / "config.json")["quantization_config"];
  EXPECT_EQ(config, read_json(to / "quantize_config.json"));
  EXPECT_EQ(config, Json::parse(R"({"quant_method":"gptq","bits":4,"group_size":32,"desc_act":false,"sym":true,
                                   "lm_head":false,"checkpoint_format":"gptq","pack_dtype":"int32"})"));
  const SafetensorsFile file(to / "model.safetensors");
  const std::string module = "model.layers.0.mlp.down_proj";  // 128 outputs, 96 inputs
  const auto expect = [&](const char* suffix, DType dtype, std::vector<std::int64_t> shape) {
    const TensorView* view = file.find(module + suffix);
    ASSERT_NE(view, nullptr) << suffix;
    EXPECT_EQ(view->dtype, dtype) << suffix;
    EXPECT_EQ(view->shape, shape) << suffix;
  };
  expect(".qweight", DType::kI32, {12, 128});
  expect(".qzeros", DType::kI32, {3, 16});
  expect(".scales", DType::kF16, {3, 128});
  expect(".g_idx", DType::kI32, {96});
  EXPECT_EQ(file.find(module + ".weight"), nullptr);
}

TEST_F(GptqExport, LinearsOfFloatsAreNamedAndTablesBecomeFloats) {
  const std::string down = "model.layers.1.mlp.down_proj.weight", table = "model.embed_tokens.weight";
  const fs::path from = model("q4g32", {{down, ""}, {table, "q8"}}), to = out();
  const std::vector<std::string> notes = plan_folder(Checkpoint(from), FolderForm::kGptq);
  export_folder(Checkpoint(from), to, context_, FolderForm::kGptq);
  ASSERT_EQ(notes.size(), 2u);
  EXPECT_TRUE(contains(notes[0], "1 linears of floats")) << notes[0];
  EXPECT_TRUE(contains(notes[1], "1 tensors of codes beside the linears")) << notes[1];
  const Json config = read_json(to / "config.json")["quantization_config"];
  EXPECT_EQ(config["dynamic"], Json::parse(R"({"-:^model\\.layers\\.1\\.mlp\\.down_proj$": {}})"));
  const Checkpoint a(from), b(to);
  EXPECT_FALSE(b.is_quantized(table));
  for (const TensorSpec& spec : a.tensors()) EXPECT_EQ(a.read_f32(spec.name), b.read_f32(spec.name)) << spec.name;
}

TEST_F(GptqExport, WhatItCannotHoldIsRefusedWithTheReason) {
  const std::string down = "model.layers.1.mlp.down_proj.weight";
  EXPECT_TRUE(contains(refusal(model("q3g32")), "3 bits, not 4 or 8"));
  EXPECT_TRUE(contains(refusal(model("q2g32")), "2 bits, not 4 or 8"));
  EXPECT_TRUE(contains(refusal(model("q4mg32")), "q4m has a minimum"));
  EXPECT_TRUE(contains(refusal(model("w8a8")), "rounds inputs"));
  EXPECT_TRUE(contains(refusal(model("q4g32", {{down, "q8"}})), "one codec for all linears"));
  EXPECT_TRUE(contains(refusal(model("")), "pare quantize"));
  const std::string zero = refusal(model("q4ag32"));
  EXPECT_TRUE(zero.starts_with("3 ") && contains(zero, "--to gptq_v2")) << zero;
  const std::string planned = error_of([&] { plan_folder(Checkpoint(model("q4ag32")), FolderForm::kGptq); });
  EXPECT_TRUE(planned.starts_with("3 ") && contains(planned, "--to gptq_v2")) << planned;
  Json narrow = small_config();  // 16 outputs of k and v
  narrow["num_key_value_heads"] = 1;
  narrow["num_attention_heads"] = 8;
  const ModelConfig config = parse_config(narrow, nullptr, "");
  fs::create_directories(scratch_ / "narrow");
  CheckpointWriter writer(scratch_ / "narrow", config, "float32");
  for (const TensorSpec& spec : expected_tensors(config)) {
    if (spec.role == TensorRole::kLinear)
      writer.put_codes(spec.name, random_codes(Codec::parse("q4g32", ""), spec.shape[0], spec.shape[1], 5));
    else
      writer.put(spec.name, values_of(spec).data());
  }
  writer.finish();
  EXPECT_TRUE(contains(refusal(scratch_ / "narrow"), "multiples of 32"));
}

TEST_F(GptqExport, CodesOfAFusedTensorAreNotLost) {
  EXPECT_TRUE(plan_folder(Checkpoint(fused({})), FolderForm::kGptq).empty());
  const std::string block = "model.layers.0.";
  for (const char* part : {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
    EXPECT_TRUE(contains(refusal(fused({block + part + ".weight"})), "floats among codes in ")) << part;
  const fs::path whole = fused({block + "self_attn.q_proj.weight", block + "self_attn.k_proj.weight",
                                block + "self_attn.v_proj.weight"});
  EXPECT_EQ(plan_folder(Checkpoint(whole), FolderForm::kGptq).size(), 1u);
}

// desc_act: others find codes, which pare has as floats.
TEST_F(GptqExport, ThePlanOfFormsThatNoCodecHolds) {
  const fs::path to = out();
  export_folder(Checkpoint(model("q4g32")), to, context_, FolderForm::kGptq);
  std::string bytes = read_text(to / "model.safetensors");
  const SafetensorsFile file(to / "model.safetensors");
  const TensorView* order = file.find("model.layers.0.mlp.down_proj.g_idx");
  ASSERT_NE(order, nullptr);
  char* const first = bytes.data() + (order->data.data() - file.file().bytes().data());
  std::swap_ranges(first, first + 4, first + 4 * 95);
  testing::write_bytes(to / "model.safetensors", bytes);
  ASSERT_FALSE(Checkpoint(to).is_quantized("model.layers.0.mlp.down_proj.weight"));
  for (const Compatibility& row : compatibility(Checkpoint(to))) {
    std::string reasons;
    for (const std::string& reason : row.reasons) reasons += reason + "\n";
    EXPECT_NE(row.fast, Compatibility::Answer::kYes) << row.target;
    const bool floats = row.target == "llama.cpp" || row.target == "pare";
    if (row.target == "Ollama") continue;  // as llama.cpp
    EXPECT_TRUE(contains(reasons, floats ? "1 linear of GPTQ that no codec holds"
                                         : "4 bits, groups of 32, inputs in another order (desc_act)"))
        << row.target << ": " << reasons;
  }
}

TEST_F(GptqExport, TheVerbSaysItBeforeItWrites) {
  const auto run = [&](const Json& given) {
    const Command command = export_command();
    return command.run(Options(command.options, given, command.name), context_);
  };
  const std::string from = model("q4g32").string(), to = out().string(), other = model("q3g32").string();
  EXPECT_TRUE(contains(error_of([&] { run({{"model", other}, {"to", "gptq"}, {"dry-run", true}}); }), "not 4 or 8"));
  run({{"model", from}, {"to", "gptq"}, {"dry-run", true}});
  EXPECT_EQ(run({{"model", from}, {"to", "gptq_v2"}, {"out", to}})["notes"].size(), 1u);  // there is no tokenizer
  EXPECT_EQ(read_json(fs::path(to) / "config.json")["quantization_config"]["checkpoint_format"], "gptq_v2");
  for (const Compatibility& row : compatibility(Checkpoint(to))) {
    if (row.target != "transformers") continue;
    EXPECT_TRUE(contains(row.reasons.at(0), "gptqmodel")) << row.reasons[0];
  }
  EXPECT_TRUE(contains(error_of([&] {
    run({{"model", from}, {"to", "gptq"}, {"codec", "q8"}, {"out", to + "2"}});
  }), "keep with --to gptq"));
}

}  // namespace
}  // namespace pare
