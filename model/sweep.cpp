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
#define PARE_INLINE __attribute__((always_inline)) inline

namespace pare {
namespace {

typedef float Float16 __attribute__((vector_size(64)));
typedef double Double8 __attribute__((vector_size(64)));
constexpr std::int64_t kPanel = 32;      // columns per packed panel of the Gram product
constexpr std::int64_t kGramRows = 512;  // float32 accumulation length
constexpr std::int64_t kLanes = kSweepRows / 8;

// tile[32][32] += sum over t of a[t][i] * b[t][j].
template <class T>
PARE_INLINE void gram_tile_body(const float* a, const float* b, std::int64_t rows, T* out, std::int64_t stride,
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
      T* line = out + (i + k) * stride;
      for (std::int64_t j = 0; j < width; ++j) line[j] += static_cast<T>(sum[k][j / 16][j % 16]);
    }
  }
}
// Clones are made of functions, not of templates.
PARE_CLONES void gram_tile(const float* a, const float* b, std::int64_t rows, double* out, std::int64_t stride,
                           std::int64_t height, std::int64_t width) {
  gram_tile_body(a, b, rows, out, stride, height, width);
}
PARE_CLONES void gram_tile(const float* a, const float* b, std::int64_t rows, float* out, std::int64_t stride,
                           std::int64_t height, std::int64_t width) {
  gram_tile_body(a, b, rows, out, stride, height, width);
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
template <class T>
PARE_INLINE void compensate_body(double* weights, const double* errors, const T* u, std::int64_t n, std::int64_t first,
                                 std::int64_t last, std::int64_t begin, std::int64_t end) {
  std::int64_t j = begin;
  for (; j + 4 <= end; j += 4) {
    Double8 sum[4][kLanes] = {};
    for (std::int64_t k = first; k < last; ++k) {
      Double8 e[kLanes];
      std::memcpy(e, errors + (k - first) * kSweepRows, sizeof e);
      const T* factor = u + k * n + j;
      for (int c = 0; c < 4; ++c) {
        for (int v = 0; v < kLanes; ++v) sum[c][v] += static_cast<double>(factor[c]) * e[v];
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
      for (int v = 0; v < kLanes; ++v) sum[v] += static_cast<double>(u[k * n + j]) * e[v];
    }
    Double8 w[kLanes];
    std::memcpy(w, weights + j * kSweepRows, sizeof w);
    for (int v = 0; v < kLanes; ++v) w[v] -= sum[v];
    std::memcpy(weights + j * kSweepRows, w, sizeof w);
  }
}

PARE_CLONES void compensate(double* weights, const double* errors, const double* u, std::int64_t n, std::int64_t first,
                            std::int64_t last, std::int64_t begin, std::int64_t end) {
  compensate_body(weights, errors, u, n, first, last, begin, end);
}
PARE_CLONES void compensate(double* weights, const double* errors, const float* u, std::int64_t n, std::int64_t first,
                            std::int64_t last, std::int64_t begin, std::int64_t end) {
  compensate_body(weights, errors, u, n, first, last, begin, end);
}

// total[r] += sum over i in [0, n) of d_i (H_ii d_i + 2 sum_{j > i} H_ij d_j).
template <class T>
PARE_INLINE void quadratic_tile_body(const double* d, const T* h, std::int64_t n, double* total) {
  Double8 sum[kLanes] = {};
  for (std::int64_t i = 0; i < n; i += 4) {
    const std::int64_t height = std::min<std::int64_t>(4, n - i);
    Double8 inner[4][kLanes] = {};
    // The 4 x 4 corner at half weight for its diagonal, then whole columns.
    for (std::int64_t a = 0; a < height; ++a) {
      for (std::int64_t j = i + a; j < i + height; ++j) {
        const double factor = static_cast<double>(h[(i + a) * n + j]) * (j == i + a ? 0.5 : 1.0);
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
        const auto factor = static_cast<double>(h[(i + a) * n + j]);
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

PARE_CLONES void quadratic_tile(const double* d, const double* h, std::int64_t n, double* total) {
  quadratic_tile_body(d, h, n, total);
}
PARE_CLONES void quadratic_tile(const double* d, const float* h, std::int64_t n, double* total) {
  quadratic_tile_body(d, h, n, total);
}

// g_i = sum over j of H_ij d_j.
template <class T>
PARE_INLINE void product_tile_body(const double* d, const T* h, std::int64_t n, double* g) {
  for (std::int64_t i = 0; i < n; i += 4) {
    const std::int64_t height = std::min<std::int64_t>(4, n - i);
    Double8 inner[4][kLanes] = {};
    if (height == 4) {
      for (std::int64_t j = 0; j < n; ++j) {
        Double8 other[kLanes];
        std::memcpy(other, d + j * kSweepRows, sizeof other);
        for (int a = 0; a < 4; ++a) {
          const auto factor = static_cast<double>(h[(i + a) * n + j]);
          for (int v = 0; v < kLanes; ++v) inner[a][v] += factor * other[v];
        }
      }
    } else {
      for (std::int64_t a = 0; a < height; ++a) {
        for (std::int64_t j = 0; j < n; ++j) {
          Double8 other[kLanes];
          std::memcpy(other, d + j * kSweepRows, sizeof other);
          for (int v = 0; v < kLanes; ++v) inner[a][v] += static_cast<double>(h[(i + a) * n + j]) * other[v];
        }
      }
    }
    std::memcpy(g + i * kSweepRows, inner, static_cast<std::size_t>(height * kSweepRows) * sizeof(double));
  }
}
PARE_CLONES void product_tile(const double* d, const double* h, std::int64_t n, double* g) {
  product_tile_body(d, h, n, g);
}
PARE_CLONES void product_tile(const double* d, const float* h, std::int64_t n, double* g) {
  product_tile_body(d, h, n, g);
}

int resolve_threads(int threads) {
  return threads > 0 ? threads : omp_get_num_procs();
}

}  // namespace

template <class T>
void add_gram(const float* a, const float* b, std::int64_t rows, std::int64_t cols, T* sum, int threads) {
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

template <class T>
void mirror_upper(T* h, std::int64_t n) {
  // In tiles, so that neither side is walked across whole rows of memory.
  for (std::int64_t top = 0; top < n; top += kPanel) {
    for (std::int64_t left = top; left < n; left += kPanel) {
      for (std::int64_t i = top; i < std::min(top + kPanel, n); ++i) {
        for (std::int64_t j = std::max(left, i + 1); j < std::min(left + kPanel, n); ++j) h[j * n + i] = h[i * n + j];
      }
    }
  }
}

namespace {

template <class T>
using RowMajor = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T>
using RowMajorMap = Eigen::Map<RowMajor<T>>;

// m: lower triangular, becomes its inverse in place; what is above the diagonal blocks is not touched. Block columns
// from the last to the first: below the diagonal block L_kk stands then -inv(rest) * L_rest,k * inv(L_kk).
template <class T>
void invert_lower(RowMajorMap<T>& m, int threads) {
  constexpr std::int64_t kWidth = 64, kHeight = 256;
  const std::int64_t n = m.rows(), blocks = (n + kWidth - 1) / kWidth;
  RowMajor<T> panel;
  for (std::int64_t k = blocks - 1; k >= 0; --k) {
    const std::int64_t first = k * kWidth, width = std::min(kWidth, n - first), below = first + width, rest = n - below;
    RowMajor<T> corner = RowMajor<T>::Identity(width, width);
    m.block(first, first, width, width).template triangularView<Eigen::Lower>().solveInPlace(corner);
    if (rest > 0) {
      panel = m.block(below, first, rest, width);
      const std::int64_t tiles = (rest + kHeight - 1) / kHeight;
#pragma omp parallel for schedule(dynamic) num_threads(resolve_threads(threads))
      for (std::int64_t t = tiles - 1; t >= 0; --t) {
        const std::int64_t top = t * kHeight, height = std::min(kHeight, rest - top);
        RowMajor<T> product = RowMajor<T>::Zero(height, width);
        if (top > 0) product.noalias() += m.block(below + top, below, height, top) * panel.topRows(top);
        product += m.block(below + top, below + top, height, height).template triangularView<Eigen::Lower>() *
                   panel.middleRows(top, height);
        m.block(below + top, first, height, width).noalias() = -product * corner;
      }
    }
    m.block(first, first, width, width) = corner;
  }
}

template <class T>
SweepFactor factor_typed(const T* hessian, std::int64_t n, const FactorOptions& options, const std::string& place,
                         int threads) {
  SweepFactor factor;
  factor.columns = n;
  factor.dead.assign(static_cast<std::size_t>(n), 0);
  factor.order.resize(static_cast<std::size_t>(n));
  std::iota(factor.order.begin(), factor.order.end(), std::int64_t{0});
  double mean = 0;
  std::int64_t live = 0;
  for (std::int64_t i = 0; i < n * n; ++i) {
    if (!std::isfinite(hessian[i])) {
      throw failure(place, "finite activation statistics", "NaN or infinity in the Hessian");
    }
  }
  for (std::int64_t i = 0; i < n; ++i) {
    const auto diagonal = static_cast<double>(hessian[i * n + i]);
    if (diagonal <= 0) {
      factor.dead[static_cast<std::size_t>(i)] = 1;
    } else {
      mean += diagonal;
      ++live;
    }
  }
  mean = live > 0 ? mean / static_cast<double>(live) : 1.0;
  if (options.activation_order) {
    std::stable_sort(factor.order.begin(), factor.order.end(),
                     [&](std::int64_t a, std::int64_t b) { return hessian[a * n + a] > hessian[b * n + b]; });
  }

  // Scaled to mean diagonal 1; m holds J H J, of which the lower triangle is factored in place.
  factor.u = SquareMatrix(n, sizeof(T) == sizeof(double) ? n : 0);
  T* values = static_cast<T*>(factor.u.visit([](auto* first) { return static_cast<void*>(first); }));
  RowMajorMap<T> m(values, n, n);
  double damping = options.damping;
  for (;; damping *= 10) {
    for (std::int64_t i = 0; i < n; ++i) {
      const T* row = hessian + factor.order[static_cast<std::size_t>(n - 1 - i)] * n;
      for (std::int64_t j = 0; j <= i; ++j) {
        m(i, j) = static_cast<T>(static_cast<double>(row[factor.order[static_cast<std::size_t>(n - 1 - j)]]) / mean);
      }
      const bool dead = factor.dead[static_cast<std::size_t>(factor.order[static_cast<std::size_t>(n - 1 - i)])] != 0;
      m(i, i) = dead ? T{1} : m(i, i) + static_cast<T>(damping);
    }
    Eigen::LLT<Eigen::Ref<RowMajor<T>>> cholesky(m);
    if (cholesky.info() == Eigen::Success) break;
    if (damping > 9.99) throw failure(place, "a positive definite Hessian", "still indefinite at damping 10");
    if (damping <= 0) damping = 1e-4;
  }
  factor.damping = damping;

  // U = R^-1 = J M^-1 J: the inverse read backwards.
  invert_lower(m, threads);
  for (std::int64_t i = 0; i < n; ++i) std::fill(values + i * n + i + 1, values + (i + 1) * n, T{0});
  const auto unscale = static_cast<T>(1.0 / std::sqrt(mean));
  for (std::int64_t low = 0, high = n * n - 1; low <= high; ++low, --high) {
    const T last = values[high];
    values[high] = values[low] * unscale;
    if (low != high) values[low] = last * unscale;
  }
  return factor;
}

}  // namespace

SweepFactor factor_hessian(const SquareMatrix& hessian, std::int64_t n, const FactorOptions& options,
                           const std::string& place, int threads) {
  return hessian.visit([&](const auto* values) { return factor_typed(values, n, options, place, threads); });
}

namespace {

template <class T>
void sweep_typed(const float* weight, std::int64_t rows, const SweepFactor& factor, const T* u, SweepRule& rule,
                 int threads) {
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
          diagonal[static_cast<std::size_t>(i - first)] = static_cast<double>(u[i * n + i]);
        }
        rule.open_block(
            tile,
            std::span(factor.order).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(last - first)),
            std::span(diagonal).first(static_cast<std::size_t>(last - first)), current.data() + first * kSweepRows);
        for (std::int64_t i = first; i < last; ++i) {
          double* here = current.data() + i * kSweepRows;
          double* error = errors.data() + (i - first) * kSweepRows;
          rule.decide(tile, factor.order[static_cast<std::size_t>(i)], here, decided);
          for (std::int64_t r = 0; r < tile.count; ++r) {
            error[r] = (here[r] - decided[r]) / diagonal[static_cast<std::size_t>(i - first)];
            here[r] = decided[r];
          }
          compensate(current.data(), error, u, n, i, i + 1, i + 1, last);
        }
        compensate(current.data(), errors.data(), u, n, first, last, last, n);
      }
    }
  }
}

}  // namespace

void sweep_columns(const float* weight, std::int64_t rows, const SweepFactor& factor, SweepRule& rule, int threads) {
  factor.u.visit([&](const auto* u) { sweep_typed(weight, rows, factor, u, rule, threads); });
}

namespace {

// Runs work(tile, d) with d = a - b of 32 rows, [cols * kSweepRows], zero where a tile has fewer.
template <class Work>
void each_tile(const float* a, const float* b, std::int64_t rows, std::int64_t cols, int threads, const Work& work) {
  const std::int64_t tiles = (rows + kSweepRows - 1) / kSweepRows;
#pragma omp parallel num_threads(resolve_threads(threads))
  {
    std::vector<double> d(static_cast<std::size_t>(cols * kSweepRows));
#pragma omp for schedule(dynamic)
    for (std::int64_t t = 0; t < tiles; ++t) {
      const RowTile tile{t * kSweepRows, std::min(kSweepRows, rows - t * kSweepRows)};
      std::fill(d.begin(), d.end(), 0.0);
      for (std::int64_t r = 0; r < tile.count; ++r) {
        for (std::int64_t i = 0; i < cols; ++i) {
          const std::int64_t at = (tile.first + r) * cols + i;
          d[static_cast<std::size_t>(i * kSweepRows + r)] = static_cast<double>(a[at]) - static_cast<double>(b[at]);
        }
      }
      work(tile, d.data());
    }
  }
}

}  // namespace

template <class T>
std::vector<double> row_errors(const float* a, const float* b, std::int64_t rows, std::int64_t cols, const T* hessian,
                               int threads) {
  std::vector<double> result(static_cast<std::size_t>(rows), 0.0);
  each_tile(a, b, rows, cols, threads, [&](RowTile tile, const double* d) {
    double total[kSweepRows] = {};
    quadratic_tile(d, hessian, cols, total);
    for (std::int64_t r = 0; r < tile.count; ++r)
      result[static_cast<std::size_t>(tile.first + r)] = std::max(0.0, total[r]);
  });
  return result;
}

template <class T>
void row_products(const float* a, const float* b, std::int64_t rows, std::int64_t cols, const T* hessian, int threads,
                  const std::function<void(RowTile, const double*)>& use) {
  each_tile(a, b, rows, cols, threads, [&](RowTile tile, const double* d) {
    std::vector<double> products(static_cast<std::size_t>(cols * kSweepRows));
    product_tile(d, hessian, cols, products.data());
    use(tile, products.data());
  });
}

template void add_gram(const float*, const float*, std::int64_t, std::int64_t, double*, int);
template void add_gram(const float*, const float*, std::int64_t, std::int64_t, float*, int);
template void mirror_upper(double*, std::int64_t);
template void mirror_upper(float*, std::int64_t);
template std::vector<double> row_errors(const float*, const float*, std::int64_t, std::int64_t, const double*, int);
template std::vector<double> row_errors(const float*, const float*, std::int64_t, std::int64_t, const float*, int);
template void row_products(const float*, const float*, std::int64_t, std::int64_t, const double*, int,
                           const std::function<void(RowTile, const double*)>&);
template void row_products(const float*, const float*, std::int64_t, std::int64_t, const float*, int,
                           const std::function<void(RowTile, const double*)>&);

}  // namespace pare
