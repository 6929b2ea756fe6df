#include "runtime/serve/request.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/options.h"
#include "runtime/verbs/generate.h"

namespace pare::serve {
namespace {

constexpr std::size_t kMostStops = 16, kMostPrompts = 2048;
constexpr int kMostAlternatives = 20;
constexpr std::int64_t kMostScores = std::int64_t{1} << 22;  // of an answer that is not streamed: it is held whole

ApiError wrong(const std::string& field, const std::string& expected, const Json& found) {
  std::string text = found.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return {400, fmt::format("{}: expected {}, found {}", field, expected, text), field};
}

// One object of a body. Null stands for a field that is left out.
class Fields {
 public:
  Fields(const Json& body, std::string place, const std::vector<std::string>& known)
      : body_(body), place_(std::move(place)) {
    if (!body.is_object())
      throw ApiError(400, fmt::format("{}: expected a JSON object, found {}", place_.empty() ? "body" : place_,
                                      body.type_name()), place_);
    for (const auto& [key, value] : body.items()) {
      if (std::find(known.begin(), known.end(), key) != known.end()) continue;
      const std::string near = nearest_name(key, known);
      const std::string hint = near.empty() ? "" : "; did you mean " + near + "?";
      throw ApiError(400, fmt::format("{}: no such field{}", field(key), hint), field(key), "unknown_field");
    }
  }

  std::string field(const std::string& key) const { return place_.empty() ? key : place_ + "." + key; }
  const Json* find(const char* key) const {
    const auto it = body_.find(key);
    return it == body_.end() || it->is_null() ? nullptr : &*it;
  }
  bool flag(const char* key, bool otherwise) const {
    const Json* value = find(key);
    if (value != nullptr && !value->is_boolean()) throw wrong(field(key), "true or false", *value);
    return value == nullptr ? otherwise : value->get<bool>();
  }
  double number(const char* key, double otherwise, double low, double high) const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    const double given = value->is_number() ? value->get<double>() : NAN;
    if (!(given >= low && given <= high))
      throw wrong(field(key), fmt::format("a number from {} to {}", low, high), *value);
    return given;
  }
  std::int64_t integer(const char* key, std::int64_t otherwise, std::int64_t low, std::int64_t high) const {
    const Json* value = find(key);
    return value == nullptr ? otherwise : integer_of(*value, field(key), low, high);
  }
  static std::int64_t integer_of(const Json& value, const std::string& place, std::int64_t low, std::int64_t high) {
    const bool fits =
        value.is_number_integer() && !(value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX);
    const std::int64_t given = fits ? value.get<std::int64_t>() : 0;
    if (!fits || given < low || given > high)
      throw wrong(place, high == INT64_MAX ? fmt::format("a whole number from {}", low)
                                           : fmt::format("a whole number from {} to {}", low, high), value);
    return given;
  }
  std::string text(const char* key, const char* otherwise) const {
    const Json* value = find(key);
    if (value != nullptr && !value->is_string()) throw wrong(field(key), "a text", *value);
    return value == nullptr ? otherwise : value->get<std::string>();
  }
  // A field of OpenAI's that is understood only where it asks for nothing.
  void neutral(const char* key, std::initializer_list<Json> values, const char* expected) const {
    const Json* given = find(key);
    if (given == nullptr || std::find(values.begin(), values.end(), *given) != values.end()) return;
    throw wrong(field(key), std::string(expected) + ", which is all that is supported", *given);
  }

 private:
  const Json& body_;
  std::string place_;
};

// What both kinds of request share.
const std::vector<std::string> kCommon = {
    "model",  "max_tokens", "temperature", "top_p",          "seed",         "stop",
    "n",      "stream",     "logprobs",    "stream_options", "logit_bias",   "presence_penalty",
    "user",   "frequency_penalty"};

Asked read_common(const Fields& fields, const ServedModel& model, std::uint64_t seed) {
  const std::string name = fields.text("model", model.name.c_str());
  if (name != model.name && name != model.engine->path().string())
    throw ApiError(404, fmt::format("the model `{}` does not exist; this server has `{}`", name, model.name), "model",
                   "model_not_found");
  Asked asked;
  asked.work.sampling.temperature = fields.number("temperature", 1, 0, 2);
  asked.work.sampling.top_p = fields.number("top_p", 1, 0, 1);
  if (asked.work.sampling.top_p == 0) asked.work.sampling.top_p = 1e-9;  // the likeliest token alone
  asked.work.sampling.seed = seed;
  if (fields.find("seed") != nullptr)
    asked.work.sampling.seed = static_cast<std::uint64_t>(fields.integer("seed", 0, INT64_MIN, INT64_MAX));
  fields.neutral("n", {1}, "1");
  fields.neutral("presence_penalty", {0, 0.0}, "0");
  fields.neutral("frequency_penalty", {0, 0.0}, "0");
  fields.neutral("logit_bias", {Json::object()}, "{}");
  fields.text("user", "");
  if (const Json* stop = fields.find("stop")) {
    const Json list = stop->is_array() ? *stop : Json::array({*stop});
    for (const Json& item : list) {
      if (!item.is_string() || item.get_ref<const std::string&>().empty() || list.size() > kMostStops)
        throw wrong("stop", fmt::format("a text or a list of at most {} texts, none of them empty", kMostStops), *stop);
      asked.work.stops.push_back(item.get<std::string>());
    }
  }
  asked.stream = fields.flag("stream", false);
  if (const Json* options = fields.find("stream_options")) {
    if (!asked.stream) throw ApiError(400, "stream_options: only where stream is true", "stream_options");
    asked.usage_in_stream = Fields(*options, "stream_options", {"include_usage"}).flag("include_usage", false);
  }
  return asked;
}

void check_prompt(const std::vector<std::int32_t>& ids, const ServedModel& model, const std::string& place) {
  if (static_cast<std::int64_t>(ids.size()) > model.context)
    throw ApiError(400, fmt::format("{}: at most {} tokens fit into the context of this model, found {}", place,
                                    model.context, ids.size()), place, "context_length_exceeded");
}

std::vector<std::int32_t> ids_of(const Json& list, const ServedModel& model, const std::string& place) {
  std::vector<std::int32_t> ids;
  const std::int64_t vocab = model.engine->config().vocab_size;
  for (const Json& id : list) ids.push_back(static_cast<std::int32_t>(Fields::integer_of(id, place, 0, vocab - 1)));
  if (ids.empty()) throw wrong(place, "at least one token", list);
  return ids;
}

std::vector<std::vector<std::int32_t>> prompts_of(const Fields& fields, const ServedModel& model) {
  const Json* given = fields.find("prompt");
  const char* expected = "a text, a list of texts, a list of token ids, or a list of such lists";
  if (given == nullptr) throw ApiError(400, fmt::format("prompt: expected {}, found none", expected), "prompt");
  std::vector<std::vector<std::int32_t>> prompts;
  std::string note;
  const auto add_text = [&](const Json& text) {
    try {
      prompts.push_back(prompt_ids(*model.engine, text.get<std::string>(), note));
    } catch (const Error& problem) {
      throw ApiError(400, problem.what(), "prompt");
    }
  };
  const bool list = given->is_array() && !given->empty();
  if (given->is_string()) {
    add_text(*given);
  } else if (list && given->front().is_number()) {
    prompts.push_back(ids_of(*given, model, "prompt"));
  } else if (list && (given->front().is_string() || given->front().is_array())) {
    for (const Json& item : *given) {
      if (item.type() != given->front().type()) throw wrong("prompt", expected, *given);
      if (item.is_string()) add_text(item);
      else prompts.push_back(ids_of(item, model, fmt::format("prompt[{}]", prompts.size())));
    }
  } else {
    throw wrong("prompt", expected, *given);
  }
  if (prompts.size() > kMostPrompts)
    throw ApiError(400, fmt::format("prompt: at most {} in a request, found {}", kMostPrompts, prompts.size()),
                   "prompt");
  for (const auto& ids : prompts) check_prompt(ids, model, "prompt");
  return prompts;
}

// The texts of a message: one, or parts of which each is one.
std::string content_of(const Fields& message) {
  const Json* content = message.find("content");
  if (content == nullptr) return "";
  if (content->is_string()) return content->get<std::string>();
  if (!content->is_array()) throw wrong(message.field("content"), "a text or a list of parts", *content);
  std::string text;
  for (std::size_t i = 0; i < content->size(); ++i) {
    const Fields part((*content)[i], fmt::format("{}[{}]", message.field("content"), i), {"type", "text"});
    part.neutral("type", {"text"}, "\"text\"");
    text += (i > 0 ? "\n" : "") + part.text("text", "");
  }
  return text;
}

// What OpenAI's clients send back as null with an answer that they were given.
constexpr const char* kUnsaid[] = {"refusal", "tool_calls", "function_call", "annotations", "audio"};
const std::vector<std::string> kOfMessages = [] {
  std::vector<std::string> known = {"role", "content", "name", "type"};
  known.insert(known.end(), std::begin(kUnsaid), std::end(kUnsaid));
  return known;
}();

Json messages_of(const Fields& fields) {
  const Json* given = fields.find("messages");
  if (given == nullptr || !given->is_array() || given->empty())
    throw wrong("messages", "a list of at least one message", given == nullptr ? Json(nullptr) : *given);
  Json messages = Json::array();
  for (std::size_t i = 0; i < given->size(); ++i) {
    const Fields message((*given)[i], fmt::format("messages[{}]", i), kOfMessages);
    message.neutral("type", {"text"}, "\"text\"");  // as evaluation harnesses send it
    for (const char* key : kUnsaid) message.neutral(key, {Json::array()}, "null");
    const std::string role = message.text("role", ""), name = message.text("name", "");
    const std::string place = message.field("role");
    if (role.empty()) throw ApiError(400, place + ": expected a text, found none", place);
    messages.push_back({{"role", role}, {"content", content_of(message)}});
    if (!name.empty()) messages.back()["name"] = name;
  }
  return messages;
}

void check_scores(const Asked& asked, const ServedModel& model) {
  if (asked.stream || !asked.work.alternatives) return;
  std::int64_t tokens = 0;
  for (const auto& prompt : asked.work.prompts) {
    const std::int64_t size = std::ssize(prompt);
    tokens += std::min(asked.work.most_tokens, model.context - size + 1) + (asked.work.echo ? size : 0);
  }
  if (tokens > kMostScores / (*asked.work.alternatives + 1))
    throw ApiError(400, fmt::format("logprobs: expected at most {} log-probabilities in an answer that is not "
                                    "streamed, found up to {} tokens of {} each", kMostScores, tokens,
                                    *asked.work.alternatives + 1), "logprobs");
}

}  // namespace

Asked read_completion(const Json& body, const ServedModel& model, std::uint64_t seed) {
  std::vector<std::string> known = kCommon;
  known.insert(known.end(), {"prompt", "echo", "best_of", "suffix"});
  const Fields fields(body, "", known);
  Asked asked = read_common(fields, model, seed);
  fields.neutral("best_of", {1}, "1");
  fields.neutral("suffix", {""}, "none");
  asked.work.prompts = prompts_of(fields, model);
  asked.work.most_tokens = fields.integer("max_tokens", 16, 0, INT64_MAX);
  asked.work.echo = fields.flag("echo", false);
  if (fields.find("logprobs") != nullptr)
    asked.work.alternatives = static_cast<int>(fields.integer("logprobs", 0, 0, kMostAlternatives));
  asked.work.end_scored = true;  // harnesses that ask for one token count on its being there
  asked.work.ends = model.ends;
  check_scores(asked, model);
  return asked;
}

Asked read_chat(const Json& body, const ServedModel& model, std::uint64_t seed) {
  std::vector<std::string> known = kCommon;
  known.insert(known.end(), {"messages", "max_completion_tokens", "top_logprobs", "response_format", "tools"});
  const Fields fields(body, "", known);
  Asked asked = read_common(fields, model, seed);
  asked.chat = true;
  fields.neutral("response_format", {Json{{"type", "text"}}}, "{\"type\": \"text\"}");
  fields.neutral("tools", {Json::array()}, "[]");
  if (!model.chat)
    throw ApiError(400, "this model has no chat template; /v1/completions continues a text with it", {},
                   "no_chat_template");
  if (fields.find("max_tokens") != nullptr && fields.find("max_completion_tokens") != nullptr)
    throw ApiError(400, "max_tokens: not beside max_completion_tokens", "max_tokens");
  const char* limit = fields.find("max_tokens") != nullptr ? "max_tokens" : "max_completion_tokens";
  asked.work.most_tokens = fields.integer(limit, INT64_MAX, 1, INT64_MAX);
  const bool scores = fields.flag("logprobs", false);
  const std::int64_t alternatives = fields.integer("top_logprobs", 0, 0, kMostAlternatives);
  if (scores) asked.work.alternatives = static_cast<int>(alternatives);
  else if (alternatives > 0) throw ApiError(400, "top_logprobs: only where logprobs is true", "top_logprobs");
  asked.work.ends = model.chat_ends;
  try {
    asked.work.prompts.push_back(chat_prompt(*model.engine, *model.chat, messages_of(fields)).ids);
  } catch (const Error& problem) {
    throw ApiError(400, problem.what(), "messages");
  }
  check_prompt(asked.work.prompts.front(), model, "messages");
  check_scores(asked, model);
  return asked;
}

}  // namespace pare::serve
