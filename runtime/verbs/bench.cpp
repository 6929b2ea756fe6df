// `pare bench`: prefill and decode speed of a compact file, and how near they are to what the machine can do.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>

#include "core/error.h"
#include "core/gguf_file.h"
#include "runtime/engine.h"
#include "runtime/kernels.h"
#include "runtime/roofline.h"
#include "runtime/team.h"
#include "runtime/verbs/cli.h"
#include "runtime/verbs/generate.h"

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

// The value that 95 of 100 do not exceed: nearest rank.
double p95(std::vector<double> values) {
  if (values.empty()) return 0;
  const std::size_t rank = (values.size() * 95 + 99) / 100;
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(rank - 1), values.end());
  return values[rank - 1];
}

// What one token costs at least, by the shapes in the file.
struct Work {
  double bytes = 0;           // of weights that decoding one token reads; of experts the share that is chosen
  double block_products = 0;  // weights of the blocks' linears that one token meets
  double head_products = 0;
  double rounded = 0;  // of block_products, those with int8 inputs
};
Work work_of(const Engine& engine) {
  const ModelConfig& config = engine.config();
  Work work;
  for (const CompactTensor& tensor : engine.file().tensors()) {
    const bool embedding = tensor.name == "model.embed_tokens.weight";
    const bool head = tensor.name == "lm_head.weight" || (embedding && config.tie_word_embeddings);
    const bool looked_up = (embedding && !head) || tensor.name == "model.embed_positions.weight";
    if (looked_up) continue;  // a row a token
    double share = 1;
    if (tensor.name.find(".experts.") != std::string::npos)
      share = static_cast<double>(config.experts.per_token) / static_cast<double>(config.experts.count);
    work.bytes += share * static_cast<double>(tensor.payload.size());
    if (tensor.shape.size() != 2) continue;
    const double products = share * static_cast<double>(tensor.shape[0]) * static_cast<double>(tensor.shape[1]);
    (head ? work.head_products : work.block_products) += products;
    const bool rounds = tensor.codec.int8_inputs || (engine.options().int8_activations && !tensor.codec.is_float());
    if (rounds && !head) work.rounded += products;
  }
  return work;
}

Json to_json(const Roofline& roof) {
  const auto json = [](const Peak& peak) { return Json{{"median", peak.median}, {"best", peak.best}}; };
  return Json{{"threads", roof.threads},
              {"read_bytes_per_second", json(roof.read_bytes)},
              {"file_bytes_per_second", json(roof.file_bytes)},
              {"int8_operations_per_second", json(roof.int8_ops)},
              {"float_operations_per_second", json(roof.float_ops)}};
}

struct Plan {
  std::string path;
  std::int64_t prompt = 0, decode = 0, repeats = 0, depth = 0, sequences = 1;
  bool int8_activations = true;
  std::string kv;
};

// The machine's limits at 1 thread, at all of them and at every number asked; `file`: the compact one that is measured.
Json measure_machine(const std::string& kernels, const MappedFile& file, std::vector<int> counts, Context& context) {
  counts.push_back(1);
  counts.push_back(processors());
  std::sort(counts.begin(), counts.end());
  counts.erase(std::unique(counts.begin(), counts.end()), counts.end());
  Json roofs = Json::array();
  context.progress->begin("roofline", static_cast<std::int64_t>(counts.size()));
  for (const int threads : counts) {
    const Roofline roof = measure_roofline(
        kernels, threads, kRooflineBytes, [] { throw_if_interrupted("bench", ""); }, file.bytes());
    roofs.push_back(to_json(roof));
    context.progress->update(static_cast<std::int64_t>(roofs.size()));
  }
  context.progress->end();
  return roofs;
}

// Ids that differ: speed depends on nothing else.
std::vector<std::int32_t> bench_ids(std::int64_t count, std::int64_t vocab, std::uint64_t seed) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<std::int32_t>((static_cast<std::uint64_t>(i) * 2654435761u + seed) %
                                       static_cast<std::uint64_t>(vocab));
  }
  return ids;
}

// One number of threads. The first repetition is a warm-up, but for the time to the first token, which it alone shows.
Json measure(const Plan& plan, int threads, Context& context, Json& about) {
  EngineOptions options;
  options.threads = threads;
  options.int8_activations = plan.int8_activations;
  options.kv = plan.kv;
  const auto start = Clock::now();
  auto engine = Engine::open(plan.path, options);
  std::vector<double> open_seconds{seconds_since(start)};
  const ModelConfig& config = engine->config();
  const std::int64_t most = config.max_position_embeddings;
  // Each by itself: the sum of any two numbers may be none.
  if (plan.prompt > most || plan.depth > most || plan.decode > most - plan.depth) {
    throw input_error(plan.path, fmt::format("-p, and --depth and -n together, at most {} (context)", most),
                      fmt::format("-p {}, --depth {} and -n {}", plan.prompt, plan.depth, plan.decode));
  }
  const auto ids = bench_ids(std::max<std::int64_t>({plan.prompt, plan.depth + plan.decode, 1}), config.vocab_size,
                             context.seed);
  std::vector<float> logits(static_cast<std::size_t>(config.vocab_size * plan.sequences));
  const Work work = work_of(*engine);
  std::vector<double> prefill_rates, decode_rates, token_seconds;
  double first_token = 0;
  std::uint64_t cache_bytes = 0;
  {
    Session session(engine);
    std::vector<Session> more;
    for (std::int64_t i = 1; i < plan.sequences; ++i) more.emplace_back(engine);
    std::vector<Session*> all{&session};
    for (Session& each : more) all.push_back(&each);
    std::vector<std::int32_t> next(all.size());
    context.progress->begin(fmt::format("bench, {} threads", engine->options().threads), plan.repeats + 1);
    Sampler greedy{SamplerOptions{}};
    for (std::int64_t r = 0; r <= plan.repeats; ++r) {
      throw_if_interrupted("bench", "");
      if (plan.prompt > 0 || r == 0) {
        session.reset();
        const auto begin = Clock::now();
        session.feed({ids.data(), static_cast<std::size_t>(std::max<std::int64_t>(plan.prompt, 1))});
        session.logits(std::max<std::int64_t>(plan.prompt, 1) - 1, 1, logits.data());
        if (r > 0) prefill_rates.push_back(static_cast<double>(plan.prompt) / seconds_since(begin));
        if (r == 0) {
          greedy({logits.data(), static_cast<std::size_t>(config.vocab_size)});
          first_token = seconds_since(start);
        }
      }
      if (plan.decode > 0) {
        for (Session* const each : all) {  // every repetition decodes at the same depth
          each->reset();
          for (std::int64_t at = 0; at < plan.depth; at += 512) {
            throw_if_interrupted("bench", "");
            each->feed({ids.data() + at, static_cast<std::size_t>(std::min<std::int64_t>(512, plan.depth - at))});
          }
        }
        const auto begin = Clock::now();
        auto last = begin;
        for (std::int64_t i = 0; i < plan.decode; ++i) {
          for (std::size_t k = 0; k < all.size(); ++k)
            next[k] = ids[(static_cast<std::size_t>(session.position()) + k) % ids.size()];
          Session::feed_each(all, next);
          Session::logits_each(all, logits.data());
          const auto now = Clock::now();
          if (r > 0) token_seconds.push_back(std::chrono::duration<double>(now - last).count());
          last = now;
        }
        if (r > 0) decode_rates.push_back(static_cast<double>(plan.decode * plan.sequences) / seconds_since(begin));
      }
      context.progress->update(r + 1);
    }
    context.progress->end();
    for (const Session* const each : all) cache_bytes += each->cache_bytes();
  }
  for (std::int64_t r = 0; r < plan.repeats; ++r) {
    const auto begin = Clock::now();
    Engine::open(plan.path, options);
    open_seconds.push_back(seconds_since(begin));
  }
  about["kernels"] = engine->options().kernels;
  about["kv"] = engine->options().kv;
  about["file_bytes"] = fs::file_size(engine->path());
  about["tensor_bytes"] = about.at("converted") ? GgufFile(plan.path).tensor_bytes() : engine->file().tensor_bytes();
  about["bytes_per_token"] = work.bytes;
  about["block_weights_per_token"] = work.block_products;
  about["limit"] = work.rounded * 2 > work.block_products ? "int8" : "float";
  const Spread p = spread(prefill_rates), d = spread(decode_rates);
  Json row = {{"threads", engine->options().threads},
              {"open_seconds", to_json(spread(open_seconds))},
              {"first_token_seconds", first_token},
              {"resident_bytes", resident_bytes()},
              {"cache_bytes", cache_bytes}};
  if (plan.prompt > 0) {
    row["prefill_tokens_per_second"] = to_json(p);
    row["prefill_operations_per_second"] = 2 * work.block_products * p.median;
  }
  if (plan.decode > 0) {
    row["decode_tokens_per_second"] = to_json(d);
    // Sequences that are decoded together share the reading.
    row["decode_bytes_per_second"] = work.bytes * d.median / static_cast<double>(plan.sequences);
    row["token_seconds"] = Json{{"median", spread(token_seconds).median}, {"p95", p95(token_seconds)}};
  }
  return row;
}

// Shares of the machine's limits, where they were measured; the limits are the medians.
void add_shares(Json& row, const Json& machine, const std::string& limit) {
  for (const Json& roof : machine) {
    if (roof.at("threads") != row.at("threads")) continue;
    const auto share = [&](const char* value, const std::string& of) {
      return row.at(value).get<double>() / roof.at(of).at("median").get<double>();
    };
    if (row.contains("prefill_operations_per_second"))
      row["prefill_peak_share"] = share("prefill_operations_per_second", limit + "_operations_per_second");
    if (!row.contains("decode_bytes_per_second")) continue;
    row["decode_read_share"] = share("decode_bytes_per_second", "read_bytes_per_second");
    if (roof.at("file_bytes_per_second").at("median").get<double>() > 0)
      row["decode_file_share"] = share("decode_bytes_per_second", "file_bytes_per_second");
  }
}

std::string machine_table(const Json& machine) {
  std::string table = fmt::format("{:>7}  {:>18}  {:>18}  {:>22}  {:>18}   median (best)\n", "threads", "read [GB/s]",
                                  "this file [GB/s]", "int8 [G op/s]", "float [G op/s]");
  for (const Json& roof : machine) {
    const auto cell = [&](const char* key) {
      const Json& peak = roof.at(key);
      if (peak.at("best") == 0.0) return std::string("-");  // this file: of a GGUF file another one is read
      return fmt::format("{:.1f} ({:.1f})", peak.at("median").get<double>() * 1e-9,
                         peak.at("best").get<double>() * 1e-9);
    };
    table +=
        fmt::format("{:>7}  {:>18}  {:>18}  {:>22}  {:>18}\n", roof.at("threads").get<int>(),
                    cell("read_bytes_per_second"), cell("file_bytes_per_second"), cell("int8_operations_per_second"),
                    cell("float_operations_per_second"));
  }
  return table;
}

// "12.3", or "12.3 (45 %)" with a share of the machine's limit.
std::string with_share(const Json& row, const char* value, const char* share) {
  if (!row.contains(value)) return "-";
  const double giga = row.at(value).get<double>() * 1e-9;
  if (!row.contains(share)) return fmt::format("{:.2f}", giga);
  return fmt::format("{:.2f} ({:.0f} %)", giga, 100 * row.at(share).get<double>());
}

// converted: opening made a compact file first.
std::string speed_table(const Json& results, const Plan& plan, bool converted) {
  const auto rate = [](const Json& row, const char* key) {
    if (!row.contains(key)) return std::string("-");
    const Json& s = row.at(key);
    return fmt::format("{:.1f} ({:.1f} to {:.1f})", s.at("median").get<double>(), s.at("min").get<double>(),
                       s.at("max").get<double>());
  };
  std::string table = fmt::format(
      "{:>7}  {:>28}  {:>15}  {:>28}  {:>13}  {:>18}\n", "threads", fmt::format("prefill {} [tokens/s]", plan.prompt),
      "[G op/s]",
      fmt::format("decode {}{}{} [tokens/s]", plan.sequences > 1 ? fmt::format("{} x ", plan.sequences) : "",
                  plan.decode, plan.depth > 0 ? fmt::format(" at {}", plan.depth) : ""),
      "[GB/s]", plan.sequences > 1 ? "step [ms] (p95)" : "token [ms] (p95)");
  for (const Json& row : results) {
    const std::string token =
        row.contains("token_seconds")
            ? fmt::format("{:.2f} ({:.2f})", row.at("token_seconds").at("median").get<double>() * 1e3,
                          row.at("token_seconds").at("p95").get<double>() * 1e3)
            : "-";
    table += fmt::format(
        "{:>7}  {:>28}  {:>15}  {:>28}  {:>13}  {:>18}\n", row.at("threads").get<int>(),
        rate(row, "prefill_tokens_per_second"), with_share(row, "prefill_operations_per_second", "prefill_peak_share"),
        rate(row, "decode_tokens_per_second"), with_share(row, "decode_bytes_per_second", "decode_read_share"), token);
  }
  table += fmt::format("{:>7}  {:>28}  {:>15}  {:>28}  {:>13}\n", "threads",
                       converted ? "convert and open [ms]" : "open [ms]", "first token [s]", "key/value cache [MB]",
                       "resident [MB]");
  for (const Json& row : results) {
    const Json& open = row.at("open_seconds");
    table += fmt::format("{:>7}  {:>28}  {:>15.3f}  {:>28.1f}  {:>13.1f}\n", row.at("threads").get<int>(),
                         fmt::format("{:.1f} ({:.1f} to {:.1f})", open.at("median").get<double>() * 1e3,
                                     open.at("min").get<double>() * 1e3, open.at("max").get<double>() * 1e3),
                         row.at("first_token_seconds").get<double>(),
                         static_cast<double>(row.at("cache_bytes").get<std::uint64_t>()) * 1e-6,
                         static_cast<double>(row.at("resident_bytes").get<std::uint64_t>()) * 1e-6);
  }
  return table;
}

Json bench(const Options& options, Context& context) {
  Plan plan;
  plan.path = options.get<std::string>("model");
  plan.prompt = options.get<std::int64_t>("prompt");
  plan.decode = options.get<std::int64_t>("tokens");
  plan.repeats = options.get<std::int64_t>("repeats");
  plan.depth = options.get<std::int64_t>("depth");
  plan.sequences = options.get<std::int64_t>("sequences");
  plan.int8_activations = options.get<std::string>("act") == "int8";
  plan.kv = options.get_or<std::string>("kv", "");
  if (plan.prompt == 0 && plan.decode == 0) throw usage_error("pare bench", "-p or -n above 0", "nothing to measure");
  if (plan.decode == 0) refuse_unused(options, {"depth", "sequences"}, "without -n", "pare bench");
  std::vector<int> thread_counts;
  if (options.has("threads-list")) {
    if (context.threads > 0) throw usage_error("pare bench", "either -t or --threads", "both");
    thread_counts = parse_threads(options.get<std::string>("threads-list"));
  } else {
    thread_counts.push_back(context.threads > 0 ? context.threads : processors());
  }
  Json machine = Json::array();
  if (options.get<bool>("roofline")) {
    // A file that is none should not cost the measurement.
    if (GgufFile::is_gguf(plan.path))
      GgufFile{plan.path};
    else
      CompactFile{plan.path};
    const MappedFile file = GgufFile::is_gguf(plan.path) ? MappedFile() : MappedFile(plan.path);
    machine = measure_machine(choose_kernels("").name, file, thread_counts, context);
    context.print(machine_table(machine));
  }
  Json results = Json::array();
  Json out = {{"file", plan.path},          {"activations", options.get<std::string>("act")},
              {"prompt", plan.prompt},      {"tokens", plan.decode},
              {"repeats", plan.repeats},    {"depth", plan.depth},
              {"sequences", plan.sequences}, {"converted", GgufFile::is_gguf(plan.path)}};
  for (const int threads : thread_counts) {
    results.push_back(measure(plan, threads, context, out));
    add_shares(results.back(), machine, out.at("limit").get<std::string>());
  }
  constexpr const char* kTitle =
      "{}: {:.1f} MB read a token, kernels {}, {} activations, {} cache, median of {} (lowest to highest)\n";
  context.print(fmt::format(kTitle, plan.path, out.at("bytes_per_token").get<double>() * 1e-6,
                            out.at("kernels").get<std::string>(), options.get<std::string>("act"),
                            out.at("kv").get<std::string>(), plan.repeats) +
                speed_table(results, plan, out.at("converted").get<bool>()));
  out["machine"] = machine;
  out["results"] = results;
  out["peak_resident_bytes"] = peak_resident_bytes();
  return out;
}

}  // namespace

Command bench_command() {
  Command command;
  command.name = "bench";
  command.summary = "Measure prefill and decode speed of a compact file or a GGUF file";
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
      {.name = "depth",
       .type = OptionType::kInteger,
       .help = "tokens that the cache holds when each decode test begins",
       .default_value = 0,
       .minimum = 0},
      {.name = "sequences",
       .type = OptionType::kInteger,
       .help = "sequences that are decoded together, each of -n tokens",
       .default_value = 1,
       .minimum = 1,
       .maximum = static_cast<double>(Session::kMostFedTogether)},
      {.name = "roofline",
       .type = OptionType::kFlag,
       .help = "measure the machine first (512 MiB of memory): reading, also of this file, int8 and float arithmetic; print "
               "shares of it",
       .default_value = false},
      act_option(),
      kv_option(),
  };
  command.run = bench;
  command.example = "pare bench model.pare -p 512 -n 64 -t 1,2 --roofline";
  return command;
}

}  // namespace pare
