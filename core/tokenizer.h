// tokenizer.json executed as data (Hugging Face `tokenizers` is the reference, id for id).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/file.h"
#include "core/json.h"

namespace pare {

class Tokenizer {
 public:
  // tokenizer.json, or sentencepiece's binary form: a file *.model, or the tokenizer.model that stands where the
  // tokenizer.json would. Errors: exit 3 naming the component and key that is broken or not supported.
  static Tokenizer from_file(const fs::path& tokenizer_json);
  static Tokenizer from_json(const Json& json, const std::string& place);
  // tokenizer.json text; faster than from_json for large files.
  static Tokenizer from_text(std::string_view text, const std::string& place);

  // add_special: run the post-processor (BOS and the like). parse_special: text that looks like a special token
  // becomes that token (false for data, true for prompts the user wrote). Invalid UTF-8 is replaced by U+FFFD.
  std::vector<std::int32_t> encode(std::string_view text, bool add_special = true, bool parse_special = true) const;
  std::string decode(std::span<const std::int32_t> ids, bool skip_special = true) const;

  std::int64_t size() const;                       // ids are < size(); config.vocab_size may be larger
  std::string token(std::int32_t id) const;        // the piece as spelled in the file
  std::int32_t id(std::string_view piece) const;   // -1 when absent
  bool is_special(std::int32_t id) const;
  std::vector<std::int32_t> prefix_ids() const;    // what the post-processor puts before the text (BOS), often empty

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

 private:
  friend class StreamDecoder;
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// A model folder's tokenizer: tokenizer.json, else tokenizer.model (read through libsentencepiece where this program
// was built with it).
bool has_tokenizer(const fs::path& folder);
// As the text of a tokenizer.json; nullopt when the folder has neither file. The text that tokenizer.model becomes is a
// pure function of the folder's files. Errors: as from_file.
std::optional<std::string> tokenizer_json_text(const fs::path& folder);

// Streaming decoder: returns the text that has become certain, holding back incomplete UTF-8.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special = true);
  std::string push(std::int32_t id);
  std::string finish();

 private:
  const Tokenizer& tokenizer_;
  bool skip_special_;
  std::vector<std::int32_t> ids_;
  std::size_t settled_ = 0;  // ids whose text has been returned
  std::size_t emitted_ = 0;  // bytes of their text
};

struct TokenizerTraining {
  std::int64_t vocab_size = 2048;                 // including special tokens and the 256 bytes
  std::vector<std::string> special_tokens = {"<|endoftext|>"};
  std::int64_t min_frequency = 2;
};
// Byte-level BPE with GPT-2's pre-tokenizer pattern; ties broken by smaller pair ids, as `tokenizers` does.
// Returns the text of a complete tokenizer.json that both pare and transformers load.
std::string train_tokenizer(const std::vector<std::string>& texts, const TokenizerTraining& options);

}  // namespace pare
