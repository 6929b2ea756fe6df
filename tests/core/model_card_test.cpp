#include "core/model_card.h"

#include "core/gguf.h"
#include "core/options.h"
#include "model_folder.h"

namespace pare {
namespace {

using testing::contains;
using testing::Scratch;
using testing::write_bytes;

class ModelCardTest : public ::testing::Test {
 protected:
  fs::path original(const std::string& card) {
    fs::create_directories(scratch_ / "Small-Model");
    write_bytes(scratch_ / "Small-Model/config.json", config_.dump());
    if (!card.empty()) write_bytes(scratch_ / "Small-Model/README.md", card);
    return scratch_ / "Small-Model";
  }
  std::string card(const fs::path& from, const std::string& command, Report figures = {}) {
    const fs::path folder = scratch_ / ("out" + std::to_string(++count_));
    fs::create_directories(folder);
    write_model_card(folder, {from, command, std::move(figures), {}});
    return read_text(folder / "README.md");
  }
  fs::path last() const { return scratch_ / ("out" + std::to_string(count_)); }
  Scratch scratch_;
  Json config_ = Json::object();
  int count_ = 0;
};

TEST_F(ModelCardTest, BaseLicenceStepsAndFigures) {
  config_["_name_or_path"] = "acme/Small-Model";
  const fs::path from = original("---\nlanguage:\n- en\nlicense: \"apache-2.0\"\nlicense_link: LICENSE\n"
                                 "tags:\n- x\n---\n# Theirs\n");
  Report figures;
  figures.add({"quantize", "mean_kl", {}, 0.0123456, "nats/token", 0.0001});
  figures.add({"quantize", "seconds", {}, 99, "s", {}, false});
  figures.add({"quantize", "layer_error", 1, 2, "", {}});
  const std::string text = card(from, "pare quantize --codec q4", figures);
  EXPECT_TRUE(text.starts_with("---\nlicense: \"apache-2.0\"\nlicense_link: \"LICENSE\"\n"
                               "base_model: \"acme/Small-Model\"\nbase_model_relation: quantized\n"
                               "library_name: transformers\n"))
      << text;
  EXPECT_TRUE(contains(text, "# acme/Small-Model\n")) << text;
  EXPECT_TRUE(contains(text, "1. `pare quantize --codec q4`\n")) << text;
  EXPECT_TRUE(contains(text, "| quantize | mean_kl |  | 0.012346 | 0.0001 | nats/token |\n")) << text;
  EXPECT_FALSE(contains(text, "seconds") || contains(text, "layer_error") || contains(text, "Theirs")) << text;
  EXPECT_EQ(card(from, "pare quantize --codec q4", figures), text);
  // A step later: the base is still the original, and both steps are told.
  const std::string next = card(last(), "pare export --to gptq");
  EXPECT_TRUE(contains(next, "license: \"apache-2.0\"\n")) << next;
  EXPECT_TRUE(contains(next, "base_model: \"acme/Small-Model\"\n")) << next;
  EXPECT_TRUE(contains(next, "\n1. `pare quantize --codec q4`\n2. `pare export --to gptq`\n")) << next;
  EXPECT_TRUE(contains(next, "Nothing was measured")) << next;
}

// A search tries more than it writes: what it chose and how close that is, before rows of single blocks.
TEST_F(ModelCardTest, TrialsOfASearchAreNoFigures) {
  Report figures;
  for (int block = 0; block < 60; ++block) {
    const std::string of = " of block " + std::to_string(block);
    figures.add({"prune", "trial: mean_kl with nothing" + of, {}, 1, "nats", {}});
    figures.add({"prune", "neurons" + of, 96, 64, "", {}});
  }
  figures.add({"prune", "blocks", 62, 60, "", {}});
  figures.add({"prune", "parameters", 1000, 900, "parameters", {}});
  figures.add({"prune", "calibration loss", 2, 2.25, "nats/token", 0.125});
  figures.add({"prune", "calibration mean_kl", {}, 0.5, "nats/token", 0.125});
  const std::string text = card(original(""), "pare prune --method shape", figures);
  EXPECT_FALSE(contains(text, "trial") || contains(text, "nothing")) << text;
  EXPECT_TRUE(contains(text, "|---|\n| prune | blocks | 62 | 60 |  |  |\n| prune | parameters | 1000 | 900 |")) << text;
  EXPECT_TRUE(contains(text, "| prune | calibration loss | 2 | 2.25 | 0.125 | nats/token |\n")) << text;
  EXPECT_TRUE(contains(text, "| prune | calibration mean_kl |  | 0.5 | 0.125 | nats/token |\n")) << text;
  EXPECT_TRUE(contains(text, "| prune | neurons of block 0 | 96 | 64 |  |  |\n")) << text;
  EXPECT_TRUE(contains(text, "\n24 further rows are left out.\n")) << text;
}

TEST_F(ModelCardTest, WhatTransformersDoesNotLoadIsSaidSo) {
  Json config = {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"vocab_size", 64},
                 {"hidden_size", 32}, {"intermediate_size", {96, 64}}, {"num_hidden_layers", 2},
                 {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"head_dim", 8},
                 {"max_position_embeddings", 64}, {"hidden_act", "silu"}};
  for (const bool own : {true, false})
    for (const char* inside : {"", "model"}) {  // a folder of pare compress has the model in one of its own
      if (!own) config["intermediate_size"] = 96;
      const fs::path folder = scratch_ / ("widths" + std::to_string(own) + inside);
      fs::create_directories(folder / inside);
      write_bytes((folder / inside / "config.json").string(), config.dump());
      write_model_card(folder, {original(""), "pare prune --per-layer", {}, {}});
      const std::string text = read_text(folder / "README.md");
      EXPECT_EQ(contains(text, "library_name: transformers\n"), !own) << text;
      EXPECT_EQ(contains(text, "library_name: pare\n"), own) << text;
      EXPECT_EQ(contains(text, "transformers does not: blocks of different widths: intermediate_size"), own) << text;
    }
}

TEST_F(ModelCardTest, WhatIsNotKnownIsNotMadeUp) {
  const std::string text = card(original(""), "pare prune --method wanda");
  EXPECT_TRUE(contains(text, "base_model: \"Small-Model\"\nbase_model_relation: finetune\n")) << text;
  EXPECT_TRUE(contains(text, "states no licence")) << text;
  EXPECT_FALSE(contains(text, "license:")) << text;
  const std::string fresh = card("", "pare train --config c.json");
  EXPECT_FALSE(contains(fresh, "base_model")) << fresh;
  config_["_name_or_path"] = "/home/somebody/model";
  EXPECT_TRUE(contains(card(original(""), "pare prune"), "base_model: \"Small-Model\"\n"));
}

TEST_F(ModelCardTest, FilesSayWhereTheyComeFrom) {
  GgufWriter writer(scratch_ / "x.gguf",
                    {{"general.license", std::string("mit")},
                     {"general.license.name", std::string("MIT")},
                     {"general.base_model.0.name", std::string("acme/Base")}},
                    {});
  writer.finish();
  const std::string text = card(scratch_ / "x.gguf", "pare export --to folder");
  EXPECT_TRUE(text.starts_with("---\nlicense: \"mit\"\nlicense_name: \"MIT\"\nbase_model: \"acme/Base\"\n")) << text;
}

// What another's card says stays text: it closes no comment, front matter or code.
TEST_F(ModelCardTest, HostileCardsAreText) {
  const std::string own = "<!-- pare: {\"base\":\"a\\n---\\nlicense: mit\",\"steps\":[\"`x`\\n# Free -> <b>\"]} -->";
  const std::string text = card(original("---\nlicense: mit\r\x01\xff\n---\n" + own), "pare quantize");
  EXPECT_FALSE(contains(text, "\nlicense: mit")) << text;
  EXPECT_FALSE(contains(text, "\n# Free") || contains(text, "\r")) << text;
  EXPECT_TRUE(contains(text, "1. `'x' # Free -  <b `\n2. `pare quantize`\n")) << text;
  for (const char* broken : {"<!-- pare: ", "<!-- pare: {} -->", "<!-- pare: [[[ -->", "---\nlicense", "---\n---\n"})
    EXPECT_TRUE(contains(card(original(broken), "pare quantize"), "1. `pare quantize`\n")) << broken;
}

TEST_F(ModelCardTest, CommandsAreThoseThatWereGiven) {
  const std::vector<OptionDecl> declared = {
      {.name = "codec", .help = "", .default_value = "q4"},
      {.name = "text", .type = OptionType::kTextList, .help = ""},
      {.name = "samples", .type = OptionType::kInteger, .help = "", .default_value = 128},
      {.name = "fisher", .type = OptionType::kFlag, .help = "", .default_value = false},
      {.name = "out", .type = OptionType::kPath, .help = ""}};
  const Options options(declared, {{"codec", "q4"}, {"text", {"/home/me/novels", "b.txt"}}, {"samples", 64},
                                   {"fisher", true}, {"out", "/tmp/x"}}, "test");
  const std::string command = command_of("quantize", options);
  EXPECT_TRUE(command.starts_with("pare quantize ")) << command;
  EXPECT_TRUE(contains(command, "--text novels b.txt") && contains(command, "--samples 64") &&
              contains(command, "--fisher")) << command;
  EXPECT_FALSE(contains(command, "--codec") || contains(command, "--out") || contains(command, "/")) << command;
}

}  // namespace
}  // namespace pare
