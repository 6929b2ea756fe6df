#include "compress/recipe.h"

#include <gtest/gtest.h>

#include "compress/yaml.h"
#include "core/error.h"
#include "fake_tools.h"

namespace pare {
namespace {

using testing::FakeTools;

const Json kFolders = {{"model", "/m"}, {"out", "/o"}};

Recipe parse(const std::string& yaml, const Json& flags = kFolders) {
  FakeTools fake;
  return parse_recipe(yaml, "r.yaml", "/recipes", flags, fake.toolbox().stages);
}

std::string complaint(const std::string& yaml, const Json& flags = kFolders) {
  try {
    parse(yaml, flags);
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    return e.what();
  }
  return "accepted";
}

void expect_contains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "'" << part << "' is not in: " << text;
}

TEST(Recipe, WithoutAFileIsOneQuantizeStage) {
  const Recipe r = parse("");
  ASSERT_EQ(r.stages.size(), 1u);
  EXPECT_EQ(r.stages[0].name, "quantize");
  EXPECT_EQ(r.text("model"), "/m");
  EXPECT_EQ(r.text("device"), "cpu");
  EXPECT_EQ(r.exporting["codec"], "keep");
  EXPECT_TRUE(r.require["mean-kl"].is_null());
}

TEST(Recipe, StagesInOrderWithTypedOptions) {
  const Recipe r = parse(
      "stages:\n  - prune: {sparsity: 0.25}\n  - quantize\n  - quantize:\n      group-size: 64\n      codec: q8\n");
  ASSERT_EQ(r.stages.size(), 3u);
  EXPECT_EQ(r.stages[0].given, Json({{"sparsity", 0.25}}));
  EXPECT_EQ(r.stages[1].given, Json::object());
  EXPECT_EQ(r.stages[2].given, Json({{"group-size", 64}, {"codec", "q8"}}));
  EXPECT_EQ(r.stages[2].place, "r.yaml:4: stages[2] (quantize)");
}

TEST(Recipe, EmptyStagesMeansExportAlone) { EXPECT_TRUE(parse("stages: []").stages.empty()); }

TEST(Recipe, JsonIsYaml) {
  EXPECT_EQ(parse(R"({"seed": 4, "stages": [{"prune": {"sparsity": 0.5}}]})").stages[0].name, "prune");
}

TEST(Recipe, PathsAreRelativeToTheRecipeAndFlagsToHere) {
  const Recipe r = parse("model: ../models/a\ntext: [x.txt, /abs/y.txt]\neval: {text: z.txt}", {{"out", "here"}});
  EXPECT_EQ(r.text("model"), "/models/a");
  EXPECT_EQ(r.run["text"], Json({"/recipes/x.txt", "/abs/y.txt"}));
  EXPECT_EQ(r.evaluation["text"], Json::array({"/recipes/z.txt"}));
  EXPECT_EQ(r.text("out"), (fs::current_path() / "here").string());
  OptionDecl held_out;
  held_out.name = "held-out";
  held_out.type = OptionType::kTextList;
  EXPECT_TRUE(is_path_option(held_out));
}

TEST(Recipe, FlagsOverRecipeOverDefaults) {
  const std::string yaml =
      "seed: 3\nmodel: /in-recipe\nrequire: {mean-kl: 0.5, bytes: 100}\nstages: [{quantize: {codec: q8}}]";
  Json flags = {{"out", "/o"}, {"model", nullptr}, {"text", Json::array()}, {"eval-final-only", false}};
  Recipe r = parse(yaml, flags);
  EXPECT_EQ(r.text("model"), "/in-recipe");
  EXPECT_EQ(r.run["seed"], 3);
  EXPECT_EQ(r.run["samples"], 64);
  flags = {{"out", "/o"}, {"model", "/flag"}, {"seed", 9}, {"require-mean-kl", 0.25}, {"eval-context", 64},
           {"set", {"quantize.codec=q4a", "quantize.group-size=128"}}};
  r = parse(yaml, flags);
  EXPECT_EQ(r.text("model"), "/flag");
  EXPECT_EQ(r.run["seed"], 9);
  EXPECT_EQ(r.require["mean-kl"], 0.25);
  EXPECT_EQ(r.require["bytes"], 100);
  EXPECT_EQ(r.evaluation["context"], 64);
  EXPECT_EQ(r.stages[0].given, Json({{"codec", "q4a"}, {"group-size", 128}}));
}

TEST(Recipe, EveryRecipeKeyIsAFlag) {
  std::vector<std::string> names;
  for (const auto& d : recipe_flags()) names.push_back(d.name);
  for (const char* name :
       {"recipe", "model", "out", "text", "eval-text", "require-mean-kl", "require-top1", "export-codec", "set"})
    EXPECT_NE(std::find(names.begin(), names.end(), name), names.end()) << name;
  for (const auto& d : recipe_flags()) EXPECT_TRUE(d.default_value.is_null() || d.default_value == false) << d.name;
}

TEST(Recipe, UnknownKeysNameLineAndNearest) {
  expect_contains(complaint("seed: 1\nstagse: []\n"),
                  "r.yaml:2: unknown key 'stagse' in the recipe; did you mean 'stages'?");
  expect_contains(complaint("eval:\n  contxt: 5"), "r.yaml:2: unknown key 'contxt' in 'eval'; did you mean 'context'?");
  expect_contains(complaint("stages:\n  - prune:\n      sparsty: 0.5"),
                  "r.yaml:3: unknown key 'sparsty' in stages[0] (prune); did you mean 'sparsity'?");
  expect_contains(complaint("stages: [quantise]"), "r.yaml:1: unknown stage 'quantise'; did you mean 'quantize'?");
  expect_contains(complaint("stages: [{prune: {model: /x}}]"), "unknown key 'model'");
}

TEST(Recipe, AllProblemsAtOnce) {
  const std::string text =
      complaint("sead: 1\nstages:\n  - prune: {sparsity: much}\n  - quantize: {codec: q5, group-size: 0}\n");
  expect_contains(text, "4 problems");
  expect_contains(text, "r.yaml:1: unknown key 'sead'");
  expect_contains(text, "r.yaml:3");
  expect_contains(text, "r.yaml:4");
  expect_contains(text, "q5");
}

TEST(Recipe, RequiredFoldersAreAskedFor) {
  const std::string text = complaint("", Json::object());
  expect_contains(text, "model");
  expect_contains(text, "out");
}

TEST(Recipe, ValuesOfTheWrongKind) {
  expect_contains(complaint("stages: 4"), "'stages' is a list");
  expect_contains(complaint("- a\n- b"), "a recipe is a mapping");
  expect_contains(complaint("device: [cpu]"), "takes one value");
  expect_contains(complaint("device: {a: b}"), "takes a value");
  expect_contains(complaint("eval: 3"), "is a mapping");
  expect_contains(complaint("stages:\n - {prune: {}, quantize: {}}"), "one stage name");
  expect_contains(complaint("seed: \"3\""), "whole number");
  expect_contains(complaint("seed: 3.5"), "whole number");
  expect_contains(complaint("require: {top1: 95}"), "at most 1");
  expect_contains(complaint("", {{"model", "/m"}, {"out", "/o"}, {"set", {"prune.sparsity=1"}}}), "no stage 'prune'");
  expect_contains(complaint("", {{"model", "/m"}, {"out", "/o"}, {"set", {"quantize.codek=q4"}}}),
                  "did you mean 'codec'?");
  expect_contains(complaint("", {{"model", "/m"}, {"out", "/o"}, {"set", {"quantize"}}}), "STAGE.KEY=VALUE");
}

TEST(Recipe, TextThatLooksLikeANumberStaysText) {
  EXPECT_EQ(parse("split: 12").run["split"], "12");
  EXPECT_EQ(parse("split: true").run["split"], "true");
}

TEST(Recipe, EchoReadsBackAsTheSameRecipe) {
  const Recipe a = parse(
      "seed: 3\ntext: [x.txt]\nsplit: \"a: #\\n'\\\"\"\neval: {context: 64, final-only: true}\n"
      "require: {mean-kl: 0.1, bytes: 12345678901}\nstages: [{prune: {sparsity: 0.3333333333333333}}, quantize]");
  const Recipe b =
      parse_recipe(emit_recipe(a, {"header"}), "r.yaml", "/elsewhere", Json::object(), FakeTools().toolbox().stages);
  EXPECT_EQ(a.run, b.run);
  EXPECT_EQ(a.evaluation, b.evaluation);
  EXPECT_EQ(a.exporting, b.exporting);
  EXPECT_EQ(a.require, b.require);
  ASSERT_EQ(a.stages.size(), b.stages.size());
  for (std::size_t i = 0; i < a.stages.size(); ++i) EXPECT_EQ(a.stages[i].given, b.stages[i].given);
}

TEST(Yaml, SyntaxErrorsNameTheLine) {
  expect_contains(complaint("seed: 1\nstages: [a, b\n"), "r.yaml:");
  expect_contains(complaint("a: 1\na: 2"), "r.yaml:2: expected every key once, found key 'a' twice");
  expect_contains(complaint("seed: 1\n---\nseed: 2\n"), "one YAML document");
  expect_contains(complaint(std::string("seed: 1\0", 8)), "zero byte");
  expect_contains(complaint("[a]: 1"), "a key that is a word");
  expect_contains(complaint("seed: !python/object 3"), "without tags");
}

TEST(Yaml, AliasBombIsRefusedQuickly) {
  std::string bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 12; ++i) {
    const std::string prev = "*a" + std::to_string(i - 1);
    bomb += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [";
    for (int j = 0; j < 10; ++j) bomb += (j ? ", " : "") + prev;
    bomb += "]\n";
  }
  expect_contains(complaint(bomb), "at most 20,000 values");
}

TEST(Yaml, CyclesAndDepthAreRefused) {
  expect_contains(complaint("a: &a [*a]"), "r.yaml:1");
  expect_contains(complaint(std::string(2000, '[') + std::string(2000, ']')), "r.yaml");
  expect_contains(complaint("a: " + std::string(40, '[') + std::string(40, ']')), "nesting of at most 32 levels");
}

TEST(Yaml, SizeLimit) { expect_contains(complaint("# " + std::string((1 << 20) + 1, 'x')), "at most 1 MiB"); }

TEST(Yaml, EveryPrefixOfARecipeIsReadOrRefused) {
  const std::string yaml =
      "model: m\nstages:\n  - prune: {sparsity: 0.5, codec: \"q4\"}\n  - quantize: &q {codec: q8}\nrequire: {top1: "
      "0.5}\n";
  for (std::size_t n = 0; n <= yaml.size(); ++n) {
    try {
      parse(yaml.substr(0, n));
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kUsage);
    }
  }
}

}  // namespace
}  // namespace pare
