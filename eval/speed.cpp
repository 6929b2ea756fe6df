#include "eval/speed.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "core/error.h"
#include "eval/statistics.h"

namespace pare {
namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::int32_t greedy(const std::vector<float>& logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

}  // namespace

SpeedResult measure_speed(const DecodeProbe& probe, std::span<const std::int32_t> prompt_ids,
                          const SpeedOptions& options) {
  if (options.prompt < 1 || options.tokens < 1 || options.warm_up < 0 || prompt_ids.empty()) {
    throw input_error("speed", "a prompt and at least one token to decode",
                      std::to_string(std::min<std::int64_t>(options.prompt, static_cast<std::int64_t>(prompt_ids.size()))) +
                          " and " + std::to_string(options.tokens));
  }
  std::vector<std::int32_t> prompt(static_cast<std::size_t>(options.prompt));
  for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = prompt_ids[i % prompt_ids.size()];
  std::vector<float> logits(static_cast<std::size_t>(probe.vocab_size));
  std::int32_t next = 0;
  const auto decode = [&] {
    probe.feed(std::span<const std::int32_t>(&next, 1), logits.data());
    next = greedy(logits);
  };
  probe.reset();
  next = prompt.front();
  for (std::int64_t i = 0; i < options.warm_up; ++i) decode();
  if (options.warm_up > 0) {  // buffers of a whole prompt exist, too
    probe.reset();
    probe.feed(prompt, logits.data());
  }

  SpeedResult result;
  result.prompt = options.prompt;
  result.tokens = options.tokens;
  probe.reset();
  auto lap = Clock::now();
  probe.feed(prompt, logits.data());
  next = greedy(logits);
  result.first_token_seconds = since(lap);
  result.prefill_tokens_per_second = static_cast<double>(options.prompt) / std::max(result.first_token_seconds, 1e-12);
  std::vector<double> seconds(static_cast<std::size_t>(options.tokens));
  double total = 0;
  for (double& each : seconds) {
    lap = Clock::now();
    decode();
    each = since(lap);
    total += each;
  }
  std::sort(seconds.begin(), seconds.end());
  result.tokens_per_second = static_cast<double>(options.tokens) / std::max(total, 1e-12);
  result.p50_token_seconds = quantile(seconds, 0.5);
  result.p95_token_seconds = quantile(seconds, 0.95);
  result.peak_memory_bytes = peak_resident_bytes();
  return result;
}

void add_rows(const SpeedResult& result, const std::string& stage, Report& report) {
  const auto row = [&](const char* metric, double value, const char* unit) {
    report.add({stage, metric, std::nullopt, value, unit, std::nullopt, false});
  };
  row("tokens_per_second", result.tokens_per_second, "tokens/s");
  row("prefill_tokens_per_second", result.prefill_tokens_per_second, "tokens/s");
  row("seconds_per_token_p95", result.p95_token_seconds, "s");
  row("time_to_first_token", result.first_token_seconds, "s");
  row("peak_memory_bytes", static_cast<double>(result.peak_memory_bytes), "bytes");
}

Json to_json(const SpeedResult& result) {
  return {{"prompt_tokens", result.prompt},
          {"decoded_tokens", result.tokens},
          {"tokens_per_second", result.tokens_per_second},
          {"prefill_tokens_per_second", result.prefill_tokens_per_second},
          {"p50_token_seconds", result.p50_token_seconds},
          {"p95_token_seconds", result.p95_token_seconds},
          {"first_token_seconds", result.first_token_seconds},
          {"peak_memory_bytes", result.peak_memory_bytes}};
}

}  // namespace pare
