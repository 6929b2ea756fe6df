#include "quantize/allocate.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <utility>

#include "core/error.h"
#include "quantize/scales.h"

namespace pare {
namespace {

constexpr const char* kChoices[] = {"q3g32", "q4g128", "q4g64", "q4g32", "q8"};

double bits_of(const Codec& codec, std::int64_t rows, std::int64_t cols) {
  return static_cast<double>(codec.bits()) * static_cast<double>(rows * cols) +
         static_cast<double>(codec.group_bits()) * static_cast<double>(rows * codec.groups(cols));
}

std::vector<BitChoice> choices_of(const TensorSpec& spec) {
  const std::int64_t rows = spec.shape[0], cols = spec.shape[1];
  std::vector<BitChoice> choices;
  for (const char* name : kChoices) {
    const Codec codec = Codec::parse(name, "--bits");
    if (codec.fits(cols)) choices.push_back({codec, bits_of(codec, rows, cols), 0});
  }
  const Codec row{CodecKind::kQ8, Codec::kPerRow};
  if (choices.empty()) choices.push_back({row, bits_of(row, rows, cols), 0});
  return choices;
}

double weights_of(const TensorSpec& spec) { return static_cast<double>(spec.shape[0] * spec.shape[1]); }

// Measures every choice of every free tensor on one walk through the original.
class Meter : public BlockVisitor {
 public:
  Meter(const AllocateJob& job, std::map<std::string, std::vector<BitChoice>>& choices)
      : job_(job), choices_(choices) {}

  void compress(int layer, BlockStage stage, std::span<BlockLinear> linears, const InputStatistics& input) override {
    const auto& outputs =
        job_.sensitivity.outputs[static_cast<std::size_t>(layer) * kBlockStages + static_cast<std::size_t>(stage)];
    std::size_t first = 0;
    for (const BlockLinear& linear : linears) {
      const std::size_t own = first;
      first += static_cast<std::size_t>(linear.rows);
      const auto found = choices_.find(linear.name);
      if (found == choices_.end()) continue;
      std::vector<float> unpacked(linear.original.size());
      for (BitChoice& choice : found->second) {
        const Importance importance{nullptr, input.mean_square.data(), false};
        round_to_nearest(linear.original.data(), linear.rows, linear.cols, choice.codec, ScaleRule::kSearched,
                         importance, linear.name, job_.threads)
            .unpack(unpacked.data());
        const std::vector<double> errors = input.hessian.visit([&](const auto* hessian) {
          return row_errors(linear.original.data(), unpacked.data(), linear.rows, linear.cols, hessian, job_.threads);
        });
        for (std::size_t r = 0; r < errors.size(); ++r) choice.cost += 0.5 * outputs[own + r] * errors[r];
      }
    }
  }

 private:
  const AllocateJob& job_;
  std::map<std::string, std::vector<BitChoice>>& choices_;
};

struct Upgrade {
  double gain = 0, bits = 0;  // gain: of cost per bit
  std::size_t tensor = 0, choice = 0;
};

// The cheapest choices in bits, and all steps up the lower convex hulls of cost over bits, the best per bit first.
struct Ladder {
  std::vector<std::size_t> chosen;
  double bits = 0, cost = 0;
  std::vector<Upgrade> upgrades;
};

Ladder ladder_of(const std::vector<std::vector<BitChoice>>& tensors) {
  Ladder ladder;
  ladder.chosen.resize(tensors.size());
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    const auto& choices = tensors[t];
    std::size_t at = 0;
    for (std::size_t c = 1; c < choices.size(); ++c)
      if (std::pair(choices[c].bits, choices[c].cost) < std::pair(choices[at].bits, choices[at].cost)) at = c;
    ladder.chosen[t] = at;
    ladder.bits += choices[at].bits;
    ladder.cost += choices[at].cost;
    for (;;) {  // always the steepest way down
      Upgrade best{0, 0, t, at};
      for (std::size_t c = 0; c < choices.size(); ++c) {
        const double bits = choices[c].bits - choices[at].bits;
        const double gain = bits > 0 ? (choices[at].cost - choices[c].cost) / bits : 0;
        if (gain > best.gain || (gain == best.gain && gain > 0 && bits > best.bits)) best = {gain, bits, t, c};
      }
      if (best.gain <= 0) break;
      ladder.upgrades.push_back(best);
      at = best.choice;
    }
  }
  std::stable_sort(ladder.upgrades.begin(), ladder.upgrades.end(),
                   [](const Upgrade& a, const Upgrade& b) { return a.gain > b.gain; });
  return ladder;
}

}  // namespace

std::vector<std::size_t> choose_bits(const std::vector<std::vector<BitChoice>>& tensors, double budget) {
  Ladder ladder = ladder_of(tensors);
  if (ladder.bits > budget * (1 + 1e-12)) {
    char need[64], have[64];
    std::snprintf(need, sizeof need, "at least %.0f bits in all", ladder.bits);
    std::snprintf(have, sizeof have, "%.0f", budget);
    throw usage_error("--bits", need, have, "the narrowest codecs that these tensors take need that much");
  }
  std::vector<bool> ended(tensors.size(), false);
  for (const Upgrade& upgrade : ladder.upgrades) {
    if (ended[upgrade.tensor]) continue;
    if (ladder.bits + upgrade.bits > budget * (1 + 1e-12)) {
      ended[upgrade.tensor] = true;
      continue;
    }
    ladder.bits += upgrade.bits;
    ladder.chosen[upgrade.tensor] = upgrade.choice;
  }
  return ladder.chosen;
}

std::vector<std::size_t> choose_cost(const std::vector<std::vector<BitChoice>>& tensors, double limit) {
  Ladder ladder = ladder_of(tensors);
  for (const Upgrade& upgrade : ladder.upgrades) {
    if (ladder.cost <= limit) return ladder.chosen;
    ladder.cost -= upgrade.gain * upgrade.bits;
    ladder.chosen[upgrade.tensor] = upgrade.choice;
  }
  if (ladder.cost <= limit * (1 + 1e-9)) return ladder.chosen;
  char need[64], have[64];
  std::snprintf(need, sizeof need, "at least %.2g nats", ladder.cost);
  std::snprintf(have, sizeof have, "%g", limit);
  throw usage_error("--kl", need, have, "the widest codecs are estimated to cost that much");
}

std::vector<std::size_t> free_tensors(const std::vector<TensorPlan>& plan, const Codec& asked) {
  std::vector<std::size_t> free;
  for (std::size_t i = 0; i < plan.size(); ++i)
    if (plan[i].spec.role == TensorRole::kLinear && plan[i].codec && plan[i].asked == asked) free.push_back(i);
  return free;
}

void require_choices(const Codec& asked) {
  if (asked.is_float()) return;  // refused elsewhere
  for (const char* name : kChoices) {
    const Codec choice = Codec::parse(name, "--bits");
    if (choice.kind == asked.kind && !asked.int8_inputs) return;
  }
  throw usage_error("--codec", "with --bits or --kl one of q3, q4 and q8, which they choose from", asked.name(),
                    "leave --codec out");
}

void require_free(const std::vector<std::size_t>& free, const std::string& option) {
  if (free.empty())
    throw usage_error(option, "block linears whose codec is that of --codec", "none", "leave --policy rules out");
}

void require_bits(const std::vector<TensorPlan>& plan, const std::vector<std::size_t>& free, double bits) {
  double least = 0, weights = 0;
  for (const std::size_t i : free) {
    const std::vector<BitChoice> choices = choices_of(plan[i].spec);
    least += std::min_element(choices.begin(), choices.end(),
                              [](const BitChoice& a, const BitChoice& b) { return a.bits < b.bits; })
                 ->bits;
    weights += weights_of(plan[i].spec);
  }
  if (least <= bits * weights * (1 + 1e-12)) return;
  char need[64], have[64];
  std::snprintf(need, sizeof need, "at least %.3f", std::ceil(1000 * least / weights) / 1000);
  std::snprintf(have, sizeof have, "%g", bits);
  throw usage_error("--bits", need, have, "the narrowest codecs that these tensors take need that much");
}

Json allocate_bits(const AllocateJob& job, const std::vector<std::size_t>& free, std::vector<TensorPlan>& plan,
                   Context& context) {
  std::map<std::string, std::vector<BitChoice>> measured;
  double weights = 0;
  for (const std::size_t i : free) {
    weights += weights_of(plan[i].spec);
    measured[plan[i].spec.name] = choices_of(plan[i].spec);
  }
  Meter meter(job, measured);
  WalkOptions walk;
  walk.device = job.device;
  walk.threads = job.threads;
  walk.hessian = true;
  walk.original_stream = false;
  walk.token_weights = &job.sensitivity;
  walk.spill = job.spill;
  walk_blocks(job.model, job.windows, walk, context, meter);

  std::vector<std::vector<BitChoice>> tensors;
  for (const std::size_t i : free) tensors.push_back(measured.at(plan[i].spec.name));
  const std::vector<std::size_t> chosen = job.bits ? choose_bits(tensors, *job.bits * weights) : choose_cost(tensors, *job.kl);
  Json rows = Json::array();
  for (std::size_t t = 0; t < free.size(); ++t) {
    const BitChoice& choice = tensors[t][chosen[t]];
    TensorPlan& tensor = plan[free[t]];
    tensor.codec = tensor.asked = choice.codec;
    Json costs = Json::object();
    for (const BitChoice& other : tensors[t]) costs[other.codec.name()] = other.cost;
    rows.push_back({{"name", tensor.spec.name},
                    {"codec", choice.codec.name()},
                    {"bits", choice.bits / weights_of(tensor.spec)},
                    {"costs", costs}});
  }
  return rows;
}

}  // namespace pare
