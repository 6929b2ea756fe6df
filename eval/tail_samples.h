// Ids drawn from what a list of the most likely ids leaves out. Kept beside that list they make an unbiased estimate of
// the distribution, which the list alone is not (Anshumann et al. 2025, "Sparse Logit Sampling").
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace pare {

struct TailSamples {
  double mass = 0;                   // probability of all ids outside the list
  std::vector<std::uint32_t> index;  // distinct, rising; fewer than `draws` where one was hit twice
  std::vector<std::uint8_t> count;   // how often: they add up to `draws`, or to 0 where the tail has no mass
};

// probability [vocab]; `listed` ids are left out. With u in (0, 1) the draws stand at (i + u) / draws of the tail's
// mass: each id is expected count = draws * p / mass times, at less variance than draws of their own. draws <= 255.
// An id's estimate is mass * count / draws.
TailSamples sample_tail(std::span<const double> probability, std::span<const std::uint32_t> listed, std::int64_t draws,
                        double u);

}  // namespace pare
