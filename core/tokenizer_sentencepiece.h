// sentencepiece's tokenizer.model -> the text of a tokenizer.json, which core/tokenizer.h then executes. The rules are
// those of transformers' converters (SpmConverter, LlamaConverter, GemmaConverter in convert_slow_tokenizer.py).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/file.h"
#include "core/json.h"

namespace pare::tok {

// The numbers of sentencepiece_model.proto.
enum class PieceType : std::int32_t {
  kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6
};
enum class SpmModelType : std::int32_t { kUnigram = 1, kBpe = 2, kWord = 3, kChar = 4 };

struct SpmPiece {
  std::string text;
  float score = 0;
  PieceType type = PieceType::kNormal;
};

struct SpmModel {
  std::vector<SpmPiece> pieces;  // in the order of their ids
  std::int32_t unknown = -1, bos = -1, eos = -1;
  bool byte_fallback = false;
  bool add_dummy_prefix = true, remove_extra_whitespaces = true;
  bool legacy = true;     // where it does not say legacy: the prefix stands before every stretch of text
  bool adds_eos = false;  // where tokenizer_config.json does not say add_eos_token
};

// What the library's interface does not tell; filled by a walk over the file that trusts nothing.
struct SpmSpec {
  SpmModelType model_type = SpmModelType::kUnigram;
  bool byte_fallback = false, treat_whitespace_as_suffix = false;
  std::string normalizer_name;
  std::size_t charsmap_bytes = 0, denormalizer_bytes = 0;
  bool add_dummy_prefix = true, remove_extra_whitespaces = true, escape_whitespaces = true;
  std::vector<PieceType> types;
};

// Errors: exit 3 with the byte where the file stops being one: truncation, impossible lengths and wire types, pieces
// that are empty, too long or not UTF-8, scores that are not numbers, types outside 1..6.
SpmSpec read_spm_spec(std::string_view bytes, const std::string& place);

// Whether this program was built with libsentencepiece and finds it.
bool reads_sentencepiece();

// Errors: exit 3; built without the library, another algorithm than BPE, normalization rules, a broken file.
SpmModel read_spm_model(const fs::path& file);

// tokenizer.json of the model with its neighbours in `folder`: tokenizer_config.json, special_tokens_map.json and
// added_tokens.json, each of which may be missing; an empty `folder`: no neighbours.
std::string spm_tokenizer_json(const SpmModel& model, const fs::path& folder, const std::string& place);

}  // namespace pare::tok
