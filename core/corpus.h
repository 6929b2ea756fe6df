// Text as documents, documents as token windows: shared by training, calibration and evaluation.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/file.h"
#include "core/json.h"
#include "core/tokenizer.h"

namespace pare {

// One document; for prompt/response jsonl the response starts at byte `response_begin` (loss is taken from there on).
struct Document {
  std::string text;
  std::size_t response_begin = 0;
  Json messages = nullptr;  // a conversation, which has no text yet; then `tools` may be what its line gives
  Json tools = nullptr;
  std::string place = {};   // of jsonl: file:line
};

// Reads one or more .txt or .jsonl files (or folders of them, sorted by name). Plain text is split at `split` if given
// (surrounding blanks and newlines of each piece stripped, empty pieces dropped), else one document per file.
// jsonl: {"text"} or {"prompt", "response"} per line, and with `conversations` {"messages": [{"role", "content"}, ..]}.
// Errors: exit 3 with file and line; empty result: exit 3.
std::vector<Document> read_documents(const std::vector<fs::path>& paths, const std::optional<std::string>& split,
                                     bool conversations = false);

// Ids of one document with the post-processor's prefix (BOS), special tokens in the text not parsed.
std::vector<std::int32_t> encode_document(const Tokenizer& tokenizer, const Document& document);

// Disjoint windows for evaluation. Each window begins with the prefix ids (if the tokenizer has any), counts them in
// `context`, and every later token is scored. With `one_per_document` a document is cut at `context` (the rest is
// dropped); otherwise it continues in further windows.
struct Window {
  std::vector<std::int32_t> ids;
  std::int64_t document = 0;   // index, for standard errors over documents
  std::int64_t first_scored = 1;  // position of the first id that is predicted and scored
};
std::vector<Window> make_windows(const Tokenizer& tokenizer, const std::vector<Document>& documents, std::int64_t context,
                                 bool one_per_document);

}  // namespace pare
