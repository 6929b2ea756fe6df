#include "runtime/serve/answer.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/tokenizer_text.h"

namespace pare::serve {
namespace {

// JSON has no infinity: what OpenAI gives for a token that cannot come.
double finite(double log_prob) {
  return std::max(log_prob, -9999.0);
}

// Bytes that are no whole characters are spelled out, as OpenAI's completions do.
std::string spelled(const std::string& bytes) {
  if (tok::is_valid_utf8(bytes)) return bytes;
  std::string out = "bytes:";
  for (const char byte : bytes) out += fmt::format("\\x{:02x}", static_cast<unsigned char>(byte));
  return out;
}

}  // namespace

Answer::Answer(const ServedModel& model, const Asked& asked, AnswerForm form)
    : model_(model),
      form_(std::move(form)),
      scores_(asked.work.alternatives.has_value()),
      usage_in_stream_(asked.usage_in_stream),
      choices_(asked.work.prompts.size()) {
  for (const auto& prompt : asked.work.prompts) prompt_tokens_ += static_cast<std::int64_t>(prompt.size());
}

void Answer::add(const Delta& delta) {
  Choice& choice = choices_[delta.index];
  choice.text += delta.text;
  choice.tokens.insert(choice.tokens.end(), delta.tokens.begin(), delta.tokens.end());
  choice.made = delta.made;
  choice.finish = delta.finish;
  finished_ += delta.finish != nullptr;
}

std::int64_t Answer::new_tokens() const {
  std::int64_t sum = 0;
  for (const Choice& choice : choices_) sum += choice.made;
  return sum;
}

Json Answer::usage() const {
  return {{"prompt_tokens", prompt_tokens_},
          {"completion_tokens", new_tokens()},
          {"total_tokens", prompt_tokens_ + new_tokens()}};
}

Json Answer::head(const char* object) const {
  return {{"id", form_.id}, {"object", object}, {"created", form_.created}, {"model", model_.name}};
}

Json Answer::log_probs(std::span<const ScoredToken> tokens) const {
  if (!scores_) return nullptr;
  return form_.chat ? chat_log_probs(tokens) : completion_log_probs(tokens);
}

Json Answer::completion_log_probs(std::span<const ScoredToken> tokens) const {
  const Tokenizer& tokenizer = model_.engine->tokenizer();
  Json names = Json::array(), values = Json::array(), tops = Json::array(), offsets = Json::array();
  for (const ScoredToken& token : tokens) {
    const std::string name = spelled(token_bytes(tokenizer, token.id));
    names.push_back(name);
    offsets.push_back(token.offset);
    values.push_back(token.log_prob ? Json(finite(*token.log_prob)) : Json(nullptr));
    Json top = nullptr;
    if (token.log_prob) {
      top = Json::object();
      // Of two tokens with the same text the likelier one stands for both.
      for (const auto& other : token.likeliest)
        top.emplace(spelled(token_bytes(tokenizer, other.id)), finite(other.log_prob));
      top.emplace(name, finite(*token.log_prob));
    }
    tops.push_back(std::move(top));
  }
  return {{"tokens", names}, {"token_logprobs", values}, {"top_logprobs", tops}, {"text_offset", offsets}};
}

Json Answer::chat_log_probs(std::span<const ScoredToken> tokens) const {
  const auto entry = [&](std::int32_t id, double log_prob) -> Json {
    const std::string bytes = token_bytes(model_.engine->tokenizer(), id);
    Json numbers = Json::array();
    for (const char byte : bytes) numbers.push_back(static_cast<unsigned char>(byte));
    return {{"token", tok::is_valid_utf8(bytes) ? bytes : tok::replace_invalid_utf8(bytes)},
            {"logprob", finite(log_prob)},
            {"bytes", numbers}};
  };
  Json content = Json::array();
  for (const ScoredToken& token : tokens) {
    content.push_back(entry(token.id, *token.log_prob));
    Json& tops = content.back()["top_logprobs"] = Json::array();
    for (const auto& other : token.likeliest) tops.push_back(entry(other.id, other.log_prob));
  }
  return {{"content", content}, {"refusal", nullptr}};
}

Json Answer::whole() const {
  Json out = head(form_.chat ? "chat.completion" : "text_completion");
  Json& list = out["choices"] = Json::array();
  for (std::size_t i = 0; i < choices_.size(); ++i) {
    const Choice& choice = choices_[i];
    Json one = {{"index", i}};
    if (form_.chat) one["message"] = {{"role", "assistant"}, {"content", choice.text}, {"refusal", nullptr}};
    else one["text"] = choice.text;
    one["logprobs"] = log_probs(choice.tokens);
    one["finish_reason"] = choice.finish;
    list.push_back(std::move(one));
  }
  out["usage"] = usage();
  return out;
}

std::vector<Json> Answer::pieces(const Delta& delta) {
  std::vector<Json> out;
  const auto piece = [&](Json choice) {
    out.push_back(head(form_.chat ? "chat.completion.chunk" : "text_completion"));
    out.back()["choices"] = Json::array({std::move(choice)});
    if (usage_in_stream_) out.back()["usage"] = nullptr;
  };
  const Json finish = delta.finish == nullptr ? Json(nullptr) : Json(delta.finish);
  const Json scores = delta.tokens.empty() ? Json(nullptr) : log_probs(delta.tokens);
  if (!form_.chat) {
    piece({{"index", delta.index}, {"text", delta.text}, {"logprobs", scores}, {"finish_reason", finish}});
    return out;
  }
  const auto chat_piece = [&](Json text, Json log_probs, Json reason) {
    piece({{"index", delta.index}, {"delta", text}, {"logprobs", log_probs}, {"finish_reason", reason}});
  };
  if (!choices_[delta.index].begun) chat_piece({{"role", "assistant"}, {"content", ""}}, nullptr, nullptr);
  choices_[delta.index].begun = true;
  if (!delta.text.empty() || !delta.tokens.empty()) chat_piece({{"content", delta.text}}, scores, nullptr);
  if (delta.finish != nullptr) chat_piece(Json::object(), nullptr, finish);
  return out;
}

Json Answer::usage_piece() const {
  Json out = head(form_.chat ? "chat.completion.chunk" : "text_completion");
  out["choices"] = Json::array();
  out["usage"] = usage();
  return out;
}

}  // namespace pare::serve
