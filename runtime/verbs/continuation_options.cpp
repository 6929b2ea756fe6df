// The options of `pare run` by which more than one token comes from a pass, or more than one model has a say.
#include <fmt/format.h>

#include <cstdio>

#include "core/error.h"
#include "runtime/verbs/generate.h"

namespace pare {
namespace {

constexpr std::int64_t kDraftTokens = 8, kLookupTokens = 4;
constexpr std::int64_t kMostDraftTokens = 64;

}  // namespace

std::vector<OptionDecl> continuation_options() {
  return {
      {.name = "draft",
       .type = OptionType::kPath,
       .help = "smaller file with the same tokenizer that guesses ahead; the result stays the model's own: the same "
               "tokens at --temp 0, else the same distribution"},
      {.name = "lookup",
       .type = OptionType::kInteger,
       .help = "guess ahead without a second model: what followed the last N tokens, or fewer, where they stood before",
       .minimum = 1,
       .maximum = 64},
      {.name = "draft-tokens",
       .type = OptionType::kInteger,
       .help = fmt::format("tokens guessed before the model looks, at most [{}; with --lookup {}]", kDraftTokens,
                           kLookupTokens),
       .minimum = 1,
       .maximum = static_cast<double>(kMostDraftTokens)},
      {.name = "draft-confidence",
       .type = OptionType::kNumber,
       .help = "guess on only while the draft gives all its guesses together at least this probability; 0: always",
       .default_value = 0.5,
       .minimum = 0,
       .maximum = 1},
      {.name = "fallback",
       .type = OptionType::kPath,
       .help = "larger file with the same tokenizer that gives the tokens of which the model is unsure"},
      {.name = "threshold",
       .type = OptionType::kNumber,
       .help = "with --fallback: unsure is where the likeliest token has a lower probability",
       .default_value = 0.5,
       .minimum = 0,
       .maximum = 1},
  };
}

void check_continuation_options(const Options& options) {
  const char* place = "pare run";
  for (const auto& [one, other] : {std::pair("draft", "lookup"), {"draft", "fallback"}, {"lookup", "fallback"}}) {
    if (!options.has(one) || !options.has(other)) continue;
    throw usage_error(place, fmt::format("one of --{} and --{}", one, other), "both", "leave one out");
  }
  if (!options.has("fallback")) refuse_unused(options, {"threshold"}, "without --fallback", place);
  if (!options.has("draft")) refuse_unused(options, {"draft-confidence"}, "without --draft", place);
  if (!options.has("draft") && !options.has("lookup"))
    refuse_unused(options, {"draft-tokens"}, "without --draft or --lookup", place);
}

OptionDecl act_option() {
  return {.name = "act",
          .type = OptionType::kText,
          .help = "activations that meet quantized weights; w8a8 linears round theirs either way",
          .default_value = "int8",
          .choices = {"int8", "float"}};
}

EngineOptions engine_options(const Options& options, const Context& context) {
  EngineOptions out;
  out.threads = context.threads;
  out.int8_activations = options.get<std::string>("act") == "int8";
  out.kv = options.get_or<std::string>("kv", "");
  return out;
}

std::unique_ptr<Continuation> make_continuation(const std::shared_ptr<const Engine>& engine, Sampler& sampler,
                                                const std::vector<std::int64_t>& ends, const Options& options,
                                                const Context& context) {
  if (options.has("fallback")) {
    const auto large = Engine::open(options.get<std::string>("fallback"), engine_options(options, context));
    require_same_tokens(*engine, *large);
    return continue_with_fallback(engine, large, options.get<double>("threshold"), sampler);
  }
  DraftOptions drafting;
  drafting.ends = ends;
  if (options.has("lookup")) {
    drafting.tokens = options.get_or<std::int64_t>("draft-tokens", kLookupTokens);
    return continue_by(engine, sampler, ends, lookup_drafter(options.get<std::int64_t>("lookup"), drafting));
  }
  if (!options.has("draft")) return continue_by(engine, sampler, ends);
  const auto draft = Engine::open(options.get<std::string>("draft"), engine_options(options, context));
  require_same_tokens(*engine, *draft);
  const std::int64_t reach = draft->config().max_position_embeddings;
  if (reach < engine->config().max_position_embeddings && !context.quiet)
    std::fprintf(stderr, "the draft guesses up to position %lld, where its context ends\n",
                 static_cast<long long>(reach));
  drafting.tokens = options.get_or<std::int64_t>("draft-tokens", kDraftTokens);
  drafting.confidence = options.get<double>("draft-confidence");
  return continue_by(engine, sampler, ends, model_drafter(draft, engine->config().vocab_size, sampler, drafting));
}

std::string counts_in_words(const Json& counts) {
  if (counts.is_null()) return {};
  const auto number = [&](const char* name) { return counts.at(name).get<std::int64_t>(); };
  if (counts.contains("handed_over")) {
    const Json& share = counts.at("handed_over_share");
    return fmt::format("; {} of {} tokens by the larger model ({:.1f} %), in {} passes over {} positions",
                       number("handed_over"), number("tokens"), share.is_null() ? 0 : 100 * share.get<double>(),
                       number("large_passes"), number("large_positions"));
  }
  std::string text = fmt::format("; {} passes for {} tokens", number("passes"), number("tokens"));
  if (number("passes") > 0) text += fmt::format(" ({:.2f} a pass)", counts.at("tokens_per_pass").get<double>());
  text += fmt::format(", {} of {} guesses stood", number("accepted"), number("drafted"));
  if (number("drafted") > 0) text += fmt::format(" ({:.1f} %)", 100 * counts.at("accepted_of_drafted").get<double>());
  return text;
}

}  // namespace pare
