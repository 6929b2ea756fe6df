#include "core/corpus.h"

#include <algorithm>

#include "core/error.h"

namespace pare {
namespace {

constexpr std::string_view kBlanks = " \t\r\n\f\v";

std::string_view strip(std::string_view text) {
  const std::size_t begin = text.find_first_not_of(kBlanks);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kBlanks) + 1 - begin);
}

std::vector<fs::path> files_of(const std::vector<fs::path>& paths) {
  std::vector<fs::path> files;
  for (const fs::path& path : paths) {
    if (!fs::is_directory(path)) {
      files.push_back(path);
      continue;
    }
    std::vector<fs::path> inside;
    for (const auto& entry : fs::directory_iterator(path)) {
      const std::string extension = entry.path().extension().string();
      if (entry.is_regular_file() && (extension == ".txt" || extension == ".jsonl")) inside.push_back(entry.path());
    }
    if (inside.empty()) throw input_error(path.string(), "a folder with .txt or .jsonl files", "none of them");
    std::sort(inside.begin(), inside.end());
    files.insert(files.end(), inside.begin(), inside.end());
  }
  return files;
}

// Of each message role and content are texts; content may be missing beside tool_calls. What else a message has is the
// template's business.
void check_messages(const Json& messages, const std::string& place) {
  if (!messages.is_array() || messages.empty())
    throw input_error(place, "\"messages\" with at least one message", messages.is_array() ? "none" : messages.type_name());
  bool reply = false;
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const Json& message = messages[i];
    const std::string there = place + ": messages[" + std::to_string(i) + "]";
    if (!message.is_object() || !message.contains("role") || !message["role"].is_string())
      throw input_error(there, "an object with \"role\" and \"content\"", message.is_object() ? "no role" : message.type_name());
    const bool calls = message.contains("tool_calls");
    const bool content = message.contains("content") && !message["content"].is_null();
    if (content ? !message["content"].is_string() : !calls)
      throw input_error(there, "a text in \"content\"", content ? message["content"].type_name() : "none");
    if (message["role"] != "assistant") continue;
    reply = true;
    if (!calls && message["content"].get<std::string>().find_first_not_of(kBlanks) == std::string::npos)
      throw input_error(there, "a reply of the assistant that is not empty", "an empty one", "remove the line");
  }
  if (!reply) throw input_error(place, "a conversation with at least one reply of the assistant", "none");
}

Document parse_line(std::string_view line, const std::string& place, bool conversations) {
  const Json json = parse_json(line, place);
  const std::string form = std::string("an object with \"text\", or with \"prompt\" and \"response\"") +
                           (conversations ? ", or with \"messages\"" : "");
  if (!json.is_object()) throw input_error(place, form, json.type_name());
  const auto text_of = [&](const char* key) -> std::string {
    const auto& value = json.at(key);
    if (!value.is_string()) throw input_error(place, std::string("a text in \"") + key + "\"", value.type_name());
    return value.get<std::string>();
  };
  const bool prompt = json.contains("prompt"), response = json.contains("response");
  Document document;
  document.place = place;
  if (json.contains("messages")) {
    if (!conversations)
      throw input_error(place, form, "a conversation (\"messages\")", "those are for finetune, train and distill");
    if (prompt || response || json.contains("text"))
      throw input_error(place, form, "\"messages\" together with \"text\", \"prompt\" or \"response\"");
    check_messages(json["messages"], place);
    document.messages = json["messages"];
    if (json.contains("tools")) document.tools = json["tools"];
    return document;
  }
  if (json.contains("text")) {
    if (prompt || response) throw input_error(place, form, "\"text\" together with \"prompt\" or \"response\"");
    document.text = text_of("text");
    return document;
  }
  if (!prompt || !response) throw input_error(place, form, "other keys");
  document.text = text_of("prompt");
  document.response_begin = document.text.size();
  document.text += text_of("response");
  if (document.text.find_first_not_of(kBlanks, document.response_begin) == std::string::npos)
    throw input_error(place, "a response that is not empty", "an empty one", "remove the line");
  return document;
}

void read_lines(const fs::path& file, bool conversations, std::vector<Document>& documents) {
  const std::string content = read_text(file);
  const std::string_view text = content;
  std::size_t number = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = strip(text.substr(begin, end - begin));
    ++number;
    begin = end + 1;
    if (line.empty()) continue;
    Document document = parse_line(line, file.string() + ":" + std::to_string(number), conversations);
    if (!document.text.empty() || !document.messages.is_null()) documents.push_back(std::move(document));
  }
}

}  // namespace

std::vector<Document> read_documents(const std::vector<fs::path>& paths, const std::optional<std::string>& split,
                                     bool conversations) {
  if (split && split->empty()) throw usage_error("split", "a text that separates documents", "an empty one");
  std::vector<Document> documents;
  std::string names;
  for (const fs::path& file : files_of(paths)) {
    names += (names.empty() ? "" : ", ") + file.string();
    if (file.extension() == ".jsonl") {
      read_lines(file, conversations, documents);
      continue;
    }
    const std::string content = read_text(file);
    if (!split) {
      if (!content.empty()) documents.push_back({content, 0});
      continue;
    }
    for (std::size_t begin = 0; begin <= content.size();) {
      const std::size_t end = std::min(content.find(*split, begin), content.size());
      const std::string_view piece = strip(std::string_view(content).substr(begin, end - begin));
      if (!piece.empty()) documents.push_back({std::string(piece), 0});
      begin = end + split->size();
    }
  }
  if (documents.empty()) throw input_error(names.empty() ? "text" : names, "at least one document", "no text at all");
  return documents;
}

std::vector<std::int32_t> encode_document(const Tokenizer& tokenizer, const Document& document) {
  std::vector<std::int32_t> ids = tokenizer.prefix_ids();
  const std::vector<std::int32_t> body = tokenizer.encode(document.text, false, false);
  ids.insert(ids.end(), body.begin(), body.end());
  return ids;
}

std::vector<Window> make_windows(const Tokenizer& tokenizer, const std::vector<Document>& documents,
                                 std::int64_t context, bool one_per_document) {
  const std::vector<std::int32_t> prefix = tokenizer.prefix_ids();
  const auto prefix_size = static_cast<std::int64_t>(prefix.size());
  if (context < std::max<std::int64_t>(prefix_size, 1) + 1)
    throw usage_error("context", "at least " + std::to_string(std::max<std::int64_t>(prefix_size, 1) + 1) + " tokens",
                      std::to_string(context));
  std::vector<Window> windows;
  for (std::size_t d = 0; d < documents.size(); ++d) {
    const std::vector<std::int32_t> body = tokenizer.encode(documents[d].text, false, false);
    for (std::size_t begin = 0; begin < body.size();) {
      Window window;
      window.document = static_cast<std::int64_t>(d);
      window.first_scored = std::max<std::int64_t>(prefix_size, 1);
      window.ids = prefix;
      const std::size_t end = std::min(body.size(), begin + static_cast<std::size_t>(context - prefix_size));
      window.ids.insert(window.ids.end(), body.begin() + static_cast<std::ptrdiff_t>(begin),
                        body.begin() + static_cast<std::ptrdiff_t>(end));
      begin = end;
      // A lone token without anything before it predicts nothing.
      if (static_cast<std::int64_t>(window.ids.size()) > window.first_scored) windows.push_back(std::move(window));
      if (one_per_document) break;
    }
  }
  return windows;
}

}  // namespace pare
