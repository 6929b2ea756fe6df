// Means with honest standard errors, and quantiles.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace pare {

struct Estimate {
  double value = 0;
  std::optional<double> standard_error;  // absent with fewer than two clusters
};

// Mean of all values with the cluster-robust standard error of a ratio: with G clusters and N values,
//   se^2 = G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2 / N^2
// (Cochran, Sampling Techniques, 1977, eq. 9A.9 with no finite-population term). cluster[i] in [0, clusters); clusters
// that hold no value do not count. With clusters of one value each this is the usual s / sqrt(N).
Estimate clustered_mean(std::span<const double> values, std::span<const std::int64_t> cluster, std::int64_t clusters);

// Each value its own cluster: s / sqrt(n).
Estimate plain_mean(std::span<const double> values);

// Linear interpolation between order statistics, h = (n - 1) q (numpy's default, type 7 of Hyndman and Fan 1996).
// `sorted` ascending and not empty, 0 <= q <= 1.
double quantile(std::span<const double> sorted, double q);

}  // namespace pare
