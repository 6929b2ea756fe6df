#include "prune/depth.h"

#include <algorithm>
#include <numeric>

#include "core/error.h"
#include "prune/measure.h"
#include "prune/scores.h"

namespace pare {
namespace {

// Activations of candidates that advance side by side; more candidates than fit are taken in groups.
constexpr std::uint64_t kStreamBudget = std::uint64_t{1} << 30;

struct Choice {
  int block = 0;                    // index in the original model
  std::vector<int> candidates;      // original indices, in order
  std::vector<double> costs;        // mean KL against the original without that block
  std::vector<double> errors;       // their standard errors over windows
};

Json to_json(const Choice& choice) {
  return {
      {"block", choice.block}, {"candidates", choice.candidates}, {"costs", choice.costs}, {"errors", choice.errors}};
}
Choice from_json(const Json& json, const std::string& place) {
  try {
    return {json.at("block").get<int>(), json.at("candidates").get<std::vector<int>>(),
            json.at("costs").get<std::vector<double>>(), json.at("errors").get<std::vector<double>>()};
  } catch (const Json::exception& problem) {
    throw failure(place, "the choices of an earlier run", problem.what(), "remove this folder and run again");
  }
}

std::uint64_t stream_bytes(const ModelConfig& config, std::int64_t windows, std::int64_t length) {
  return 4 * static_cast<std::uint64_t>(group_tokens(windows, length)) *
         static_cast<std::uint64_t>(config.hidden_size);
}

int group_size(const ModelConfig& config, std::int64_t windows, std::int64_t length) {
  const std::uint64_t fit = kStreamBudget / std::max<std::uint64_t>(1, stream_bytes(config, windows, length));
  return static_cast<int>(std::clamp<std::uint64_t>(fit, 1, 4096));
}

// The blocks `alive` without each one in turn. The activations before a candidate are those of the unchanged model, so
// they are carried once; every candidate of a group then advances through the blocks behind it, each loaded once.
class CostMeter {
 public:
  explicit CostMeter(PruneJob& job)
      : job_(job),
        device_(parse_device(job.options.get<std::string>("device"))),
        groups_(shard_groups(job.windows, device_)),
        head_(job.model, device_),
        rope_(rope_tables(job.model.config(), job.windows.length, device_)),
        side_by_side_(group_size(job.model.config(), job.windows.count, job.windows.length)) {}

  Choice measure(const std::vector<int>& alive, int round, int rounds) {
    const auto count = static_cast<int>(alive.size());
    job_.context.progress->begin("depth " + std::to_string(round + 1) + "/" + std::to_string(rounds),
                                 count * static_cast<std::int64_t>(groups_.size()));
    std::vector<WindowFigures> figures(alive.size());
    std::int64_t done = 0;
    for (const auto& shards : groups_) {
      Stream original = embed_stream(job_.model, shards, device_), prefix = original;
      for (int layer = 0; layer < job_.model.config().num_layers; ++layer) step(layer, {&original});
      for (int first = 0; first < count; first += side_by_side_) {
        const int end = std::min(first + side_by_side_, count);
        std::vector<Stream> candidates;
        candidates.reserve(static_cast<std::size_t>(end - first));
        for (int at = first; at < count; ++at) {
          std::vector<Stream*> moving;
          for (Stream& stream : candidates) moving.push_back(&stream);
          if (at < end) {
            candidates.push_back(prefix);  // skips block `at`
            moving.push_back(&prefix);
          }
          step(alive[static_cast<std::size_t>(at)], moving);
        }
        std::vector<const Stream*> others;
        for (const Stream& stream : candidates) others.push_back(&stream);
        const auto measured = compare_streams(original, head_, others, head_, shards, device_, job_.context.threads);
        for (int at = first; at < end; ++at)
          figures[static_cast<std::size_t>(at)].append(measured[static_cast<std::size_t>(at - first)]);
        job_.context.progress->update(done + end);
      }
      done += count;
    }
    job_.context.progress->end();
    Choice choice;
    choice.candidates = alive;
    for (std::size_t i = 0; i < figures.size(); ++i) {
      const Divergence divergence = figures[i].divergence();
      choice.costs.push_back(
          finite_divergence(divergence.kl, "the model without block " + std::to_string(alive[i])));
      choice.errors.push_back(divergence.kl_error);
    }
    const auto best = std::min_element(choice.costs.begin(), choice.costs.end());  // of equal ones the first
    choice.block = choice.candidates[static_cast<std::size_t>(best - choice.costs.begin())];
    return choice;
  }

 private:
  void step(int layer, const std::vector<Stream*>& streams) {
    advance(job_.model, layer, rope_, streams, device_, job_.context.threads);
  }

  PruneJob& job_;
  torch::Device device_;
  std::vector<std::vector<torch::Tensor>> groups_;
  Head head_;
  RopeTables rope_;
  int side_by_side_;
};

}  // namespace

std::vector<int> choose_blocks(PruneJob& job, int keep, bool report) {
  const int rounds = static_cast<int>(job.model.config().num_layers) - keep;
  const fs::path file = job.state / "depth.json";
  Json choices = fs::exists(file) ? read_json(file) : Json::array();
  std::vector<int> alive(static_cast<std::size_t>(job.model.config().num_layers));
  std::iota(alive.begin(), alive.end(), 0);
  std::unique_ptr<CostMeter> meter;
  for (int round = 0; round < rounds; ++round) {
    Choice choice;
    if (static_cast<std::size_t>(round) < choices.size()) {
      choice = from_json(choices[static_cast<std::size_t>(round)], file.string());
    } else {
      if (!meter) meter = std::make_unique<CostMeter>(job);
      choice = meter->measure(alive, round, rounds);
      choices.push_back(to_json(choice));
      write_text(file, choices.dump());
    }
    std::erase(alive, choice.block);
    for (std::size_t i = 0; report && i < choice.candidates.size(); ++i)
      job.context.report.add({"prune",
                              "trial: mean_kl without block " + std::to_string(choice.candidates[i]) +
                                  (choice.candidates[i] == choice.block ? " (removed)" : "") + ", round " +
                                  std::to_string(round + 1),
                              std::nullopt, choice.costs[i], "nats", choice.errors[i]});
  }
  return alive;
}

std::uint64_t choose_blocks_peak_bytes(const ModelConfig& config, std::int64_t samples, std::int64_t length) {
  const std::int64_t together = std::min<std::int64_t>(group_size(config, samples, length), config.num_layers);
  const auto streams = static_cast<std::uint64_t>((config.has_experts() ? 2 : 1) * together);
  return compare_peak_bytes(config, samples, length, together) + streams * stream_bytes(config, samples, length);
}

double choose_blocks_passes(const ModelConfig& config, std::int64_t keep) {
  double blocks = 0;
  for (std::int64_t count = config.num_layers; count > keep; --count) {
    const auto alive = static_cast<double>(count);
    blocks += static_cast<double>(config.num_layers) + alive * (alive - 1) / 2 + alive;  // the original first
  }
  return blocks / static_cast<double>(config.num_layers);
}

}  // namespace pare
