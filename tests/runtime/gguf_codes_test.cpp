// Codes that go into GGUF blocks: several tensors in one, and what a reader finds again.
#include <gtest/gtest.h>

#include "core/error.h"
#include "runtime/gguf_export.h"
#include "tests/core/model_folder.h"
#include "tests/runtime/round_trips.h"

namespace pare {
namespace {

using testing::contains;
using testing::error_of;
using testing::Scratch;

// A GPT-2 of one block, whose q, k and v are one tensor there, in these codecs.
void write_gpt2(const fs::path& folder, const std::vector<std::string>& qkv) {
  const Json json = Json::parse(R"({"architectures":["GPT2LMHeadModel"],"model_type":"gpt2","n_embd":64,"n_inner":128,
    "n_layer":1,"n_head":4,"n_positions":32,"vocab_size":40,"layer_norm_epsilon":1e-05,"eos_token_id":2})");
  const ModelConfig config = parse_config(json, nullptr, "config.json");
  fs::create_directories(folder);
  CheckpointWriter writer(folder, config, "float32");
  for (const TensorSpec& spec : expected_tensors(config)) {
    std::string codec;
    if (spec.name.ends_with("q_proj.weight")) codec = qkv[0];
    if (spec.name.ends_with("k_proj.weight")) codec = qkv[1];
    if (spec.name.ends_with("v_proj.weight")) codec = qkv[2];
    if (codec.empty())
      writer.put(spec.name, testing::values_of(spec).data());
    else
      writer.put_codes(spec.name, testing::random_codes(Codec::parse(codec, ""), spec.shape[0], spec.shape[1], 3));
  }
  writer.finish();
}

std::vector<std::string> notes_of(const Checkpoint& model, bool fallback, bool requantize = false) {
  GgufOptions options;
  options.fallback = fallback;
  options.requantize = requantize;
  return plan_gguf(model, options).notes;
}

bool said(const std::vector<std::string>& notes, const std::string& text) {
  return std::any_of(notes.begin(), notes.end(), [&](const std::string& note) { return contains(note, text); });
}

TEST(GgufCodes, EveryPartOfATensorIsLookedAt) {
  const Scratch scratch("gguf-parts");
  const std::string rounded = "zero x scale is no half";
  write_gpt2(scratch / "rounded", {"q4m", "q4m", "q4a"});
  const Checkpoint model(scratch / "rounded");
  EXPECT_TRUE(contains(error_of([&] { notes_of(model, false); }), rounded));
  EXPECT_TRUE(said(notes_of(model, true), rounded));
  EXPECT_TRUE(said(notes_of(model, true, true), "1 matrices of q4a"));
  testing::write_gguf_file(model, scratch / "rounded.gguf");  // in F32
  const Checkpoint back = Checkpoint::open(scratch / "rounded.gguf");
  for (const TensorSpec& spec : model.tensors()) EXPECT_EQ(back.read_f32(spec.name), model.read_f32(spec.name));
  write_gpt2(scratch / "narrow", {"q4", "q4", "q3"});
  EXPECT_TRUE(said(notes_of(Checkpoint(scratch / "narrow"), false), "1 matrices of 3 or 2 bits"));
  write_gpt2(scratch / "inputs", {"q8c", "w8a8", "q8c"});
  EXPECT_TRUE(said(notes_of(Checkpoint(scratch / "inputs"), false), "1 matrices of w8a8"));
  write_gpt2(scratch / "exact", {"q4m", "q4m", "q4m"});
  const std::vector<std::string> notes = notes_of(Checkpoint(scratch / "exact"), false);
  EXPECT_EQ(notes.size(), 1u) << notes[0];  // there is no tokenizer
}

}  // namespace
}  // namespace pare
