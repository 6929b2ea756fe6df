#include "model/sweep.h"

#include <omp.h>

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "core/error.h"

// Without a resolver (static or exotic platforms) the baseline build of each kernel serves.
#if defined(__x86_64__) && defined(__linux__)
#define PARE_CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define PARE_CLONES
#endif

namespace pare {
namespace {

typedef float Float16 __attribute__((vector_size(64)));
typedef double Double8 __attribute__((vector_size(64)));
constexpr std::int64_t kPanel = 32;     // columns per packed panel of the Gram product
constexpr std::int64_t kGramRows = 512; // float32 accumulation length
constexpr std::int64_t kLanes = kSweepRows / 8;

// tile[32][32] += sum over t of a[t][i] * b[t][j].
PARE_CLONES void gram_tile(const float* a, const float* b, std::int64_t rows, double* out, std::int64_t stride,
                           std::int64_t height, std::int64_t width) {
  for (std::int64_t i = 0; i < kPanel; i += 4) {
    Float16 sum[4][2] = {};
    for (std::int64_t t = 0; t < rows; ++t) {
      Float16 low, high;
      std::memcpy(&low, b + t * kPanel, sizeof low);
      std::memcpy(&high, b + t * kPanel + 16, sizeof high);
      const float* left = a + t * kPanel + i;
      for (int k = 0; k < 4; ++k) {
        sum[k][0] += left[k] * low;
        sum[k][1] += left[k] * high;
      }
    }
    for (int k = 0; k < 4 && i + k < height; ++k) {
      double* line = out + (i + k) * stride;
      for (std::int64_t j = 0; j < width; ++j) line[j] += static_cast<double>(sum[k][j / 16][j % 16]);
    }
  }
}

// Panels [panel][row][32], zero padded.
void pack_panels(const float* x, std::int64_t rows, std::int64_t cols, std::vector<float>& packed) {
  const std::int64_t panels = (cols + kPanel - 1) / kPanel;
  packed.assign(static_cast<std::size_t>(panels * rows * kPanel), 0.0f);
  for (std::int64_t p = 0; p < panels; ++p) {
    const std::int64_t width = std::min(kPanel, cols - p * kPanel);
    for (std::int64_t t = 0; t < rows; ++t) {
      std::memcpy(packed.data() + (p * rows + t) * kPanel, x + t * cols + p * kPanel,
                  static_cast<std::size_t>(width) * sizeof(float));
    }
  }
}

// Columns [begin, end) of a tile lose what columns [first, last) were off by: w_j -= sum_k e_k U_kj.
PARE_CLONES void compensate(double* weights, const double* errors, const double* u, std::int64_t n, std::int64_t first,
                            std::int64_t last, std::int64_t begin, std::int64_t end) {
  std::int64_t j = begin;
  for (; j + 4 <= end; j += 4) {
    Double8 sum[4][kLanes] = {};
    for (std::int64_t k = first; k < last; ++k) {
      Double8 e[kLanes];
      std::memcpy(e, errors + (k - first) * kSweepRows, sizeof e);
      const double* factor = u + k * n + j;
      for (int c = 0; c < 4; ++c) {
        for (int v = 0; v < kLanes; ++v) sum[c][v] += factor[c] * e[v];
      }
    }
    for (int c = 0; c < 4; ++c) {
      Double8 w[kLanes];
      std::memcpy(w, weights + (j + c) * kSweepRows, sizeof w);
      for (int v = 0; v < kLanes; ++v) w[v] -= sum[c][v];
      std::memcpy(weights + (j + c) * kSweepRows, w, sizeof w);
    }
  }
  for (; j < end; ++j) {
    Double8 sum[kLanes] = {};
    for (std::int64_t k = first; k < last; ++k) {
      Double8 e[kLanes];
      std::memcpy(e, errors + (k - first) * kSweepRows, sizeof e);
      for (int v = 0; v < kLanes; ++v) sum[v] += u[k * n + j] * e[v];
    }
    Double8 w[kLanes];
    std::memcpy(w, weights + j * kSweepRows, sizeof w);
    for (int v = 0; v < kLanes; ++v) w[v] -= sum[v];
    std::memcpy(weights + j * kSweepRows, w, sizeof w);
  }
}

// total[r] += sum over i in [0, n) of d_i (H_ii d_i + 2 sum_{j > i} H_ij d_j).
PARE_CLONES void quadratic_tile(const double* d, const double* h, std::int64_t n, double* total) {
  Double8 sum[kLanes] = {};
  for (std::int64_t i = 0; i < n; i += 4) {
    const std::int64_t height = std::min<std::int64_t>(4, n - i);
    Double8 inner[4][kLanes] = {};
    // The 4 x 4 corner at half weight for its diagonal, then whole columns.
    for (std::int64_t a = 0; a < height; ++a) {
      for (std::int64_t j = i + a; j < i + height; ++j) {
        const double factor = h[(i + a) * n + j] * (j == i + a ? 0.5 : 1.0);
        for (int v = 0; v < kLanes; ++v) {
          Double8 other;
          std::memcpy(&other, d + j * kSweepRows + v * 8, sizeof other);
          inner[a][v] += factor * other;
        }
      }
    }
    for (std::int64_t j = i + 4; j < n; ++j) {
      Double8 other[kLanes];
      std::memcpy(other, d + j * kSweepRows, sizeof other);
      for (int a = 0; a < 4; ++a) {
        const double factor = h[(i + a) * n + j];
        for (int v = 0; v < kLanes; ++v) inner[a][v] += factor * other[v];
      }
    }
    for (std::int64_t a = 0; a < height; ++a) {
      Double8 own[kLanes];
      std::memcpy(own, d + (i + a) * kSweepRows, sizeof own);
      for (int v = 0; v < kLanes; ++v) sum[v] += own[v] * inner[a][v];
    }
  }
  for (int v = 0; v < kLanes; ++v) {
    for (int r = 0; r < 8; ++r) total[v * 8 + r] += 2.0 * sum[v][r];
  }
}

int resolve_threads(int threads) { return threads > 0 ? threads : omp_get_num_procs(); }

}  // namespace

void add_gram(const float* a, const float* b, std::int64_t rows, std::int64_t cols, double* sum, int threads) {
  const std::int64_t panels = (cols + kPanel - 1) / kPanel;
  std::vector<float> left, right;
  for (std::int64_t start = 0; start < rows; start += kGramRows) {
    const std::int64_t count = std::min(kGramRows, rows - start);
    pack_panels(a + start * cols, count, cols, left);
    if (a != b) pack_panels(b + start * cols, count, cols, right);
    const std::vector<float>& other = a == b ? left : right;
#pragma omp parallel for schedule(dynamic) num_threads(resolve_threads(threads))
    for (std::int64_t i = 0; i < panels; ++i) {
      for (std::int64_t j = a == b ? i : 0; j < panels; ++j) {
        gram_tile(left.data() + i * count * kPanel, other.data() + j * count * kPanel, count,
                  sum + i * kPanel * cols + j * kPanel, cols, std::min(kPanel, cols - i * kPanel),
                  std::min(kPanel, cols - j * kPanel));
      }
    }
  }
}

void mirror_upper(double* h, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = i + 1; j < n; ++j) h[j * n + i] = h[i * n + j];
  }
}

SweepFactor factor_hessian(std::span<const double> hessian, std::int64_t n, const FactorOptions& options,
                           const std::string& place, int threads) {
  using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor>;
  SweepFactor factor;
  factor.columns = n;
  factor.dead.assign(static_cast<std::size_t>(n), 0);
  factor.order.resize(static_cast<std::size_t>(n));
  std::iota(factor.order.begin(), factor.order.end(), std::int64_t{0});
  double mean = 0;
  std::int64_t live = 0;
  for (double value : hessian) {
    if (!std::isfinite(value)) throw failure(place, "finite activation statistics", "NaN or infinity in the Hessian");
  }
  for (std::int64_t i = 0; i < n; ++i) {
    const double diagonal = hessian[static_cast<std::size_t>(i * n + i)];
    if (diagonal <= 0) {
      factor.dead[static_cast<std::size_t>(i)] = 1;
    } else {
      mean += diagonal;
      ++live;
    }
  }
  mean = live > 0 ? mean / static_cast<double>(live) : 1.0;
  if (options.activation_order) {
    std::stable_sort(factor.order.begin(), factor.order.end(), [&](std::int64_t a, std::int64_t b) {
      return hessian[static_cast<std::size_t>(a * n + a)] > hessian[static_cast<std::size_t>(b * n + b)];
    });
  }

  // Scaled to mean diagonal 1; m holds J H J, of which the lower triangle is factored in place.
  Matrix m(n, n);
  double damping = options.damping;
  for (;; damping *= 10) {
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int64_t column = factor.order[static_cast<std::size_t>(n - 1 - j)];
      for (std::int64_t i = j; i < n; ++i) {
        const std::int64_t row = factor.order[static_cast<std::size_t>(n - 1 - i)];
        m(i, j) = hessian[static_cast<std::size_t>(column * n + row)] / mean;
      }
      m(j, j) = factor.dead[static_cast<std::size_t>(column)] ? 1.0 : m(j, j) + damping;
    }
    Eigen::LLT<Eigen::Ref<Matrix>> cholesky(m);
    if (cholesky.info() == Eigen::Success) break;
    if (damping > 9.99) throw failure(place, "a positive definite Hessian", "still indefinite at damping 10");
    if (damping <= 0) damping = 1e-4;
  }
  factor.damping = damping;

  // U = R^-1 = J M^-1 J, panel by panel: columns [first, last) of M^-1 live in rows >= first.
  factor.u.assign(static_cast<std::size_t>(n * n), 0.0);
  const double unscale = 1.0 / std::sqrt(mean);
  constexpr std::int64_t kWidth = 64;
#pragma omp parallel for schedule(dynamic) num_threads(resolve_threads(threads))
  for (std::int64_t first = 0; first < n; first += kWidth) {
    const std::int64_t width = std::min(kWidth, n - first), height = n - first;
    Matrix x = Matrix::Identity(height, width);
    m.bottomRightCorner(height, height).template triangularView<Eigen::Lower>().solveInPlace(x);
    for (std::int64_t j = 0; j < width; ++j) {
      const std::int64_t u_column = n - 1 - (first + j);
      for (std::int64_t i = j; i < height; ++i) {
        factor.u[static_cast<std::size_t>((n - 1 - (first + i)) * n + u_column)] = x(i, j) * unscale;
      }
    }
  }
  return factor;
}

void sweep_columns(const float* weight, std::int64_t rows, const SweepFactor& factor, SweepRule& rule, int threads) {
  const std::int64_t n = factor.columns;
  const std::int64_t tiles = (rows + kSweepRows - 1) / kSweepRows;
#pragma omp parallel num_threads(resolve_threads(threads))
  {
    std::vector<double> current(static_cast<std::size_t>(n * kSweepRows));
    std::vector<double> errors(static_cast<std::size_t>(kSweepBlock * kSweepRows));
    std::vector<double> diagonal(static_cast<std::size_t>(kSweepBlock));
    double decided[kSweepRows];
#pragma omp for schedule(dynamic)
    for (std::int64_t t = 0; t < tiles; ++t) {
      const RowTile tile{t * kSweepRows, std::min(kSweepRows, rows - t * kSweepRows)};
      std::fill(current.begin(), current.end(), 0.0);
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t column = factor.order[static_cast<std::size_t>(i)];
        for (std::int64_t r = 0; r < tile.count; ++r) {
          current[static_cast<std::size_t>(i * kSweepRows + r)] =
              static_cast<double>(weight[(tile.first + r) * n + column]);
        }
      }
      for (std::int64_t first = 0; first < n; first += kSweepBlock) {
        const std::int64_t last = std::min(first + kSweepBlock, n);
        std::fill(errors.begin(), errors.end(), 0.0);
        for (std::int64_t i = first; i < last; ++i) {
          diagonal[static_cast<std::size_t>(i - first)] = factor.u[static_cast<std::size_t>(i * n + i)];
        }
        rule.open_block(tile, std::span(factor.order).subspan(static_cast<std::size_t>(first),
                                                              static_cast<std::size_t>(last - first)),
                        std::span(diagonal).first(static_cast<std::size_t>(last - first)),
                        current.data() + first * kSweepRows);
        for (std::int64_t i = first; i < last; ++i) {
          double* here = current.data() + i * kSweepRows;
          double* error = errors.data() + (i - first) * kSweepRows;
          rule.decide(tile, factor.order[static_cast<std::size_t>(i)], here, decided);
          for (std::int64_t r = 0; r < tile.count; ++r) {
            error[r] = (here[r] - decided[r]) / diagonal[static_cast<std::size_t>(i - first)];
            here[r] = decided[r];
          }
          compensate(current.data(), error, factor.u.data(), n, i, i + 1, i + 1, last);
        }
        compensate(current.data(), errors.data(), factor.u.data(), n, first, last, last, n);
      }
    }
  }
}

std::vector<double> row_errors(const float* a, const float* b, std::int64_t rows, std::int64_t cols,
                               const double* hessian, int threads) {
  std::vector<double> result(static_cast<std::size_t>(rows), 0.0);
  const std::int64_t tiles = (rows + kSweepRows - 1) / kSweepRows;
#pragma omp parallel num_threads(resolve_threads(threads))
  {
    std::vector<double> d(static_cast<std::size_t>(cols * kSweepRows));
    double total[kSweepRows];
#pragma omp for schedule(dynamic)
    for (std::int64_t t = 0; t < tiles; ++t) {
      const std::int64_t first = t * kSweepRows, count = std::min(kSweepRows, rows - first);
      std::fill(d.begin(), d.end(), 0.0);
      std::fill(total, total + kSweepRows, 0.0);
      for (std::int64_t r = 0; r < count; ++r) {
        for (std::int64_t i = 0; i < cols; ++i) {
          const std::int64_t at = (first + r) * cols + i;
          d[static_cast<std::size_t>(i * kSweepRows + r)] = static_cast<double>(a[at]) - static_cast<double>(b[at]);
        }
      }
      quadratic_tile(d.data(), hessian, cols, total);
      for (std::int64_t r = 0; r < count; ++r) result[static_cast<std::size_t>(first + r)] = std::max(0.0, total[r]);
    }
  }
  return result;
}

}  // namespace pare
