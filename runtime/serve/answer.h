// Answers in OpenAI's forms: whole ones, and the pieces of streamed ones.
#pragma once

#include "runtime/serve/request.h"

namespace pare::serve {

struct AnswerForm {
  std::string id;
  std::int64_t created = 0;  // seconds since 1970
  bool chat = false;
};

// Takes the results of one request. Every choice is one prompt's.
class Answer {
 public:
  Answer(const ServedModel& model, const Asked& asked, AnswerForm form);
  void add(const Delta& delta);
  bool finished() const { return finished_ == choices_.size(); }
  std::int64_t new_tokens() const;

  Json whole() const;
  // The objects that a stream sends for a result, before the first one of its choice one that names the role too.
  std::vector<Json> pieces(const Delta& delta);
  Json usage_piece() const;  // the last one, where it was asked for

 private:
  struct Choice {
    std::string text;
    std::vector<ScoredToken> tokens;
    std::int64_t made = 0;
    const char* finish = nullptr;
    bool begun = false;
  };
  Json head(const char* object) const;
  Json usage() const;
  Json log_probs(std::span<const ScoredToken> tokens) const;
  Json completion_log_probs(std::span<const ScoredToken> tokens) const;
  Json chat_log_probs(std::span<const ScoredToken> tokens) const;

  const ServedModel& model_;
  const AnswerForm form_;
  const bool scores_, usage_in_stream_;
  std::int64_t prompt_tokens_ = 0;
  std::vector<Choice> choices_;
  std::size_t finished_ = 0;
};

}  // namespace pare::serve
