// The only file that sees libsentencepiece's header.
#include "core/sentencepiece/library.h"

#include <sentencepiece_processor.h>

#include <exception>
#include <string>
#include <string_view>

extern "C" __attribute__((visibility("default"))) void pare_sentencepiece_read(const char* bytes, std::size_t size,
                                                                               const PareSpmSink* sink) {
  const auto refuse = [&](std::string_view why) { sink->problem(sink->self, why.data(), why.size()); };
  try {
    sentencepiece::SentencePieceProcessor library;
    const auto status = library.LoadFromSerializedProto(std::string_view(bytes, size));
    if (!status.ok()) return refuse(status.ToString());
    for (int id = 0; id < library.GetPieceSize(); ++id) {
      const std::string& text = library.IdToPiece(id);
      const std::int32_t kind = (library.IsUnknown(id) ? kPareSpmUnknown : 0) |
                                (library.IsControl(id) ? kPareSpmControl : 0) |
                                (library.IsByte(id) ? kPareSpmByte : 0) | (library.IsUnused(id) ? kPareSpmUnused : 0);
      sink->piece(sink->self, text.data(), text.size(), library.GetScore(id), kind);
    }
    sink->ids(sink->self, library.bos_id(), library.eos_id());
  } catch (const std::exception& problem) {
    refuse(problem.what());
  }
}
