#include "model/sweep.h"

#include <omp.h>

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <numeric>
#include <type_traits>

#include "core/error.h"
#include "model/clones.h"
#include "model/split_products.h"

#define PARE_INLINE __attribute__((always_inline)) inline

namespace pare {
namespace {

typedef float Float16 __attribute__((vector_size(64)));
typedef double Double8 __attribute__((vector_size(64)));
constexpr std::int64_t kPanel = 32;       // columns per packed panel of the Gram product
constexpr std::int64_t kGramRows = 512;   // float32 accumulation length
constexpr std::int64_t kGramDepth = 128;  // rows of two panels that stand in the nearest cache together
constexpr std::int64_t kGramPanels = 4;   // that stand in the second cache while others pass by,
constexpr std::int64_t kGramPassing = 12;  // so many
constexpr std::int64_t kLanes = 4;  // registers of rows at a time

struct alignas(64) Line {  // a load never spans two
  float at[16];
};

// out[height][width], lines `stride` apart, += product[32][32].
template <class T>
PARE_INLINE void add_tile(const float* product, T* out, std::int64_t stride, std::int64_t height, std::int64_t width) {
  for (std::int64_t k = 0; k < height; ++k) {
    T* line = out + k * stride;
#pragma omp simd
    for (std::int64_t j = 0; j < width; ++j) line[j] += static_cast<T>(product[k * kPanel + j]);
  }
}

// tile[32][32] += sum over t of a[t][i] * b[t][j], rows at most kGramRows.
template <class T>
PARE_INLINE void gram_tile_body(const float* a, const float* b, std::int64_t rows, T* out, std::int64_t stride,
                                std::int64_t height, std::int64_t width) {
  constexpr int kHeight = 8;
  alignas(64) float product[kPanel * kPanel] = {};
  for (std::int64_t top = 0; top < rows; top += kGramDepth) {
    const std::int64_t depth = std::min(kGramDepth, rows - top);
    for (std::int64_t i = 0; i < kPanel; i += kHeight) {
      Float16 sum[kHeight][2];
      std::memcpy(sum, product + i * kPanel, sizeof sum);
      const float *left = a + top * kPanel + i, *right = b + top * kPanel;
      const float* next = b + (top + depth) * kPanel + i / kHeight * depth * 8;  // a quarter in each pass
      for (std::int64_t t = 0; t < depth; ++t, left += kPanel, right += kPanel, next += 8) {
        __builtin_prefetch(next);
        Float16 low, high;
        std::memcpy(&low, right, sizeof low);
        std::memcpy(&high, right + 16, sizeof high);
#pragma GCC unroll 8
        for (int k = 0; k < kHeight; ++k) {
          sum[k][0] += left[k] * low;
          sum[k][1] += left[k] * high;
        }
      }
      std::memcpy(product + i * kPanel, sum, sizeof sum);
    }
  }
  add_tile(product, out, stride, height, width);
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

PARE_CLONES void add_product(const float* product, double* out, std::int64_t stride, std::int64_t height,
                             std::int64_t width) {
  add_tile(product, out, stride, height, width);
}
PARE_CLONES void add_product(const float* product, float* out, std::int64_t stride, std::int64_t height,
                             std::int64_t width) {
  add_tile(product, out, stride, height, width);
}

// Panel p as [row][32], zero padded.
void pack_panel(const float* x, std::int64_t rows, std::int64_t cols, std::int64_t p, float* out) {
  const std::int64_t width = std::min(kPanel, cols - p * kPanel);
  for (std::int64_t t = 0; t < rows; ++t, out += kPanel) {
    std::memcpy(out, x + t * cols + p * kPanel, static_cast<std::size_t>(width) * sizeof(float));
    std::fill(out + width, out + kPanel, 0.0f);
  }
}

// Strip by strip: `depth` rows of the matrix by kStrip columns stand packed as [column / 4][row][4], so that rows a
// power of two apart do not fight for the same cache lines, and serve every row of the tile. Products in V: floats over
// kDepth rows at most, which are then added in double.
constexpr std::int64_t kStrip = 64, kDepth = 64;

template <class V, bool kTransposed, class T>
PARE_INLINE void subtract_body(double* out, const double* factors, const T* m, std::int64_t n, std::int64_t first,
                               std::int64_t last, std::int64_t begin, std::int64_t end) {
  if (!kTransposed && last - first == 1) {
    for (std::int64_t j = begin; j < end; ++j) {
      const auto factor = static_cast<double>(m[first * n + j]);
      double* target = out + (j - begin) * kSweepRows;
      for (std::int64_t r = 0; r < kSweepRows; ++r) target[r] -= factor * factors[r];
    }
    return;
  }
  using S = std::remove_cvref_t<decltype(V{}[0])>;
  constexpr std::int64_t kLine = 64 / sizeof(T);
  constexpr std::int64_t kWidth = sizeof(V) / sizeof(S), kRows = kLanes * kWidth;  // at a time
  static_assert(kSweepRows % kRows == 0);
  alignas(64) S packed[kStrip * kDepth], rounded[kDepth * kSweepRows], sums[4 * kRows];
  for (std::int64_t top = first; top < last; top += kDepth) {
    const std::int64_t depth = std::min(kDepth, last - top);
    for (std::int64_t i = 0; i < depth * kSweepRows; ++i)
      rounded[i] = static_cast<S>(factors[(top - first) * kSweepRows + i]);
    for (std::int64_t left = begin; left < end; left += kStrip) {
      const std::int64_t width = std::min(kStrip, end - left), quads = (width + 3) / 4;
      if (width % 4 != 0) std::fill(packed + (quads - 1) * depth * 4, packed + quads * depth * 4, S{0});
      for (std::int64_t j = 0; kTransposed && j < width; ++j) {
        const T* column = m + (left + j) * n + top;
        S* to = packed + j / 4 * depth * 4 + j % 4;
        for (std::int64_t k = 0; k < depth; ++k) to[k * 4] = static_cast<S>(column[k]);
      }
      for (std::int64_t k = 0; !kTransposed && k < depth; ++k) {
        const T* row = m + (top + k) * n + left;
        std::int64_t j = 0;
        for (; j + 4 <= width; j += 4) {
          for (std::int64_t c = 0; c < 4; ++c) packed[(j * depth) + k * 4 + c] = static_cast<S>(row[j + c]);
        }
        for (; j < width; ++j) packed[(j / 4 * depth + k) * 4 + j % 4] = static_cast<S>(row[j]);
      }
      for (std::int64_t part = 0; part < kSweepRows; part += kRows) {
        for (std::int64_t quad = 0; quad < quads; ++quad) {
          if (part == 0 && left + 2 * kStrip <= end && depth == kDepth) {  // the next strip's, its lines are far apart
            const T* ahead = kTransposed ? m + (left + kStrip + quad * 4) * n + top
                                         : m + (top + quad * 4) * n + left + kStrip;
            for (std::int64_t i = 0; i < 4; ++i)
              for (std::int64_t k = 0; k < kStrip; k += kLine) __builtin_prefetch(ahead + i * n + k);
          }
          V sum[4][kLanes] = {};
          const S *column = packed + quad * depth * 4, *factor = rounded + part;
          for (std::int64_t k = 0; k < depth; ++k, column += 4, factor += kSweepRows) {
#pragma GCC unroll 4
            for (int v = 0; v < kLanes; ++v) {
              V e;
              std::memcpy(&e, factor + v * kWidth, sizeof e);
#pragma GCC unroll 4
              for (int c = 0; c < 4; ++c) sum[c][v] += column[c] * e;
            }
          }
          std::memcpy(sums, sum, sizeof sums);
          const std::int64_t filled = std::min<std::int64_t>(4, width - quad * 4);
          for (std::int64_t c = 0; c < filled; ++c) {
            double* target = out + (left - begin + quad * 4 + c) * kSweepRows + part;
            for (std::int64_t i = 0; i < kRows; ++i) target[i] -= static_cast<double>(sums[c * kRows + i]);
          }
        }
      }
    }
  }
}
// Clones are made of functions, not of templates.
PARE_CLONES void subtract_exact(double* out, const double* factors, const double* m, std::int64_t n, std::int64_t first,
                                std::int64_t last, std::int64_t begin, std::int64_t end) {
  subtract_body<Double8, false>(out, factors, m, n, first, last, begin, end);
}
PARE_CLONES void subtract_exact(double* out, const double* factors, const float* m, std::int64_t n, std::int64_t first,
                                std::int64_t last, std::int64_t begin, std::int64_t end) {
  subtract_body<Double8, false>(out, factors, m, n, first, last, begin, end);
}
PARE_CLONES void subtract(double* out, const double* factors, const double* m, std::int64_t n, std::int64_t first,
                          std::int64_t last, std::int64_t begin, std::int64_t end) {
  subtract_body<Float16, false>(out, factors, m, n, first, last, begin, end);
}
PARE_CLONES void subtract(double* out, const double* factors, const float* m, std::int64_t n, std::int64_t first,
                          std::int64_t last, std::int64_t begin, std::int64_t end) {
  subtract_body<Float16, false>(out, factors, m, n, first, last, begin, end);
}
PARE_CLONES void subtract_transposed(double* out, const double* factors, const double* m, std::int64_t n,
                                     std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end) {
  subtract_body<Float16, true>(out, factors, m, n, first, last, begin, end);
}
PARE_CLONES void subtract_transposed(double* out, const double* factors, const float* m, std::int64_t n,
                                     std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end) {
  subtract_body<Float16, true>(out, factors, m, n, first, last, begin, end);
}

// total[r] += d H d^T for d [n][kSweepRows]: twice what lies above the diagonal strips, and the strips.
template <class T>
void quadratic_tile(const double* d, const T* h, std::int64_t n, double* total) {
  double strip[kStrip * kSweepRows];
  for (std::int64_t left = 0; left < n; left += kStrip) {
    const std::int64_t width = std::min(kStrip, n - left);
    std::fill(strip, strip + width * kSweepRows, 0.0);
    subtract(strip, d, h, n, 0, left, left, left + width);
    for (std::int64_t i = 0; i < width * kSweepRows; ++i) strip[i] *= 2;
    subtract(strip, d + left * kSweepRows, h, n, left, left + width, left, left + width);
    for (std::int64_t j = 0; j < width; ++j) {
      for (std::int64_t r = 0; r < kSweepRows; ++r)
        total[r] -= strip[j * kSweepRows + r] * d[(left + j) * kSweepRows + r];
    }
  }
}

int resolve_threads(int threads) {
  return threads > 0 ? threads : omp_get_num_procs();
}

}  // namespace

template <class T>
void add_gram(const float* a, const float* b, std::int64_t rows, std::int64_t cols, T* sum, int threads, int part,
              int parts) {
  static_assert(kPanel == kGramPanel);
  const std::int64_t panels = (cols + kPanel - 1) / kPanel;
  const std::int64_t blocks = ((panels - part + parts - 1) / parts + kGramPanels - 1) / kGramPanels;
  const bool split = split_products_wanted();
  const std::int64_t bytes =  // of a panel, in each of its forms
      split ? split_panel_bytes(std::min(kGramRows, rows)) : std::min(kGramRows, rows) * kPanel * 4;
  const std::int64_t ahead = split ? 0 : kGramDepth * kPanel * 4;  // what tiles fetch ahead of themselves
  const auto lines = static_cast<std::size_t>((panels * bytes + ahead) / 64);
  const bool apart = a != b || split;  // the two sides are packed differently
  const auto left_lines = std::make_unique_for_overwrite<Line[]>(lines);
  const auto right_lines = std::make_unique_for_overwrite<Line[]>(apart ? lines : 0);
  auto *left = reinterpret_cast<std::byte*>(left_lines.get()), *right = reinterpret_cast<std::byte*>(right_lines.get());
  const std::byte* other = apart ? right : left;
#pragma omp parallel num_threads(resolve_threads(threads))
  for (std::int64_t start = 0; start < rows; start += kGramRows) {
    const std::int64_t count = std::min(kGramRows, rows - start);
#pragma omp for
    for (std::int64_t p = 0; p < panels; ++p) {
      std::byte *to_left = left + p * bytes, *to_right = right + p * bytes;
      if (split) {
        split_panel(b + start * cols, count, cols, p * kPanel, a == b ? to_left : nullptr, to_right);
        if (a != b) split_panel(a + start * cols, count, cols, p * kPanel, to_left, nullptr);
      } else {
        pack_panel(a + start * cols, count, cols, p, reinterpret_cast<float*>(to_left));
        if (a != b) pack_panel(b + start * cols, count, cols, p, reinterpret_cast<float*>(to_right));
      }
    }
#pragma omp for schedule(dynamic) collapse(2)
    for (std::int64_t block = 0; block < blocks; ++block) {
      for (std::int64_t passing = 0; passing < panels; passing += kGramPassing) {
        const std::int64_t begin = part + block * kGramPanels * parts;
        const std::int64_t end = std::min(begin + kGramPanels * parts, panels);
        for (std::int64_t j = passing; j < std::min(passing + kGramPassing, panels); ++j) {
          for (std::int64_t i = begin; i < end && (a != b || i <= j); i += parts) {
            T* to = sum + i * kPanel * cols + j * kPanel;
            const std::int64_t height = std::min(kPanel, cols - i * kPanel);
            const std::int64_t width = std::min(kPanel, cols - j * kPanel);
            if (split) {
              alignas(64) float product[kPanel * kPanel];
              split_panel_product(left + i * bytes, other + j * bytes, count, product);
              add_product(product, to, cols, height, width);
            } else {
              gram_tile(reinterpret_cast<const float*>(left + i * bytes),
                        reinterpret_cast<const float*>(other + j * bytes), count, to, cols, height, width);
            }
          }
        }
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
  factor.group = options.group;
  if (options.activation_order) {
    const auto own = [&](std::int64_t i) { return static_cast<double>(hessian[i * n + i]); };
    std::vector<double> sums(static_cast<std::size_t>(options.group > 0 ? n / options.group : 0), 0.0);
    for (std::size_t g = 0; g < sums.size(); ++g) {
      const auto begin = static_cast<std::int64_t>(g) * options.group;
      for (std::int64_t i = begin; i < begin + options.group; ++i) sums[g] += own(i);
    }
    std::stable_sort(factor.order.begin(), factor.order.end(), [&](std::int64_t a, std::int64_t b) {
      if (options.group > 0 && a / options.group != b / options.group) {
        const std::int64_t left = a / options.group, right = b / options.group;
        const double ours = sums[static_cast<std::size_t>(left)], theirs = sums[static_cast<std::size_t>(right)];
        return ours != theirs ? ours > theirs : left < right;
      }
      return own(a) > own(b);
    });
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
  const std::int64_t tiles = (rows + kSweepRows - 1) / kSweepRows, group = rule.group();
  const std::int64_t block = group > 0 ? kSweepBlock / group * group : kSweepBlock;
#pragma omp parallel num_threads(resolve_threads(threads))
  {
    std::vector<double> current(static_cast<std::size_t>(n * kSweepRows));
    std::vector<double> errors(static_cast<std::size_t>(kSweepBlock * kSweepRows));
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
      for (std::int64_t first = 0; first < n; first += block) {
        const std::int64_t last = std::min(first + block, n);
        std::fill(errors.begin(), errors.end(), 0.0);
        rule.open_block(tile, first, last - first, current.data() + first * kSweepRows);
        for (std::int64_t i = first; i < last; ++i) {
          double* here = current.data() + i * kSweepRows;
          double* error = errors.data() + (i - first) * kSweepRows;
          if (group > 0 && i % group == 0) rule.open_group(tile, i, here);
          rule.decide(tile, factor.order[static_cast<std::size_t>(i)], here, decided);
          for (std::int64_t r = 0; r < tile.count; ++r) {
            error[r] = (here[r] - decided[r]) / static_cast<double>(u[i * n + i]);
            here[r] = decided[r];
          }
          subtract_exact(current.data() + (i + 1) * kSweepRows, error, u, n, i, i + 1, i + 1, last);
        }
        subtract_exact(current.data() + last * kSweepRows, errors.data(), u, n, first, last, last, n);
      }
    }
  }
}

}  // namespace

std::vector<double> remaining_hessian(const SweepFactor& factor, std::int64_t first, std::int64_t size) {
  const auto u = [&](std::int64_t i, std::int64_t j) {
    return factor.u[static_cast<std::size_t>((first + i) * factor.columns + first + j)];
  };
  std::vector<double> r(static_cast<std::size_t>(size * size), 0.0), out(r.size(), 0.0);  // r = U_gg^-1, upper
  const auto at = [&](std::int64_t i, std::int64_t j) { return static_cast<std::size_t>(i * size + j); };
  const auto dead = [&](std::int64_t i) {
    return factor.dead[static_cast<std::size_t>(factor.order[static_cast<std::size_t>(first + i)])] != 0;
  };
  for (std::int64_t j = 0; j < size; ++j) {
    r[at(j, j)] = 1.0 / u(j, j);
    for (std::int64_t i = j - 1; i >= 0; --i) {
      double sum = 0;
      for (std::int64_t k = i + 1; k <= j; ++k) sum += u(i, k) * r[at(k, j)];
      r[at(i, j)] = -sum / u(i, i);
    }
  }
  for (std::int64_t i = 0; i < size; ++i) {
    for (std::int64_t j = i; j < size; ++j) {
      if (dead(i) || dead(j)) continue;
      for (std::int64_t k = j; k < size; ++k) out[at(i, j)] += r[at(i, k)] * r[at(j, k)];
      out[at(j, i)] = out[at(i, j)];
    }
  }
  return out;
}

void sweep_columns(const float* weight, std::int64_t rows, const SweepFactor& factor, SweepRule& rule, int threads) {
  factor.u.visit([&](const auto* u) { sweep_typed(weight, rows, factor, u, rule, threads); });
}

namespace {

// Runs work(tile, d) with d = a - b of kSweepRows rows, [cols * kSweepRows], zero where a tile has fewer.
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
                  const std::function<void(RowTile, std::span<double>)>& use) {
  each_tile(a, b, rows, cols, threads, [&](RowTile tile, const double* d) {
    std::vector<double> products(static_cast<std::size_t>(cols * kSweepRows), 0.0);
    subtract(products.data(), d, hessian, cols, 0, cols, 0, cols);
    for (double& value : products) value = -value;
    use(tile, products);
  });
}

template <class T>
void subtract_products(double* out, const double* factors, const T* matrix, std::int64_t n, std::int64_t first,
                       std::int64_t last, std::int64_t begin, std::int64_t end, bool transposed) {
  if (transposed) return subtract_transposed(out, factors, matrix, n, first, last, begin, end);
  subtract(out, factors, matrix, n, first, last, begin, end);
}

template void add_gram(const float*, const float*, std::int64_t, std::int64_t, double*, int, int, int);
template void add_gram(const float*, const float*, std::int64_t, std::int64_t, float*, int, int, int);
template void mirror_upper(double*, std::int64_t);
template void mirror_upper(float*, std::int64_t);
template std::vector<double> row_errors(const float*, const float*, std::int64_t, std::int64_t, const double*, int);
template std::vector<double> row_errors(const float*, const float*, std::int64_t, std::int64_t, const float*, int);
template void subtract_products(double*, const double*, const double*, std::int64_t, std::int64_t, std::int64_t,
                                std::int64_t, std::int64_t, bool);
template void subtract_products(double*, const double*, const float*, std::int64_t, std::int64_t, std::int64_t,
                                std::int64_t, std::int64_t, bool);
template void row_products(const float*, const float*, std::int64_t, std::int64_t, const double*, int,
                           const std::function<void(RowTile, std::span<double>)>&);
template void row_products(const float*, const float*, std::int64_t, std::int64_t, const float*, int,
                           const std::function<void(RowTile, std::span<double>)>&);

}  // namespace pare
