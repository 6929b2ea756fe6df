// Text sampled from a model itself: calibration and held-out text where the user has none.
#pragma once

#include <cstdint>
#include <memory>

#include "core/context.h"
#include "core/file.h"
#include "runtime/engine.h"

namespace pare {

// `streams` independent streams of `tokens` tokens each at temperature 1, begun with the tokenizer's prefix (BOS) or,
// where there is none, with an end-of-text token; a stream that ends a document begins the next one. Written as jsonl,
// one {"text"} per document. The same bytes at any thread count. The engine must use one thread: streams run side by
// side. Errors: exit 1 when the model samples no text at all.
void sample_text(const std::shared_ptr<const Engine>& engine, std::int64_t streams, std::int64_t tokens,
                 std::uint64_t seed, const fs::path& out, int threads, Progress& progress);

}  // namespace pare
