// One stretch of generated text, as `pare run` makes it for a prompt and for every turn of a chat.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "core/context.h"
#include "core/options.h"
#include "runtime/engine.h"

namespace pare {

struct Generation {
  std::string text;
  std::vector<std::int32_t> ids;  // made; an end token is not among them
  const char* stop = "length";    // or "eos", "context"
  std::size_t fed = 0;            // tokens of the prompt that had to be fed
  double prefill_seconds = 0, decode_seconds = 0;
  std::size_t decoded = 0;        // of `ids`, those fed during decode_seconds
};

// Feeds `prompt` behind what the session holds and samples up to `limit` tokens, until one of `ends` comes.
// decoder: has seen what stands before; `emit` gets the text piece by piece.
Generation generate(Session& session, const Engine& engine, Sampler& sampler, StreamDecoder& decoder,
                    std::span<const std::int32_t> prompt, std::int64_t limit, std::span<const std::int64_t> ends,
                    const std::function<void(const std::string&)>& emit);

double prefill_rate(const Generation& made);  // tokens per second
double decode_rate(const Generation& made);

// `pare run --chat`: a conversation through the model's chat template; lines of stdin unless --prompt is given.
Json run_chat(const std::shared_ptr<const Engine>& engine, Sampler& sampler, const Options& options, Context& context);

// A piece of the result as it comes: on stdout at once, nothing in JSON mode.
void print_piece(const Context& context, const std::string& piece);
// Speeds of one stretch on stderr, unless quiet.
void print_speed(const Generation& made, const Engine& engine, const Context& context, const std::string& more);

}  // namespace pare
