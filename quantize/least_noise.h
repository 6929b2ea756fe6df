// Scales under which two roundings together make the least noise. No LibTorch types.
#pragma once

#include <span>
#include <vector>

#include "quantize/scale_search.h"

namespace pare {

// Of linears that read the same inputs. Errors of a rounding count as independent and uniform within a step: then with
// d_j = s_j^2 and w_j^2 the energy of column j, the squared output error per token is
//   E_t[max_j x_tj^2 / d_j] / (12 * 127^2) * sum_j d_j w_j^2                       where inputs are rounded to int8
//   + sum over rows and groups of max_j(w_rj^2 d_j) / (12 q^2) * sum_j E[x_j^2] / d_j   with q the largest code,
// which is convex in log d (a geometric program): SmoothQuant's formula balances the same two terms by peaks alone.
// Adam on it, in a fixed number of steps.
// inputs [tokens * columns]; channel [columns]: which of the `channels` scales column j takes. Returns [channels],
// divided by sqrt(max s min s). The same bits at any number of threads.
std::vector<float> least_noise_scales(std::span<const ScaledLinear> linears, std::span<const float> inputs,
                                      std::span<const std::int64_t> channel, std::int64_t channels);

// What is minimised, at these scales.
double noise_of(std::span<const ScaledLinear> linears, std::span<const float> inputs,
                std::span<const std::int64_t> channel, std::span<const float> scales);

}  // namespace pare
