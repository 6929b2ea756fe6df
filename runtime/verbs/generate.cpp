#include "runtime/verbs/generate.h"

#include <algorithm>
#include <chrono>
#include <cstdio>

namespace pare {

using Clock = std::chrono::steady_clock;
static double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

Generation generate(Continuation& continuation, StreamDecoder& decoder, std::span<const std::int32_t> prompt,
                    std::int64_t limit, std::span<const std::int64_t> ends,
                    const std::function<void(const std::string&)>& emit) {
  Generation out;
  out.fed = prompt.size();
  const auto push = [&](const std::string& piece) {
    out.text += piece;
    if (!piece.empty()) emit(piece);
  };
  const auto prefill_start = Clock::now();
  continuation.feed(prompt);
  Clock::time_point decode_start = Clock::now();
  std::size_t taken = 0;
  bool ended = false;
  while (static_cast<std::int64_t>(out.ids.size()) < limit) {
    throw_if_interrupted("run", "");
    const std::int64_t most = taken == 0 ? 1 : limit - static_cast<std::int64_t>(out.ids.size());
    for (const std::int32_t id : continuation.next(most)) {
      if (taken++ == 0) {
        out.prefill_seconds = seconds_since(prefill_start);
        decode_start = Clock::now();
      }
      if (std::find(ends.begin(), ends.end(), id) != ends.end()) {
        out.stop = "eos";
        ended = true;
        break;
      }
      out.ids.push_back(id);
      push(decoder.push(id));
    }
    if (ended || static_cast<std::int64_t>(out.ids.size()) == limit) break;
    if (continuation.room() <= 0) {
      out.stop = "context";
      break;
    }
  }
  out.decoded = taken > 0 ? taken - 1 : 0;
  out.decode_seconds = seconds_since(decode_start);
  out.counts = continuation.counts();
  push(decoder.finish());
  return out;
}

double prefill_rate(const Generation& made) {
  return made.prefill_seconds > 0 ? static_cast<double>(made.fed) / made.prefill_seconds : 0;
}
double decode_rate(const Generation& made) {
  return made.decoded > 0 ? static_cast<double>(made.decoded) / made.decode_seconds : 0;
}

void print_piece(const Context& context, const std::string& piece) {
  if (context.json) return;
  std::fwrite(piece.data(), 1, piece.size(), stdout);
  std::fflush(stdout);
}

void print_speed(const Generation& made, const Engine& engine, const Context& context, const std::string& more) {
  if (context.quiet) return;
  const double prefill = prefill_rate(made), decode = decode_rate(made);
  std::fprintf(stderr,
               "%zu prompt tokens at %.1f tokens/s; %zu new tokens at %.1f tokens/s (stopped: %s); %s; %s, %d threads, "
               "%s activations%s\n",
               made.fed, prefill, made.ids.size(), decode, made.stop, more.c_str(), engine.options().kernels.c_str(),
               engine.options().threads, engine.options().int8_activations ? "int8" : "float",
               counts_in_words(made.counts).c_str());
}

}  // namespace pare
