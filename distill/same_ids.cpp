#include "distill/same_ids.h"

#include <algorithm>

#include "core/error.h"

namespace pare {
namespace {

// Where tokenizers of one piece table still part: merges, normalization, digits, blanks, line ends, scripts, special
// tokens in the text, what stands before it.
constexpr const char* kProbes[] = {
    "The quick brown fox jumps over the lazy dog.",
    "  leading blanks,\ttabs\t\tand   runs   of them  ",
    "Line one\nLine two\r\n\r\n\nLine three\n",
    "0 1 12 123 1234 12345 3.14159 1,000,000 0x1F 2024-05-06T07:08:09Z",
    "don't WON'T it's I'LL we've They'd",
    "int main(int argc, char** argv) { return argc > 1 ? -1 : 0; }  // ->*",
    "https://example.org/a_b-c?d=e&f=%20#g user.name+tag@example.com",
    "na\u00efve caf\u00e9 e\u0301 \u00c5ngstr\u00f6m \ufb01ne stra\u00dfe \u0130stanbul",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \uc548\ub155\ud558\uc138\uc694",
    "\u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2211\u222b\u221e \u2014 \u201cquoted\u201d "
    "\u00a0\u2003\u200b",
    "<|endoftext|> </s> <s> <|im_start|>user [INST] <unk> <pad>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ======== ---- ...... !!!???",
    "SupercalifragilisticexpialidociousXMLHttpRequest snake_case camelCase",
    "",
};

}  // namespace

Tokenizer shared_tokenizer(const fs::path& teacher_folder, const fs::path& student_folder) {
  const auto text = [](const fs::path& folder) {
    std::optional<std::string> found = tokenizer_json_text(folder);
    if (!found) throw input_error((folder / "tokenizer.json").string(), "a tokenizer", "nothing there");
    return *found;
  };
  const fs::path place = student_folder / "tokenizer.json";
  const std::string taught_text = text(teacher_folder), own_text = text(student_folder);
  Tokenizer own = Tokenizer::from_text(own_text, place.string());
  if (taught_text == own_text) return own;
  const Tokenizer taught = Tokenizer::from_text(taught_text, (teacher_folder / "tokenizer.json").string());
  const std::string hint = "teacher and student must give every id the same meaning";
  if (own.size() > taught.size())
    throw input_error(place.string(), "at most the teacher's " + std::to_string(taught.size()) + " tokens",
                      std::to_string(own.size()), hint);
  for (std::int64_t i = 0; i < std::min(own.size(), taught.size()); ++i) {
    const auto id = static_cast<std::int32_t>(i);
    if (own.token(id) != taught.token(id))
      throw input_error(place.string(),
                        "the teacher's tokenizer, where id " + std::to_string(id) + " is '" + taught.token(id) + "'",
                        "'" + own.token(id) + "'", hint);
  }
  for (const char* probe : kProbes)
    if (own.encode(probe) != taught.encode(probe) ||
        own.encode(probe, false, false) != taught.encode(probe, false, false))
      throw input_error(place.string(), "the teacher's tokenizer",
                        "other ids for the text '" + std::string(probe) + "'", hint);
  return own;
}

std::int64_t shared_vocabulary(const Tokenizer& tokenizer, const fs::path& teacher_folder, std::int64_t teacher_vocab,
                               const fs::path& student_folder, std::int64_t student_vocab) {
  for (const auto& [folder, vocab] : {std::pair{teacher_folder, teacher_vocab}, {student_folder, student_vocab}})
    if (tokenizer.size() > vocab)
      throw input_error((folder / "config.json").string() + ": vocab_size",
                        "at least " + std::to_string(tokenizer.size()) + " (ids of the tokenizer)",
                        std::to_string(vocab));
  return std::min(teacher_vocab, student_vocab);
}

}  // namespace pare
