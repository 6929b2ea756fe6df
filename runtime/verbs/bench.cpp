// `pare bench`: prefill and decode speed of a compact file.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <thread>

#include "core/error.h"
#include "runtime/engine.h"
#include "runtime/verbs/cli.h"

namespace pare {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

std::vector<int> parse_threads(const std::string& text) {
  std::vector<int> counts;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (true) {
    int count = 0;
    const auto [next, error] = std::from_chars(at, end, count);
    if (error != std::errc() || count < 1 || count > 1024 || (next != end && *next != ',')) {
      throw usage_error("-t", "numbers of threads separated by commas, such as 1,2", "\"" + text + "\"");
    }
    counts.push_back(count);
    if (next == end) return counts;
    at = next + 1;
  }
}

struct Spread {
  double median = 0, low = 0, high = 0;
};
Spread spread(std::vector<double> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  return {n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2, values.front(), values.back()};
}

Json to_json(const Spread& s) {
  return Json{{"median", s.median}, {"min", s.low}, {"max", s.high}};
}

Json bench(const Options& options, Context& context) {
  const auto prompt = options.get<std::int64_t>("prompt"), decode = options.get<std::int64_t>("tokens");
  const auto repeats = options.get<std::int64_t>("repeats");
  if (prompt == 0 && decode == 0) throw usage_error("pare bench", "-p or -n above 0", "nothing to measure");
  std::vector<int> thread_counts;
  if (options.has("threads-list")) {
    if (context.threads > 0) throw usage_error("pare bench", "either -t or --threads", "both");
    thread_counts = parse_threads(options.get<std::string>("threads-list"));
  } else {
    thread_counts.push_back(context.threads);
  }
  const std::string path = options.get<std::string>("model");
  Json results = Json::array();
  std::uint64_t file_bytes = 0, tensor_bytes = 0;
  std::string kernels;
  for (const int threads : thread_counts) {
    EngineOptions engine_options;
    engine_options.threads = threads;
    engine_options.int8_activations = options.get<std::string>("act") == "int8";
    const auto engine = Engine::open(path, engine_options);
    const ModelConfig& config = engine->config();
    file_bytes = engine->file().file_bytes();
    tensor_bytes = engine->file().tensor_bytes();
    kernels = engine->options().kernels;
    if (std::max(prompt, decode) > config.max_position_embeddings) {
      throw input_error(path, fmt::format("-p and -n at most {} (context)", config.max_position_embeddings),
                        std::to_string(std::max(prompt, decode)));
    }
    // Speed does not depend on the ids as long as they differ.
    std::vector<std::int32_t> ids(static_cast<std::size_t>(std::max<std::int64_t>({prompt, decode, 1})));
    for (std::size_t i = 0; i < ids.size(); ++i) {
      ids[i] = static_cast<std::int32_t>((static_cast<std::uint64_t>(i) * 2654435761u + context.seed) %
                                         static_cast<std::uint64_t>(config.vocab_size));
    }
    std::vector<float> logits(static_cast<std::size_t>(config.vocab_size));
    Session session(engine);
    std::vector<double> prefill_rates, decode_rates;
    context.progress->begin(fmt::format("bench, {} threads", engine->options().threads), repeats + 1);
    for (std::int64_t r = 0; r <= repeats; ++r) {  // the first is a warm-up
      throw_if_interrupted("bench", "");
      if (prompt > 0) {
        session.reset();
        const auto begin = Clock::now();
        session.feed({ids.data(), static_cast<std::size_t>(prompt)});
        session.logits(prompt - 1, 1, logits.data());
        if (r > 0) prefill_rates.push_back(static_cast<double>(prompt) / seconds_since(begin));
      }
      if (decode > 0) {
        session.reset();
        const auto begin = Clock::now();
        for (std::int64_t i = 0; i < decode; ++i) {
          session.feed({ids.data() + i, 1});
          session.logits(0, 1, logits.data());
        }
        if (r > 0) decode_rates.push_back(static_cast<double>(decode) / seconds_since(begin));
      }
      context.progress->update(r + 1);
    }
    context.progress->end();
    const Spread p = spread(prefill_rates), d = spread(decode_rates);
    results.push_back(Json{{"threads", engine->options().threads},
                           {"prefill_tokens_per_second", to_json(p)},
                           {"decode_tokens_per_second", to_json(d)},
                           {"decode_gigabytes_per_second", d.median * static_cast<double>(tensor_bytes) * 1e-9},
                           {"resident_bytes", resident_bytes()}});
  }
  std::string table =
      fmt::format("{}: {:.1f} MB of weights, kernels {}, {} activations, median of {} (lowest to highest)\n", path,
                  static_cast<double>(tensor_bytes) * 1e-6, kernels, options.get<std::string>("act"), repeats);
  table +=
      fmt::format("{:>7}  {:>32}  {:>32}  {:>12}  {:>13}\n", "threads", fmt::format("prefill {} [tokens/s]", prompt),
                  fmt::format("decode {} [tokens/s]", decode), "read [GB/s]", "resident [MB]");
  for (const Json& row : results) {
    const auto cell = [&](const char* key) {
      const Json& s = row.at(key);
      return fmt::format("{:.1f} ({:.1f} to {:.1f})", s.at("median").get<double>(), s.at("min").get<double>(),
                         s.at("max").get<double>());
    };
    table += fmt::format("{:>7}  {:>32}  {:>32}  {:>12.2f}  {:>13.1f}\n", row.at("threads").get<int>(),
                         cell("prefill_tokens_per_second"), cell("decode_tokens_per_second"),
                         row.at("decode_gigabytes_per_second").get<double>(),
                         static_cast<double>(row.at("resident_bytes").get<std::uint64_t>()) * 1e-6);
  }
  context.print(table);
  return Json{{"file", path},
              {"file_bytes", file_bytes},
              {"tensor_bytes", tensor_bytes},
              {"kernels", kernels},
              {"activations", options.get<std::string>("act")},
              {"prompt", prompt},
              {"tokens", decode},
              {"repeats", repeats},
              {"results", results},
              {"peak_resident_bytes", peak_resident_bytes()}};
}

}  // namespace

Command bench_command() {
  Command command;
  command.name = "bench";
  command.summary = "Measure prefill and decode speed of a compact file";
  command.options = {
      {.name = "model", .type = OptionType::kPath, .help = "compact file or GGUF file", .required = true, .positional = true},
      {.name = "prompt",
       .type = OptionType::kInteger,
       .help = "tokens of the prefill test, 0: none",
       .default_value = 512,
       .minimum = 0,
       .short_name = "p"},
      {.name = "tokens",
       .type = OptionType::kInteger,
       .help = "tokens of the decode test, 0: none",
       .default_value = 64,
       .minimum = 0,
       .short_name = "n"},
      {.name = "threads-list",
       .type = OptionType::kText,
       .help = "numbers of threads to measure, such as 1,2; default: --threads",
       .short_name = "t"},
      {.name = "repeats",
       .type = OptionType::kInteger,
       .help = "repetitions after one warm-up",
       .default_value = 3,
       .minimum = 1,
       .short_name = "r"},
      {.name = "act",
       .type = OptionType::kText,
       .help = "activations that meet quantized weights; w8a8 linears round theirs either way",
       .default_value = "int8",
       .choices = {"int8", "float"}},
  };
  command.run = bench;
  command.example = "pare bench model.pare -p 512 -n 64 -t 1,2";
  return command;
}

}  // namespace pare
