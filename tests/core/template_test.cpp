#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <map>

#include "core/chat_template.h"
#include "core/error.h"
#include "model_folder.h"
#include "tests/chat_moment.h"

namespace pare {
namespace {

using testing::chat_moment;
using testing::contains;
using testing::error_of;

const Json& golden() {
  static const Json json = read_json(fs::path(PARE_SOURCE_DIR) / "tests/golden/chat.json");
  return json;
}
std::string render(const std::string& source, const Json& variables = Json::object()) {
  return ChatTemplate::parse(source, "t.jinja")
      .render(variables.value("messages", Json::array()), variables.value("add_generation_prompt", false), chat_moment(),
              variables);
}
std::string refusal(const std::string& source, const Json& variables = Json::object()) {
  return error_of([&] { render(source, variables); });
}

TEST(ChatTemplate, FamiliesAreRenderedAsTransformersRendersThem) {
  std::int64_t texts = 0, errors = 0;
  ASSERT_EQ(golden()["families"].size(), 8u);
  for (const auto& [family, row] : golden()["families"].items()) {
    const ChatTemplate chat = ChatTemplate::parse(row["template"].get<std::string>(), family);
    for (const auto& [conversation, answers] : row["cases"].items()) {
      for (std::size_t i = 0; i < answers.size(); ++i) {
        Json variables = golden()["special"];
        variables.update(golden()["variants"][i]);
        const Json& messages = golden()["conversations"][conversation];
        const Json& wanted = row["texts"][answers[i].get<std::size_t>()];
        const auto run = [&] {
          return chat.render(messages, variables["add_generation_prompt"].get<bool>(), chat_moment(), variables);
        };
        if (wanted.is_null()) {
          ++errors;
          EXPECT_THROW(run(), Error) << family << ", " << conversation << ", variant " << i;
        } else {
          ++texts;
          EXPECT_EQ(run(), wanted.get<std::string>()) << family << ", " << conversation << ", variant " << i;
        }
      }
    }
  }
  EXPECT_GT(texts, 500);
  EXPECT_GT(errors, 100);
}

TEST(ChatTemplate, EveryConstructIsRenderedAsTransformersRendersIt) {
  Json variables = golden()["special"];
  variables.update(golden()["data"]);
  ASSERT_GE(golden()["snippets"].size(), 110u);
  for (const Json& snippet : golden()["snippets"]) {
    const std::string source = snippet[0].get<std::string>();
    if (snippet[1].is_null()) {
      EXPECT_THROW(render(source, variables), Error) << source;
      continue;
    }
    std::string text;
    EXPECT_NO_THROW(text = render(source, variables)) << source;
    EXPECT_EQ(text, snippet[1].get<std::string>()) << source;
  }
}

TEST(ChatTemplate, WhatIsNotSupportedIsRefused) {
  Json variables = golden()["data"];
  for (const Json& source : golden()["refused"])
    EXPECT_THROW(render(source.get<std::string>(), variables), Error) << source;
}

TEST(ChatTemplate, ErrorsNamePlaceLineAndCause) {
  EXPECT_TRUE(contains(refusal("a\n{{ 1 +\n\n }}"), "t.jinja: line 4: expected an expression, found }}"));
  EXPECT_TRUE(contains(refusal("\n\n{{ 'x' + 1 }}"),
                       "t.jinja: line 3: expected a template that runs, found 'str' + 'int'"));
  EXPECT_TRUE(contains(refusal("\n{{ raise_exception('roles!') }}"),
                       "t.jinja: line 2: expected a conversation that the template accepts, found roles!"));
  EXPECT_TRUE(contains(refusal("{{ x|trimm }}"), "the nearest known one is trim"));
  EXPECT_TRUE(contains(refusal("{% include 'secrets' %}"), "line 1: expected one of the tags if, for, set"));
  EXPECT_TRUE(contains(refusal("{% for x in y %}\n\n"), "line 2: expected {% endfor %}, found the end"));
  EXPECT_TRUE(contains(refusal("{{ missing.name }}"), "'missing' is undefined"));
  EXPECT_TRUE(contains(refusal("\xff"), "UTF-8"));
}

TEST(ChatTemplate, NothingRunsOrGrowsWithoutBound) {
  const auto start = std::chrono::steady_clock::now();
  const std::string nested = "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}";
  EXPECT_TRUE(contains(refusal(nested), "steps"));
  EXPECT_TRUE(contains(refusal("{% set ns = namespace(s='x') %}{% for i in range(100) %}{% set ns.s = ns.s ~ ns.s %}"
                               "{% endfor %}"), "a text of more than 16 MiB"));
  EXPECT_TRUE(contains(refusal("{% set ns = namespace(l=[1]) %}{% for i in range(100) %}{% set ns.l = ns.l + ns.l %}"
                               "{% endfor %}"), "a list of more than"));
  EXPECT_TRUE(contains(refusal("{% set ns = namespace(l=[]) %}{% for i in range(1000) %}{% set ns.l = [ns.l] %}"
                               "{% endfor %}"), "nested more than 100 deep"));
  EXPECT_TRUE(contains(refusal("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), "recursion deeper than"));
  EXPECT_TRUE(contains(refusal("{{ 'xxxxxxxx' * 9000000000000000000 }}"), "a text of more than 16 MiB"));
  EXPECT_TRUE(contains(refusal("{{ 'x'.replace('', 'y' * 16000000) }}"), "a text of more than 16 MiB"));
  EXPECT_TRUE(contains(refusal("{{ 9223372036854775807 + 1 }}"), "64 bits"));
  EXPECT_TRUE(contains(refusal("{{ " + std::string(100000, '(') + "1" + std::string(100000, ')') + " }}"), "nesting"));
  EXPECT_TRUE(contains(refusal("{{ x" + std::string(100000, ' ') + std::string(5000, '.') + "a }}"), "expected"));
  std::string chain = "{{ 1";
  for (int i = 0; i < 100000; ++i) chain += "+1";
  EXPECT_TRUE(contains(refusal(chain + " }}"), "levels"));
  std::string blocks;
  for (int i = 0; i < 50000; ++i) blocks += "{% if 1 %}";
  EXPECT_TRUE(contains(refusal(blocks), "nesting"));
  EXPECT_TRUE(contains(refusal(std::string((1 << 20) + 1, 'x')), "at most 1 MiB"));
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 20);
}

// A namespace that holds itself must not outlive the run (the sanitizer's leak check sees it).
TEST(ChatTemplate, NamespacesMayHoldThemselves) {
  EXPECT_EQ(render("{% set ns = namespace() %}{% set ns.me = ns %}{{ ns.me.me.me is defined }}"), "True");
  EXPECT_TRUE(contains(refusal("{% set ns = namespace() %}{% set ns.me = ns %}{{ ns }}"), "cannot be printed"));
}

std::function<std::optional<std::string>(const std::string&)> files(std::map<std::string, std::string> held) {
  return [held](const std::string& name) -> std::optional<std::string> {
    const auto found = held.find(name);
    return found == held.end() ? std::nullopt : std::optional(found->second);
  };
}

TEST(ChatTemplate, IsFoundInTheFilesOfAModel) {
  const Json one = Json::array({{{"role", "user"}, {"content", "hi"}}});
  const auto rendered = [&](std::map<std::string, std::string> held) {
    return ChatTemplate::find(files(std::move(held)), "m").render(one, true, chat_moment());
  };
  const std::string config = R"({"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>",
    "pad_token": null, "chat_template":
    "config {{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ messages[0].content }}"})";
  EXPECT_EQ(rendered({{"tokenizer_config.json", config}}), "config <s></s>Falsehi");
  // The file of its own wins, as in transformers; tokens still come from tokenizer_config.json.
  EXPECT_EQ(rendered({{"tokenizer_config.json", config}, {"chat_template.jinja", "file {{ bos_token }}\n"}}),
            "file <s>");
  EXPECT_EQ(rendered({{"tokenizer_config.json", R"({"chat_template": [{"name": "tool_use", "template": "t"},
    {"name": "default", "template": "d{{ add_generation_prompt }}"}]})"}}), "dTrue");

  EXPECT_EQ(rendered({{"special_tokens_map.json", R"({"bos_token": "<b>", "eos_token": {"content": "<e>"}})"},
                      {"tokenizer_config.json", R"({"eos_token": "<E>"})"},
                      {"chat_template.jinja", "{{ bos_token }}{{ eos_token }}"}}), "<b><E>");
  EXPECT_EQ(ChatTemplate::find(files({{"tokenizer_config.json", config}}), "m").special_token("bos_token"), "<s>");
  EXPECT_EQ(ChatTemplate::find(files({{"tokenizer_config.json", config}}), "m").special_token("unk_token"), "");

  const auto refused = [&](std::map<std::string, std::string> held) {
    return error_of([&] { rendered(std::move(held)); });
  };
  EXPECT_TRUE(contains(refused({}), "expected a chat template"));
  EXPECT_TRUE(contains(refused({{"tokenizer_config.json", "{}"}}), "expected a chat template"));
  EXPECT_TRUE(contains(refused({{"tokenizer_config.json", R"({"chat_template": null})"}}), "expected a chat template"));
  EXPECT_TRUE(contains(refused({{"tokenizer_config.json", R"({"chat_template": 5})"}}), "a text or a list"));
  EXPECT_TRUE(contains(refused({{"tokenizer_config.json", R"({"chat_template": [{"name": "rag", "template": "x"}]})"}}),
                       "a template named default, found rag"));
  EXPECT_TRUE(contains(refused({{"tokenizer_config.json", "[]"}}), "a JSON object"));
  EXPECT_TRUE(contains(refused({{"tokenizer_config.json", R"({"chat_template": "{{ x"})"}}), "chat_template: line 1"));
}

}  // namespace
}  // namespace pare
