// Which of several choices to take for each of several things. Plain numbers.
#pragma once

#include <cstddef>
#include <vector>

namespace pare {

struct Choice {
  double size = 0, cost = 0;
};

// Of each group the index of one choice, such that the sizes sum to at most `budget` and the costs to as little as
// possible; empty where not even the smallest of each fit. Dynamic programming over the sums that no other sum beats in
// size and cost: exact while there are at most kMostSums of them; beyond, of sums within budget / kMostSums of each
// other the cheapest goes on. No group is empty.
constexpr std::size_t kMostSums = 20000;
std::vector<std::size_t> cheapest_choices(const std::vector<std::vector<Choice>>& groups, double budget);

}  // namespace pare
