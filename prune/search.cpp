#include "prune/search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "core/arch/arch.h"
#include "core/error.h"
#include "prune/depth.h"
#include "prune/knapsack.h"
#include "prune/measure.h"

namespace pare {
namespace {

constexpr int kFinalists = 3;
constexpr int kLevels = 4;      // of each thing, evenly between all and half of it
constexpr int kTightenings = 3;  // of a budget of seconds whose choices all turn out too slow
constexpr std::int64_t kMostWidths = 64;  // of one block's MLP that a knapsack chooses among

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
  double kl = 0;    // expected
  double cost = 0;  // in the unit of the budget
};

// Every combination, with the sum of the divergences of its parts (0 where `kls` is empty).
std::vector<Candidate> combinations(const ModelConfig& config, const std::vector<std::vector<Shape>>& axes,
                                    const std::vector<std::vector<double>>& kls) {
  const Shape own = shape_of(config);
  std::vector<Candidate> all = {{own, 0, 0}};
  for (std::size_t a = 0; a < axes.size(); ++a) {
    const std::size_t before = all.size();
    for (std::size_t i = 0; i < before; ++i)
      for (std::size_t k = 0; k < axes[a].size(); ++k)
        all.push_back({joined(own, all[i].shape, axes[a][k]), all[i].kl + (kls.empty() ? 0 : kls[a][k]), 0});
  }
  return all;
}

// Those that the model can have, and what each costs.
std::vector<Candidate> possible(const ModelConfig& config, std::int64_t multiple, ShapeCosts& costs,
                                const std::vector<Candidate>& all) {
  std::vector<Candidate> out;
  for (Candidate candidate : all) {
    if (!shape_problems(config, candidate.shape, multiple).empty()) continue;
    candidate.cost = costs.of(candidate.shape);
    out.push_back(candidate);
  }
  return out;
}

std::vector<Candidate> within(const std::vector<Candidate>& all, double limit) {
  std::vector<Candidate> out;
  for (const Candidate& candidate : all)
    if (candidate.cost <= limit) out.push_back(candidate);
  return out;
}

[[noreturn]] void refuse_budget(const Budget& budget, double least, const std::string& hint) {
  const std::string bound = budget.unit == Unit::kSeconds
                                ? "at most what the fastest that is searched is expected to reach, "
                                : "at least what the smallest that is searched takes, ";
  throw usage_error(budget.option(), bound + budget.in_words(least), budget.in_words(budget.limit), hint);
}

void refuse_large_budget(const Budget& budget, double own) {
  if (own > budget.limit) return;
  throw usage_error(budget.option(),
                    (budget.unit == Unit::kSeconds ? "more than the model's own " : "less than the model's own ") +
                        budget.in_words(own),
                    budget.in_words(budget.limit), "the model is within this budget as it is");
}

constexpr const char* kTimesFile = "decode.json";
constexpr const char* kTimed = "seconds on ";  // keys of search.json

TokenTimer timer_of(const PruneJob& job, const Budget& budget) {
  if (budget.timer) return budget.timer;
  return [&](const ModelConfig& config) {
    return seconds_per_token(config, budget.stored, job.context.threads, job.state / "speed.pare");
  };
}

constexpr const char* kSmallerHint = "the search goes down to half of each width and of the blocks: cut twice, or ask "
                                     "for a shape with --layers, --ffn, ...";

class Searcher {
 public:
  Searcher(PruneJob& job, const CutPlan& plan) : job_(job), plan_(plan), file_(job.state / "search.json") {
    if (fs::exists(file_)) known_ = read_json(file_);
  }

  double divergence(const Shape& shape) {
    CutPlan plan = plan_;
    plan.shape = shape;
    return divergence(plan, shape.in_words());
  }

  double divergence(CutPlan plan, const std::string& key) {
    if (known_.contains(key)) return known_.at(key).get<double>();
    job_.context.progress->note("Measuring " + key);
    PruneJob trial{job_.model,    job_.options, job_.context, job_.windows, job_.state / "trial",
                   job_.state / "trial.state", job_.dtype,   job_.spill};
    for (const fs::path& folder : {trial.work, trial.state}) {
      fs::remove_all(folder);
      fs::create_directories(folder);
    }
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
    known_[key] = finite_divergence(kl, key);
    write_text(file_, known_.dump());
    return kl;
  }

  // Seconds of a token of the model that the plan makes.
  double seconds(const CutPlan& plan, const TokenTimer& timer, const std::string& key) {
    const std::string name = kTimed + timed_on(job_.context.threads) + ": " + key;
    if (known_.contains(name)) return known_.at(name).get<double>();
    job_.context.progress->note("Measuring the speed of " + key);
    std::vector<int> layers = plan.layers;
    if (layers.empty()) {
      layers.resize(static_cast<std::size_t>(plan.shape.layers));
      std::iota(layers.begin(), layers.end(), 0);
    }
    const double seconds = timer(cut_config(job_.model.config(), plan.shape, layers, plan.widths));
    known_[name] = seconds;
    write_text(file_, known_.dump());
    return seconds;
  }

  // Times of a machine that was busy must not decide about the next run too.
  void forget_times() {
    Json kept = Json::object();
    for (const auto& [name, value] : known_.items())
      if (!name.starts_with(kTimed)) kept[name] = value;
    known_ = std::move(kept);
    write_text(file_, known_.dump());
    fs::remove(job_.state / kTimesFile);
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

std::string Budget::option() const {
  return unit == Unit::kParameters ? "--max-params" : unit == Unit::kBytes ? "--max-bytes" : "--min-tokens-per-second";
}

std::string Budget::in_words(double cost) const {
  if (unit == Unit::kParameters) return std::to_string(std::llround(cost)) + " parameters";
  if (unit == Unit::kBytes)
    return std::to_string(std::llround(cost)) +
           (stored.linear.is_float() ? " bytes of tensors as " : " bytes of a compact file in ") + stored.name();
  char text[32];
  std::snprintf(text, sizeof text, "%.4g", 1 / cost);
  return std::string(text) + " tokens a second as " + stored.name();
}

std::vector<Shape> shapes_within(const ModelConfig& config, std::int64_t multiple, const Budget& budget,
                                 ShapeCosts& costs) {
  refuse_large_budget(budget, costs.of(shape_of(config)));
  const auto all = possible(config, multiple, costs, combinations(config, search_axes(config, multiple), {}));
  auto fitting = within(all, budget.limit);
  if (fitting.empty()) {
    double least = std::numeric_limits<double>::infinity();
    for (const Candidate& candidate : all) least = std::min(least, candidate.cost);
    refuse_budget(budget, least, kSmallerHint);
  }
  std::stable_sort(fitting.begin(), fitting.end(),
                   [](const Candidate& a, const Candidate& b) { return a.cost > b.cost; });
  std::vector<Shape> shapes;
  for (const Candidate& candidate : fitting) shapes.push_back(candidate.shape);
  return shapes;
}

namespace {

// Expected and measured speed of a choice; whether it is within the budget.
bool fast_enough(PruneJob& job, Searcher& searcher, const Budget& budget, const CutPlan& plan, double expected,
                 const std::string& name, double& seconds) {
  if (budget.unit != Unit::kSeconds) return true;
  seconds = searcher.seconds(plan, timer_of(job, budget), name);
  job.context.report.add({"prune", "tokens a second of " + name + ", expected and measured", 1 / expected, 1 / seconds,
                          "tokens/s", std::nullopt, false});
  return seconds <= budget.limit;
}

[[noreturn]] void too_slow(Searcher& searcher, const Budget& budget, double fastest) {
  searcher.forget_times();
  throw failure("--min-tokens-per-second", "a shape that decodes as fast as it was expected to",
                "at best " + budget.in_words(fastest) + " where " + budget.in_words(budget.limit) + " were asked for",
                "other work on this machine slows it down: the same command again measures speeds anew; or ask for a "
                "little less");
}

}  // namespace

void search_shape(PruneJob& job, CutPlan& plan, std::int64_t multiple, const Budget& budget,
                  const DecodeTimes& times) {
  const ModelConfig& config = job.model.config();
  ShapeCosts costs(config, budget.unit, budget.stored, times);
  shapes_within(config, multiple, budget, costs);  // refused before anything is measured
  const auto axes = search_axes(config, multiple);
  Searcher searcher(job, plan);
  const auto row = [&](const std::string& what, std::optional<double> expected, double measured) {
    job.context.report.add({"prune", what, expected, measured, "nats", std::nullopt});
  };
  std::vector<std::vector<double>> kls;
  for (const auto& axis : axes) {
    kls.emplace_back();
    for (const Shape& shape : axis) {
      kls.back().push_back(searcher.divergence(shape));
      row("trial: mean_kl of " + shape.in_words(), std::nullopt, kls.back().back());
    }
  }
  auto all = possible(config, multiple, costs, combinations(config, axes, kls));
  std::stable_sort(all.begin(), all.end(), [](const Candidate& a, const Candidate& b) { return a.kl < b.kl; });
  double limit = budget.limit, fastest = std::numeric_limits<double>::infinity();
  std::vector<Candidate> fitting;
  for (int attempt = 0; fitting.empty(); ++attempt) {
    double nearest = std::numeric_limits<double>::infinity();  // measured over expected
    int tried = 0;
    for (const Candidate& candidate : within(all, limit)) {
      if (tried++ == kFinalists) break;
      CutPlan trial = plan;
      trial.shape = candidate.shape;
      double seconds = 0;
      if (fast_enough(job, searcher, budget, trial, candidate.cost, candidate.shape.in_words(), seconds))
        fitting.push_back(candidate);
      fastest = std::min(fastest, seconds);
      nearest = std::min(nearest, seconds / candidate.cost);
    }
    if (!fitting.empty()) break;
    if (tried == 0 || attempt == kTightenings) too_slow(searcher, budget, fastest);
    limit = std::min(limit * 0.98, budget.limit / nearest);
  }
  std::size_t best = 0;
  std::vector<double> measured;
  for (const Candidate& candidate : fitting) {
    measured.push_back(searcher.divergence(candidate.shape));
    if (measured.back() < measured[best]) best = measured.size() - 1;
  }
  for (std::size_t i = 0; i < fitting.size(); ++i)
    row("trial: mean_kl of " + fitting[i].shape.in_words() + ", sum of its parts before" + (i == best ? " (chosen)" : ""),
        fitting[i].kl, measured[i]);
  plan.shape = fitting[best].shape;
}

namespace {

// Sizes of one block that a knapsack may choose, largest first: all of it, and what the levels reach.
std::vector<std::int64_t> sizes_of(std::int64_t all, const std::vector<std::int64_t>& levels, std::int64_t step) {
  std::vector<std::int64_t> out = {all};
  if (levels.empty()) return out;
  const std::int64_t first = (all - 1) / step * step, count = (first - levels.back()) / step + 1;
  const std::int64_t stride = (count + kMostWidths - 1) / kMostWidths * step;
  for (std::int64_t n = first; n >= levels.back(); n -= stride) out.push_back(n);
  return out;
}

std::string in_words(const CutPlan& plan) {
  Json blocks = Json::array();
  for (std::size_t i = 0; i < plan.layers.size(); ++i) {
    const BlockWidths& w = plan.widths[i];
    blocks.push_back(std::to_string(plan.layers[i]) + ": " + std::to_string(w.kv_heads) + " and " +
                     std::to_string(w.inner));
  }
  return "blocks with heads of keys and neurons " + blocks.dump();
}

void set_widths(CutPlan& plan, const ModelConfig& config, const std::vector<std::optional<BlockWidths>>& chosen) {
  plan.layers.clear();
  plan.widths.clear();
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    if (!chosen[i]) continue;
    plan.layers.push_back(static_cast<int>(i));
    plan.widths.push_back(*chosen[i]);
  }
  plan.shape = shape_of(config);
  plan.shape.layers = static_cast<std::int64_t>(plan.layers.size());
  plan.shape.heads = plan.shape.kv_heads = plan.shape.ffn = 0;
  for (const BlockWidths& widths : plan.widths) {
    plan.shape.heads = std::max(plan.shape.heads, widths.heads);
    plan.shape.kv_heads = std::max(plan.shape.kv_heads, widths.kv_heads);
    plan.shape.ffn = std::max(plan.shape.ffn, widths.inner);
  }
}

void report_scores(PruneJob& job, const ModelConfig& config, const std::vector<int>& layers, const ScoreLevels& levels,
                   const std::vector<BlockScores>& scores) {
  const auto row = [&](const std::string& what, double kl) {
    job.context.report.add({"prune", "trial: mean_kl with " + what, std::nullopt, kl, "nats", std::nullopt});
  };
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const std::string block = " of block " + std::to_string(layers[i]);
    for (std::size_t k = 0; k < levels.ffn.size(); ++k)
      row(std::to_string(levels.ffn[k]) + " of " + std::to_string(config.intermediate_size) + " neurons" + block,
          scores[i].ffn[k]);
    for (std::size_t k = 0; k < levels.kv_heads.size(); ++k)
      row(std::to_string(levels.kv_heads[k]) + " of " + std::to_string(config.num_kv_heads) +
              " heads of keys and values" + block,
          scores[i].kv_heads[k]);
    if (levels.without) row("nothing" + block, scores[i].without);
  }
}

}  // namespace

std::vector<std::optional<BlockWidths>> widths_within(const ModelConfig& config, std::int64_t multiple,
                                                      const ScoreLevels& levels,
                                                      const std::vector<BlockScores>& scores, const Budget& budget,
                                                      ShapeCosts& costs) {
  const std::int64_t group = config.num_heads / config.num_kv_heads;
  std::vector<std::int64_t> heads = {config.num_kv_heads};
  heads.insert(heads.end(), levels.kv_heads.begin(), levels.kv_heads.end());
  std::size_t dearest = 0;  // stays, whatever its widths: a model has a block
  for (std::size_t i = 0; i < scores.size(); ++i)
    if (scores[i].without > scores[dearest].without) dearest = i;
  std::vector<std::vector<Choice>> groups;
  std::vector<std::vector<std::optional<BlockWidths>>> meanings;
  double least = costs.outer(config.hidden_size);
  for (std::size_t i = 0; i < scores.size(); ++i) {
    groups.emplace_back();
    meanings.emplace_back();
    for (const std::int64_t kv : heads)
      for (const std::int64_t inner : sizes_of(config.intermediate_size, levels.ffn, multiple)) {
        const BlockWidths widths{kv * group, kv, inner};
        const double kl = level_cost(config.num_kv_heads, levels.kv_heads, scores[i].kv_heads, kv) +
                          level_cost(config.intermediate_size, levels.ffn, scores[i].ffn, inner);
        groups.back().push_back({costs.block(config.hidden_size, widths, config.experts.count), kl});
        meanings.back().push_back(widths);
      }
    if (levels.without && i != dearest) {
      groups.back().push_back({0, scores[i].without});
      meanings.back().push_back(std::nullopt);
    }
    least += std::min_element(groups.back().begin(), groups.back().end(), [](const Choice& a, const Choice& b) {
               return a.size < b.size;
             })->size;
  }
  const auto chosen = cheapest_choices(groups, budget.limit - costs.outer(config.hidden_size));
  if (chosen.empty()) refuse_budget(budget, least, "--per-layer leaves channels and vocabulary as they are");
  std::vector<std::optional<BlockWidths>> out;
  for (std::size_t i = 0; i < chosen.size(); ++i) out.push_back(meanings[i][chosen[i]]);
  return out;
}

void refuse_widths(const ModelConfig& config, std::int64_t multiple, const Budget& budget, ShapeCosts& costs) {
  refuse_large_budget(budget, costs.of(config));
  const ScoreLevels levels = score_levels(config, multiple, true, true, true);
  const std::vector<BlockScores> none(static_cast<std::size_t>(config.num_layers),
                                      {std::vector<double>(levels.ffn.size(), 0.0),
                                       std::vector<double>(levels.kv_heads.size(), 0.0), 0.0});
  widths_within(config, multiple, levels, none, budget, costs);
}

void search_widths(PruneJob& job, CutPlan& plan, std::int64_t multiple, const Budget& budget,
                   const DecodeTimes& times) {
  const ModelConfig& config = job.model.config();
  ShapeCosts costs(config, budget.unit, budget.stored, times);
  refuse_widths(config, multiple, budget, costs);
  std::vector<int> all(static_cast<std::size_t>(config.num_layers));
  std::iota(all.begin(), all.end(), 0);
  const ScoreLevels levels = score_levels(config, multiple, true, true, true);
  const auto scores = measure_scores(job, plan, all, levels);
  report_scores(job, config, all, levels, scores);
  Searcher searcher(job, plan);
  ScoreLevels whole = levels;
  whole.without = false;
  double fastest = std::numeric_limits<double>::infinity(), best = std::numeric_limits<double>::infinity();
  CutPlan chosen = plan;
  for (const ScoreLevels& way : {levels, whole}) {
    Budget tight = budget;
    for (int attempt = 0; attempt <= kTightenings; ++attempt) {
      CutPlan trial = plan;
      try {
        set_widths(trial, config, widths_within(config, multiple, way, scores, tight, costs));
      } catch (const Error&) {
        break;  // too small for all blocks, or tightened beyond the smallest
      }
      const std::string name = in_words(trial);
      const ModelConfig made = cut_config(config, trial.shape, trial.layers, trial.widths);
      double seconds = 0;
      if (!fast_enough(job, searcher, budget, trial, costs.of(made), name, seconds)) {
        fastest = std::min(fastest, seconds);
        tight.limit = std::min(tight.limit * 0.98, budget.limit * costs.of(made) / seconds);
        continue;
      }
      const double kl = searcher.divergence(trial, name);
      job.context.report.add({"prune", "trial: mean_kl of " + name, std::nullopt, kl, "nats", std::nullopt});
      if (kl < best) {
        best = kl;
        chosen = trial;
      }
      break;
    }
  }
  if (chosen.layers.empty()) too_slow(searcher, budget, fastest);
  plan = chosen;
}

void refuse_means(const ModelConfig& config, const Shape& shape, std::int64_t multiple) {
  const Shape own = shape_of(config);
  const bool ffn = shape.ffn < own.ffn, heads = shape.kv_heads < own.kv_heads;
  const ScoreLevels levels = score_levels(config, multiple, ffn, heads, false);
  const auto check = [](const char* option, std::int64_t all, const std::vector<std::int64_t>& sizes,
                        std::int64_t mean) {
    const std::int64_t least = sizes.empty() ? all : sizes.back();
    if (mean < least)
      throw usage_error(option, "with --per-layer a mean of at least " + std::to_string(least) +
                                    ", the fewest that a block may keep", std::to_string(mean));
  };
  if (ffn) check("--ffn", own.ffn, levels.ffn, shape.ffn);
  if (heads) check("--kv-heads", own.kv_heads, levels.kv_heads, shape.kv_heads);
}

void spread_widths(PruneJob& job, CutPlan& plan, std::int64_t multiple) {
  const ModelConfig& config = job.model.config();
  const Shape own = shape_of(config);
  const bool ffn = plan.shape.ffn < own.ffn, heads = plan.shape.kv_heads < own.kv_heads;
  const std::int64_t group = own.heads / own.kv_heads;
  const ScoreLevels levels = score_levels(config, multiple, ffn, heads, false);
  const auto scores = measure_scores(job, plan, plan.layers, levels);
  report_scores(job, config, plan.layers, levels, scores);
  plan.widths.assign(plan.layers.size(), {plan.shape.heads, plan.shape.kv_heads, plan.shape.ffn});
  const auto give_out = [&](std::int64_t all, const std::vector<std::int64_t>& sizes,
                            const std::vector<std::int64_t>& known, std::int64_t mean, auto score, auto set) {
    std::vector<std::vector<Choice>> groups;
    for (const BlockScores& block : scores) {
      groups.emplace_back();
      for (const std::int64_t size : sizes)
        groups.back().push_back({static_cast<double>(size), level_cost(all, known, score(block), size)});
    }
    const auto chosen = cheapest_choices(groups, static_cast<double>(mean) * static_cast<double>(groups.size()));
    if (chosen.empty()) throw std::logic_error("spread_widths: a mean that refuse_means refuses");
    for (std::size_t i = 0; i < chosen.size(); ++i) set(plan.widths[i], sizes[chosen[i]]);
  };
  if (ffn)
    give_out(own.ffn, sizes_of(own.ffn, levels.ffn, multiple), levels.ffn, plan.shape.ffn,
             [](const BlockScores& block) { return block.ffn; },
             [](BlockWidths& widths, std::int64_t size) { widths.inner = size; });
  if (heads) {
    std::vector<std::int64_t> sizes = {own.kv_heads};
    sizes.insert(sizes.end(), levels.kv_heads.begin(), levels.kv_heads.end());
    give_out(own.kv_heads, sizes, levels.kv_heads, plan.shape.kv_heads,
             [](const BlockScores& block) { return block.kv_heads; },
             [&](BlockWidths& widths, std::int64_t size) {
               widths.kv_heads = size;
               widths.heads = size * group;
             });
  }
  const std::int64_t hidden = plan.shape.hidden;
  const std::int64_t experts = plan.shape.experts;
  std::vector<std::optional<BlockWidths>> chosen(static_cast<std::size_t>(own.layers));
  for (std::size_t i = 0; i < plan.layers.size(); ++i) chosen[static_cast<std::size_t>(plan.layers[i])] = plan.widths[i];
  set_widths(plan, config, chosen);
  plan.shape.hidden = hidden;
  plan.shape.experts = experts;
}

DecodeTimes decode_times(PruneJob& job, const Budget& budget) {
  if (budget.unit != Unit::kSeconds) return {};
  const ModelConfig& config = job.model.config();
  const fs::path file = job.state / kTimesFile;
  const std::string machine = timed_on(job.context.threads);
  Json known = fs::exists(file) ? read_json(file) : Json::object();
  std::vector<Timing> timings;
  if (known.contains(machine)) {
    for (const Json& entry : known.at(machine)) {
      const auto v = entry.get<std::vector<double>>();
      const auto at = [&](std::size_t i) { return static_cast<std::int64_t>(v.at(i)); };
      timings.push_back({{at(0), at(1), at(2), at(3), at(4), at(5)}, v.at(6)});
    }
  } else {
    timings = measure_shapes(config, timer_of(job, budget), job.context);
    Json json = Json::array();
    for (const auto& [s, seconds] : timings)
      json.push_back({s.layers, s.heads, s.kv_heads, s.ffn, s.hidden, s.experts, seconds});
    known[machine] = std::move(json);
    write_text(file, known.dump());
  }
  const DecodeTimes times = fit_times(config, budget.stored, timings);
  ShapeCosts costs(config, Unit::kSeconds, budget.stored, times);
  for (const auto& [shape, seconds] : timings)
    job.context.report.add({"prune", "tokens a second of " + shape.in_words() + ", fitted and measured",
                            1 / costs.of(shape), 1 / seconds, "tokens/s", std::nullopt, false});
  return times;
}

double search_passes(const ModelConfig& config, std::int64_t multiple, bool refit) {
  double passes = 0;
  for (const auto& axis : search_axes(config, multiple))
    for (const Shape& shape : axis) passes += cut_passes(config, shape, refit) + 2;
  return passes + kFinalists * (cut_passes(config, shape_of(config), refit) + 3);
}

}  // namespace pare
