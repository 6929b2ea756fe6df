// What requests are checked against and answered from.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/chat_template.h"
#include "runtime/engine.h"

namespace pare::serve {

struct ServedModel {
  std::shared_ptr<const Engine> engine;
  std::string name;                  // of the model in requests and answers
  std::int64_t context = 0;          // positions of a sequence
  std::optional<ChatTemplate> chat;  // where the model has one
  std::vector<std::int64_t> ends, chat_ends;  // tokens that end a text, a turn
  std::int64_t created = 0;          // seconds since 1970
};

// What a token adds to a text: bytes that need not be whole characters.
std::string token_bytes(const Tokenizer& tokenizer, std::int32_t id);

}  // namespace pare::serve
