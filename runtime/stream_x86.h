// Requests for memory that is read once, as weights and past keys and values are for few tokens; included by the x86
// sources of kernels, of attention and of the roofline, which has to read as fast as they do.
#pragma once

#include <immintrin.h>

#include "runtime/attention_kernels.h"

namespace pare {
namespace {

// Asks for each line twice: into the second cache, which has room for as many requests as keep memory busy, a page before
// it is read, and from there into the first. Plain reading is 12 to 20 % slower with one request into the first cache or
// with distances beyond a page (Intel Xeon with AMX).
[[maybe_unused]] inline void ask_ahead(const void* line) {
  const auto* at = static_cast<const char*>(line);
  _mm_prefetch(at + 4096, _MM_HINT_T1);
  _mm_prefetch(at + 1024, _MM_HINT_T0);
}

// Asks for kBytes of what comes after a plane, a whole plane before they are read: in the order of addresses, whatever
// the order in which they are read, and into the second cache. Of several steps within a line the first asks for it.
template <std::int64_t kBytes>
inline void ask_next(const KvPlane& plane, std::int64_t offset) {
  static_assert(kBytes % 64 == 0 || 64 % kBytes == 0);
  if (plane.ahead == nullptr || (kBytes < 64 && offset % 64 != 0)) return;
#pragma GCC unroll 16
  for (std::int64_t i = 0; i < kBytes; i += 64) _mm_prefetch(plane.ahead + offset + i, _MM_HINT_T1);
}

}  // namespace
}  // namespace pare
