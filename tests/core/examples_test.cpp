// Training examples: which ids of a response, a conversation and a document are learned.
#include "core/examples.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "core/error.h"
#include "tests/scratch.h"

namespace pare {
namespace {

const fs::path kTeacher = fs::path(PARE_SOURCE_DIR) / "examples/teacher";

const Tokenizer& tokenizer() {
  static const Tokenizer one = Tokenizer::from_file(kTeacher / "tokenizer.json");
  return one;
}

std::string learned(const Example& example) {
  std::vector<std::int32_t> ids;
  for (std::size_t i = 0; i < example.ids.size(); ++i)
    if (example.scored[i] != 0) ids.push_back(example.ids[i]);
  return tokenizer().decode(ids, false);
}

ExampleForm form(std::int64_t most) {
  return {.tokenizer = &tokenizer(), .end_id = 0, .most = most};
}

std::vector<Example> of(const Document& document, const ExampleForm& f, ExampleCounts& counts) {
  std::vector<Example> examples;
  add_examples(document, f, examples, counts);
  return examples;
}

TEST(Examples, ConversationsHaveTheMaskOfTransformers) {
  const Json golden = read_json(fs::path(PARE_SOURCE_DIR) / "tests/golden/chat_masks.json");
  const testing::Scratch scratch;
  write_text(scratch.path() / "chat_template.jinja", golden["template"].get<std::string>());
  write_text(scratch.path() / "tokenizer_config.json", R"({"eos_token": "<|endoftext|>"})");
  const auto chat = folder_chat_template(scratch.path());
  ASSERT_TRUE(chat);
  ExampleForm f = form(1000);
  f.chat = &*chat;
  for (const Json& conversation : golden["cases"]) {
    ExampleCounts counts;
    Document document;
    document.messages = conversation["messages"];
    document.place = "chat.jsonl:1";
    auto examples = of(document, f, counts);
    ASSERT_EQ(examples.size(), 1u);
    EXPECT_EQ(Json(examples[0].ids), conversation["ids"]);
    EXPECT_EQ(Json(examples[0].scored), conversation["mask"]);
    EXPECT_EQ(counts.learned, std::count(examples[0].scored.begin(), examples[0].scored.end(), 1));
    f.last_reply_only = true;
    std::string last;
    for (const Json& message : conversation["messages"])
      if (message["role"] == "assistant") last = message["content"].get<std::string>();
    EXPECT_EQ(learned(of(document, f, counts).front()), last + "<|endoftext|>");
    f.last_reply_only = false;
  }
}

TEST(Examples, TemplatesWhosePrefixesAreNoneAreRefusedByPlace) {
  const auto message_of = [](const std::string& jinja, const Json& messages) -> std::string {
    const ChatTemplate chat = ChatTemplate::parse(jinja, "t");
    ExampleForm f = form(100);
    f.chat = &chat;
    Document document;
    document.messages = messages;
    document.place = "chat.jsonl:7";
    ExampleCounts counts;
    try {
      of(document, f, counts);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput);
      return error.place() + " | " + error.hint();
    }
    return "";
  };
  const Json two = {{{"role", "user"}, {"content", "a"}},
                    {{"role", "assistant"}, {"content", "b"}},
                    {{"role", "user"}, {"content", "c"}},
                    {{"role", "assistant"}, {"content", "d"}}};
  const std::string turns = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{{ '\\n' }}{% endfor %}";
  EXPECT_EQ(message_of(turns, two), "");
  EXPECT_NE(message_of(turns + "{% if add_generation_prompt %}{{ 'think' }}{% endif %}", two)
                .find("chat.jsonl:7: messages[1]"),
            std::string::npos);
  // The last reply is written otherwise than earlier ones.
  const std::string last = message_of(
      "{% for m in messages %}{{ m['role'] + m['content'] }}{{ '!' if loop.last and "
      "m['role'] == 'assistant' else '' }}{{ '\\n' }}{% endfor %}",
      two);
  EXPECT_NE(last.find("--replies last"), std::string::npos) << last;
  ExampleCounts counts;
  Document document;
  document.messages = two;
  EXPECT_THROW(of(document, form(100), counts), Error);  // no template
}

TEST(Examples, ResponsesAreLearnedWithTheirEnd) {
  for (const auto& [prompt, response] :
       {std::pair<std::string, std::string>{"Question: why?\nAnswer:", " because it was built"},
        {"The comp", "iler"}}) {
    Document document;
    document.text = prompt + response;
    document.response_begin = prompt.size();
    ExampleCounts counts;
    const auto examples = of(document, form(100), counts);
    ASSERT_EQ(examples.size(), 1u);
    EXPECT_EQ(learned(examples[0]), response + "<|endoftext|>");
    EXPECT_EQ(tokenizer().decode(examples[0].ids, false), document.text + "<|endoftext|>");
    const auto alone = tokenizer().encode(prompt, false, false);  // what a prompt gives when the model is used
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), examples[0].ids.begin()));
  }
}

TEST(Examples, WhatIsTooLongIsCutDroppedOrRefusedAndCounted) {
  Document document;
  document.text = "Question: which one of the targets?\nAnswer: the last one of all the targets that were built";
  document.response_begin = document.text.find(" the last");
  document.place = "a.jsonl:3";
  const auto prompt = tokenizer().encode(document.text.substr(0, document.response_begin), false, false);
  ExampleForm f = form(static_cast<std::int64_t>(prompt.size()) + 3);
  ExampleCounts cut;
  const auto examples = of(document, f, cut);
  ASSERT_EQ(examples.size(), 1u);
  EXPECT_EQ(examples[0].ids.size(), prompt.size() + 3);
  EXPECT_EQ(cut.cut, 1);
  EXPECT_EQ(cut.learned, 3);
  f.most = static_cast<std::int64_t>(prompt.size());  // nothing of the response is left
  ExampleCounts nothing;
  EXPECT_TRUE(of(document, f, nothing).empty());
  EXPECT_EQ(nothing.cut, 0);
  EXPECT_EQ(nothing.dropped, 1);
  f.too_long = TooLong::kDrop;
  EXPECT_TRUE(of(document, f, nothing).empty());
  EXPECT_EQ(nothing.dropped, 2);
  f.too_long = TooLong::kRefuse;
  try {
    of(document, f, nothing);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.place(), "a.jsonl:3");
  }
}

// What lies behind the context costs nothing: the template refuses to render anything but the beginning and the whole.
TEST(Examples, RepliesBehindTheContextAreNotRendered) {
  const ChatTemplate chat = ChatTemplate::parse(
      "{% if messages | length > 6 and messages | length < 40 %}{{ raise_exception('again') }}{% endif %}"
      "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}", "t");
  Document document;
  document.place = "chat.jsonl:2";
  for (int i = 0; i < 40; ++i)
    document.messages.push_back(
        {{"role", i % 2 == 0 ? "user" : "assistant"}, {"content", "number " + std::to_string(i)}});
  ExampleForm f = form(0);
  f.chat = &chat;
  const auto begin = tokenizer().encode("user: number 0\nassistant: number 1\n", false, true);
  f.most = static_cast<std::int64_t>(begin.size());
  ExampleCounts counts;
  const auto examples = of(document, f, counts);
  ASSERT_EQ(examples.size(), 1u);
  EXPECT_EQ(examples[0].ids, begin);
  EXPECT_EQ(learned(examples[0]), "assistant: number 1\n");
  EXPECT_EQ(counts.cut, 1);
  f.too_long = TooLong::kDrop;
  EXPECT_TRUE(of(document, f, counts).empty());
  EXPECT_EQ(counts.dropped, 1);
  f.too_long = TooLong::kRefuse;
  try {
    of(document, f, counts);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.place(), "chat.jsonl:2");
    EXPECT_NE(error.hint().find("--too-long"), std::string::npos);
  }
}

TEST(Examples, LongDocumentsGoOnAndEveryIdIsLearnedOnce) {
  Document document;
  for (int i = 0; i < 40; ++i) document.text += "the target number " + std::to_string(i) + " is built. ";
  auto whole = tokenizer().encode(document.text, false, false);
  whole.push_back(0);
  ExampleCounts counts;
  std::vector<std::int32_t> seen = {whole[0]};
  for (const Example& example : of(document, form(17), counts)) {
    EXPECT_LE(example.ids.size(), 17u);
    EXPECT_EQ(example.ids[0], seen.back());
    for (std::size_t i = 0; i < example.ids.size(); ++i)
      if (example.scored[i] != 0) seen.push_back(example.ids[i]);
  }
  EXPECT_EQ(seen, whole);
  EXPECT_EQ(counts.learned, static_cast<std::int64_t>(whole.size()) - 1);
}

TEST(Examples, BrokenLinesAreNamedByFileAndLine) {
  const testing::Scratch scratch;
  const fs::path file = scratch.path() / "chat.jsonl";
  const auto place_of = [&](const std::string& line, bool conversations = true) -> std::string {
    write_text(file, "{\"prompt\": \"a\", \"response\": \"b\"}\n\n" + line + "\n");
    try {
      read_documents({file}, std::nullopt, conversations);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput) << line;
      return error.place();
    }
    return "";
  };
  const std::string there = file.string() + ":3";
  for (const char* bad :
       {R"({"prompt": "a", "response": ""})", R"({"prompt": "a", "response": " \n"})", R"({"prompt": "a"})",
        R"({"prompt": "a", "response": 3})", R"({"messages": []})", R"({"messages": "a"})", R"({"prompt": )",
        R"({"messages": [{"role": "user", "content": "a"}]})", R"({"messages": [{"role": "user"}]})",
        R"({"messages": [{"role": "assistant", "content": " "}]})", R"({"messages": [{"content": "a"}]})",
        R"({"messages": [{"role": "assistant", "content": ["a"]}]})", R"({"messages": [3]})", "[1]",
        R"({"messages": [{"role": "assistant", "content": "a"}], "text": "b"})"})
    EXPECT_EQ(place_of(bad).substr(0, there.size()), there) << bad;
  EXPECT_EQ(place_of(R"({"messages": [{"role": "assistant", "content": "a"}]})"), "");
  EXPECT_EQ(place_of(R"({"messages": [{"role": "assistant", "content": "a"}]})", false), there);
}

}  // namespace
}  // namespace pare
