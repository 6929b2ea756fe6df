#include "core/chat_template.h"

#include "core/error.h"
#include "core/template/syntax.h"

namespace pare {

namespace chat {
struct Program {
  Body body;
  std::string place;
  Pairs special_tokens;
};
}  // namespace chat

namespace {

// The tokens that transformers hands to a template: texts, or AddedToken objects with their text in "content".
// Older models name them in special_tokens_map.json only.
chat::Pairs special_tokens(const Json& config, const Json& map) {
  chat::Pairs out;
  for (const char* name :
       {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}) {
    for (const Json* source : {&config, &map}) {
      if (!source->contains(name)) continue;
      const Json& token = (*source)[name];
      const Json& text = token.is_object() && token.contains("content") ? token["content"] : token;
      if (!text.is_string()) continue;
      out.emplace_back(name, chat::from_json(text));
      break;
    }
  }
  return out;
}

using FileText = std::function<std::optional<std::string>(const std::string&)>;

Json json_file(const FileText& file, const std::string& name, const std::string& place) {
  const auto text = file(name);
  Json json = text ? parse_json(*text, place + ": " + name) : Json::object();
  if (!json.is_object()) throw input_error(place + ": " + name, "a JSON object", json.type_name());
  return json;
}

std::string named_template(const Json& list, const std::string& place) {
  std::string names;
  for (const Json& entry : list) {
    const bool sound = entry.is_object() && entry.contains("name") && entry["name"].is_string() &&
                       entry.contains("template") && entry["template"].is_string();
    if (!sound)
      throw input_error(place, "templates with a name and a template, both texts", entry.dump().substr(0, 80));
    if (entry["name"] == "default") return entry["template"].get<std::string>();
    names += (names.empty() ? "" : ", ") + entry["name"].get<std::string>();
  }
  throw input_error(place, "a template named default", names.empty() ? "an empty list" : names);
}

}  // namespace

std::optional<ChatTemplate::Source> ChatTemplate::source(const FileText& file, const std::string& place) {
  if (auto text = file("chat_template.jinja")) return Source{std::move(*text), place + ": chat_template.jinja"};
  const Json config = json_file(file, "tokenizer_config.json", place);
  if (!config.contains("chat_template") || config["chat_template"].is_null()) return std::nullopt;
  const Json& given = config["chat_template"];
  const std::string there = place + ": tokenizer_config.json: chat_template";
  if (given.is_string()) return Source{given.get<std::string>(), there};
  if (given.is_array()) return Source{named_template(given, there), there};
  throw input_error(there, "a text or a list of named templates", given.type_name());
}

ChatTemplate ChatTemplate::find(const FileText& file, const std::string& place) {
  const std::optional<Source> found = source(file, place);
  if (!found)
    throw input_error(place, "a chat template (chat_template.jinja, or chat_template in tokenizer_config.json)", "none",
                      "models that were not tuned for chat have none; run it without --chat");
  auto program = std::make_shared<chat::Program>();
  program->body = chat::parse(found->text, found->place);
  program->place = found->place;
  program->special_tokens = special_tokens(json_file(file, "tokenizer_config.json", place),
                                           json_file(file, "special_tokens_map.json", place));
  ChatTemplate out;
  out.program_ = std::move(program);
  return out;
}

ChatTemplate ChatTemplate::parse(std::string_view source, const std::string& place) {
  auto program = std::make_shared<chat::Program>();
  program->body = chat::parse(source, place);
  program->place = place;
  ChatTemplate out;
  out.program_ = std::move(program);
  return out;
}

std::string ChatTemplate::special_token(std::string_view name) const {
  for (const auto& [known, value] : program_->special_tokens)
    if (known == name) return value.bytes();
  return {};
}

std::string ChatTemplate::render(const Json& messages, bool add_generation_prompt, const std::tm& now,
                                 const Json& more) const {
  chat::Pairs variables = program_->special_tokens;
  try {
    chat::Budget budget;
    chat::put(variables, "messages", chat::from_json(messages), budget);
    chat::put(variables, "tools", chat::Value::none(), budget);
    chat::put(variables, "documents", chat::Value::none(), budget);
    chat::put(variables, "add_generation_prompt", chat::Value::boolean(add_generation_prompt), budget);
    for (const auto& [name, value] : more.items()) chat::put(variables, name, chat::from_json(value), budget);
  } catch (const chat::Fault& fault) {
    throw input_error(program_->place, "a conversation that can be rendered", fault.message, fault.hint);
  }
  return chat::run(program_->body, variables, now, program_->place);
}

}  // namespace pare
