#include "quantize/gptq.h"

#include <algorithm>
#include <cmath>

#include "quantize/scales.h"

namespace pare {
namespace {

class NearestRule : public SweepRule {
 public:
  NearestRule(const float* weight, QuantizedTensor& tensor, bool keep_zeros)
      : weight_(weight),
        tensor_(tensor),
        keep_zeros_(keep_zeros),
        range_(code_range(tensor.codec.kind)),
        groups_(tensor.codec.groups(tensor.cols)),
        size_(tensor.cols / groups_) {}

  void decide(RowTile tile, std::int64_t column, const double* current, double* decided) override {
    for (std::int64_t r = 0; r < tile.count; ++r) {
      const std::int64_t row = tile.first + r;
      const std::size_t group = static_cast<std::size_t>(row * groups_ + column / size_);
      const float scale = f16_to_f32(tensor_.scales[group]);
      const int zero = tensor_.zeros.empty() ? 0 : tensor_.zeros[group];
      double offset = 0;
      if (scale > 0 && !(keep_zeros_ && weight_[row * tensor_.cols + column] == 0.0f)) {
        offset = std::nearbyint(std::clamp(current[r] / static_cast<double>(scale),
                                           static_cast<double>(range_.low - zero),
                                           static_cast<double>(range_.high - zero)));
      }
      tensor_.codes[static_cast<std::size_t>(row * tensor_.cols + column)] =
          static_cast<std::int8_t>(static_cast<int>(offset) + zero);
      decided[r] = static_cast<double>(static_cast<float>(offset) * scale);
    }
  }

 private:
  const float* weight_;
  QuantizedTensor& tensor_;
  bool keep_zeros_;
  CodeRange range_;
  std::int64_t groups_, size_;
};

}  // namespace

GptqResult gptq(const float* weight, const QuantizedTensor& nearest, const double* hessian, const SweepFactor& factor,
                bool keep_zeros, int threads) {
  const std::int64_t rows = nearest.rows, cols = nearest.cols;
  GptqResult result;
  result.tensor = nearest;
  NearestRule rule(weight, result.tensor, keep_zeros);
  sweep_columns(weight, rows, factor, rule, threads);

  std::vector<float> unpacked(static_cast<std::size_t>(rows * cols));
  nearest.unpack(unpacked.data());
  const std::vector<double> plain = row_errors(weight, unpacked.data(), rows, cols, hessian, threads);
  result.tensor.unpack(unpacked.data());
  const std::vector<double> swept = row_errors(weight, unpacked.data(), rows, cols, hessian, threads);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::size_t at = static_cast<std::size_t>(r);
    result.nearest_error += plain[at];
    result.sweep_error += swept[at];
    result.error += std::min(plain[at], swept[at]);
    if (plain[at] < swept[at]) {
      ++result.nearest_rows;
      std::copy_n(nearest.codes.begin() + r * cols, cols, result.tensor.codes.begin() + r * cols);
    }
  }
  return result;
}

bool is_pruned(std::span<const float> weight) {
  const auto zeros = std::count(weight.begin(), weight.end(), 0.0f);
  return !weight.empty() && static_cast<double>(zeros) >= 0.05 * static_cast<double>(weight.size());
}

}  // namespace pare
