#include "prune/knapsack.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace pare {
namespace {

struct Sum {
  double size = 0, cost = 0;
  std::uint32_t before = 0, choice = 0;  // place among the sums of the group before
};

bool better(const Sum& a, const Sum& b) { return a.cost != b.cost ? a.cost < b.cost : a.size < b.size; }

// Ascending in size, falling in cost.
std::vector<Sum> undominated(std::vector<Sum> sums) {
  std::stable_sort(sums.begin(), sums.end(), [](const Sum& a, const Sum& b) {
    return a.size != b.size ? a.size < b.size : a.cost < b.cost;
  });
  std::vector<Sum> out;
  for (const Sum& sum : sums)
    if (out.empty() || sum.cost < out.back().cost) out.push_back(sum);
  return out;
}

// The cheapest of each kMostSums-th part of the budget.
std::vector<Sum> thinned(const std::vector<Sum>& sums, double budget) {
  std::vector<Sum> best(kMostSums + 1);
  std::vector<std::uint8_t> taken(best.size(), 0);
  for (const Sum& sum : sums) {
    const auto place = static_cast<std::size_t>(std::clamp(sum.size / budget, 0.0, 1.0) * kMostSums);
    if (taken[place] != 0 && !better(sum, best[place])) continue;
    best[place] = sum;
    taken[place] = 1;
  }
  std::vector<Sum> out;
  for (std::size_t i = 0; i < best.size(); ++i)
    if (taken[i] != 0) out.push_back(best[i]);
  return out;
}

}  // namespace

std::vector<std::size_t> cheapest_choices(const std::vector<std::vector<Choice>>& groups, double budget) {
  const double limit = budget * (1 + 1e-12);  // sums of sizes in another order than the caller's
  std::vector<double> rest(groups.size() + 1, 0.0);  // least of the groups from here on
  for (std::size_t g = groups.size(); g-- > 0;) {
    double least = std::numeric_limits<double>::infinity();
    for (const Choice& choice : groups[g]) least = std::min(least, choice.size);
    rest[g] = rest[g + 1] + least;
  }
  std::vector<std::vector<Sum>> steps = {{Sum{}}};
  for (std::size_t g = 0; g < groups.size(); ++g) {
    std::vector<Sum> sums;
    for (std::size_t s = 0; s < steps.back().size(); ++s)
      for (std::size_t c = 0; c < groups[g].size(); ++c) {
        const Sum& before = steps.back()[s];
        const double size = before.size + groups[g][c].size;
        if (size + rest[g + 1] <= limit)
          sums.push_back({size, before.cost + groups[g][c].cost, static_cast<std::uint32_t>(s),
                          static_cast<std::uint32_t>(c)});
      }
    if (sums.empty()) return {};
    if (sums.size() > 16 * kMostSums) sums = thinned(sums, limit);
    sums = undominated(std::move(sums));
    if (sums.size() > kMostSums) sums = undominated(thinned(sums, limit));
    steps.push_back(std::move(sums));
  }
  std::vector<std::size_t> chosen(groups.size());
  std::size_t at = static_cast<std::size_t>(
      std::min_element(steps.back().begin(), steps.back().end(), better) - steps.back().begin());
  for (std::size_t g = groups.size(); g-- > 0;) {
    const Sum& sum = steps[g + 1][at];
    chosen[g] = sum.choice;
    at = sum.before;
  }
  return chosen;
}

}  // namespace pare
