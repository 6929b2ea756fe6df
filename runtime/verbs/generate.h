// One stretch of generated text, as `pare run` makes it for a prompt and for every turn of a chat.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "core/chat_template.h"
#include "core/context.h"
#include "core/options.h"
#include "runtime/continuation.h"

namespace pare {

struct Generation {
  std::string text;
  std::vector<std::int32_t> ids;  // made; an end token is not among them
  const char* stop = "length";    // or "eos", "context"
  std::size_t fed = 0;            // tokens of the prompt that had to be fed
  double prefill_seconds = 0, decode_seconds = 0;
  std::size_t decoded = 0;        // of what decode_seconds gave, without the first token; an end token counts
  Json counts;                    // Continuation::counts
};

// Feeds `prompt` behind what is held and takes up to `limit` tokens, until one of `ends` comes.
// decoder: has seen what stands before; `emit` gets the text piece by piece.
Generation generate(Continuation& continuation, StreamDecoder& decoder, std::span<const std::int32_t> prompt,
                    std::int64_t limit, std::span<const std::int64_t> ends,
                    const std::function<void(const std::string&)>& emit);

// Who continues, as the options say: one model, with guesses of a second one (--draft) or of the text (--lookup), or
// two by turns (--fallback).
std::vector<OptionDecl> continuation_options();
void check_continuation_options(const Options& options);  // exit 2 where they do not go together; opens nothing
std::unique_ptr<Continuation> make_continuation(const std::shared_ptr<const Engine>& engine, Sampler& sampler,
                                                const std::vector<std::int64_t>& ends, const Options& options,
                                                const Context& context);
// Continuation::counts in words; empty for null.
std::string counts_in_words(const Json& counts);
OptionDecl act_option();
// The options that say how a file is opened; act_option() and kv_option() among them.
EngineOptions engine_options(const Options& options, const Context& context);

double prefill_rate(const Generation& made);  // tokens per second
double decode_rate(const Generation& made);

// The prompt's ids; an empty prompt becomes the token that begins a text. `note` says which was taken. Errors: exit 3.
std::vector<std::int32_t> prompt_ids(const Engine& engine, const std::string& prompt, std::string& note);

// A conversation in the form of the model's chat template, which the caller keeps. Errors: exit 3, no template or one
// that refuses the conversation.
ChatTemplate chat_template(const Engine& engine);
std::vector<std::int64_t> chat_ends(const Engine& engine, const ChatTemplate& form);  // tokens that end a turn
struct ChatPrompt {
  std::string text;
  std::vector<std::int32_t> ids;  // at least one
};
ChatPrompt chat_prompt(const Engine& engine, const ChatTemplate& form, const Json& messages);

// `pare run --chat`: a conversation through the model's chat template; lines of stdin unless --prompt is given.
Json run_chat(const std::shared_ptr<const Engine>& engine, Sampler& sampler, const Options& options, Context& context);

// A piece of the result as it comes: on stdout at once, nothing in JSON mode.
void print_piece(const Context& context, const std::string& piece);
// Speeds of one stretch on stderr, unless quiet.
void print_speed(const Generation& made, const Engine& engine, const Context& context, const std::string& more);

}  // namespace pare
