// Chat templates: the Jinja of a model's tokenizer files, rendered as transformers renders it by a strict interpreter
// of the subset that published templates use. It reads no files, calls nothing outside itself, and steps, sizes and
// recursion are bounded; what it does not know it refuses.
#pragma once

#include <ctime>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "core/json.h"

namespace pare {

namespace chat {
struct Program;
}

class ChatTemplate {
 public:
  // The template of a model: chat_template.jinja, else `chat_template` of tokenizer_config.json (a text, or a list of
  // named ones, of which "default" is taken). `file` gives the text of one of the model's files, or nothing.
  // Errors: exit 3, no template, a broken one, or one that needs what is not supported (place, line, construct).
  static ChatTemplate find(const std::function<std::optional<std::string>(const std::string&)>& file,
                           const std::string& place);
  static ChatTemplate parse(std::string_view source, const std::string& place);
  // The text that find() takes and the place it stands at; nothing where the model has no template.
  struct Source {
    std::string text, place;
  };
  static std::optional<Source> source(const std::function<std::optional<std::string>(const std::string&)>& file,
                                      const std::string& place);

  // messages: [{"role", "content", ...}]; `more` adds or replaces variables (bos_token, tools, enable_thinking, ...).
  // `now`: what strftime_now() prints. Errors: exit 3 with the line of the template, also where the template itself
  // refuses the conversation (raise_exception).
  std::string render(const Json& messages, bool add_generation_prompt, const std::tm& now,
                     const Json& more = Json::object()) const;

  std::string special_token(std::string_view name) const;  // "bos_token" and the like; "" where the model has none

 private:
  std::shared_ptr<const chat::Program> program_;
};

}  // namespace pare
