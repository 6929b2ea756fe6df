// `pare run`: continues a text with a compact file.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "core/error.h"
#include "runtime/engine.h"
#include "runtime/verbs/cli.h"

namespace pare {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// The prompt's ids; an empty prompt becomes the token that begins a text. `note` says which was taken.
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

Json run(const Options& options, Context& context) {
  const auto start = Clock::now();
  if (options.get<double>("temp") == 0) refuse_unused(options, {"top-p"}, "at --temp 0", "pare run");
  EngineOptions engine_options;
  engine_options.threads = context.threads;
  engine_options.int8_activations = options.get<std::string>("act") == "int8";
  const auto engine = Engine::open(options.get<std::string>("model"), engine_options);
  SamplerOptions sampling;
  sampling.temperature = options.get<double>("temp");
  sampling.top_p = options.get<double>("top-p");
  sampling.seed = context.seed;
  Sampler sampler(sampling);

  const std::string prompt = options.get<std::string>("prompt");
  std::string note;
  const std::vector<std::int32_t> ids = prompt_ids(*engine, prompt, note);
  const double load_seconds = seconds_since(start);
  if (!note.empty() && !context.quiet) std::fprintf(stderr, "%s\n", note.c_str());

  const auto limit = options.get<std::int64_t>("tokens");
  const bool ignore_eos = options.get<bool>("ignore-eos");
  const std::vector<std::int64_t>& ends = engine->config().eos_ids;
  Session session(engine);
  StreamDecoder decoder(engine->tokenizer());
  // The decoder sees the prompt too: a leading space of the continuation belongs to the text.
  for (const std::int32_t id : ids) decoder.push(id);

  std::string text;
  const auto emit = [&](const std::string& piece) {
    text += piece;
    if (context.json || piece.empty()) return;
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
  };

  std::vector<float> logits(static_cast<std::size_t>(engine->config().vocab_size));
  std::vector<std::int32_t> made;
  const char* stop = "length";
  const auto prefill_start = Clock::now();
  session.feed(ids);
  double prefill_seconds = 0, first_token_seconds = 0;
  Clock::time_point decode_start = Clock::now();
  std::int64_t rows = static_cast<std::int64_t>(ids.size());
  while (static_cast<std::int64_t>(made.size()) < limit) {
    throw_if_interrupted("run", "");
    session.logits(rows - 1, 1, logits.data());
    const std::int32_t id = sampler(logits);
    if (made.empty()) {
      prefill_seconds = seconds_since(prefill_start);
      first_token_seconds = seconds_since(start);
      decode_start = Clock::now();
    }
    if (!ignore_eos && std::find(ends.begin(), ends.end(), id) != ends.end()) {
      stop = "eos";
      break;
    }
    made.push_back(id);
    emit(decoder.push(id));
    if (static_cast<std::int64_t>(made.size()) == limit) break;
    if (session.position() >= engine->config().max_position_embeddings) {
      stop = "context";
      break;
    }
    session.feed({&id, 1});
    rows = 1;
  }
  const double decode_seconds = seconds_since(decode_start);
  emit(decoder.finish());
  if (!context.json) std::fputs("\n", stdout);
  std::fflush(stdout);

  const double decoded = static_cast<double>(session.position()) - static_cast<double>(ids.size());
  const double prefill_rate = prefill_seconds > 0 ? static_cast<double>(ids.size()) / prefill_seconds : 0;
  const double decode_rate = decoded > 0 ? decoded / decode_seconds : 0;
  if (!context.quiet) {
    std::fprintf(stderr,
                 "%zu prompt tokens at %.1f tokens/s; %zu new tokens at %.1f tokens/s (stopped: %s); first token after "
                 "%.3f s, of it %.3f s opening; %s, %d threads, %s activations\n",
                 ids.size(), prefill_rate, made.size(), decode_rate, stop, first_token_seconds, load_seconds,
                 engine->options().kernels.c_str(), engine->options().threads,
                 engine->options().int8_activations ? "int8" : "float");
  }
  Json result;
  result["text"] = text;
  result["prompt"] = prompt;
  result["prompt_ids"] = ids;
  result["ids"] = made;
  result["stop"] = stop;
  result["prefill_tokens_per_second"] = prefill_rate;
  result["decode_tokens_per_second"] = decode_rate;
  result["time_to_first_token_seconds"] = first_token_seconds;
  result["open_seconds"] = load_seconds;
  result["kernels"] = engine->options().kernels;
  result["threads"] = engine->options().threads;
  result["activations"] = engine->options().int8_activations ? "int8" : "float";
  result["seed"] = context.seed;
  return result;
}

}  // namespace

Command run_command() {
  Command command;
  command.name = "run";
  command.summary = "Continue a text with a compact file";
  command.options = {
      {.name = "model", .type = OptionType::kPath, .help = "compact file", .required = true, .positional = true},
      {.name = "prompt",
       .type = OptionType::kText,
       .help = "text to continue; empty: start from the begin token",
       .default_value = "",
       .short_name = "p"},
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
      {.name = "act",
       .type = OptionType::kText,
       .help = "activations that meet quantized weights",
       .default_value = "int8",
       .choices = {"int8", "float"}},
      {.name = "ignore-eos", .type = OptionType::kFlag, .help = "go on after an end token", .default_value = false},
  };
  command.run = run;
  command.example = "pare run model.pare -p \"Once upon a time\" -n 100 --temp 0.8 --top-p 0.9";
  return command;
}

}  // namespace pare
