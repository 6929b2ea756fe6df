#include "prune/sparsegpt.h"

namespace pare {
namespace {

class SparseRule : public SweepRule {
 public:
  SparseRule(SweepMask& mask, std::int64_t cols, float* out) : mask_(mask), cols_(cols), out_(out) {}

  std::int64_t group() const override { return mask_.sparsity().of; }
  void open_block(RowTile tile, std::int64_t first, std::int64_t count, const double* current) override {
    if (!mask_.sparsity().n_of_m()) mask_.choose(tile, first, count, current);
  }
  void open_group(RowTile tile, std::int64_t first, const double* current) override {
    mask_.choose(tile, first, group(), current);
  }
  void decide(RowTile tile, std::int64_t column, const double* current, double* decided) override {
    for (std::int64_t r = 0; r < tile.count; ++r) {
      const std::int64_t row = tile.first + r;
      decided[r] = mask_.keeps(row, column) ? current[r] : 0.0;
      out_[row * cols_ + column] = static_cast<float>(decided[r]);
    }
  }

 private:
  SweepMask& mask_;
  std::int64_t cols_;
  float* out_;
};

}  // namespace

SparseWeights sparsegpt(const float* weight, std::int64_t rows, const SweepFactor& factor, const Sparsity& sparsity,
                        int threads) {
  SparseWeights result;
  result.weight.resize(static_cast<std::size_t>(rows * factor.columns));
  SweepMask mask(factor, rows, sparsity);
  SparseRule rule(mask, factor.columns, result.weight.data());
  sweep_columns(weight, rows, factor, rule, threads);
  result.keep = mask.keep();
  return result;
}

}  // namespace pare
