// Documents, prompts with responses and conversations as training examples: ids, and which of them are learned.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/chat_template.h"
#include "core/corpus.h"

namespace pare {

struct Example {
  std::vector<std::int32_t> ids;
  std::vector<std::uint8_t> scored;  // of each id: predicted from those before it; the first one never is
};

enum class TooLong { kCut, kDrop, kRefuse };

struct ExampleForm {
  const Tokenizer* tokenizer = nullptr;
  std::int32_t end_id = 0;  // ends documents and responses; a conversation ends as its template ends it
  std::int64_t most = 0;    // ids of one example
  TooLong too_long = TooLong::kCut;
  bool last_reply_only = false;        // of a conversation; else every reply of the assistant is learned
  const ChatTemplate* chat = nullptr;  // nullptr: conversations are refused
};

// Documents longer than `most` go on in further examples, none of whose ids is lost: each begins with the last id of
// the one before. What is longer otherwise is dealt with as `too_long` says; cut at its end, an example may have
// nothing left to learn, then it is dropped.
struct ExampleCounts {
  std::int64_t documents = 0, learned = 0;  // ids scored
  std::int64_t cut = 0, dropped = 0;
};

// The ids of one document, as read_documents gives it, added to `examples`.
// Text: every id but the first is learned, and end_id. Response: prompt and response are encoded together where the
// prompt's own ids begin the result, else apart; the response and end_id are learned. Conversation: the template
// renders it whole; of each reply, what the whole has beyond the rendered messages before it (with the generation
// prompt), up to the rendered messages with it; replies behind `most` ids are not looked at. Templates that print the date print 26 Jul 2024, so that a run can be
// repeated. Errors: exit 3 with the document's place, for a reply whose bounds the ids do not have, and for kRefuse.
void add_examples(const Document& document, const ExampleForm& form, std::vector<Example>& examples,
                  ExampleCounts& counts);

// The chat template of a model folder, if it has one. Errors: exit 3, one that cannot be used.
std::optional<ChatTemplate> folder_chat_template(const fs::path& folder);

}  // namespace pare
