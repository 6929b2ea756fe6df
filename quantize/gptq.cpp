#include "quantize/gptq.h"

#include <algorithm>
#include <cmath>

#include "quantize/scales.h"

#if defined(__x86_64__) && defined(__linux__)
#define PARE_CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define PARE_CLONES
#endif

namespace pare {
namespace {

PARE_CLONES void add_scaled(double* sum, const double* values, double factor, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) sum[i] += factor * values[i];
}
PARE_CLONES void add_scaled(double* sum, const float* values, double factor, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) sum[i] += factor * static_cast<double>(values[i]);
}

// One row: codes, scales and zeros of the row, g = H d for d = w - dequantized.
struct Row {
  std::int8_t* codes;
  std::uint16_t* scales;
  const std::uint8_t* zeros;  // null: none
  const float* weight;
  std::int64_t cols, size;
  CodeRange range;
  bool keep_zeros;

  int zero(std::int64_t group) const { return zeros ? zeros[group] : 0; }

  template <class T>
  bool move_codes(const T* hessian, double* g) {
    bool moved = false;
    for (std::int64_t j = 0; j < cols; ++j) {
      const double scale = static_cast<double>(f16_to_f32(scales[j / size])),
                   curvature = static_cast<double>(hessian[j * cols + j]);
      if (!(scale > 0 && curvature > 0) || (keep_zeros && weight[j] == 0.0f)) continue;
      const double wanted = static_cast<double>(codes[j]) + g[j] / (scale * curvature);
      const double step =
          std::nearbyint(std::clamp<double>(wanted, range.low, range.high)) - static_cast<double>(codes[j]);
      if (step == 0 || 2.0 * step * g[j] <= step * step * scale * curvature * (1 + 1e-9)) continue;
      codes[j] = static_cast<std::int8_t>(codes[j] + static_cast<int>(step));
      add_scaled(g, hessian + j * cols, -step * scale, cols);
      moved = true;
    }
    return moved;
  }

  template <class T>
  bool move_scales(const T* hessian, double* g) {
    bool moved = false;
    for (std::int64_t group = 0; group < cols / size; ++group) {
      const std::int64_t begin = group * size, end = begin + size;
      double slope = 0, curvature = 0;
      for (std::int64_t i = begin; i < end; ++i) {
        const double q = codes[i] - zero(group);
        if (q == 0) continue;
        slope += q * g[i];
        double inner = 0;
        for (std::int64_t j = begin; j < end; ++j)
          inner += static_cast<double>(hessian[i * cols + j]) * (codes[j] - zero(group));
        curvature += q * inner;
      }
      if (!(curvature > 0)) continue;
      const double scale = static_cast<double>(f16_to_f32(scales[group]));
      const double wanted = scale + slope / curvature;
      if (!(wanted > 0 && wanted < 65504.0)) continue;
      const std::uint16_t bits = f32_to_f16(static_cast<float>(wanted));
      const double step = static_cast<double>(f16_to_f32(bits)) - scale;
      if (step == 0 || 2.0 * step * slope <= step * step * curvature) continue;
      scales[group] = bits;
      for (std::int64_t i = begin; i < end; ++i) {
        const double q = codes[i] - zero(group);
        if (q != 0) add_scaled(g, hessian + i * cols, -step * q, cols);
      }
      moved = true;
    }
    return moved;
  }
};

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
        offset =
            std::nearbyint(std::clamp(current[r] / static_cast<double>(scale), static_cast<double>(range_.low - zero),
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

template <class T>
GptqResult gptq(const float* weight, const QuantizedTensor& nearest, const T* hessian, const SweepFactor& factor,
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

template <class T>
double polish(const float* weight, QuantizedTensor& tensor, const T* hessian, bool keep_zeros, int passes,
              int threads) {
  const std::int64_t rows = tensor.rows, cols = tensor.cols, groups = tensor.codec.groups(cols);
  const QuantizedTensor before = tensor;
  std::vector<float> unpacked(static_cast<std::size_t>(rows * cols));
  before.unpack(unpacked.data());
  std::vector<double> old_errors(static_cast<std::size_t>(rows), 0.0);
  row_products(weight, unpacked.data(), rows, cols, hessian, threads, [&](RowTile tile, const double* products) {
    std::vector<double> g(static_cast<std::size_t>(cols));
    for (std::int64_t i = 0; i < tile.count; ++i) {
      const std::int64_t r = tile.first + i;
      Row row{tensor.codes.data() + r * cols,
              tensor.scales.data() + r * groups,
              tensor.zeros.empty() ? nullptr : tensor.zeros.data() + r * groups,
              weight + r * cols,
              cols,
              cols / groups,
              code_range(tensor.codec.kind),
              keep_zeros};
      double error = 0;
      for (std::int64_t j = 0; j < cols; ++j) {
        const std::size_t at = static_cast<std::size_t>(r * cols + j);
        g[static_cast<std::size_t>(j)] = products[j * kSweepRows + i];
        error += (static_cast<double>(weight[at]) - static_cast<double>(unpacked[at])) * g[static_cast<std::size_t>(j)];
      }
      old_errors[static_cast<std::size_t>(r)] = std::max(0.0, error);
      for (int pass = 0; pass < passes; ++pass) {
        const bool codes_moved = row.move_codes(hessian, g.data());
        const bool scales_moved = row.move_scales(hessian, g.data());
        if (!codes_moved && !scales_moved) break;
      }
    }
  });
  tensor.unpack(unpacked.data());
  const std::vector<double> errors = row_errors(weight, unpacked.data(), rows, cols, hessian, threads);
  double sum = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::size_t at = static_cast<std::size_t>(r);
    sum += std::min(errors[at], old_errors[at]);
    if (errors[at] < old_errors[at]) continue;
    std::copy_n(before.codes.begin() + r * cols, cols, tensor.codes.begin() + r * cols);
    std::copy_n(before.scales.begin() + r * groups, groups, tensor.scales.begin() + r * groups);
  }
  return sum;
}

template GptqResult gptq(const float*, const QuantizedTensor&, const double*, const SweepFactor&, bool, int);
template GptqResult gptq(const float*, const QuantizedTensor&, const float*, const SweepFactor&, bool, int);
template double polish(const float*, QuantizedTensor&, const double*, bool, int, int);
template double polish(const float*, QuantizedTensor&, const float*, bool, int, int);

bool is_pruned(std::span<const float> weight) {
  const auto zeros = std::count(weight.begin(), weight.end(), 0.0f);
  return !weight.empty() && static_cast<double>(zeros) >= 0.05 * static_cast<double>(weight.size());
}

}  // namespace pare
