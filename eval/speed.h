// How fast a model answers: prefill, decoding one token at a time, and the spread of the latter.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "core/context.h"

namespace pare {

// Incremental decoding as the measurement sees it; the runtime's Session fits by two lambdas.
struct DecodeProbe {
  std::int64_t vocab_size = 0;
  std::function<void()> reset;                                        // empty sequence
  std::function<void(std::span<const std::int32_t>, float*)> feed;    // appends ids; logits of the last one [vocab_size]
};

struct SpeedOptions {
  std::int64_t prompt = 128;   // ids fed at once
  std::int64_t tokens = 64;    // ids decoded one by one, greedy
  std::int64_t warm_up = 8;    // ids decoded before, then the prompt once; not counted; 0: cold
};

struct SpeedResult {
  std::int64_t prompt = 0, tokens = 0;
  double first_token_seconds = 0;        // prompt to the first id chosen
  double prefill_tokens_per_second = 0;
  double tokens_per_second = 0;          // decoding: tokens / sum of their times
  double p50_token_seconds = 0, p95_token_seconds = 0;
  std::uint64_t peak_memory_bytes = 0;   // of the whole process at the end of the measurement
};

// `prompt_ids` are repeated to the wanted length. Errors: exit 3 when prompt or token counts are not positive.
SpeedResult measure_speed(const DecodeProbe& probe, std::span<const std::int32_t> prompt_ids, const SpeedOptions& options);

// Rows "tokens_per_second", "seconds_per_token_p95", "time_to_first_token", "peak_memory_bytes"; none deterministic.
void add_rows(const SpeedResult& result, const std::string& stage, Report& report);
Json to_json(const SpeedResult& result);

}  // namespace pare
