// How many weights of a matrix go, and the choice among weights that a column sweep compensates: what prune and
// quantize share of pruning. Plain arrays, no LibTorch types.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "model/sweep.h"

namespace pare {

// How many weights go: a fraction of them, or N:M = N kept in every M consecutive inputs of a row.
struct Sparsity {
  double fraction = 0.5;      // in (0, 1); of each row or of the tensor, rounded down to whole weights
  int keep = 0, of = 0;       // N:M when of > 0
  std::int64_t weights = -1;  // from 0 on: exactly so many of the tensor instead of the fraction

  bool n_of_m() const { return of > 0; }
  // "2:4" -> {keep 2, of 4}. Exit 2 unless 0 < N < M <= 64.
  static Sparsity pattern(std::string_view text, const std::string& place);
  std::string name() const;  // "50 %" or "2:4"
  // Weights removed of `count` that compete with each other.
  std::int64_t removed(std::int64_t count) const;
  // Of the first `part` of a tensor's `whole` weights, where parts of it compete by themselves: what parts lose adds up
  // to `weights`, or to removed(whole).
  std::int64_t removed_before(std::int64_t part, std::int64_t whole) const;
};

// keep[i] = 0 for the `remove` lowest of scores[0, count), else 1; of equal ones the higher index goes first.
// work: scratch, reused between calls. T: float or double.
template <class T>
void drop_lowest(const T* scores, std::int64_t count, std::int64_t remove, std::vector<T>& work, std::uint8_t* keep);

// SparseGPT's choice (Frantar & Alistarh 2023): removing a weight w of column j, as compensated when the sweep comes
// there, costs w^2 / U_jj^2 with U of the factor; 0 in dead columns. A SweepRule asks it before the columns' turn.
class SweepMask {
 public:
  // With N:M every M consecutive inputs stand together in the factor's order, or in one group of it. The factor is kept
  // by reference.
  SweepMask(const SweepFactor& factor, std::int64_t rows, const Sparsity& sparsity);

  // Chooses among visiting positions [first, first + count) of the tile: all of its rows together, or with N:M every M
  // inputs of a row. current: [count][kSweepRows] as the sweep has it. From several threads for different tiles.
  void choose(RowTile tile, std::int64_t first, std::int64_t count, const double* current);
  bool keeps(std::int64_t row, std::int64_t column) const {
    return keep_[static_cast<std::size_t>(row * factor_.columns + column)] != 0;
  }
  const Sparsity& sparsity() const { return sparsity_; }
  // [rows * columns] as stored, 1 = stays; complete after the sweep.
  const std::vector<std::uint8_t>& keep() const { return keep_; }

 private:
  const SweepFactor& factor_;
  Sparsity sparsity_;
  std::int64_t rows_;
  std::vector<double> cost_;  // [columns] in visiting order: 1 / U_jj^2
  std::vector<std::uint8_t> keep_;
};

}  // namespace pare
