// The only file that sees libsentencepiece. The library reads pieces, scores and ids; what it is handed was checked
// before, because it ends the process on some inputs.
#include "core/tokenizer_sentencepiece.h"

#include "core/error.h"
#include "core/tokenizer_text.h"

#ifdef PARE_HAVE_SENTENCEPIECE
#include <sentencepiece_processor.h>
#endif

namespace pare::tok {

#ifndef PARE_HAVE_SENTENCEPIECE

bool reads_sentencepiece() { return false; }

SpmModel read_spm_model(const fs::path& file) {
  throw input_error(file.string(), "a tokenizer.json", "only sentencepiece's tokenizer.model",
                    "this program was built without libsentencepiece: install libsentencepiece-dev and build again, or "
                    "let transformers write the file: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)");
}

#else

namespace {

constexpr std::size_t kMaxModelBytes = std::size_t{1} << 28;  // the largest in use have 5 MB

const char* name_of(SpmModelType type) {
  switch (type) {
    case SpmModelType::kUnigram: return "UNIGRAM";
    case SpmModelType::kBpe: return "BPE";
    case SpmModelType::kWord: return "WORD";
    case SpmModelType::kChar: return "CHAR";
  }
  return "unknown";
}

void refuse_other_kinds(const SpmSpec& spec, const std::string& place) {
  if (spec.model_type != SpmModelType::kBpe)
    throw input_error(place + ": trainer_spec.model_type", "BPE", name_of(spec.model_type),
                      "only BPE tokenizers are read");
  if (spec.treat_whitespace_as_suffix)
    throw input_error(place + ": trainer_spec.treat_whitespace_as_suffix", "false", "true");
  if (spec.charsmap_bytes > 0)
    throw input_error(place + ": normalizer_spec.precompiled_charsmap", "no normalization rules (identity)",
                      "the rules \"" + spec.normalizer_name + "\", " + std::to_string(spec.charsmap_bytes) + " bytes",
                      "such a model's ids would differ; rules compiled by sentencepiece are not executed");
  if (spec.denormalizer_bytes > 0)
    throw input_error(place + ": denormalizer_spec.precompiled_charsmap", "none",
                      std::to_string(spec.denormalizer_bytes) + " bytes");
  if (!spec.escape_whitespaces) throw input_error(place + ": normalizer_spec.escape_whitespaces", "true", "false");
}

std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace

bool reads_sentencepiece() { return true; }

SpmModel read_spm_model(const fs::path& file) {
  const std::string place = file.string();
  const MappedFile mapped(file);
  const std::string_view bytes = as_text(mapped.bytes());
  if (bytes.size() > kMaxModelBytes)
    throw input_error(place, "at most " + std::to_string(kMaxModelBytes) + " bytes", std::to_string(bytes.size()));
  const SpmSpec spec = read_spm_spec(bytes, place);
  refuse_other_kinds(spec, place);

  const auto refuse = [&](const std::string& why) -> Error {
    return input_error(place, "a model that libsentencepiece accepts", why);
  };
  sentencepiece::SentencePieceProcessor library;
  try {
    if (const auto status = library.LoadFromSerializedProto(bytes); !status.ok()) throw refuse(status.ToString());
  } catch (const Error&) {
    throw;
  } catch (const std::exception& problem) {
    throw refuse(problem.what());
  }

  SpmModel model;
  const int count = library.GetPieceSize();
  if (count < 0 || static_cast<std::size_t>(count) != spec.types.size())
    throw refuse("another number of pieces: " + std::to_string(count));
  model.pieces.reserve(spec.types.size());
  for (int id = 0; id < count; ++id) {
    const PieceType type = spec.types[static_cast<std::size_t>(id)];
    if (library.IsUnknown(id) != (type == PieceType::kUnknown) ||
        library.IsControl(id) != (type == PieceType::kControl) || library.IsByte(id) != (type == PieceType::kByte) ||
        library.IsUnused(id) != (type == PieceType::kUnused))
      throw refuse("another type of piece " + std::to_string(id));
    model.pieces.push_back({library.IdToPiece(id), library.GetScore(id), type});
  }
  model.unknown = library.unk_id();
  model.bos = library.bos_id();
  model.eos = library.eos_id();
  model.pad = library.pad_id();
  model.byte_fallback = spec.byte_fallback;
  model.add_dummy_prefix = spec.add_dummy_prefix;
  model.remove_extra_whitespaces = spec.remove_extra_whitespaces;
  return model;
}

#endif

}  // namespace pare::tok
