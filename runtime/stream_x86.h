// Requests for memory that is read once from its begin to its end, as weights are for few tokens; included by the x86
// sources of kernels and of the roofline, which has to read as fast as they do.
#pragma once

#include <immintrin.h>

namespace pare {
namespace {

// Asks for each line twice: into the second cache, which has room for as many requests as keep memory busy, about a page
// before it is read, and from there into the first. Measured against one request into the first cache: 8 % fewer
// milliseconds a token of a 1B model at q4, 15 % faster plain reading; distances beyond 4096 gain nothing.
inline void ask_ahead(const void* line) {
  const auto* at = static_cast<const char*>(line);
  _mm_prefetch(at + 4096, _MM_HINT_T1);
  _mm_prefetch(at + 1024, _MM_HINT_T0);
}

}  // namespace
}  // namespace pare
