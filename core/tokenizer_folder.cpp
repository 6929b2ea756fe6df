// Where a folder's tokenizer comes from.
#include "core/tokenizer.h"
#include "core/tokenizer_sentencepiece.h"

namespace pare {
namespace {

std::string text_of_model(const fs::path& file) {
  return tok::spm_tokenizer_json(tok::read_spm_model(file), file.parent_path(), file.string());
}

}  // namespace

Tokenizer Tokenizer::from_file(const fs::path& tokenizer_json) {
  // Older models ship their vocabulary in sentencepiece's binary form alone.
  fs::path model = tokenizer_json;
  if (model.extension() != ".model") model.replace_filename("tokenizer.model");
  if (model == tokenizer_json || (!fs::exists(tokenizer_json) && fs::exists(model)))
    return from_text(text_of_model(model), model.string());
  return from_text(read_text(tokenizer_json), tokenizer_json.string());
}

bool has_tokenizer(const fs::path& folder) {
  return fs::exists(folder / "tokenizer.json") || fs::exists(folder / "tokenizer.model");
}

std::optional<std::string> tokenizer_json_text(const fs::path& folder) {
  if (fs::exists(folder / "tokenizer.json")) return read_text(folder / "tokenizer.json");
  if (fs::exists(folder / "tokenizer.model")) return text_of_model(folder / "tokenizer.model");
  return std::nullopt;
}

}  // namespace pare
