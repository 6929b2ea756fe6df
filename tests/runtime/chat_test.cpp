// `pare run --chat`: template, tokens, turns and what a session keeps between them.
#include <gtest/gtest.h>

#include <iostream>
#include <sstream>

#include "core/error.h"
#include "runtime/verbs/cli.h"
#include "tests/runtime/tiny_model.h"

namespace pare {
namespace {

using namespace pare::testing;

constexpr const char* kChatMl =
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

// Lines for std::cin while it lives.
struct Typed {
  explicit Typed(const std::string& text) : stream(text), before(std::cin.rdbuf(stream.rdbuf())) {}
  ~Typed() {
    std::cin.rdbuf(before);
    std::cin.clear();
  }
  std::istringstream stream;
  std::streambuf* before;
};

class ChatTest : public ::testing::Test {
 protected:
  // A tokenizer that puts <|begin|> before every text, as Llama's does.
  static std::string tokenizer() {
    TokenizerTraining training;
    training.vocab_size = 284;
    training.special_tokens = {"<|begin|>", "<|im_start|>", "<|im_end|>"};
    Json json = Json::parse(train_tokenizer({"once upon a time there was a time"}, training));
    json["post_processor"] = Json::parse(R"({"type": "TemplateProcessing",
      "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
      "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
      "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}}})");
    return json.dump();
  }
  fs::path write(const Json& chat_template) {
    const fs::path path = scratch_.path / ("m" + std::to_string(files_++) + ".pare");
    const Json config = {{"bos_token", "<|begin|>"}, {"eos_token", "<|im_end|>"}, {"chat_template", chat_template}};
    write_tiny_model(path, tiny_config("llama", 32, 64, 4, 2, 8, 284, true), {CodecKind::kQ8, 32}, 5,
                     {{"tokenizer.json", tokenizer()}, {"tokenizer_config.json", config.dump()}});
    return path;
  }
  static Json call(const fs::path& path, Json given) {
    given["model"] = path.string();
    Progress progress(true);
    Context context;
    context.json = context.quiet = true;
    context.threads = 1;
    context.progress = &progress;
    const Command command = run_command();
    return command.run(Options(command.options, given, "test"), context);
  }
  static std::string error_of(const fs::path& path, const Json& given) {
    try {
      call(path, given);
    } catch (const Error& problem) {
      return problem.what();
    }
    return "no error";
  }
  ScratchFolder scratch_;
  int files_ = 0;
};

TEST_F(ChatTest, OneMessageIsRenderedAndBeginsOnce) {
  const Json run = call(write(kChatMl), {{"chat", true}, {"prompt", "a time"}, {"system", "once"}, {"tokens", 8}});
  ASSERT_EQ(run.at("turns").size(), 1u);
  const Json& turn = run.at("turns").at(0);
  EXPECT_EQ(turn.at("prompt"), "<|begin|><|im_start|>system\nonce<|im_end|>\n<|im_start|>user\na time<|im_end|>\n"
                               "<|im_start|>assistant\n");
  const auto ids = turn.at("prompt_ids").get<std::vector<int>>();
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 0), 1);  // <|begin|>
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 1), 3);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 2), 2);
  EXPECT_EQ(turn.at("ids").size(), 8u);
  EXPECT_EQ(run.at("messages").size(), 3u);
  EXPECT_EQ(run.at("messages").at(2).at("role"), "assistant");
  EXPECT_EQ(run.at("messages").at(2).at("content"), turn.at("text"));
}

// The second turn continues on what the session holds and gives what a run over the whole text gives.
TEST_F(ChatTest, LinesAreTurnsOfOneConversation) {
  const fs::path path = write("{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}[a]");
  Json run;
  {
    const Typed typed("once upon\n\na time\n");
    run = call(path, {{"chat", true}, {"tokens", 6}, {"act", "float"}});
  }
  ASSERT_EQ(run.at("turns").size(), 2u);
  EXPECT_EQ(run.at("messages").size(), 4u);
  const Json &first = run.at("turns").at(0), &second = run.at("turns").at(1);
  EXPECT_EQ(first.at("prompt"), "[u]once upon[a]");
  EXPECT_EQ(second.at("prompt"), "[u]once upon[a]" + first.at("text").get<std::string>() + "[u]a time[a]");
  EXPECT_EQ(first.at("reused_tokens"), 0);
  const fs::path plain = write("{{ messages[-1].content }}");  // renders just the message: the text as it stands
  const Json again = call(plain, {{"chat", true}, {"prompt", second.at("prompt")}, {"tokens", 6}, {"act", "float"}});
  EXPECT_EQ(again.at("turns").at(0).at("prompt_ids"), second.at("prompt_ids"));
  EXPECT_EQ(again.at("turns").at(0).at("ids"), second.at("ids"));
}

TEST_F(ChatTest, TheSessionKeepsWhatTheTemplateRepeats) {
  const fs::path path = write("{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content }}{% endfor %}");
  Json run;
  {
    const Typed typed("once\ntime\n");
    run = call(path, {{"chat", true}, {"tokens", 0}});
  }
  const Json& second = run.at("turns").at(1);
  EXPECT_EQ(second.at("reused_tokens"), run.at("turns").at(0).at("prompt_ids").size());
  EXPECT_GT(second.at("reused_tokens"), 0);
  // A template that changes what stands before is computed from the start.
  const Typed typed("once\ntime\n");
  run = call(write("{{ messages|length }}{{ messages[-1].content }}"), {{"chat", true}, {"tokens", 2}});
  EXPECT_EQ(run.at("turns").at(1).at("reused_tokens"), 0);
}

TEST_F(ChatTest, GuessesChangeNothing) {
  const fs::path path = write(kChatMl);
  const auto talk = [&](Json given) {
    const Typed typed("once upon\na time\nthere\n");
    given.update({{"chat", true}, {"tokens", 20}});
    return call(path, given).at("turns");
  };
  const Json plain = talk({});
  ASSERT_EQ(plain.size(), 3u);
  for (const Json& more : {Json{{"draft", write(kChatMl).string()}}, Json{{"lookup", 3}}}) {
    const Json turns = talk(more);
    ASSERT_EQ(turns.size(), 3u);
    for (std::size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(turns.at(i).at("ids"), plain.at(i).at("ids")) << more << ", turn " << i;
      EXPECT_EQ(turns.at(i).at("reused_tokens"), plain.at(i).at("reused_tokens"));
      EXPECT_EQ(turns.at(i).at("ahead").at("tokens"), 19);
    }
  }
}

TEST_F(ChatTest, EndsAtTheEndOfATurn) {
  // Token 2 is <|im_end|>: the end token of this model, and of its tokenizer's configuration.
  const fs::path path = write(kChatMl);
  bool stopped = false;
  for (int i = 0; i < 60 && !stopped; ++i) {
    const Json run = call(path, {{"chat", true}, {"prompt", std::string(static_cast<std::size_t>(i + 1), 'a')},
                                 {"tokens", 150}});
    const Json& turn = run.at("turns").at(0);
    for (const Json& id : turn.at("ids")) EXPECT_NE(id, 2);
    stopped = turn.at("stop") == "eos";
  }
  EXPECT_TRUE(stopped);
}

TEST_F(ChatTest, RefusalsSayWhatIsMissing) {
  const fs::path path = write(kChatMl), none = write(nullptr);
  EXPECT_NE(error_of(none, {{"chat", true}, {"prompt", "a"}}).find("expected a chat template"), std::string::npos);
  EXPECT_NE(error_of(path, {{"system", "s"}, {"prompt", "a"}}).find("system"), std::string::npos);
  EXPECT_NE(error_of(path, {{"chat", true}, {"ignore-eos", true}, {"prompt", "a"}}).find("ignore-eos"),
            std::string::npos);
  EXPECT_NE(error_of(path, {{"chat", true}, {"prompt", std::string(4000, 'a')}}).find("a conversation of at most"),
            std::string::npos);
  const fs::path strict = write("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x");
  EXPECT_NE(error_of(strict, {{"chat", true}, {"system", "s"}, {"prompt", "a"}}).find("no system"), std::string::npos);
}

}  // namespace
}  // namespace pare
