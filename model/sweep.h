// Second-order machinery over one linear's input Hessian: accumulation, factorisation and the column sweep that
// GPTQ and SparseGPT share. Plain arrays and Eigen, no LibTorch types. Everything gives the same bits at any number
// of threads: fixed tiles, each computed by one thread in a fixed order.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace pare {

// sum [cols * cols] += a^T b for float a, b [rows, cols] (row-major): products in float32, or split ones, over at most
// 512 rows, added to the sums. With a == b only entries (i, j) with i / 32 <= j / 32 are written: call mirror_upper at the end.
// T: double or float, here and below. Of `parts` that share the work each adds the rows of every parts-th panel of
// kGramPanel rows of the sum, from the part-th on.
inline constexpr std::int64_t kGramPanel = 32;
template <class T>
void add_gram(const float* a, const float* b, std::int64_t rows, std::int64_t cols, T* sum, int threads, int part = 0,
              int parts = 1);
// h[j][i] = h[i][j] for i < j.
template <class T>
void mirror_upper(T* h, std::int64_t n);

// [n * n] row-major, in double up to `widest_double` columns and in float above: half the memory. With a damping of 1 %
// of the mean diagonal, entries good to 1e-7 give the same codes.
inline constexpr std::int64_t kWidestDouble = 8192;
class SquareMatrix {
 public:
  SquareMatrix() = default;
  SquareMatrix(std::int64_t n, std::int64_t widest_double) {
    (n > widest_double ? single_.resize(static_cast<std::size_t>(n * n))
                       : double_.resize(static_cast<std::size_t>(n * n)));
  }
  explicit SquareMatrix(std::vector<double> values) : double_(std::move(values)) {}
  bool empty() const { return double_.empty() && single_.empty(); }
  bool single() const { return !single_.empty(); }
  double operator[](std::size_t at) const { return single() ? static_cast<double>(single_[at]) : double_[at]; }
  bool operator==(const SquareMatrix&) const = default;
  // `work(pointer to the first element)` for the type that the matrix has.
  template <class Work>
  decltype(auto) visit(Work&& work) const {
    return single() ? work(single_.data()) : work(double_.data());
  }
  template <class Work>
  decltype(auto) visit(Work&& work) {
    return single() ? work(single_.data()) : work(double_.data());
  }
  // Not for a matrix of floats.
  const std::vector<double>& doubles() const {
    if (single()) throw std::logic_error("a matrix of floats");
    return double_;
  }

 private:
  std::vector<double> double_;
  std::vector<float> single_;
};

// The factor of a damped Hessian in visiting order: (H + damping * mean diag * I)^-1 = U^T U with U upper triangular.
struct SweepFactor {
  std::int64_t columns = 0;
  std::vector<std::int64_t> order;  // visiting position -> column as stored
  std::int64_t group = 0;           // as asked
  SquareMatrix u;                   // in visiting order; zero below the diagonal
  std::vector<std::uint8_t> dead;   // [columns] as stored: the input was zero on every token
  double damping = 0;               // the factor that succeeded
};

struct FactorOptions {
  double damping = 0.01;         // of the mean diagonal; multiplied by 10 after a failed factorisation
  bool activation_order = true;  // descending diagonal; ties by column
  // With activation_order: groups of so many columns stay together, ordered by the sums of their diagonals; the storage
  // needs no index then, and what a group needs is known before its first column. 0: columns alone.
  std::int64_t group = 0;
};

// hessian: [n * n] symmetric. With J the reversal and J H J = M M^T, R = J M J is upper with H = R R^T, so U = R^-1:
// one Cholesky and one triangular inverse, both in place and in the Hessian's own precision, scaled to a mean diagonal
// of 1; no explicit inverse of H. Dead columns get diagonal 1. Errors: exit 1 naming `place` when the Hessian holds NaN
// or infinity, or stays indefinite at damping 10.
SweepFactor factor_hessian(const SquareMatrix& hessian, std::int64_t n, const FactorOptions& options,
                           const std::string& place, int threads);

inline constexpr std::int64_t kSweepRows = 64;
inline constexpr std::int64_t kSweepBlock = 128;

// Rows [first, first + count) of a weight matrix, handled together.
struct RowTile {
  std::int64_t first = 0, count = 0;
};

// Chooses what becomes of a column; the sweep compensates the rest. Called from several threads for different tiles.
class SweepRule {
 public:
  virtual ~SweepRule() = default;
  // Above 0, at most kSweepBlock: open_group is called before every so many columns, which share a block of the sweep.
  virtual std::int64_t group() const { return 0; }
  // Before every block of kSweepBlock columns, or of as many whole groups as that holds. current: [count * kSweepRows],
  // as below.
  virtual void open_block(RowTile tile, std::int64_t first, std::int64_t count, const double* current) {}
  // first: visiting position. current: [group() * kSweepRows], the weights of the group as compensated so far, row r of
  // the tile at [c * kSweepRows + r].
  virtual void open_group(RowTile tile, std::int64_t first, const double* current) {}
  // current [tile.count]: the compensated weights of `column` (as stored); writes what stands there from now on.
  virtual void decide(RowTile tile, std::int64_t column, const double* current, double* decided) = 0;
};

// What errors d in visiting positions [first, first + size) cost once all later columns compensate for them: d A d^T,
// [size * size], A = (U_gg^T U_gg)^-1, the Schur complement of the damped Hessian; 0 for dead columns.
std::vector<double> remaining_hessian(const SweepFactor& factor, std::int64_t first, std::int64_t size);

// weight: [rows * cols] row-major, not modified. Frantar et al. 2022 (GPTQ), algorithm 1 with lazy blocks.
void sweep_columns(const float* weight, std::int64_t rows, const SweepFactor& factor, SweepRule& rule, int threads);

// Per row: d H d^T for d = a - b, float a, b [rows, cols]. The exact layer error is the sum.
template <class T>
std::vector<double> row_errors(const float* a, const float* b, std::int64_t rows, std::int64_t cols, const T* hessian,
                               int threads);

// H d for every row of d = a - b, kSweepRows rows at a time: `use` may change a tile's products [cols * kSweepRows],
// row r of the tile at [j * kSweepRows + r]. Called from several threads for different tiles.
template <class T>
void row_products(const float* a, const float* b, std::int64_t rows, std::int64_t cols, const T* hessian, int threads,
                  const std::function<void(RowTile, std::span<double>)>& use);

// Of a tile: out_j -= sum over k in [first, last) of factors_k M_kj, for j in [begin, end); of the transposed M, M_jk.
// out: [end - begin][kSweepRows], factors: [last - first][kSweepRows], matrix M: [n * n].
template <class T>
void subtract_products(double* out, const double* factors, const T* matrix, std::int64_t n, std::int64_t first,
                       std::int64_t last, std::int64_t begin, std::int64_t end, bool transposed = false);

}  // namespace pare
