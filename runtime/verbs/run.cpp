// `pare run`: continues a text with a compact file; chat.cpp has --chat.
#include <fmt/format.h>

#include <chrono>
#include <cstdio>

#include "core/error.h"
#include "runtime/engine.h"
#include "runtime/verbs/cli.h"
#include "runtime/verbs/generate.h"

namespace pare {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

Json run(const Options& options, Context& context) {
  const auto start = Clock::now();
  if (options.get<double>("temp") == 0) refuse_unused(options, {"top-p"}, "at --temp 0", "pare run");
  check_continuation_options(options);
  const auto engine = Engine::open(options.get<std::string>("model"), engine_options(options, context));
  SamplerOptions sampling;
  sampling.temperature = options.get<double>("temp");
  sampling.top_p = options.get<double>("top-p");
  sampling.seed = context.seed;
  Sampler sampler(sampling);

  if (options.get<bool>("chat")) {
    refuse_unused(options, {"ignore-eos"}, "with --chat", "pare run");
    return run_chat(engine, sampler, options, context);
  }
  refuse_unused(options, {"system"}, "without --chat", "pare run");

  const std::string prompt = options.get<std::string>("prompt");
  std::string note;
  const std::vector<std::int32_t> ids = prompt_ids(*engine, prompt, note);
  const double load_seconds = seconds_since(start);
  if (!note.empty() && !context.quiet) std::fprintf(stderr, "%s\n", note.c_str());

  std::vector<std::int64_t> ends = engine->config().eos_ids;
  if (options.get<bool>("ignore-eos")) ends.clear();
  const auto continuation = make_continuation(engine, sampler, ends, options, context);
  StreamDecoder decoder(engine->tokenizer());
  // The decoder sees the prompt too: a leading space of the continuation belongs to the text.
  for (const std::int32_t id : ids) decoder.push(id);
  const double before_seconds = seconds_since(start);
  const Generation made = generate(*continuation, decoder, ids, options.get<std::int64_t>("tokens"), ends,
                                   [&](const std::string& piece) { print_piece(context, piece); });
  print_piece(context, "\n");
  const double first_token_seconds = made.ids.empty() ? 0 : before_seconds + made.prefill_seconds;
  print_speed(made, *engine, context,
              fmt::format("first token after {:.3f} s, of it {:.3f} s opening", first_token_seconds, load_seconds));
  Json result;
  result["text"] = made.text;
  result["prompt"] = prompt;
  result["prompt_ids"] = ids;
  result["ids"] = made.ids;
  result["stop"] = made.stop;
  result["prefill_tokens_per_second"] = prefill_rate(made);
  result["decode_tokens_per_second"] = decode_rate(made);
  result["time_to_first_token_seconds"] = first_token_seconds;
  result["open_seconds"] = load_seconds;
  result["kernels"] = engine->options().kernels;
  result["threads"] = engine->options().threads;
  result["activations"] = engine->options().int8_activations ? "int8" : "float";
  result["kv"] = engine->options().kv;
  result["seed"] = context.seed;
  if (!made.counts.is_null()) result["ahead"] = made.counts;
  return result;
}

}  // namespace

std::vector<std::int32_t> prompt_ids(const Engine& engine, const std::string& prompt, std::string& note) {
  const Tokenizer& tokenizer = engine.tokenizer();
  std::vector<std::int32_t> ids = tokenizer.encode(prompt, true, true);
  if (!prompt.empty()) {
    if (ids.empty()) throw input_error("prompt", "text that gives at least one token", "none");
    return ids;
  }
  if (ids.empty()) ids = tokenizer.prefix_ids();
  if (ids.empty()) {
    for (const char* piece : {"<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>"}) {
      if (const std::int32_t id = tokenizer.id(piece); id >= 0) {
        ids.push_back(id);
        break;
      }
    }
  }
  if (ids.empty() && !engine.config().eos_ids.empty())
    ids.push_back(static_cast<std::int32_t>(engine.config().eos_ids.front()));
  if (ids.empty()) {
    throw input_error("prompt", "a text (this model has no token that begins one)", "an empty prompt",
                      "give one with -p");
  }
  note = fmt::format("empty prompt: starting from token {} {}", ids.front(), tokenizer.token(ids.front()));
  return ids;
}

Command run_command() {
  Command command;
  command.name = "run";
  command.summary = "Continue a text with a compact file or a GGUF file, or talk to it";
  command.options = {
      {.name = "model", .type = OptionType::kPath, .help = "compact file or GGUF file", .required = true, .positional = true},
      {.name = "prompt",
       .type = OptionType::kText,
       .help = "text to continue; empty: start from the begin token (with --chat: a message; empty: lines of stdin)",
       .default_value = "",
       .short_name = "p"},
      {.name = "chat",
       .type = OptionType::kFlag,
       .help = "a conversation in the form of the model's chat template",
       .default_value = false},
      {.name = "system", .type = OptionType::kText, .help = "system message that begins the conversation"},
      {.name = "tokens",
       .type = OptionType::kInteger,
       .help = "new tokens at most",
       .default_value = 128,
       .minimum = 0,
       .short_name = "n"},
      {.name = "temp",
       .type = OptionType::kNumber,
       .help = "temperature; 0: always the likeliest token",
       .default_value = 0.0,
       .minimum = 0},
      {.name = "top-p",
       .type = OptionType::kNumber,
       .help = "draw from the likeliest tokens with this share of the mass",
       .default_value = 1.0,
       .minimum = 0,
       .maximum = 1},
      act_option(),
      kv_option(),
      {.name = "ignore-eos", .type = OptionType::kFlag, .help = "go on after an end token", .default_value = false},
  };
  for (OptionDecl& option : continuation_options()) command.options.push_back(std::move(option));
  command.run = run;
  command.example = "pare run model.pare -p \"Once upon a time\" -n 100 --temp 0.8 --top-p 0.9";
  return command;
}

}  // namespace pare
