#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/error.h"
#include "runtime/engine.h"

namespace pare {
namespace {

std::uint64_t rotate_left(std::uint64_t x, int k) {
  return (x << k) | (x >> (64 - k));
}

// xoshiro256** (Blackman and Vigna), public domain algorithm; uniform in [0, 1) with 53 bits.
double next_uniform(std::uint64_t (&s)[4]) {
  const std::uint64_t result = rotate_left(s[1] * 5, 7) * 9;
  const std::uint64_t t = s[1] << 17;
  s[2] ^= s[0];
  s[3] ^= s[1];
  s[1] ^= s[2];
  s[0] ^= s[3];
  s[2] ^= t;
  s[3] = rotate_left(s[3], 45);
  return static_cast<double>(result >> 11) * 0x1p-53;
}

}  // namespace

Sampler::Sampler(const SamplerOptions& options) : options_(options) {
  if (!(options.temperature >= 0) || !std::isfinite(options.temperature)) {
    throw usage_error("temperature", "a number >= 0", std::to_string(options.temperature));
  }
  if (!(options.top_p > 0 && options.top_p <= 1)) {
    throw usage_error("top-p", "a number above 0 and at most 1", std::to_string(options.top_p));
  }
  greedy_ = !std::isfinite(1.0 / options.temperature);  // zero, or too small to divide by
  std::uint64_t seed = options.seed;
  for (std::uint64_t& word : state_) {  // splitmix64
    seed += 0x9e3779b97f4a7c15u;
    std::uint64_t z = seed;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    word = z ^ (z >> 31);
  }
}

double Choices::probability(std::int32_t id) const {
  const auto found = std::find_if(all.begin(), all.end(), [&](const Choice& choice) { return choice.id == id; });
  return found == all.end() ? 0 : found->weight / total;
}

std::int32_t Sampler::operator()(std::span<const float> logits) {
  weigh(logits, choices_);
  return draw(choices_);
}

void Sampler::weigh(std::span<const float> logits, Choices& out) const {
  if (logits.empty()) throw failure("logits", "at least one", "none");
  std::size_t best = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i]) || logits[i] == INFINITY) {
      throw failure("logits", "numbers", "a value that is not finite at token " + std::to_string(i),
                    "the weights hold NaN or overflow; check them with `pare verify`");
    }
    if (logits[i] > logits[best]) best = i;
  }
  if (logits[best] == -INFINITY) throw failure("logits", "a token that is possible", "minus infinity for every token");
  const double peak = logits[best], inverse = 1.0 / options_.temperature;
  out.all.clear();
  out.total = 1;
  if (greedy_) {
    out.all.push_back({1, logits[best], static_cast<std::int32_t>(best)});
    return;
  }
  out.total = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double w = std::exp((logits[i] - peak) * inverse);
    out.all.push_back({w, logits[i], static_cast<std::int32_t>(i)});
    out.total += w;
  }
  // A token below this share, the likeliest apart, cannot belong to the smallest set of tokens that reaches top_p.
  const double floor = options_.top_p < 1 && logits.size() > 1
                           ? (1 - options_.top_p) / static_cast<double>(logits.size() - 1) * out.total
                           : 0;
  std::erase_if(out.all, [&](const Choices::Choice& choice) {
    return choice.id != static_cast<std::int32_t>(best) && (choice.weight < floor || choice.weight == 0);
  });
  if (options_.top_p >= 1) return;
  std::sort(out.all.begin(), out.all.end(), [](const auto& a, const auto& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  });
  double mass = 0;
  std::size_t keep = 0;
  while (keep < out.all.size() && mass < options_.top_p * out.total) mass += out.all[keep++].weight;
  out.all.resize(std::max<std::size_t>(keep, 1));
  out.total = mass;
}

std::int32_t Sampler::draw(const Choices& choices) {
  if (greedy_) return choices.all.front().id;
  double point = uniform() * choices.total;
  for (const auto& [weight, logit, id] : choices.all) {
    point -= weight;
    if (point < 0) return id;
  }
  return choices.all.back().id;
}

double Sampler::uniform() {
  return next_uniform(state_);
}

}  // namespace pare
