// A tokenizer.model through libsentencepiece. The library reads pieces, scores and ids; what it is handed was checked
// before, because it ends the process on some inputs.
#include "core/tokenizer_sentencepiece.h"

#include "core/error.h"

#ifdef PARE_SENTENCEPIECE_MODULE
#include <dlfcn.h>

#include "core/sentencepiece/library.h"
#endif

namespace pare::tok {
namespace {

const char* const kOtherWays =
    "or let transformers write the file: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)";

#ifdef PARE_SENTENCEPIECE_MODULE

constexpr std::size_t kMaxModelBytes = std::size_t{1} << 26;  // the largest in use have 5 MB

struct Module {
  PareSpmRead* read = nullptr;
  std::string problem;
};

// The module stands beside the program; the tests stand a folder below it.
const Module& module() {
  static const Module opened = [] {
    Module out;
#ifdef PARE_SANITIZED  // a sanitizer's run time refuses scopes of their own
    const int flags = RTLD_NOW | RTLD_LOCAL;
#else
    const int flags = RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND;
#endif
    std::error_code ignored;
    const fs::path folder = fs::read_symlink("/proc/self/exe", ignored).parent_path();
    const fs::path beside = folder / PARE_SENTENCEPIECE_MODULE, above = folder.parent_path() / beside.filename();
    void* handle = dlopen((fs::exists(beside, ignored) ? beside : above).c_str(), flags);
    if (handle) out.read = reinterpret_cast<PareSpmRead*>(dlsym(handle, "pare_sentencepiece_read"));
    if (!out.read)
      if (const char* why = dlerror()) out.problem = why;
    return out;
  }();
  return opened;
}

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
                      "rules compiled by sentencepiece are not executed, and without them the ids would differ");
  if (spec.denormalizer_bytes > 0)
    throw input_error(place + ": denormalizer_spec.precompiled_charsmap", "none",
                      std::to_string(spec.denormalizer_bytes) + " bytes");
  if (!spec.escape_whitespaces) throw input_error(place + ": normalizer_spec.escape_whitespaces", "true", "false");
}

struct Received {
  SpmModel model;
  std::vector<std::int32_t> kinds;
  std::string problem;
  bool complete = false;
};

Received ask_library(std::string_view bytes) {
  Received out;
  PareSpmSink sink;
  sink.self = &out;
  sink.piece = [](void* self, const char* text, std::size_t size, float score, std::int32_t kind) {
    auto& to = *static_cast<Received*>(self);
    to.model.pieces.push_back({std::string(text, size), score, PieceType::kNormal});
    to.kinds.push_back(kind);
  };
  sink.ids = [](void* self, std::int32_t bos, std::int32_t eos) {
    auto& to = *static_cast<Received*>(self);
    to.model.bos = bos;
    to.model.eos = eos;
    to.complete = true;
  };
  sink.problem = [](void* self, const char* text, std::size_t size) {
    static_cast<Received*>(self)->problem = std::string(text, size);
  };
  module().read(bytes.data(), bytes.size(), &sink);
  return out;
}

std::int32_t kind_of(PieceType type) {
  switch (type) {
    case PieceType::kUnknown: return kPareSpmUnknown;
    case PieceType::kControl: return kPareSpmControl;
    case PieceType::kByte: return kPareSpmByte;
    case PieceType::kUnused: return kPareSpmUnused;
    default: return 0;
  }
}

#endif

}  // namespace

#ifndef PARE_SENTENCEPIECE_MODULE

bool reads_sentencepiece() { return false; }

SpmModel read_spm_model(const fs::path& file) {
  throw input_error(file.string(), "a tokenizer.json", "only sentencepiece's tokenizer.model",
                    std::string("this program was built without libsentencepiece: install libsentencepiece-dev and "
                                "build again, ") + kOtherWays);
}

#else

bool reads_sentencepiece() { return module().read != nullptr; }

SpmModel read_spm_model(const fs::path& file) {
  const std::string place = file.string();
  const MappedFile mapped(file);
  const std::string_view bytes(reinterpret_cast<const char*>(mapped.bytes().data()), mapped.bytes().size());
  if (bytes.size() > kMaxModelBytes)
    throw input_error(place, "at most " + std::to_string(kMaxModelBytes) + " bytes", std::to_string(bytes.size()));
  const SpmSpec spec = read_spm_spec(bytes, place);
  refuse_other_kinds(spec, place);
  if (!module().read)
    throw input_error(place, "a tokenizer.json", "only sentencepiece's tokenizer.model, and " + module().problem,
                      std::string("install libsentencepiece-dev and build again, ") + kOtherWays);

  Received got = ask_library(bytes);
  const auto refuse = [&](const std::string& why) {
    throw input_error(place, "a model that libsentencepiece accepts", why);
  };
  if (!got.complete) refuse(got.problem);
  SpmModel model = std::move(got.model);
  if (model.pieces.size() != spec.types.size())
    refuse("another number of pieces: " + std::to_string(model.pieces.size()));
  for (std::size_t id = 0; id < spec.types.size(); ++id) {
    model.pieces[id].type = spec.types[id];
    if (got.kinds[id] != kind_of(spec.types[id])) refuse("another type of piece " + std::to_string(id));
    // The library looks the unknown piece up by name; its type says which it is whatever it is called.
    if (spec.types[id] == PieceType::kUnknown) model.unknown = static_cast<std::int32_t>(id);
  }
  const auto size = static_cast<std::int32_t>(model.pieces.size());
  if (model.unknown < 0) refuse("no unknown piece");
  if (model.bos >= size || model.eos >= size) refuse("ids outside the vocabulary");
  model.byte_fallback = spec.byte_fallback;
  model.add_dummy_prefix = spec.add_dummy_prefix;
  model.remove_extra_whitespaces = spec.remove_extra_whitespaces;
  return model;
}

#endif

}  // namespace pare::tok
