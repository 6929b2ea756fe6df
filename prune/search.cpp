#include "prune/search.h"

#include <algorithm>
#include <map>

#include "core/arch/arch.h"
#include "core/error.h"
#include "prune/measure.h"

namespace pare {
namespace {

constexpr int kFinalists = 3;
constexpr int kLevels = 4;  // of each thing, evenly between all and half of it

std::int64_t parameters(const ModelConfig& config, const Shape& shape) {
  return parameter_count(cut_config(config, shape));
}

// The shape with what `axis` makes smaller of the model's own.
Shape joined(const Shape& own, Shape shape, const Shape& axis) {
  for (std::int64_t Shape::*part :
       {&Shape::layers, &Shape::heads, &Shape::kv_heads, &Shape::ffn, &Shape::hidden, &Shape::experts})
    if (axis.*part != own.*part) shape.*part = axis.*part;
  return shape;
}

// `levels` values from just below `all` to half of it, multiples of `step` and at least `least`.
std::vector<std::int64_t> levels(std::int64_t all, std::int64_t step, std::int64_t least) {
  std::vector<std::int64_t> out;
  for (int level = 1; level <= kLevels; ++level) {
    const std::int64_t value = (all * (2 * kLevels - level) / (2 * kLevels) + step / 2) / step * step;
    if (value < all && value >= least && (out.empty() || value < out.back())) out.push_back(value);
  }
  return out;
}

struct Candidate {
  Shape shape;
  double cost = 0;  // expected
  std::int64_t count = 0;
};

// Every combination, with the sum of the costs of its parts (0 where `costs` is empty).
std::vector<Candidate> combinations(const ModelConfig& config, const std::vector<std::vector<Shape>>& axes,
                                    const std::vector<std::vector<double>>& costs) {
  const Shape own = shape_of(config);
  std::vector<Candidate> all = {{own, 0, 0}};
  for (std::size_t a = 0; a < axes.size(); ++a) {
    const std::size_t before = all.size();
    for (std::size_t i = 0; i < before; ++i)
      for (std::size_t k = 0; k < axes[a].size(); ++k)
        all.push_back({joined(own, all[i].shape, axes[a][k]), all[i].cost + (costs.empty() ? 0 : costs[a][k]), 0});
  }
  return all;
}

std::vector<Candidate> within(const ModelConfig& config, std::int64_t multiple, std::int64_t budget,
                              const std::vector<Candidate>& all) {
  std::vector<Candidate> out;
  for (Candidate candidate : all) {
    if (!shape_problems(config, candidate.shape, multiple).empty()) continue;
    candidate.count = parameters(config, candidate.shape);
    if (candidate.count <= budget) out.push_back(candidate);
  }
  return out;
}

class Searcher {
 public:
  Searcher(PruneJob& job, const CutPlan& plan) : job_(job), plan_(plan), file_(job.state / "search.json") {
    if (fs::exists(file_)) known_ = read_json(file_);
  }

  double divergence(const Shape& shape) {
    const std::string key = shape.in_words();
    if (known_.contains(key)) return known_.at(key).get<double>();
    job_.context.progress->note("Measuring " + key);
    PruneJob trial{job_.model,    job_.options, job_.context, job_.windows, job_.state / "trial",
                   job_.state / "trial.state", job_.dtype,   job_.spill};
    for (const fs::path& folder : {trial.work, trial.state}) {
      fs::remove_all(folder);
      fs::create_directories(folder);
    }
    CutPlan plan = plan_;
    plan.shape = shape;
    plan.report = false;
    choose_globals(job_, plan);
    write_cut(trial, plan);
    double kl = 0;
    {
      const Checkpoint cut(trial.work);
      kl = compare_models(job_.model, cut, job_.windows, parse_device(job_.options.get<std::string>("device")),
                          job_.context)
               .kl;
    }
    for (const fs::path& folder : {trial.work, trial.state}) fs::remove_all(folder);
    known_[key] = kl;
    write_text(file_, known_.dump());
    return kl;
  }

 private:
  PruneJob& job_;
  const CutPlan& plan_;
  fs::path file_;
  Json known_ = Json::object();
};

}  // namespace

std::vector<std::vector<Shape>> search_axes(const ModelConfig& config, std::int64_t multiple) {
  const Shape own = shape_of(config);
  const std::int64_t group = own.heads / own.kv_heads;
  std::vector<std::vector<Shape>> axes;
  const auto add = [&](std::int64_t Shape::*part, const std::vector<std::int64_t>& values) {
    axes.emplace_back();
    for (const std::int64_t value : values) {
      Shape shape = own;
      shape.*part = value;
      axes.back().push_back(shape);
    }
  };
  add(&Shape::layers, levels(own.layers, 1, 1));
  add(&Shape::ffn, levels(own.ffn, multiple, multiple));
  const bool tied = find_family(config.family)->heads_share_width;
  if (!tied) add(&Shape::hidden, levels(own.hidden, multiple, multiple));
  if (config.has_experts()) add(&Shape::experts, levels(own.experts, 1, config.experts.per_token));
  axes.emplace_back();
  for (const std::int64_t count : levels(own.kv_heads > 1 ? own.kv_heads : own.heads, 1, 1)) {
    Shape shape = own;
    if (own.kv_heads > 1) shape.kv_heads = count;  // whole groups
    shape.heads = own.kv_heads > 1 ? count * group : count;
    if (tied) shape.hidden = shape.heads * config.head_dim;
    axes.back().push_back(shape);
  }
  for (auto& axis : axes)
    std::erase_if(axis, [&](const Shape& shape) { return !shape_problems(config, shape, multiple).empty(); });
  std::erase_if(axes, [](const auto& axis) { return axis.empty(); });
  return axes;
}

std::vector<Shape> shapes_within(const ModelConfig& config, std::int64_t multiple, std::int64_t budget) {
  if (parameter_count(config) <= budget)
    throw usage_error("--max-params", "fewer than the model's " + std::to_string(parameter_count(config)) +
                                          " parameters", std::to_string(budget));
  const auto all = combinations(config, search_axes(config, multiple), {});
  auto fitting = within(config, multiple, budget, all);
  if (fitting.empty()) {
    std::int64_t least = parameter_count(config);
    for (const Candidate& candidate : all)
      if (shape_problems(config, candidate.shape, multiple).empty())
        least = std::min(least, parameters(config, candidate.shape));
    throw usage_error("--max-params", "at least " + std::to_string(least) +
                                          " parameters: the search goes down to half of each width and of the blocks",
                      std::to_string(budget), "cut twice, or ask for a shape with --layers, --ffn, ...");
  }
  std::stable_sort(fitting.begin(), fitting.end(),
                   [](const Candidate& a, const Candidate& b) { return a.count > b.count; });
  std::vector<Shape> shapes;
  for (const Candidate& candidate : fitting) shapes.push_back(candidate.shape);
  return shapes;
}

Shape search_shape(PruneJob& job, const CutPlan& plan, std::int64_t multiple, std::int64_t budget) {
  const ModelConfig& config = job.model.config();
  const auto axes = search_axes(config, multiple);
  Searcher searcher(job, plan);
  const auto row = [&](const std::string& what, std::optional<double> expected, double measured) {
    job.context.report.add({"prune", what, expected, measured, "nats", std::nullopt});
  };
  std::vector<std::vector<double>> costs;
  for (const auto& axis : axes) {
    costs.emplace_back();
    for (const Shape& shape : axis) {
      costs.back().push_back(searcher.divergence(shape));
      row("mean_kl of " + shape.in_words(), std::nullopt, costs.back().back());
    }
  }
  auto fitting = within(config, multiple, budget, combinations(config, axes, costs));
  std::stable_sort(fitting.begin(), fitting.end(),
                   [](const Candidate& a, const Candidate& b) { return a.cost < b.cost; });
  if (fitting.size() > kFinalists) fitting.resize(kFinalists);
  std::size_t best = 0;
  std::vector<double> measured;
  for (const Candidate& candidate : fitting) {
    measured.push_back(searcher.divergence(candidate.shape));
    if (measured.back() < measured[best]) best = measured.size() - 1;
  }
  for (std::size_t i = 0; i < fitting.size(); ++i)
    row("mean_kl of " + fitting[i].shape.in_words() + ", sum of its parts before" + (i == best ? " (chosen)" : ""),
        fitting[i].cost, measured[i]);
  return fitting[best].shape;
}

double search_passes(const ModelConfig& config, std::int64_t multiple, bool refit) {
  double passes = 0;
  for (const auto& axis : search_axes(config, multiple))
    for (const Shape& shape : axis) passes += cut_passes(config, shape, refit) + 2;
  return passes + kFinalists * (cut_passes(config, shape_of(config), refit) + 3);
}

}  // namespace pare
