// Folders of quant_method gptq as other programs write them, laid out here bit by bit from the format's definition.
#include "core/gptq_folder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>

#include "model_folder.h"

namespace pare {
namespace {

using testing::contains;
using testing::error_of;
using testing::Scratch;
using testing::small_config;
using testing::values_of;
using testing::write_bytes;

// One linear: any codes, zero points (as meant), scales and groups of inputs, and the weights that they stand for.
struct Linear {
  std::int64_t outputs = 0, inputs = 0;
  std::vector<int> codes;       // [outputs, inputs], unsigned
  std::vector<int> zeros;       // [groups, outputs]
  std::vector<float> scales;    // [groups, outputs]
  std::vector<int> group_of;    // [inputs]
  double weight(std::int64_t o, std::int64_t i) const {
    const std::int64_t at = group_of[static_cast<std::size_t>(i)] * outputs + o;
    return (codes[static_cast<std::size_t>(o * inputs + i)] - zeros[static_cast<std::size_t>(at)]) *
           static_cast<double>(scales[static_cast<std::size_t>(at)]);
  }
};

struct Form {
  int bits = 4;
  std::int64_t group = 32;  // -1: the row
  bool symmetric = true, reordered = false, version2 = false, order = true;
  DType scales = DType::kF16;
};

// Bit k of a stream of I32 words.
void set_bit(std::vector<std::uint32_t>& words, std::int64_t bit) {
  words[static_cast<std::size_t>(bit / 32)] |= 1u << (bit % 32);
}

class GptqFolder : public ::testing::Test {
 protected:
  Linear random_linear(const TensorSpec& spec, const Form& form) {
    Linear linear;
    linear.outputs = spec.shape[0];
    linear.inputs = spec.shape[1];
    const std::int64_t width = form.group < 0 ? linear.inputs : form.group;
    const std::int64_t groups = (linear.inputs + width - 1) / width;
    const int top = (1 << form.bits) - 1;
    const auto any = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); };
    for (std::int64_t i = 0; i < linear.outputs * linear.inputs; ++i)
      linear.codes.push_back(any(form.bits == 8 && form.symmetric ? 1 : 0, top));
    for (std::int64_t i = 0; i < groups * linear.outputs; ++i) {
      linear.zeros.push_back(form.symmetric ? (top + 1) / 2 : any(form.version2 ? 0 : 1, top));
      linear.scales.push_back(f16_to_f32(static_cast<std::uint16_t>(any(1, 0x3800))));
    }
    for (std::int64_t i = 0; i < linear.inputs; ++i) linear.group_of.push_back(static_cast<int>(i / width));
    if (form.reordered) std::shuffle(linear.group_of.begin(), linear.group_of.end(), random_);
    return linear;
  }

  // The definition: words of 32 / bits codes, the first in the lowest bits; qweight packs along the inputs, qzeros
  // along the outputs and, in version 1, holds one less.
  void pack(const std::string& module, const Linear& linear, const Form& form) {
    const std::int64_t per_word = 32 / form.bits, out = linear.outputs;
    const auto groups = static_cast<std::int64_t>(linear.scales.size()) / out;
    std::vector<std::uint32_t> weight(static_cast<std::size_t>(linear.inputs / per_word * out));
    for (std::int64_t o = 0; o < out; ++o)
      for (std::int64_t i = 0; i < linear.inputs; ++i)
        for (int b = 0; b < form.bits; ++b)
          if ((linear.codes[static_cast<std::size_t>(o * linear.inputs + i)] >> b & 1) != 0)
            set_bit(weight, (i / per_word * out + o) * 32 + i % per_word * form.bits + b);
    std::vector<std::uint32_t> zeros(static_cast<std::size_t>(groups * out / per_word));
    for (std::int64_t g = 0; g < groups; ++g)
      for (std::int64_t o = 0; o < out; ++o)
        for (int b = 0; b < form.bits; ++b)
          if (((linear.zeros[static_cast<std::size_t>(g * out + o)] - (form.version2 ? 0 : 1)) >> b & 1) != 0)
            set_bit(zeros, (g * (out / per_word) + o / per_word) * 32 + o % per_word * form.bits + b);
    add(module + ".qweight", DType::kI32, {linear.inputs / per_word, out}, weight);
    add(module + ".qzeros", DType::kI32, {groups, out / per_word}, zeros);
    std::vector<std::uint16_t> scales;
    for (const float scale : linear.scales)
      scales.push_back(form.scales == DType::kF16 ? f32_to_f16(scale) : f32_to_bf16(scale));
    add(module + ".scales", form.scales, {groups, out}, scales);
    if (form.order) add(module + ".g_idx", DType::kI32, {linear.inputs}, linear.group_of);
  }

  template <class T>
  void add(const std::string& name, DType dtype, std::vector<std::int64_t> shape, const std::vector<T>& values) {
    decls_.push_back({name, dtype, std::move(shape)});
    data_.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
  }

  Json quantization(const Form& form) const {
    return {{"quant_method", "gptq"}, {"bits", form.bits}, {"group_size", form.group}, {"desc_act", form.reordered},
            {"sym", form.symmetric}, {"lm_head", false}, {"checkpoint_format", form.version2 ? "gptq_v2" : "gptq"}};
  }

  // All linears of the model in this form; `change` may spoil one before it is packed.
  void write(const Form& form, const Json& quantization, const std::function<void(Linear&)>& change = {}) {
    decls_.clear();
    data_.clear();
    linears_.clear();
    fs::remove_all(scratch_ / "m");
    fs::create_directories(scratch_ / "m");
    Json config = small_config();
    if (!quantization.is_null()) config["quantization_config"] = quantization;
    write_bytes(scratch_ / "m" / "config.json", config.dump());
    for (const TensorSpec& spec : expected_tensors(parse_config(small_config(), nullptr, ""))) {
      if (spec.role != TensorRole::kLinear) {
        add(spec.name, DType::kF32, spec.shape, values_of(spec));
        continue;
      }
      Linear linear = random_linear(spec, form);
      if (change && spec.name.ends_with("1.mlp.up_proj.weight")) change(linear);
      pack(spec.name.substr(0, spec.name.rfind('.')), linear, form);
      linears_.emplace(spec.name, std::move(linear));
    }
    save();
  }
  void save() const {
    SafetensorsWriter writer(scratch_ / "m" / "model.safetensors", decls_, {{"format", "pt"}});
    writer.write(as_bytes(data_));
    writer.finish();
  }
  void write(const Form& form) { write(form, quantization(form)); }
  std::string refusal() const {
    return error_of([&] { const Checkpoint model(scratch_ / "m"); });
  }
  // Every weight is the product in double, which float holds.
  void expect_weights(const std::string& what) const {
    const Checkpoint model(scratch_ / "m");
    EXPECT_TRUE(model.is_gptq());
    for (const auto& [name, linear] : linears_) {
      const std::vector<float> values = model.read_f32(name);
      for (std::int64_t o = 0; o < linear.outputs; ++o)
        for (std::int64_t i = 0; i < linear.inputs; ++i)
          ASSERT_EQ(static_cast<double>(values[static_cast<std::size_t>(o * linear.inputs + i)]), linear.weight(o, i))
              << what << " " << name << " " << o << " " << i;
    }
  }
  Scratch scratch_;
  std::mt19937 random_{7};
  std::vector<TensorDecl> decls_;
  std::string data_;
  std::map<std::string, Linear> linears_;
};

constexpr const char* kQ = "model.layers.0.self_attn.q_proj.weight";    // 128 inputs
constexpr const char* kDown = "model.layers.0.mlp.down_proj.weight";    // 96 inputs

TEST_F(GptqFolder, EveryFormIsReadAsItsDefinitionSays) {
  struct Case {
    Form form;
    const char* q;     // the codec of rows of 128
    const char* down;  // of 96
  };
  for (const Case& given : std::vector<Case>{
           {{4, 32}, "q4g32", "q4g32"},
           {{4, 64}, "q4g64", "q4g32"},
           {{4, 128}, "q4g128", "q4g32"},   // a group longer than the row is the row
           {{4, -1}, "q4g128", "q4g32"},    // one scale per row, repeated
           {{.bits = 4, .group = 32, .version2 = true}, "q4g32", "q4g32"},
           {{.bits = 4, .group = 32, .symmetric = false}, "q4ag32", "q4ag32"},
           {{.bits = 4, .group = 128, .symmetric = false, .version2 = true}, "q4ag128", "q4ag32"},
           {{.bits = 4, .group = 32, .order = false}, "q4g32", "q4g32"},
           {{.bits = 4, .group = 16}, "f32", "f32"},
           {{.bits = 4, .group = 32, .reordered = true}, "f32", "f32"},
           {{.bits = 4, .group = 32, .symmetric = false, .reordered = true, .version2 = true}, "f32", "f32"},
           {{8, 32}, "q8", "q8"},
           {{8, 128}, "q8", "q8"},
           {{8, -1}, "q8c", "q8c"},
           {{.bits = 8, .group = 64, .version2 = true}, "q8", "q8"},
           {{.bits = 8, .group = 32, .symmetric = false}, "f32", "f32"},
           {{.bits = 8, .group = 32, .symmetric = false, .reordered = true, .version2 = true}, "f32", "f32"}}) {
    const Form& form = given.form;
    const std::string what = std::to_string(form.bits) + " bits, group " + std::to_string(form.group) +
                             (form.symmetric ? "" : " asymmetric") + (form.reordered ? " reordered" : "") +
                             (form.version2 ? " v2" : "");
    write(form);
    ASSERT_EQ(refusal(), "no error") << what;
    const Checkpoint model(scratch_ / "m");
    EXPECT_EQ(model.codec(kQ).name(), given.q) << what;
    EXPECT_EQ(model.codec(kDown).name(), given.down) << what;
    EXPECT_EQ(model.notes().size(), std::string(given.q) == "f32" ? 1u : 0u) << what;
    if (form.reordered) {
      EXPECT_TRUE(contains(model.notes()[0], "desc_act"));
    }
    expect_weights(what);
  }
}

TEST_F(GptqFolder, ACodeThatNoCodecHasMakesItsLinearFloats) {
  const Form form{8, 32};
  write(form, quantization(form), [](Linear& linear) { linear.codes[77] = 0; });  // -128
  const Checkpoint model(scratch_ / "m");
  EXPECT_EQ(model.codec("model.layers.1.mlp.up_proj.weight").name(), "f32");
  EXPECT_EQ(model.codec("model.layers.0.mlp.up_proj.weight").name(), "q8");
  expect_weights("-128");
}

TEST_F(GptqFolder, ScalesThatAreNoHalvesMakeFloats) {
  Form form{4, 32};
  form.scales = DType::kBF16;
  write(form, quantization(form), [](Linear& linear) { linear.scales[5] = 1e30f; });
  const Checkpoint model(scratch_ / "m");
  EXPECT_EQ(model.codec("model.layers.1.mlp.up_proj.weight").name(), "f32");
  EXPECT_TRUE(std::isfinite(model.read_f32("model.layers.1.mlp.up_proj.weight")[160 * 5]));
}

// Words that a reader by hand would expect: version 1 of a symmetric model holds 7 in every place.
TEST_F(GptqFolder, WordsOfVersionOne) {
  QuantizedTensor tensor = testing::random_codes(Codec::parse("q4g32", ""), 32, 32, 1);
  EXPECT_EQ(pack_gptq_zeros(tensor, true), std::vector<std::int32_t>(4, 0x77777777));
  EXPECT_EQ(pack_gptq_zeros(tensor, false), std::vector<std::int32_t>(4, static_cast<std::int32_t>(0x88888888)));
  for (int i = 0; i < 8; ++i) tensor.codes[static_cast<std::size_t>(i)] = static_cast<std::int8_t>(i - 8);  // row 0
  EXPECT_EQ(pack_gptq_weight(tensor)[0], 0x76543210);
  QuantizedTensor wide = testing::random_codes(Codec::parse("q8", ""), 32, 32, 1);
  EXPECT_EQ(pack_gptq_zeros(wide, true), std::vector<std::int32_t>(8, 0x7f7f7f7f));
  const std::int8_t codes[] = {-127, -1, 0, 127};
  std::copy_n(codes, 4, wide.codes.begin());
  EXPECT_EQ(pack_gptq_weight(wide)[0], static_cast<std::int32_t>(0xff807f01));
  EXPECT_EQ(gptq_order(Codec::parse("q4g64", ""), 128)[64], 1);
}

TEST_F(GptqFolder, EarlyFoldersSayItInAFileOfItsOwn) {
  const Form form{4, 32};
  write(form, nullptr);
  EXPECT_TRUE(contains(refusal(), "is missing"));
  write_bytes(scratch_ / "m" / "quantize_config.json", R"({"bits":4,"group_size":32,"desc_act":false,"sym":true})");
  ASSERT_EQ(refusal(), "no error");
  expect_weights("quantize_config.json");
}

TEST_F(GptqFolder, WhatReadersDisagreeAboutIsRefused) {
  const Form form{.bits = 4, .group = 32, .symmetric = false};
  write(form, quantization(form), [](Linear& linear) { linear.zeros[3] = 16; });  // stored 15
  const std::string said = refusal();
  EXPECT_TRUE(said.starts_with("3 ") && contains(said, "1.mlp.up_proj.qzeros") && contains(said, "gptq_v2")) << said;
  Json second = quantization(form);
  second["checkpoint_format"] = "gptq_v2";  // the same bits there mean 15
  write(form, second, [](Linear& linear) { linear.zeros[3] = 16; });
  EXPECT_EQ(refusal(), "no error");
}

TEST_F(GptqFolder, DamageIsNamed) {
  const Form form{4, 32};
  const auto with = [&](const char* key, const Json& value) {
    Json json = quantization(form);
    json[key] = value;
    write(form, json);
    return refusal();
  };
  EXPECT_TRUE(contains(with("bits", 3), "4 or 8"));
  EXPECT_TRUE(contains(with("bits", "4"), "a whole number"));
  EXPECT_TRUE(contains(with("group_size", 0), "group_size"));
  for (const Json& beyond : {Json(1048577), Json(INT64_MAX), Json(UINT64_MAX), Json(UINT64_MAX - 31)})
    EXPECT_TRUE(contains(with("group_size", beyond), "group_size")) << beyond;
  EXPECT_TRUE(contains(with("bits", UINT64_MAX - 251), "bits: expected a whole number of 64 bits"));
  EXPECT_TRUE(contains(with("group_size", nullptr), "group_size"));
  EXPECT_TRUE(contains(with("group_size", 64), "instead of"));
  EXPECT_TRUE(contains(with("bits", 8), "instead of"));
  EXPECT_TRUE(contains(with("checkpoint_format", "marlin"), "gptq or gptq_v2"));
  EXPECT_TRUE(contains(with("is_marlin_format", true), "marlin"));
  EXPECT_TRUE(contains(with("pack_dtype", "int16"), "int32"));
  EXPECT_TRUE(contains(with("dynamic", {{"+:.*down.*", {{"bits", 8}}}}), "dynamic"));
  EXPECT_EQ(with("dynamic", {{"-:.*head.*", Json::object()}}), "no error");
  write(form, quantization(form), [](Linear& linear) { linear.group_of[9] = 4; });
  EXPECT_TRUE(contains(refusal(), "4 of input 9"));
  write(form, quantization(form), [](Linear& linear) { linear.group_of[9] = -1; });
  EXPECT_TRUE(contains(refusal(), "-1 of input 9"));
  write(form, quantization(form), [](Linear& linear) { linear.scales[9] = HUGE_VALF; });
  EXPECT_TRUE(contains(refusal(), "finite scales"));
  for (const char* suffix : {".qweight", ".qzeros", ".scales"}) {
    write(form);
    const std::string name = std::string("model.layers.0.self_attn.q_proj") + suffix;
    std::find_if(decls_.begin(), decls_.end(), [&](const auto& d) { return d.name == name; })->name = "elsewhere";
    save();
    const std::string said = refusal();
    EXPECT_TRUE(said.starts_with("3 ") && contains(said, "q_proj") && contains(said, "is missing")) << said;
  }
  write(form);
  add("model.layers.0.self_attn.q_proj.weight", DType::kF32, {128, 128}, std::vector<float>(128 * 128));
  save();
  EXPECT_TRUE(contains(refusal(), "left over"));
  for (const float bias : {0.0f, 1.0f}) {  // of nothing, as AutoGPTQ wrote, and one that the model has not
    write(form);
    add("model.layers.0.self_attn.q_proj.bias", DType::kF32, {128}, std::vector<float>(128, bias));
    save();
    EXPECT_EQ(refusal() == "no error", bias == 0.0f) << refusal();
  }
}

}  // namespace
}  // namespace pare
