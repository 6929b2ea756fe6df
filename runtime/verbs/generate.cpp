#include "runtime/verbs/generate.h"

#include <algorithm>
#include <chrono>
#include <cstdio>

namespace pare {

using Clock = std::chrono::steady_clock;
static double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

Generation generate(Session& session, const Engine& engine, Sampler& sampler, StreamDecoder& decoder,
                    std::span<const std::int32_t> prompt, std::int64_t limit, std::span<const std::int64_t> ends,
                    const std::function<void(const std::string&)>& emit) {
  Generation out;
  out.fed = prompt.size();
  const auto push = [&](const std::string& piece) {
    out.text += piece;
    if (!piece.empty()) emit(piece);
  };
  std::vector<float> logits(static_cast<std::size_t>(engine.config().vocab_size));
  const auto prefill_start = Clock::now();
  session.feed(prompt);
  Clock::time_point decode_start = Clock::now();
  auto rows = static_cast<std::int64_t>(prompt.size());
  while (static_cast<std::int64_t>(out.ids.size()) < limit) {
    throw_if_interrupted("run", "");
    session.logits(rows - 1, 1, logits.data());
    const std::int32_t id = sampler(logits);
    if (out.ids.empty()) {
      out.prefill_seconds = seconds_since(prefill_start);
      decode_start = Clock::now();
    }
    if (std::find(ends.begin(), ends.end(), id) != ends.end()) {
      out.stop = "eos";
      break;
    }
    out.ids.push_back(id);
    push(decoder.push(id));
    if (static_cast<std::int64_t>(out.ids.size()) == limit) break;
    if (session.position() >= engine.config().max_position_embeddings) {
      out.stop = "context";
      break;
    }
    session.feed({&id, 1});
    ++out.decoded;
    rows = 1;
  }
  out.decode_seconds = seconds_since(decode_start);
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
               "%s activations\n",
               made.fed, prefill, made.ids.size(), decode, made.stop, more.c_str(), engine.options().kernels.c_str(),
               engine.options().threads, engine.options().int8_activations ? "int8" : "float");
}

}  // namespace pare
