// Products of float32 matrices on matrix tiles (AMX): each value is the sum of two bfloat16, and of the four products
// of halves the three larger are added up in float32. Relative to the sum of |x w| that loses at most 2^-16 (measured:
// 2^-19), beside what sums in float32 lose: far below what rounding weights does. Calibration is content with that,
// evaluation and training do not use it.
#pragma once

#include <cstdint>

namespace pare {

// The processor has tiles for bfloat16, the system lets this process use them, and PARE_KERNELS in the environment
// names no other kernels.
bool has_split_products();

// While it lives, products of decoder blocks that this thread computes without gradients and sums over rows that it
// begins (add_gram) are split ones, if this machine has them.
class SplitProductsScope {
 public:
  SplitProductsScope();
  ~SplitProductsScope();
  SplitProductsScope(const SplitProductsScope&) = delete;
  SplitProductsScope& operator=(const SplitProductsScope&) = delete;

 private:
  bool before_;
};
bool split_products_wanted();

// out[rows][outputs], lines `stride` apart, = x[rows][depth] w[outputs][depth]^T. Finite values. The same bits at any
// number of rows and wherever a row lies. Needs has_split_products(); one thread.
void split_product(const float* x, std::int64_t rows, std::int64_t depth, const float* w, std::int64_t outputs,
                   float* out, std::int64_t stride);

// Memory that split_product takes meanwhile.
std::uint64_t split_product_bytes(std::int64_t rows, std::int64_t depth, std::int64_t outputs);

// 32 columns of x[rows][columns] from `first` on, for products over rows: split_panel_bytes(rows) each, 64-byte
// aligned. Columns and rows that are not there count as zeros. Either form may be null.
constexpr std::int64_t kSplitPanel = 32;
std::int64_t split_panel_bytes(std::int64_t rows);
void split_panel(const float* x, std::int64_t rows, std::int64_t columns, std::int64_t first, void* left, void* right);
// out[32][32] = sum over rows of left[row][i] right[row][j].
void split_panel_product(const void* left, const void* right, std::int64_t rows, float* out);

}  // namespace pare
