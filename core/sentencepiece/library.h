// The C interface of the module that holds libsentencepiece. The library carries a protobuf of its own and exports its
// symbols; in one scope with LibTorch's protobuf either of the two ends in a crash. So it lives in a module that is
// opened on first use, with a scope of its own, and only plain C passes the border.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

enum : std::int32_t { kPareSpmUnknown = 1, kPareSpmControl = 2, kPareSpmByte = 4, kPareSpmUnused = 8 };

// What the reader calls back with; texts are valid during the call only.
struct PareSpmSink {
  void* self;
  void (*piece)(void* self, const char* text, std::size_t size, float score, std::int32_t kind);  // in order of ids
  void (*ids)(void* self, std::int32_t bos, std::int32_t eos);      // at the end; -1: none
  void (*problem)(void* self, const char* text, std::size_t size);  // the library refuses the file
};

// Calls `piece` for every piece and then `ids`, or `problem`.
typedef void PareSpmRead(const char* bytes, std::size_t size, const PareSpmSink* sink);
PareSpmRead pare_sentencepiece_read;

}  // extern "C"
