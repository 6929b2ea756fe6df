#include "core/model_card.h"

#include "core/gguf.h"
#include "core/notices.h"
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
  // `config`: of the result.
  std::string card(const fs::path& from, const std::string& command, Report figures = {}, const Json& config = {}) {
    const fs::path folder = scratch_ / ("out" + std::to_string(++count_));
    fs::create_directories(folder);
    if (!config.is_null()) write_bytes(folder / "config.json", config.dump());
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
  const Json codes = {{"quantization_config", {{"quant_method", "compressed-tensors"}}}};
  const std::string text = card(from, "pare quantize --codec q4", figures, codes);
  EXPECT_TRUE(text.starts_with("---\nlicense: \"apache-2.0\"\nlicense_link: \"LICENSE\"\n"
                               "base_model: \"acme/Small-Model\"\nbase_model_relation: quantized\n"
                               "library_name: transformers\n"))
      << text;
  EXPECT_TRUE(contains(text, "# acme/Small-Model\n")) << text;
  EXPECT_TRUE(contains(text, "1. `pare quantize --codec q4`\n")) << text;
  EXPECT_TRUE(contains(text, "| quantize | mean_kl |  | 0.012346 | 0.0001 | nats/token |\n")) << text;
  EXPECT_FALSE(contains(text, "seconds") || contains(text, "layer_error") || contains(text, "Theirs")) << text;
  EXPECT_EQ(card(from, "pare quantize --codec q4", figures, codes), text);
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

// Whatever the last command was: what the file holds decides, and a conversion is no fine-tune.
TEST_F(ModelCardTest, TheRelationIsThatOfTheWeights) {
  const fs::path from = original("");
  const Json codes = {{"quantization_config", {{"quant_method", "gptq"}}}};
  EXPECT_FALSE(contains(card(from, "pare export --to folder", {}, Json::object()), "base_model_relation"));
  EXPECT_TRUE(contains(card(from, "pare export --to gptq", {}, codes), "base_model_relation: quantized\n"));
  EXPECT_TRUE(contains(card(from, "pare compress r.yaml", {}, Json::object()), "base_model_relation: finetune\n"));
  card(from, "pare prune --method wanda", {}, Json::object());
  EXPECT_TRUE(contains(card(last(), "pare export --to folder", {}, Json::object()), "base_model_relation: finetune\n"));
}

TEST_F(ModelCardTest, FilesSayWhereTheyComeFrom) {
  const auto written = [&](const std::vector<std::pair<std::string, std::string>>& keys) {
    std::vector<std::pair<std::string, GgufValue>> pairs(keys.begin(), keys.end());
    fs::remove(scratch_ / "x.gguf");
    GgufWriter writer(scratch_ / "x.gguf", pairs, {});
    writer.finish();
    return card(scratch_ / "x.gguf", "pare export --to folder");
  };
  // general.base_model of others is what their model was tuned from, not this model.
  const std::string text = written({{"general.license", "mit"},
                                    {"general.license.name", "MIT"},
                                    {"general.name", "Base Tuned"},
                                    {"general.base_model.0.name", "acme/Base"}});
  EXPECT_TRUE(text.starts_with("---\nlicense: \"mit\"\nlicense_name: \"MIT\"\nbase_model: \"Base Tuned\"\n")) << text;
  EXPECT_TRUE(contains(written({{"general.basename", "Tuned"}}), "base_model: \"Tuned\"\n"));
  EXPECT_TRUE(contains(written({{"general.base_model.0.name", "acme/Base"}}), "base_model: \"acme/Base\"\n"));
  EXPECT_TRUE(contains(written({}), "base_model: \"x.gguf\"\n"));
  // In ours general.name is the folder's.
  EXPECT_TRUE(contains(written({{"general.name", "out"}, {"pare.base_model", "acme/Base"}}),
                       "base_model: \"acme/Base\"\n"));
}

TEST_F(ModelCardTest, SnapshotsOfACacheHaveTheirNames) {
  const fs::path snapshot = scratch_ / "models--acme--Small-Model/snapshots/0123abc";
  fs::create_directories(snapshot);
  EXPECT_EQ(origin_of(snapshot).base, "acme/Small-Model");
  EXPECT_EQ(origin_of(snapshot / "").base, "acme/Small-Model");
  write_bytes(snapshot / "config.json", R"({"_name_or_path": "acme/Parent"})");  // of whoever saved it
  EXPECT_EQ(origin_of(snapshot).base, "acme/Small-Model");
  fs::create_directories(scratch_ / "models--gpt2/snapshots/f");
  EXPECT_EQ(origin_of(scratch_ / "models--gpt2/snapshots/f").base, "gpt2");
}

TEST_F(ModelCardTest, LicencesAreReadAsTheyAreWritten) {
  using Said = std::vector<std::pair<std::string, std::string>>;
  const auto said = [&](const std::string& text) { return origin_of(original(text)).licence; };
  const Said mit = {{"license", "mit"}};
  for (const char* text : {"---\nlicense: mit\n---\n", "---\r\ntags:\r\n- x\r\nlicense: mit\r\n---\r\n",
                           "\xef\xbb\xbf---\nlicense: mit\n---\n", "---\nlicense: mit # free\n---\n",
                           "---\nlicense: 'mit' # \"free\"\n---\n", "---\nlicense: mit\nlicense: gpl\n---\n"})
    EXPECT_EQ(said(text), mit) << text;
  EXPECT_EQ(said("---\nlicense: other\nlicense_name: \"a \\\"b\\\" # c\"\nlicense_link: x#y\n---\n"),
            (Said{{"license", "other"}, {"license_name", "a \"b\" # c"}, {"license_link", "x#y"}}));
  for (const char* text : {"---\nlicense: |\n  mit\n---\n", "---\nlicense: >-\n  mit\n---\n",
                           "---\nlicense: &a mit\n---\n",
                           "---\nlicense: *a\n---\n", "---\nlicense:\n---\n", "---\nlicense: # mit\n---\n",
                           "---\nlicense: \"mit\n---\n", "license: mit\n"})
    EXPECT_TRUE(said(text).empty()) << text;
}

// What another's card says stays text: it closes no comment, front matter or code.
TEST_F(ModelCardTest, HostileCardsAreText) {
  const std::string own = "<!-- pare: {\"base\":\"a\\n---\\nlicense: mit\",\"steps\":[\"`x`\\n# Free -> <b>\","
                          "\"\\u003c!-- pare: --\\u003e\"]} -->";
  const std::string text = card(original("---\nlicense: mit\r\x01\xff\n---\n" + own), "pare quantize");
  EXPECT_FALSE(contains(text, "\nlicense: mit")) << text;
  EXPECT_FALSE(contains(text, "\n# Free") || contains(text, "\r")) << text;
  EXPECT_TRUE(contains(text, "1. `` `x` # Free -> <b> ``\n2. `<!-- pare: -->`\n3. `pare quantize`\n")) << text;
  EXPECT_TRUE(contains(card(last(), "pare export"), "3. `pare quantize`\n4. `pare export`\n"));
  for (const char* broken : {"<!-- pare: ", "<!-- pare: {} -->", "<!-- pare: [[[ -->", "---\nlicense", "---\n---\n"})
    EXPECT_TRUE(contains(card(original(broken), "pare quantize"), "1. `pare quantize`\n")) << broken;
}

// Somebody's file, linked to under the name of a licence, is not published.
TEST_F(ModelCardTest, LinksOutOfTheFolderAreNotFollowed) {
  const fs::path from = original("");
  write_bytes(scratch_ / "secret", "---\nlicense: secret\n---\n");
  fs::create_symlink("../secret", from / "README.md");
  fs::create_symlink(scratch_ / "secret", from / "NOTICE");
  write_bytes(from / "LICENSE.txt", std::string((1 << 20) + 1, 'x'));
  write_bytes(from / "MIT", "free");
  fs::create_symlink("MIT", from / "LICENSE.md");
  EXPECT_TRUE(origin_of(from).licence.empty());
  EXPECT_EQ(read_notice(from, "README.md"), std::nullopt);
  EXPECT_EQ(read_notice(from, "NOTICE"), std::nullopt);
  EXPECT_EQ(notice_obstacle(from, "NOTICE"), "a link that leaves the folder");
  EXPECT_EQ(notice_obstacle(from, "LICENSE.txt"), "more than 1 MiB");
  EXPECT_EQ(read_notice(from, "LICENSE.md"), "free");
  const std::string text = card(from, "pare export");
  EXPECT_TRUE(contains(text, "NOTICE is a link that leaves the folder, and was not taken along")) << text;
  // A cache keeps the bytes beside its snapshots.
  const fs::path cache = scratch_ / "models--acme--M";
  fs::create_directories(cache / "snapshots/c");
  fs::create_directories(cache / "blobs");
  write_bytes(cache / "blobs/1", "---\nlicense: mit\n---\n");
  fs::create_symlink("../../blobs/1", cache / "snapshots/c/README.md");
  fs::create_symlink("../../../secret", cache / "snapshots/c/LICENSE");
  EXPECT_EQ(origin_of(cache / "snapshots/c").licence.size(), 1u);
  EXPECT_EQ(read_notice(cache / "snapshots/c", "LICENSE"), std::nullopt);
}

TEST_F(ModelCardTest, CommandsAreThoseThatWereGiven) {
  const std::vector<OptionDecl> declared = {
      {.name = "codec", .help = "", .default_value = "q4"},
      {.name = "text", .type = OptionType::kTextList, .help = ""},
      {.name = "samples", .type = OptionType::kInteger, .help = "", .default_value = 128},
      {.name = "fisher", .type = OptionType::kFlag, .help = "", .default_value = false},
      {.name = "split", .help = ""},
      {.name = "teacher", .type = OptionType::kPath, .help = ""},
      {.name = "shuffle", .type = OptionType::kFlag, .help = "", .default_value = true},
      {.name = "out", .type = OptionType::kPath, .help = ""}};
  const Options options(declared, {{"codec", "q4"}, {"text", {"/home/me/novels", "b.txt"}}, {"samples", 64},
                                   {"fisher", true}, {"out", "/tmp/x"}, {"shuffle", false}}, "test");
  const std::string command = command_of("quantize", options);
  EXPECT_TRUE(command.starts_with("pare quantize ")) << command;
  EXPECT_TRUE(contains(command, "--text novels b.txt") && contains(command, "--samples 64") &&
              contains(command, "--fisher") && contains(command, "--no-shuffle")) << command;
  EXPECT_FALSE(contains(command, "--codec") || contains(command, "--out") || contains(command, "/")) << command;
  const auto given = [&](const Json& values) { return command_of("train", Options(declared, values, "test")); };
  EXPECT_EQ(given({{"split", "</s>"}}), "pare train --split '</s>'");
  EXPECT_EQ(given({{"split", "it's `$x`"}}), "pare train --split 'it'\\''s `$x`'");
  EXPECT_EQ(given({{"split", "'\n\x01\\"}}), "pare train --split $'\\'\\n\\x01\\\\'");
  EXPECT_EQ(given({{"split", ""}}), "pare train --split ''");
  EXPECT_EQ(given({{"teacher", "/data/My Model/"}}), "pare train --teacher 'My Model'");
  EXPECT_EQ(given({{"teacher", "/c/models--acme--M/snapshots/1"}}), "pare train --teacher acme/M");
}

}  // namespace
}  // namespace pare
