#include "quantize/allocate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "core/error.h"
#include "quantize/scales.h"
#include "tests/quantize/tiny_model.h"

namespace pare {
namespace {

using testing::folder_hash;
using testing::run_quantize;
using testing::ScratchFolder;
using testing::tiny_config;
using testing::write_tiny;

using Instance = std::vector<std::vector<BitChoice>>;

Instance random_instance(std::mt19937_64& random, std::size_t tensors) {
  std::uniform_real_distribution<double> uniform(0.1, 1.0);
  Instance instance(tensors);
  for (auto& choices : instance) {
    const double size = std::floor(1 + 9 * uniform(random)), cost = uniform(random);
    for (const double bits : {3.5, 4.125, 4.5, 8.5})
      choices.push_back({Codec{}, bits * size, cost * std::exp2(-2 * bits * (0.9 + 0.2 * uniform(random)))});
  }
  return instance;
}

struct Sum {
  double bits = 0, cost = 0;
};
Sum sum_of(const Instance& instance, const std::vector<std::size_t>& chosen) {
  Sum sum;
  for (std::size_t t = 0; t < instance.size(); ++t) {
    sum.bits += instance[t][chosen[t]].bits;
    sum.cost += instance[t][chosen[t]].cost;
  }
  return sum;
}

// Of every combination of choices.
template <class Visit>
void each_combination(const Instance& instance, const Visit& visit) {
  std::vector<std::size_t> chosen(instance.size(), 0);
  for (;;) {
    visit(sum_of(instance, chosen));
    std::size_t t = 0;
    while (t < chosen.size() && ++chosen[t] == instance[t].size()) chosen[t++] = 0;
    if (t == chosen.size()) return;
  }
}

double exhaustive(const Instance& instance, double budget) {
  double best = std::numeric_limits<double>::infinity();
  each_combination(instance, [&](const Sum& sum) {
    if (sum.bits <= budget) best = std::min(best, sum.cost);
  });
  return best;
}

double fewest_bits(const Instance& instance, double limit) {
  double best = std::numeric_limits<double>::infinity();
  each_combination(instance, [&](const Sum& sum) {
    if (sum.cost <= limit * (1 + 1e-9)) best = std::min(best, sum.bits);
  });
  return best;
}

TEST(Allocate, IsTheExhaustiveOptimumWhereAnUpgradeFillsTheBudgetAndCloseElsewhere) {
  std::mt19937_64 random(11);
  double greedy = 0, best = 0;
  for (int trial = 0; trial < 40; ++trial) {
    const Instance instance = random_instance(random, 6);
    double least = 0, most = 0;
    for (const auto& choices : instance) {
      least += choices.front().bits;
      most += choices.back().bits;
    }
    for (const double share : {0.0, 0.1, 0.3, 0.6, 1.0}) {
      const double budget = least + share * (most - least);
      const Sum found = sum_of(instance, choose_bits(instance, budget));
      EXPECT_LE(found.bits, budget * (1 + 1e-9));
      const double optimum = exhaustive(instance, budget);
      EXPECT_GE(found.cost, optimum * (1 - 1e-12));
      greedy += found.cost;
      best += optimum;
      // What was used exactly is a budget that an upgrade fills, unless another one was skipped before.
      const Sum again = sum_of(instance, choose_bits(instance, found.bits));
      EXPECT_LE(again.cost, found.cost * (1 + 1e-12));
      if (share == 0.0 || share == 1.0) {
        EXPECT_NEAR(found.cost, optimum, 1e-12);
      }
    }
  }
  EXPECT_LT(greedy, 1.1 * best);
}

TEST(Allocate, TooFewBitsAreRefused) {
  std::mt19937_64 random(2);
  const Instance instance = random_instance(random, 3);
  double least = 0;
  for (const auto& choices : instance) least += choices.front().bits;
  EXPECT_NO_THROW(choose_bits(instance, least));
  try {
    choose_bits(instance, least - 1);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
  }
}

TEST(Allocate, AGivenCostIsMetWithNearlyTheFewestBits) {
  std::mt19937_64 random(5);
  double greedy = 0, best = 0;
  for (int trial = 0; trial < 40; ++trial) {
    const Instance instance = random_instance(random, 6);
    double most = 0, least = 0;
    for (const auto& choices : instance) {
      most += choices.front().cost;
      least += choices.back().cost;
    }
    for (const double share : {0.0, 0.05, 0.3, 1.0}) {
      const double limit = least + share * (most - least);
      const Sum found = sum_of(instance, choose_cost(instance, limit));
      EXPECT_LE(found.cost, limit * (1 + 1e-9));
      const double fewest = fewest_bits(instance, limit);
      EXPECT_GE(found.bits, fewest * (1 - 1e-12));
      greedy += found.bits;
      best += fewest;
    }
    EXPECT_THROW(choose_cost(instance, least / 2), Error);
  }
  EXPECT_LT(greedy, 1.05 * best);
}

// What a codec costs by the second-order estimate against the KL when this tensor alone is replaced.
TEST(Allocate, EstimatesFollowTheMeasuredDivergence) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config(2), "float32", [](Decoder& decoder) {
    for (auto& item : decoder->named_parameters())
      if (item.value().dim() == 2) item.value().mul_(4.0);
  });
  const Json result = run_quantize({{"model", (scratch / "in").string()},
                                    {"out", (scratch / "out").string()},
                                    {"random-tokens", true},
                                    {"samples", 64},
                                    {"context", 32},
                                    {"bits", 5.0}});
  const Checkpoint out(scratch / "out");
  double bits = 0, weights = 0, log_ratio = 0;
  std::map<std::string, int> codecs;
  const torch::NoGradGuard no_grad;
  Decoder original = load_decoder(Checkpoint(scratch / "in"), torch::kCPU);
  const CalibrationWindows windows = random_windows(96, 64, 32, 99);
  torch::Tensor ids = torch::empty({64, 32}, torch::kLong);
  std::copy(windows.ids.begin(), windows.ids.end(), ids.data_ptr<std::int64_t>());
  const torch::Tensor p = torch::log_softmax(original->forward(ids).to(torch::kDouble), -1);
  const Json& rows = result.at("bits");
  ASSERT_EQ(rows.size(), 14u);
  for (const Json& row : rows) {
    const auto name = row.at("name").get<std::string>();
    EXPECT_EQ(out.codec(name).name(), row.at("codec"));
    ++codecs[row.at("codec")];
    torch::Tensor& weight = original->tensor(name);
    const auto count = static_cast<double>(weight.numel());
    weights += count;
    bits += count * row.at("bits").get<double>();
    const torch::Tensor kept = weight.clone();
    QuantizedTensor codes = round_to_nearest(kept.data_ptr<float>(), kept.size(0), kept.size(1), Codec::parse("q4", "t"),
                                             ScaleRule::kSearched, {}, name, 1);
    codes.unpack(weight.data_ptr<float>());
    const torch::Tensor q = torch::log_softmax(original->forward(ids).to(torch::kDouble), -1);
    weight.copy_(kept);
    const double measured = (p.exp() * (p - q)).sum(-1).mean().item<double>();
    const double estimate = row.at("costs").at("q4g32").get<double>();
    // Errors of v at different tokens meet again in attention, which the estimate, a sum over tokens, does not know.
    EXPECT_GT(estimate, measured / 8) << name;
    EXPECT_LT(estimate, measured * 4) << name;
    log_ratio += std::log(estimate / measured) / 14;
  }
  EXPECT_LT(std::fabs(log_ratio), std::log(1.7));
  EXPECT_LE(bits, 5.0 * weights);
  EXPECT_GT(bits, 4.6 * weights);
  EXPECT_GT(codecs.size(), 1u);
  EXPECT_FALSE(fs::exists(scratch / "out" / "quantize.bits.json"));
}

TEST(Allocate, ASmallerDivergenceTakesMoreBits) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config(2), "float32", [](Decoder& decoder) {
    for (auto& item : decoder->named_parameters())
      if (item.value().dim() == 2) item.value().mul_(4.0);
  });
  double bits = 0;
  for (const double kl : {1.0, 0.02, 0.002}) {
    const fs::path out = scratch / ("out" + std::to_string(kl));
    const Json result = run_quantize({{"model", (scratch / "in").string()}, {"out", out.string()}, {"random-tokens", true},
                                      {"samples", 16}, {"context", 32}, {"kl", kl}});
    double sum = 0, cost = 0;
    for (const Json& row : result.at("bits")) {
      sum += row.at("bits").get<double>();
      cost += row.at("costs").at(row.at("codec").get<std::string>()).get<double>();
    }
    EXPECT_LE(cost, kl);
    EXPECT_GT(sum, bits) << kl;
    bits = sum;
  }
}

TEST(Allocate, CodecsThatAreNoChoiceAreRefused) {
  for (const char* name : {"q4a", "q4m", "q2", "w8a8"})
    EXPECT_THROW(require_choices(Codec::parse(name, "test")), Error) << name;
  for (const char* name : {"q3g64", "q4", "q4g128", "q8", "q8c"}) require_choices(Codec::parse(name, "test"));
}

TEST(Allocate, SameBytesAtAnyThreadCount) {
  ScratchFolder scratch;
  write_tiny(scratch / "in", tiny_config(2), "bfloat16");
  Json given = {{"model", (scratch / "in").string()}, {"random-tokens", true}, {"samples", 9}, {"context", 32},
                {"bits", 4.8}};
  given["out"] = (scratch / "one").string();
  run_quantize(given, 1);
  given["out"] = (scratch / "three").string();
  run_quantize(given, 3);
  EXPECT_EQ(folder_hash(scratch / "one"), folder_hash(scratch / "three"));
}

}  // namespace
}  // namespace pare
