#include "core/examples.h"

#include <algorithm>

#include "core/error.h"

namespace pare {
namespace {

using Ids = std::vector<std::int32_t>;

bool begins_with(const Ids& whole, const Ids& prefix) {
  return prefix.size() <= whole.size() && std::equal(prefix.begin(), prefix.end(), whole.begin());
}

Example of_response(const Document& document, const ExampleForm& form) {
  const Tokenizer& tokenizer = *form.tokenizer;
  const Ids prompt = encode_document(tokenizer, {document.text.substr(0, document.response_begin), 0});
  Example example{encode_document(tokenizer, {document.text, 0}), {}};
  if (!begins_with(example.ids, prompt) || example.ids.size() == prompt.size()) {
    example.ids = prompt;
    const Ids response = tokenizer.encode(std::string_view(document.text).substr(document.response_begin),
                                          /*add_special=*/false, /*parse_special=*/false);
    example.ids.insert(example.ids.end(), response.begin(), response.end());
  }
  example.scored.assign(prompt.size(), 0);
  example.ids.push_back(form.end_id);
  example.scored.resize(example.ids.size(), 1);
  return example;
}

std::tm repeatable_date() {
  std::tm date{};
  date.tm_year = 124;
  date.tm_mon = 6;
  date.tm_mday = 26;
  date.tm_wday = 5;
  date.tm_yday = 207;
  return date;
}

Example of_conversation(const Document& document, const ExampleForm& form) {
  if (form.chat == nullptr)
    throw input_error(document.place, "a model folder with a chat template for conversations", "none",
                      "add chat_template.jinja to the folder, or write prompt and response");
  const auto encoded = [&](const Json& messages, bool generation_prompt) {
    Json more = Json::object();
    if (!document.tools.is_null()) more["tools"] = document.tools;
    try {
      return form.tokenizer->encode(form.chat->render(messages, generation_prompt, repeatable_date(), more), false,
                                    true);
    } catch (const Error& error) {
      throw input_error(document.place + ": " + error.place(), error.expected(), error.found());
    }
  };
  const Json& messages = document.messages;
  Example example{encoded(messages, false), {}};
  example.scored.assign(example.ids.size(), 0);
  const auto most = static_cast<std::size_t>(form.most);
  if (form.too_long != TooLong::kCut && example.ids.size() > most) return example;  // whatever its replies are
  std::size_t first = 0;
  if (form.last_reply_only)
    for (std::size_t i = 0; i < messages.size(); ++i)
      if (messages[i]["role"] == "assistant") first = i;
  Json so_far(messages.begin(), messages.begin() + static_cast<std::ptrdiff_t>(first));
  std::size_t reached = 0;  // ids that the last rendering had
  for (std::size_t i = first; i < messages.size() && reached < most; so_far.push_back(messages[i++])) {
    if (messages[i]["role"] != "assistant") continue;
    const Ids prefix = encoded(so_far, true);
    const std::string there = document.place + ": messages[" + std::to_string(i) + "]";
    if (!begins_with(example.ids, prefix))
      throw input_error(there, "a conversation that begins with its own messages before this reply, as ids",
                        "a template that writes them otherwise",
                        "a template may need another form of its generation prompt");
    reached = prefix.size();
    if (reached >= most) break;  // cut off
    const auto until_here = [&] {
      Json with = so_far;
      with.push_back(messages[i]);
      return encoded(with, false);
    };
    const Ids until = i + 1 == messages.size() ? example.ids : until_here();
    if (!begins_with(example.ids, until))
      throw input_error(there, "a conversation that begins with its own messages up to this reply, as ids",
                        "a template that writes earlier replies otherwise than the last one",
                        "learn from the last reply alone (--replies last), with a line for each reply");
    if (until.size() <= prefix.size()) throw input_error(there, "a reply of at least one id", "none");
    std::fill(example.scored.begin() + static_cast<std::ptrdiff_t>(prefix.size()),
              example.scored.begin() + static_cast<std::ptrdiff_t>(until.size()), std::uint8_t{1});
    reached = until.size();
  }
  return example;
}

}  // namespace

void add_examples(const Document& document, const ExampleForm& form, std::vector<Example>& examples,
                  ExampleCounts& counts) {
  const auto most = static_cast<std::size_t>(form.most);
  const auto add = [&](Example example) {
    if (!example.scored.empty()) example.scored[0] = 0;
    const auto learned = std::count(example.scored.begin(), example.scored.end(), std::uint8_t{1});
    if (learned == 0) {
      ++counts.dropped;
      return;
    }
    counts.learned += learned;
    examples.push_back(std::move(example));
  };
  ++counts.documents;
  if (document.messages.is_null() && document.response_begin == 0) {
    Ids ids = encode_document(*form.tokenizer, document);
    ids.push_back(form.end_id);
    const std::size_t prefix = form.tokenizer->prefix_ids().size();
    for (std::size_t begin = 0; begin + 1 < ids.size(); begin += most - 1) {
      const std::size_t end = std::min(ids.size(), begin + most);
      Example example{
          Ids(ids.begin() + static_cast<std::ptrdiff_t>(begin), ids.begin() + static_cast<std::ptrdiff_t>(end)),
          std::vector<std::uint8_t>(end - begin, 1)};
      if (begin == 0) std::fill_n(example.scored.begin(), std::min(prefix, example.scored.size()), std::uint8_t{0});
      add(std::move(example));
    }
    return;
  }
  Example example = document.messages.is_null() ? of_response(document, form) : of_conversation(document, form);
  if (example.ids.size() > most) {
    if (form.too_long == TooLong::kRefuse)
      throw input_error(document.place, "at most " + std::to_string(most) + " tokens (--context and one)",
                        std::to_string(example.ids.size()), "raise --context, or --too-long cut or drop");
    if (form.too_long == TooLong::kDrop) {
      ++counts.dropped;
      return;
    }
    ++counts.cut;
    example.ids.resize(most);
    example.scored.resize(most);
    if (std::find(example.scored.begin(), example.scored.end(), std::uint8_t{1}) == example.scored.end()) --counts.cut;
  }
  add(std::move(example));
}

std::optional<ChatTemplate> folder_chat_template(const fs::path& folder) {
  const auto file = [&](const std::string& name) -> std::optional<std::string> {
    if (!fs::exists(folder / name)) return std::nullopt;
    return read_text(folder / name);
  };
  if (!ChatTemplate::source(file, folder.string())) return std::nullopt;
  return ChatTemplate::find(file, folder.string());
}

}  // namespace pare
