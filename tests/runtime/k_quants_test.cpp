// Numbers into the blocks of ggml's K types: bits, the search against brute force in double, edge inputs, and export.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "core/gguf_file.h"
#include "runtime/gguf_export.h"
#include "runtime/k_quants.h"
#include "tests/core/gguf_bytes.h"
#include "tests/core/model_folder.h"
#include "tests/runtime/round_trips.h"

namespace pare {
namespace {

using testing::contains;
using testing::error_of;
using testing::Scratch;

struct Format {
  GgmlType type;
  int size, low, high, scale_low, scale_high, minimum_high;
};
constexpr Format kFormats[] = {{GgmlType::kQ2_K, 16, 0, 3, 0, 15, 15},
                               {GgmlType::kQ3_K, 16, -4, 3, -32, 31, 0},
                               {GgmlType::kQ4_K, 32, 0, 15, 0, 63, 63},
                               {GgmlType::kQ5_K, 32, 0, 31, 0, 63, 63},
                               {GgmlType::kQ6_K, 16, -32, 31, -128, 127, 0}};
constexpr GgmlType kAll[] = {GgmlType::kQ2_K, GgmlType::kQ3_K, GgmlType::kQ4_K, GgmlType::kQ5_K,
                             GgmlType::kQ6_K, GgmlType::kQ4_1, GgmlType::kQ5_1};

std::vector<float> normal(std::size_t count, unsigned seed, float spread = 0.02f) {
  std::mt19937 random(seed);
  std::vector<float> out(count);
  for (float& value : out) {  // sums of uniforms: the same on every platform
    float sum = 0;
    for (int i = 0; i < 6; ++i) sum += static_cast<float>(random() >> 8) / 16777216.0f - 0.5f;
    value = spread * sum * (random() % 16 == 0 ? 3.0f : 1.0f);
  }
  return out;
}

// What a reader finds.
std::vector<float> there_and_back(GgmlType type, const std::vector<float>& values, const float* importance = nullptr) {
  const auto count = static_cast<std::int64_t>(values.size());
  std::vector<std::byte> blocks(ggml_bytes(type, count));
  require_blocks(type, values.data(), count, "test");
  round_to_blocks(type, values.data(), count, importance, blocks.data());
  std::vector<float> out(values.size());
  ggml_to_f32(type, blocks.data(), count, out.data());
  return out;
}

double squares(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
  return sum;
}

TEST(KQuants, EveryBitIsWhereTheReaderLooksForIt) {
  std::mt19937 random(1);
  const auto between = [&](int low, int high) {
    return static_cast<std::int8_t>(low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1)));
  };
  for (const Format& format : kFormats) {
    for (int round = 0; round < 50; ++round) {
      KBlock block;
      block.d = f32_to_f16(0.01f * static_cast<float>(1 + round));
      block.m = f32_to_f16(0.003f * static_cast<float>(50 - round));
      for (auto& scale : block.scales) scale = between(format.scale_low, format.scale_high);
      for (auto& minimum : block.minima) minimum = between(0, format.minimum_high);
      for (auto& code : block.codes) code = between(format.low, format.high);
      std::vector<std::byte> bytes(ggml_bytes(format.type, 256));
      pack_k_block(format.type, block, bytes.data());
      float found[256];
      ggml_to_f32(format.type, bytes.data(), 256, found);
      for (std::size_t i = 0; i < 256; ++i) {
        const std::size_t group = i / static_cast<std::size_t>(format.size);
        const float wanted = f16_to_f32(block.d) * static_cast<float>(block.scales[group]) * static_cast<float>(block.codes[i]) -
                             f16_to_f32(block.m) * static_cast<float>(block.minima[group]);
        ASSERT_EQ(found[i], wanted) << ggml_type_name(format.type) << " " << i;
      }
    }
  }
  for (const GgmlType type : {GgmlType::kQ4_1, GgmlType::kQ5_1}) {
    std::int8_t codes[32];
    for (int i = 0; i < 32; ++i) codes[i] = static_cast<std::int8_t>(type == GgmlType::kQ4_1 ? i / 2 : 31 - i);
    std::byte bytes[24];
    pack_pair_block(type, f32_to_f16(0.5f), f32_to_f16(-3.0f), codes, bytes);
    float found[32];
    ggml_to_f32(type, bytes, 32, found);
    for (int i = 0; i < 32; ++i) EXPECT_EQ(found[i], 0.5f * static_cast<float>(codes[i]) - 3.0f);
  }
}

// Least squared error of a sub-block with a scale and a minimum >= 0 that are any numbers: what no block can be below.
double free_error(const Format& format, const float* x) {
  double least = std::numeric_limits<double>::infinity(), low = 0, high = 0, top = 0;
  for (int i = 0; i < format.size; ++i) {
    const auto value = static_cast<double>(x[i]);
    low = std::min(low, value), high = std::max(high, value), top = std::max(top, std::fabs(value));
  }
  const auto try_pair = [&](double scale, double base) {
    double error = 0;
    for (int i = 0; i < format.size && error < least; ++i) {
      const double code = std::clamp<double>(std::nearbyint((static_cast<double>(x[i]) + base) / scale), format.low, format.high);
      error += std::pow(scale * code - base - static_cast<double>(x[i]), 2);
    }
    least = std::min(least, error);
  };
  constexpr int kSteps = 80;
  for (int s = 24; s <= 88; ++s) {
    if (format.minimum_high == 0) {
      for (const int sign : {-1, 1})
        for (int part = 0; part < 4; ++part) try_pair(sign * top / -format.low * (s + part / 4.0) / kSteps, 0);
    } else {
      for (int b = 0; b <= 36; ++b) try_pair((high - low) / format.high * s / kSteps, -low * b / 30);
    }
  }
  return least;
}

TEST(KQuants, ErrorIsNearThatOfScalesWithoutAGrid) {
  for (const Format& format : kFormats) {
    const std::vector<float> x = normal(256, 3);
    double least = 0;
    for (std::size_t i = 0; i < x.size(); i += static_cast<std::size_t>(format.size)) least += free_error(format, x.data() + i);
    const double found = squares(there_and_back(format.type, x), x);
    // The grid of Q2_K's scales has 15 steps; where a code has more bits, steps of six bits and of halves as small as these
    // count for more.
    const bool middle = format.type == GgmlType::kQ3_K || format.type == GgmlType::kQ4_K;
    EXPECT_LT(found, least * (middle ? 1.06 : 1.12)) << ggml_type_name(format.type);
    EXPECT_GT(found, least * 0.95) << ggml_type_name(format.type);
  }
}

TEST(KQuants, NoOtherIntegersForTheSameHalvesAreMuchBetter) {
  for (const Format& format : kFormats) {
    const std::vector<float> x = normal(256, 4);
    std::vector<std::byte> block(ggml_bytes(format.type, 256));
    round_to_blocks(format.type, x.data(), 256, nullptr, block.data());
    const auto half_at = [&](std::size_t at) {
      std::uint16_t bits;
      std::memcpy(&bits, block.data() + at, 2);
      return static_cast<double>(f16_to_f32(bits));
    };
    const bool first = format.type == GgmlType::kQ4_K || format.type == GgmlType::kQ5_K;
    const double d = first ? half_at(0) : half_at(format.type == GgmlType::kQ2_K ? 80 : block.size() - 2);
    const double m = first ? half_at(2) : format.type == GgmlType::kQ2_K ? half_at(82) : 0;
    double least = 0;
    for (int from = 0; from < 256; from += format.size) {
      double best = std::numeric_limits<double>::infinity();
      for (int s = format.scale_low; s <= format.scale_high; ++s)
        for (int k = 0; k <= format.minimum_high; ++k) {
          double error = 0;
          for (int i = from; i < from + format.size && error < best; ++i) {
            const double value = static_cast<double>(x[static_cast<std::size_t>(i)]), scale = d * s;
            const double code = scale != 0 ? std::clamp<double>(std::nearbyint((value + m * k) / scale), format.low, format.high) : 0;
            error += std::pow(scale * code - m * k - value, 2);
          }
          best = std::min(best, error);
        }
      least += best;
    }
    const double found = squares(there_and_back(format.type, x), x);
    EXPECT_LT(found, least * 1.05) << ggml_type_name(format.type);
    EXPECT_GT(found, least * 0.999) << ggml_type_name(format.type);
  }
}

TEST(KQuants, WhatABlockHoldsComesBack) {
  for (const GgmlType type : kAll) {
    const std::vector<float> zeros(256, 0.0f);
    EXPECT_EQ(there_and_back(type, zeros), zeros);
    for (const float value : {0.3f, -0.3f, 1.0f, -1000.0f, 2e-4f, -2e-4f}) {
      const std::vector<float> found = there_and_back(type, std::vector<float>(256, value));
      // 2e-4: the halves of Q4_K and Q5_K are so small that they have few digits.
      EXPECT_EQ(found, std::vector<float>(256, found[0]));
      EXPECT_NEAR(found[0], value, (std::fabs(value) < 1e-3f ? 0.01 : 0.001) * std::fabs(value)) << ggml_type_name(type);
    }
    for (const float tiny : {1e-45f, 1e-40f, 1e-20f, 1e-9f, -1e-9f}) {
      for (const float each : there_and_back(type, std::vector<float>(256, tiny))) EXPECT_EQ(each, 0.0f) << tiny;
    }
    // One number among zeros, the largest and the smallest that there can be.
    for (const float value : {60000.0f, -60000.0f, 5e-4f, -5e-4f}) {
      std::vector<float> one(256, 0.0f);
      one[77] = value;
      const std::vector<float> found = there_and_back(type, one);
      EXPECT_NEAR(found[77], value, 0.005 * std::fabs(value)) << ggml_type_name(type);
      EXPECT_LT(squares(found, one), 4e-4 * static_cast<double>(value) * static_cast<double>(value));
    }
  }
  // Codes that mean exactly 0: what was pruned stays so.
  for (const GgmlType type : {GgmlType::kQ3_K, GgmlType::kQ6_K}) {
    std::vector<float> x = normal(512, 9);
    for (std::size_t i = 0; i < x.size(); i += 2) x[i] = 0;
    const std::vector<float> found = there_and_back(type, x);
    for (std::size_t i = 0; i < x.size(); i += 2) EXPECT_EQ(found[i], 0.0f);
  }
}

TEST(KQuants, OneSidedNumbersAndThoseFarFromZeroStayFinite) {
  for (const GgmlType type : kAll) {
    for (const float shift : {5.0f, -5.0f, 0.05f, -0.05f}) {
      std::vector<float> x = normal(256, 12);
      for (float& value : x) value += shift;
      const std::vector<float> found = there_and_back(type, x);
      double power = 0;
      for (const float value : x) power += static_cast<double>(value) * static_cast<double>(value);
      EXPECT_LT(squares(found, x), 0.02 * power) << ggml_type_name(type) << " " << shift;
    }
  }
}

TEST(KQuants, RefusesWhatNoBlockHolds) {
  for (const GgmlType type : kAll) {
    for (const float value : {NAN, INFINITY, -INFINITY, 1e30f}) {
      std::vector<float> x = normal(256, 5);
      x[200] = value;
      const std::string said = error_of([&] { there_and_back(type, x); });
      EXPECT_TRUE(said.starts_with(value == 1e30f ? "1 test" : "3 test") && contains(said, "200")) << said;
    }
  }
}

TEST(KQuants, ImportanceMovesTheError) {
  for (const GgmlType type : kAll) {
    const std::vector<float> x = normal(512, 6);
    std::vector<float> weight(x.size(), 0.25f);
    EXPECT_EQ(there_and_back(type, x, weight.data()), there_and_back(type, x)) << "a common factor is none";
    for (std::size_t i = 0; i < weight.size(); i += 4) weight[i] = 40;
    const std::vector<float> plain = there_and_back(type, x), led = there_and_back(type, x, weight.data());
    double before = 0, after = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      before += static_cast<double>(weight[i]) * std::pow(static_cast<double>(plain[i]) - static_cast<double>(x[i]), 2);
      after += static_cast<double>(weight[i]) * std::pow(static_cast<double>(led[i]) - static_cast<double>(x[i]), 2);
    }
    EXPECT_LT(after, 0.9 * before) << ggml_type_name(type);
    const std::vector<float> none(x.size(), 0.0f);  // an input that never came
    EXPECT_EQ(there_and_back(type, x, none.data()), plain);
  }
}

// One block of a Llama with rows of 256, but for those of `down`; no tokenizer.
void make_model(const fs::path& folder, std::int64_t inner) {
  Json json = Json::parse(R"({"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":256,
    "num_hidden_layers":1,"num_attention_heads":4,"num_key_value_heads":2,"vocab_size":40,"max_position_embeddings":64,
    "rms_norm_eps":1e-05,"rope_theta":10000.0,"hidden_act":"silu","tie_word_embeddings":true,"bos_token_id":1,
    "eos_token_id":2,"torch_dtype":"float32"})");
  json["intermediate_size"] = inner;
  const ModelConfig config = parse_config(json, nullptr, "config.json");
  fs::create_directories(folder);
  CheckpointWriter writer(folder, config, "float32");
  unsigned seed = 1;
  for (const TensorSpec& spec : expected_tensors(config)) {
    std::size_t count = 1;
    for (const std::int64_t size : spec.shape) count *= static_cast<std::size_t>(size);
    writer.put(spec.name, normal(count, ++seed).data());
  }
  writer.finish();
}

void write(const Checkpoint& model, const fs::path& out, const std::string& codec, int threads, bool requantize = false) {
  Context context;
  context.quiet = true;
  context.threads = threads;
  GgufOptions options{out, codec};
  options.requantize = requantize;
  export_gguf(model, plan_gguf(model, options), options, context);
}

bool said(const std::vector<std::string>& notes, const std::string& text) {
  return std::any_of(notes.begin(), notes.end(), [&](const std::string& note) { return contains(note, text); });
}

// Rows of 256 into K blocks, rows of 128 into finer blocks of 32, and the same bytes at any number of threads.
TEST(KQuantsExport, RowsOf256AndOthers) {
  const Scratch scratch("k-quants");
  make_model(scratch / "model", 128);
  const Checkpoint model(scratch / "model");
  struct Row {
    const char *codec, *wide, *narrow;
    std::int64_t file_type;
  };
  for (const Row& row : {Row{"q2_k", "Q2_K", "Q4_0", 10}, Row{"q3_k", "Q3_K", "Q4_0", 11}, Row{"q4_k", "Q4_K", "Q4_1", 14},
                         Row{"q5_k", "Q5_K", "Q5_1", 16}, Row{"q6_k", "Q6_K", "Q8_0", 18}}) {
    const fs::path path = scratch / (std::string(row.codec) + ".gguf"), again = scratch / (std::string(row.codec) + "3");
    write(model, path, row.codec, 1);
    if (row.file_type == 14) {
      write(model, again, row.codec, 3);  // threads
      EXPECT_EQ(read_text(path), read_text(again));
    }
    const GgufFile file(path);
    EXPECT_EQ(ggml_type_name(file.find("token_embd.weight")->type), std::string(row.wide));
    EXPECT_EQ(ggml_type_name(file.find("blk.0.attn_q.weight")->type), std::string(row.wide));
    EXPECT_EQ(ggml_type_name(file.find("blk.0.ffn_down.weight")->type), std::string(row.narrow));
    EXPECT_EQ(ggml_type_name(file.find("blk.0.ffn_norm.weight")->type), std::string("F32"));
    EXPECT_EQ(file.integer("general.file_type"), row.file_type);
    const Checkpoint back = Checkpoint::open(path);  // through pare's reader, rows of q and k in our order again
    for (const TensorSpec& spec : model.tensors()) {
      const std::vector<float> before = model.read_f32(spec.name), after = back.read_f32(spec.name);
      double power = 0;
      for (const float value : before) power += static_cast<double>(value) * static_cast<double>(value);
      EXPECT_LT(squares(before, after), (row.codec[1] == '2' ? 0.1 : 0.035) * power) << row.codec << " " << spec.name;
    }
    GgufOptions options{path, row.codec};
    const std::vector<std::string> notes = plan_gguf(model, options).notes;
    EXPECT_TRUE(said(notes, std::string("1 matrices whose rows are no multiples of 256: stored in ") + row.narrow)) << row.codec;
    options.fallback = false;
    const std::string refused = error_of([&] { plan_gguf(model, options); });
    EXPECT_TRUE(contains(refused, "ffn_down") && contains(refused, row.narrow)) << refused;
  }
}

// Codes stay codes unless asked; what is rounded again is the floats that the codes stand for.
TEST(KQuantsExport, CodesAreRoundedAgainOnlyWhenAsked) {
  const Scratch scratch("k-quants-codes");
  make_model(scratch / "model", 256);
  const Checkpoint model(scratch / "model");
  const std::string coded = "model.layers.0.mlp.up_proj.weight";
  {
    FolderTransaction folder(scratch / "codes");
    CheckpointWriter writer(folder.work(), model.config(), "float32");
    for (const TensorSpec& spec : model.tensors()) {
      if (spec.name == coded)
        writer.put_codes(spec.name, testing::random_codes(Codec::parse("q8", ""), spec.shape[0], spec.shape[1], 3));
      else
        writer.put(spec.name, model.read_f32(spec.name).data());
    }
    writer.finish();
    folder.commit();
  }
  const Checkpoint codes(scratch / "codes");
  write(codes, scratch / "kept.gguf", "q4_k", 1);
  write(codes, scratch / "again.gguf", "q4_k", 1, true);
  write(codes, scratch / "half.gguf", "f16", 1, true);
  write(codes, scratch / "same.gguf", "q8", 1, true);
  const GgufFile kept(scratch / "kept.gguf"), again(scratch / "again.gguf"), half(scratch / "half.gguf");
  EXPECT_EQ(kept.find("blk.0.ffn_up.weight")->type, GgmlType::kQ8_0);
  EXPECT_EQ(kept.find("blk.0.ffn_gate.weight")->type, GgmlType::kQ4_K);
  EXPECT_EQ(again.find("blk.0.ffn_up.weight")->type, GgmlType::kQ4_K);
  EXPECT_EQ(half.find("blk.0.ffn_up.weight")->type, GgmlType::kF16);
  const std::vector<float> values = codes.read_f32(coded);
  EXPECT_EQ(Checkpoint::open(scratch / "kept.gguf").read_f32(coded), values);
  EXPECT_EQ(Checkpoint::open(scratch / "same.gguf").read_f32(coded), values) << "Q8_0 holds q8 as it is";
  EXPECT_EQ(Checkpoint::open(scratch / "again.gguf").read_f32(coded), there_and_back(GgmlType::kQ4_K, values));
  GgufOptions options{"", "q4_k"};
  EXPECT_TRUE(said(plan_gguf(codes, options).notes, "1 matrices of codes: they stay so"));
  options.requantize = true;
  EXPECT_TRUE(said(plan_gguf(codes, options).notes, "1 matrices of codes: rounded again, to Q4_K"));
}

// As llama-imatrix writes it: sums of squares and how many inputs they are of.
void write_imatrix(const fs::path& path, const std::string& name, const std::vector<float>& sums, float count) {
  const auto columns = static_cast<std::int64_t>(sums.size());
  GgufWriter out(path, {{"general.type", std::string("imatrix")}},
                 {{name + ".in_sum2", GgmlType::kF32, {1, columns}}, {name + ".counts", GgmlType::kF32, {1, 1}}});
  out.write(std::as_bytes(std::span(sums)));
  out.write(std::as_bytes(std::span(&count, 1)));
  out.finish();
}

TEST(KQuantsExport, ImportancesAreThoseOfTheFile) {
  const Scratch scratch("k-quants-imatrix");
  make_model(scratch / "model", 256);
  const Checkpoint model(scratch / "model");
  std::vector<float> sums(256, 3.0f);
  for (std::size_t i = 0; i < sums.size(); i += 8) sums[i] = 900;
  const std::string name = "blk.0.ffn_up.weight", ours = "model.layers.0.mlp.up_proj.weight";
  write_imatrix(scratch / "good.gguf", name, sums, 3);
  GgufOptions options{scratch / "out.gguf", "q4_k"};
  options.imatrix = scratch / "good.gguf";
  const GgufPlan plan = plan_gguf(model, options);
  EXPECT_TRUE(said(plan.notes, "7 matrices that --imatrix has no inputs of"));
  Context context;
  context.quiet = true;
  export_gguf(model, plan, options, context);
  for (float& sum : sums) sum /= 3;
  std::vector<float> wanted = model.read_f32(ours), weights;
  for (std::size_t row = 0; row < wanted.size() / 256; ++row) weights.insert(weights.end(), sums.begin(), sums.end());
  wanted = there_and_back(GgmlType::kQ4_K, wanted, weights.data());
  EXPECT_EQ(Checkpoint::open(scratch / "out.gguf").read_f32(ours), wanted);
  EXPECT_NE(wanted, there_and_back(GgmlType::kQ4_K, model.read_f32(ours)));
  const auto refusal = [&](const std::string& file) {
    options.imatrix = scratch / file;
    return error_of([&] { plan_gguf(model, options); });
  };
  write_imatrix(scratch / "short.gguf", name, std::vector<float>(128, 1.0f), 3);
  EXPECT_TRUE(contains(refusal("short.gguf"), "1 x 128")) << refusal("short.gguf");
  sums[0] = 1e3f;
  write_imatrix(scratch / "overflows.gguf", name, sums, 1e-38f);
  EXPECT_TRUE(contains(refusal("overflows.gguf"), "a count of")) << refusal("overflows.gguf");
  sums[7] = NAN;
  write_imatrix(scratch / "nan.gguf", name, sums, 3);
  EXPECT_TRUE(refusal("nan.gguf").starts_with("3 ") && contains(refusal("nan.gguf"), "in_sum2"));
  sums[7] = -1;
  write_imatrix(scratch / "negative.gguf", name, sums, 3);
  EXPECT_TRUE(contains(refusal("negative.gguf"), "at least 0"));
  EXPECT_TRUE(contains(refusal("out.gguf"), "no file of llama-imatrix"));
  testing::write_bytes(scratch / "text.gguf", "what is this");
  EXPECT_TRUE(contains(refusal("text.gguf"), "llama-imatrix"));
  options.codec = "q8";
  EXPECT_TRUE(refusal("good.gguf").starts_with("2 --imatrix"));
  sums[7] = 1;  // no input came: no importances
  write_imatrix(scratch / "never.gguf", name, sums, 0);
  options = {scratch / "never-out.gguf", "q4_k"};
  options.imatrix = scratch / "never.gguf";
  export_gguf(model, plan_gguf(model, options), options, context);
  EXPECT_EQ(Checkpoint::open(options.out).read_f32(ours), there_and_back(GgmlType::kQ4_K, model.read_f32(ours)));
}

TEST(KQuantsExport, ADamagedWeightIsNamedAndLeavesNothing) {
  const Scratch scratch("k-quants-damage");
  make_model(scratch / "model", 256);
  const fs::path weights = scratch / "model" / "model.safetensors";
  std::ptrdiff_t offset = 0;
  {
    const SafetensorsFile file(weights);
    offset = file.find("model.layers.0.mlp.up_proj.weight")->data.data() - file.file().bytes().data();
  }
  std::string bad = read_text(weights);
  const float value = NAN;
  std::memcpy(bad.data() + offset + 4 * 256 * 7, &value, 4);
  write_text(weights, bad);
  const Checkpoint model(scratch / "model");
  const std::string said_ = error_of([&] { write(model, scratch / "out.gguf", "q6_k", 2); });
  EXPECT_TRUE(said_.starts_with("3 tensor model.layers.0.mlp.up_proj.weight, row 7")) << said_;
  EXPECT_FALSE(fs::exists(scratch / "out.gguf"));
}

}  // namespace
}  // namespace pare
