// What stays of a cut layer: which units, and least squares for the weights that read them. Plain arrays.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace pare {

// Indices of the `keep` largest, ascending; of equal ones the lower index stays.
std::vector<std::int64_t> most_important(const std::vector<double>& importance, std::int64_t keep);

// Weights W' [rows, inputs] that give targets t from the inputs x that a cut layer still has, drawn to the weights W
// that it would keep otherwise:
//   W' = (T + lambda W) (H + lambda I)^-1,  H = sum x x^T,  T = sum t x^T,  lambda = damping * mean diag H,
// the minimiser of sum |t - W' x|^2 + lambda |W' - W|^2. With t = W_all x_all this hands what kept inputs can predict
// of the removed ones over to them, as the updates of Optimal Brain Surgeon do (Hassibi, Stork 1992).
class Refit {
 public:
  // gram: H, [inputs, inputs], symmetric. Exit 1 when it stays singular in spite of the damping; `place` names it.
  Refit(const double* gram, std::int64_t inputs, double damping, const std::string& place);
  ~Refit();
  // weights: W [rows, inputs]; cross: T [rows, inputs]. Rows do not depend on each other.
  std::vector<float> solve(const float* weights, const double* cross, std::int64_t rows) const;

 private:
  struct Factor;
  std::unique_ptr<Factor> factor_;
};

// sum |t - W x|^2 over the tokens of H and T in double; energy: sum |t|^2.
double squared_error(const float* weights, const double* gram, const double* cross, double energy, std::int64_t rows,
                     std::int64_t inputs);

}  // namespace pare
