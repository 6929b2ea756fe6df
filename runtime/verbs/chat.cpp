// `pare run --chat`: every turn is rendered from the whole conversation, as the model's template asks; what the
// session already holds is not computed again.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <iostream>

#include "core/chat_template.h"
#include "core/error.h"
#include "runtime/verbs/generate.h"

namespace pare {
namespace {

std::tm local_time() {
  const std::time_t seconds = std::time(nullptr);
  std::tm now{};
  localtime_r(&seconds, &now);
  return now;
}

Json message(const char* role, const std::string& content) { return {{"role", role}, {"content", content}}; }

class Chat {
 public:
  Chat(const std::shared_ptr<const Engine>& engine, Sampler& sampler, const Options& options, Context& context)
      : engine_(*engine),
        template_(chat_template(engine_)),
        sampler_(sampler),
        context_(context),
        limit_(options.get<std::int64_t>("tokens")),
        ends_(chat_ends(engine_, template_)) {
    continuation_ = make_continuation(engine, sampler_, ends_, options, context_);
    if (options.has("system")) messages_.push_back(message("system", options.get<std::string>("system")));
  }

  void turn(const std::string& text) {
    messages_.push_back(message("user", text));
    const auto [prompt, ids] = chat_prompt(engine_, template_, messages_);
    const std::int64_t room = engine_.config().max_position_embeddings;
    if (static_cast<std::int64_t>(ids.size()) > room)
      throw input_error("chat", fmt::format("a conversation of at most {} tokens", room),
                        std::to_string(ids.size()), "begin a new one");
    std::size_t reused = held_.size();
    if (reused >= ids.size() || !std::equal(held_.begin(), held_.end(), ids.begin())) {
      continuation_->reset();
      reused = 0;
    }
    StreamDecoder decoder(engine_.tokenizer());
    for (const std::int32_t id : ids) decoder.push(id);
    const Generation made =
        generate(*continuation_, decoder, std::span(ids).subspan(reused), limit_, ends_,
                 [this](const std::string& piece) { print_piece(context_, piece); });
    print_piece(context_, "\n");
    held_ = ids;
    held_.insert(held_.end(), made.ids.begin(), made.ids.begin() + static_cast<std::ptrdiff_t>(made.decoded));
    messages_.push_back(message("assistant", made.text));
    print_speed(made, engine_, context_, fmt::format("{} tokens kept from before", reused));
    turns_.push_back({{"prompt", prompt},
                      {"prompt_ids", ids},
                      {"reused_tokens", reused},
                      {"text", made.text},
                      {"ids", made.ids},
                      {"stop", made.stop}});
    if (!made.counts.is_null()) turns_.back()["ahead"] = made.counts;
  }

  Json result() const { return {{"messages", messages_}, {"turns", turns_}, {"seed", context_.seed}}; }

 private:
  const Engine& engine_;
  const ChatTemplate template_;
  Sampler& sampler_;
  Context& context_;
  std::unique_ptr<Continuation> continuation_;
  const std::int64_t limit_;
  const std::vector<std::int64_t> ends_;
  std::vector<std::int32_t> held_;  // by continuation_
  Json messages_ = Json::array(), turns_ = Json::array();
};

}  // namespace

ChatTemplate chat_template(const Engine& engine) {
  return ChatTemplate::find([&](const std::string& name) { return engine.file().embedded(name); },
                            engine.path().string());
}

std::vector<std::int64_t> chat_ends(const Engine& engine, const ChatTemplate& form) {
  std::vector<std::int64_t> ends = engine.config().eos_ids;
  // Some models end a turn with a token that only the tokenizer's configuration names.
  if (const std::int32_t id = engine.tokenizer().id(form.special_token("eos_token")); id >= 0) ends.push_back(id);
  return ends;
}

ChatPrompt chat_prompt(const Engine& engine, const ChatTemplate& form, const Json& messages) {
  ChatPrompt prompt;
  prompt.text = form.render(messages, true, local_time());
  // The template writes the special tokens itself, the one that begins a text too.
  prompt.ids = engine.tokenizer().encode(prompt.text, false, true);
  if (prompt.ids.empty()) throw input_error("chat", "a conversation that gives at least one token", "none");
  return prompt;
}

Json run_chat(const std::shared_ptr<const Engine>& engine, Sampler& sampler, const Options& options, Context& context) {
  Chat chat(engine, sampler, options, context);
  if (const std::string prompt = options.get<std::string>("prompt"); !prompt.empty()) {
    chat.turn(prompt);
    return chat.result();
  }
  const bool ask = isatty(0) != 0 && !context.quiet;
  if (ask) std::fputs("one line a turn; end with Ctrl-D\n", stderr);
  std::string line;
  while (ask && std::fputs("> ", stderr), std::getline(std::cin, line)) {
    throw_if_interrupted("run", "");
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (!line.empty()) chat.turn(line);
  }
  throw_if_interrupted("run", "");
  if (ask) std::fputs("\n", stderr);
  return chat.result();
}

}  // namespace pare
