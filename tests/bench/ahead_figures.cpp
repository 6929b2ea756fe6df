// What guessing ahead and falling back stand on, as one JSON object on stdout; tests/bench/ahead.py runs it.
//
//   ahead_figures passes FILE ROUNDS        processor time of a pass over 1 to 9 tokens with all their logits, one
//                                           thread, behind 64 positions; rounds are interleaved
//   ahead_figures runs MODEL DRAFT TOKENS ROUNDS TEXT...   every way to continue the first 240 bytes of each text by
//                                           TOKENS: processor time behind the first token, one thread, rounds
//                                           interleaved; fails where greedy tokens are not those of the plain way
//   ahead_figures curve SMALL LARGE WINDOWS TEXT...   next-token figures of `run SMALL --fallback LARGE --threshold T`
//                                           on given text, for thresholds from 0 to 1
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "core/corpus.h"
#include "core/json.h"
#include "runtime/continuation.h"

namespace pare {
namespace {

double processor_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

std::shared_ptr<const Engine> open_alone(const char* file) {
  EngineOptions options;
  options.threads = 1;
  return Engine::open(file, options);
}

Json passes(const char* file, int rounds) {
  constexpr std::int64_t kMost = 9, kDepth = 64;
  const auto engine = open_alone(file);
  Session session(engine);
  const auto id = [&](std::int64_t i) { return static_cast<std::int32_t>(i * 7919 % engine->config().vocab_size); };
  std::vector<std::int32_t> ids;
  for (std::int64_t i = 0; i < kDepth + kMost; ++i) ids.push_back(id(i + 1));
  session.feed(std::span(ids).first(kDepth));
  std::vector<float> logits(static_cast<std::size_t>(kMost * engine->config().vocab_size));
  std::vector<std::vector<double>> seconds(kMost);
  for (int round = 0; round < rounds; ++round) {
    for (std::int64_t count = 1; count <= kMost; ++count) {
      const double begun = processor_seconds();
      session.feed(std::span(ids).subspan(kDepth, static_cast<std::size_t>(count)));
      session.logits(0, count, logits.data());
      session.truncate(kDepth);
      seconds[static_cast<std::size_t>(count - 1)].push_back(processor_seconds() - begun);
    }
  }
  Json out = Json::array();
  double one = 0;
  for (auto& each : seconds) {
    std::sort(each.begin(), each.end());
    const double median = each[each.size() / 2];
    if (out.empty()) one = median;
    out.push_back({{"tokens", out.size() + 1}, {"seconds", median}, {"of_one", median / one}});
  }
  return out;
}

struct Way {
  std::string name;
  bool lookup = false;
  DraftOptions options;  // no tokens: plain
};
std::vector<Way> all_ways() {
  std::vector<Way> ways = {{"plain", false, {0, 0, {}}}};
  const auto guesses = [](std::int64_t count) { return std::to_string(count) + (count == 1 ? " guess" : " guesses"); };
  for (const std::int64_t tokens : {1, 2, 3, 4, 6, 8})
    ways.push_back({"draft, " + guesses(tokens), false, {tokens, 0, {}}});
  for (int tenths = 1; tenths <= 9; tenths += 2)
    ways.push_back({"draft, while all stand with 0." + std::to_string(tenths), false, {8, tenths / 10.0, {}}});
  for (const std::int64_t tokens : {1, 2, 4, 8})
    ways.push_back({"look-up of 3, " + guesses(tokens), true, {tokens, 0, {}}});
  return ways;
}

// Sums of one way over all prompts.
struct Spent {
  std::vector<double> seconds;  // by round
  double tokens = 0, passes = 0, drafted = 0, tested = 0, accepted = 0, draft_passes = 0;
};

Json runs(const char* model_file, const char* draft_file, std::int64_t tokens, int rounds,
          const std::vector<fs::path>& texts) {
  const auto model = open_alone(model_file), draft = open_alone(draft_file);
  require_same_tokens(*model, *draft);
  std::vector<std::vector<std::int32_t>> prompts;
  for (const fs::path& text : texts) prompts.push_back(model->tokenizer().encode(read_text(text).substr(0, 240)));
  const std::vector<Way> ways = all_ways();
  Json out = Json::array();
  for (const double temperature : {0.0, 0.8}) {
    std::vector<Spent> spent(ways.size());
    std::vector<std::vector<std::int32_t>> plain(prompts.size());
    for (int round = 0; round < rounds; ++round) {
      for (std::size_t w = 0; w < ways.size(); ++w) {
        const Way& way = ways[w];
        Sampler sampler({temperature, temperature > 0 ? 0.95 : 1, static_cast<std::uint64_t>(round)});
        std::unique_ptr<Drafter> drafter;
        if (way.lookup) drafter = lookup_drafter(3, way.options);
        else if (way.options.tokens > 0)
          drafter = model_drafter(draft, model->config().vocab_size, sampler, way.options);
        const auto by = continue_by(model, sampler, {}, std::move(drafter));
        double seconds = 0;
        for (std::size_t i = 0; i < prompts.size(); ++i) {
          by->reset();
          by->feed(prompts[i]);
          std::vector<std::int32_t> got;
          got.push_back(by->next(1).front());
          const double begun = processor_seconds();
          while (static_cast<std::int64_t>(got.size()) < tokens)
            for (const std::int32_t id : by->next(tokens - static_cast<std::int64_t>(got.size()))) got.push_back(id);
          seconds += processor_seconds() - begun;
          if (w == 0) plain[i] = got;
          if (temperature == 0 && got != plain[i]) throw std::runtime_error(way.name + ": other tokens than plain");
          if (const Json counts = by->counts(); !counts.is_null()) {
            spent[w].tokens += counts.at("tokens").get<double>();
            spent[w].passes += counts.at("passes").get<double>();
            spent[w].drafted += counts.at("drafted").get<double>();
            spent[w].tested += counts.at("tested").get<double>();
            spent[w].accepted += counts.at("accepted").get<double>();
            if (counts.contains("draft_passes")) spent[w].draft_passes += counts.at("draft_passes").get<double>();
          }
        }
        spent[w].seconds.push_back(seconds);
      }
    }
    for (std::size_t w = 0; w < ways.size(); ++w) {
      Spent& each = spent[w];
      std::sort(each.seconds.begin(), each.seconds.end());
      out.push_back({{"way", ways[w].name},
                     {"temperature", temperature},
                     {"seconds", each.seconds[each.seconds.size() / 2]},
                     {"tokens", each.tokens},
                     {"passes", each.passes},
                     {"drafted", each.drafted},
                     {"tested", each.tested},
                     {"accepted", each.accepted},
                     {"draft_passes", each.draft_passes}});
    }
  }
  return out;
}

Json curve(const char* small_file, const char* large_file, std::size_t most_windows,
           const std::vector<fs::path>& texts) {
  const auto small = open_alone(small_file), large = open_alone(large_file);
  require_same_tokens(*small, *large);
  const std::int64_t context =
      std::min(small->config().max_position_embeddings, large->config().max_position_embeddings);
  auto windows = make_windows(large->tokenizer(), read_documents(texts, std::nullopt), context, false);
  if (windows.size() > most_windows) windows.resize(most_windows);
  struct Figures {
    std::int64_t handed_over = 0, same = 0;
    double loss = 0, kl = 0;
  };
  std::vector<double> thresholds;
  for (int i = 0; i <= 20; ++i) thresholds.push_back(i / 20.0);
  std::vector<Figures> figures(thresholds.size());
  const auto source = runtime_logits(small), original = runtime_logits(large);
  const auto vocab = static_cast<std::size_t>(std::min(source->vocab_size(), original->vocab_size()));
  std::vector<float> a(static_cast<std::size_t>(source->vocab_size()));
  std::vector<float> b(static_cast<std::size_t>(original->vocab_size()));
  std::int64_t predictions = 0;
  double large_loss = 0;
  const auto logsumexp = [&](const std::vector<float>& logits) {
    const double peak = *std::max_element(logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(vocab));
    double sum = 0;
    for (std::size_t i = 0; i < vocab; ++i) sum += std::exp(logits[i] - peak);
    return peak + std::log(sum);
  };
  const auto best = [&](const std::vector<float>& logits) {
    return std::max_element(logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(vocab)) - logits.begin();
  };
  for (const Window& window : windows) {
    source->begin(window.ids);
    original->begin(window.ids);
    for (auto t = static_cast<std::size_t>(window.first_scored); t < window.ids.size(); ++t) {
      source->logits(static_cast<std::int64_t>(t) - 1, 1, a.data());
      original->logits(static_cast<std::int64_t>(t) - 1, 1, b.data());
      const double la = logsumexp(a), lb = logsumexp(b), confidence = top_probability(std::span(a).first(vocab));
      const auto next = static_cast<std::size_t>(window.ids[t]);
      double kl = 0;
      for (std::size_t i = 0; i < vocab; ++i) kl += std::exp(b[i] - lb) * ((b[i] - lb) - (a[i] - la));
      const bool same = best(a) == best(b);
      for (std::size_t i = 0; i < thresholds.size(); ++i) {
        const bool over = confidence < thresholds[i];
        figures[i].handed_over += over ? 1 : 0;
        figures[i].same += over || same ? 1 : 0;
        figures[i].loss += over ? lb - b[next] : la - a[next];
        figures[i].kl += over ? 0 : kl;
      }
      large_loss += lb - b[next];
      ++predictions;
    }
  }
  if (predictions == 0) throw std::runtime_error("no text");
  const auto n = static_cast<double>(predictions);
  Json rows = Json::array();
  for (std::size_t i = 0; i < thresholds.size(); ++i) {
    rows.push_back({{"threshold", thresholds[i]},
                    {"handed_over", static_cast<double>(figures[i].handed_over) / n},
                    {"top1_as_large", static_cast<double>(figures[i].same) / n},
                    {"loss", figures[i].loss / n},
                    {"kl_from_large", figures[i].kl / n}});
  }
  return {{"predictions", predictions}, {"large_loss", large_loss / n}, {"rows", rows}};
}

}  // namespace
}  // namespace pare

int main(int argc, char** argv) {
  try {
    const std::string mode = argc > 1 ? argv[1] : "";
    pare::Json out;
    if (mode == "passes" && argc == 4 && std::atoi(argv[3]) > 0) {
      out = pare::passes(argv[2], std::atoi(argv[3]));
    } else if (mode == "runs" && argc > 6 && std::atoi(argv[4]) > 1 && std::atoi(argv[5]) > 0) {
      out = pare::runs(argv[2], argv[3], std::atoi(argv[4]), std::atoi(argv[5]), {argv + 6, argv + argc});
    } else if (mode == "curve" && argc > 5 && std::atoi(argv[4]) > 0) {
      out = pare::curve(argv[2], argv[3], static_cast<std::size_t>(std::atoi(argv[4])), {argv + 5, argv + argc});
    } else {
      std::fprintf(stderr, "usage: ahead_figures passes FILE ROUNDS | runs MODEL DRAFT TOKENS ROUNDS TEXT... | "
                   "curve SMALL LARGE WINDOWS TEXT...\n");
      return 2;
    }
    std::printf("%s\n", out.dump().c_str());
    return 0;
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "ahead_figures: %s\n", problem.what());
    return 1;
  }
}
