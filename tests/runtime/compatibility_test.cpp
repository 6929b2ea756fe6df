// What `plan` says about models whose answers are known from the rules themselves.
#include "runtime/compatibility.h"

#include <gtest/gtest.h>

#include "runtime/round_to_nearest.h"
#include "tests/compress/tiny_model.h"
#include "tests/scratch.h"

namespace pare {
namespace {

using testing::Scratch;
// The model with its blocks' linears in `codec`, but those whose name has `kept` in it.
void write_codes(const fs::path& in, const fs::path& out, const std::string& name, const std::string& kept = "-") {
  const Checkpoint model(in);
  const Codec codec = Codec::parse(name, "test");
  FolderTransaction folder(out);
  CheckpointWriter writer(folder.work(), model.config(), "float32");
  for (const TensorSpec& spec : model.tensors()) {
    const std::vector<float> values = model.read_f32(spec.name);
    if (spec.role == TensorRole::kLinear && spec.name.find(kept) == std::string::npos)
      writer.put_codes(spec.name, round_to_nearest(codec, spec.shape[0], spec.shape[1], values.data(), spec.name));
    else
      writer.put(spec.name, values.data());
  }
  writer.copy_side_files(in);
  writer.finish();
  folder.commit();
}

struct Verdicts {
  explicit Verdicts(const fs::path& model) : rows(compatibility(Checkpoint::open(model))) {}
  const Compatibility& of(const std::string& target) const {
    for (const Compatibility& row : rows)
      if (row.target == target) return row;
    throw std::logic_error("no row " + target);
  }
  std::string answers(const std::string& target) const {
    return std::string(answer_name(of(target).loads)) + " " + answer_name(of(target).fast);
  }
  std::string reasons(const std::string& target) const {
    std::string all;
    for (const std::string& reason : of(target).reasons) all += reason + "\n";
    return all;
  }
  std::vector<Compatibility> rows;
};

TEST(Compatibility, RowsOf128RunEverywhereAndThoseOf64NotInMarlin) {
  const Scratch scratch("compatibility");
  testing::make_tiny_model(scratch / "wide", {.hidden = 128, .intermediate = 256});
  testing::make_tiny_model(scratch / "narrow", {.hidden = 64, .intermediate = 128});
  for (const char* name : {"wide", "narrow"}) write_codes(scratch / name, scratch / (name + std::string("-q4")), "q4");
  const Verdicts wide(scratch / "wide-q4"), narrow(scratch / "narrow-q4");
  for (const Verdicts* each : {&wide, &narrow})
    for (const char* target : {"llama.cpp", "Ollama", "transformers", "vLLM (CPU)", "pare"})
      EXPECT_EQ(each->answers(target), "yes yes") << target;
  EXPECT_EQ(wide.answers("vLLM (Marlin)"), "yes yes");
  EXPECT_EQ(narrow.answers("vLLM (Marlin)"), "perhaps no");
  EXPECT_NE(narrow.reasons("vLLM (Marlin)").find("64 inputs are no multiple of 128"), std::string::npos);
  EXPECT_NE(wide.reasons("Ollama").find("TEMPLATE"), std::string::npos);
  EXPECT_NE(wide.reasons("transformers").find("compressed-tensors"), std::string::npos);
  const Verdicts floats(scratch / "narrow");
  EXPECT_EQ(floats.answers("vLLM (Marlin)"), "yes no");
  EXPECT_NE(floats.reasons("vLLM (Marlin)").find("quantized it would not take"), std::string::npos);
  EXPECT_NE(floats.reasons("llama.cpp").find("K-quants"), std::string::npos);
  EXPECT_EQ(Verdicts(scratch / "wide").answers("vLLM (Marlin)"), "yes perhaps");
}

TEST(Compatibility, CodecsThatOthersDoNotHave) {
  const Scratch scratch("compatibility");
  testing::make_tiny_model(scratch / "in", {.hidden = 128, .intermediate = 256});
  struct Expected {
    const char *codec, *llama, *transformers, *marlin, *cpu;
  };
  for (const Expected& row : {Expected{"q8", "yes yes", "yes yes", "yes yes", "perhaps no"},
                              Expected{"w8a8", "yes yes", "yes yes", "yes yes", "yes yes"},
                              Expected{"q3", "yes yes", "yes yes", "perhaps no", "perhaps no"},
                              Expected{"q4m", "yes yes", "yes no", "yes no", "yes no"}}) {
    const fs::path out = scratch / row.codec;
    write_codes(scratch / "in", out, row.codec);
    const Verdicts found(out);
    EXPECT_EQ(found.answers("llama.cpp"), row.llama) << row.codec;
    EXPECT_EQ(found.answers("transformers"), row.transformers) << row.codec << found.reasons("transformers");
    EXPECT_EQ(found.answers("vLLM (Marlin)"), row.marlin) << row.codec << found.reasons("vLLM (Marlin)");
    EXPECT_EQ(found.answers("vLLM (CPU)"), row.cpu) << row.codec;
  }
  write_codes(scratch / "in", scratch / "mixed", "q4", "k_proj");
  const Verdicts mixed(scratch / "mixed");
  EXPECT_EQ(mixed.answers("vLLM (Marlin)"), "perhaps no");
  EXPECT_NE(mixed.reasons("vLLM (Marlin)").find("different codecs"), std::string::npos);
}

TEST(Compatibility, WhatLlamaCppWouldNotComputeIsRefusedWithItsReason) {
  const Scratch scratch("compatibility");
  testing::make_tiny_model(scratch / "in", {});
  Json tokenizer = read_json(scratch / "in" / "tokenizer.json");
  tokenizer["pre_tokenizer"] = {{"type", "Whitespace"}};
  write_text(scratch / "in" / "tokenizer.json", tokenizer.dump());
  const Verdicts found(scratch / "in");
  EXPECT_EQ(found.answers("llama.cpp"), "no no");
  EXPECT_EQ(found.answers("Ollama"), "no no");
  EXPECT_FALSE(found.reasons("llama.cpp").empty());
  EXPECT_EQ(found.answers("transformers"), "yes yes");
}

}  // namespace
}  // namespace pare
