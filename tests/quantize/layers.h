// Random layers for the tests of this folder.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace pare::testing {

inline std::vector<float> random_weight(std::mt19937_64& random, std::int64_t rows, std::int64_t cols) {
  std::normal_distribution<double> normal(0.0, 0.05);
  std::vector<float> out(static_cast<std::size_t>(rows * cols));
  for (float& value : out) value = static_cast<float>(normal(random) * (random() % 50 == 0 ? 6.0 : 1.0));
  return out;
}

// E[x x^T] of correlated inputs with unequal energies.
inline std::vector<double> random_hessian(std::mt19937_64& random, std::int64_t n, std::int64_t tokens) {
  std::normal_distribution<double> normal;
  std::vector<double> h(static_cast<std::size_t>(n * n), 0.0), x(static_cast<std::size_t>(n));
  for (std::int64_t t = 0; t < tokens; ++t) {
    double shared = normal(random);
    for (std::int64_t j = 0; j < n; ++j) {
      shared = 0.8 * shared + 0.6 * normal(random);
      x[static_cast<std::size_t>(j)] = shared * (1.0 + static_cast<double>(j % 7));
    }
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        h[static_cast<std::size_t>(i * n + j)] +=
            x[static_cast<std::size_t>(i)] * x[static_cast<std::size_t>(j)] / static_cast<double>(tokens);
      }
    }
  }
  return h;
}

inline std::vector<double> diagonal(const std::vector<double>& h, std::int64_t n) {
  std::vector<double> out(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) out[static_cast<std::size_t>(i)] = h[static_cast<std::size_t>(i * n + i)];
  return out;
}

// d^T H d restricted to columns [begin, end), literally.
inline double quadratic(const std::vector<double>& h, std::int64_t n, const std::vector<double>& d, std::int64_t begin,
                        std::int64_t end) {
  double sum = 0;
  for (std::int64_t i = begin; i < end; ++i) {
    for (std::int64_t j = begin; j < end; ++j) {
      sum += d[static_cast<std::size_t>(i)] * h[static_cast<std::size_t>(i * n + j)] * d[static_cast<std::size_t>(j)];
    }
  }
  return sum;
}

}  // namespace pare::testing
