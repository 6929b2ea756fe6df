#include "quantize/gptq.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "model/clones.h"
#include "quantize/minima.h"
#include "quantize/scales.h"

namespace pare {
namespace {

PARE_CLONES void add_scaled(double* sum, const double* values, double factor, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) sum[i] += factor * values[i];
}

constexpr std::int64_t kPolishBlock = 128;  // columns whose gradients follow every single move

// A tile of rows under coordinate descent: g = H d for d = w - dequantized, [cols][kSweepRows]. Inside a block of
// columns a row's gradients follow every move; the other columns get all of a block's moves in one matrix product.
template <class T>
class PolishTile {
 public:
  PolishTile(RowTile tile, QuantizedTensor& tensor, const T* hessian, std::span<const std::uint8_t> keep,
             std::span<double> g)
      : tile_(tile),
        tensor_(tensor),
        hessian_(hessian),
        keep_(keep),
        g_(g.data()),
        cols_(tensor.cols),
        groups_(tensor.codec.groups(tensor.cols)),
        size_(cols_ / groups_),
        range_(code_range(tensor.codec.kind)),
        moves_(static_cast<std::size_t>(kPolishBlock * kSweepRows)),
        corner_(static_cast<std::size_t>(kPolishBlock * kPolishBlock)) {
    for (std::int64_t r = 0; r < tile.count; ++r) live_.push_back(r);
  }

  // One pass over codes, one over scales; false: nothing moved. Rows in which nothing moves are left alone afterwards.
  bool pass() {
    moved_.fill(false);
    for (std::int64_t begin = 0; begin < cols_; begin += kPolishBlock)
      in_block(begin, std::min(begin + kPolishBlock, cols_), [&](std::int64_t row, double* g, double* moves) {
        return move_codes(row, begin, std::min(begin + kPolishBlock, cols_), g, moves);
      });
    if (size_ > kPolishBlock) {
      move_wide_scales();
    } else {
      const std::int64_t block = kPolishBlock / size_ * size_;
      for (std::int64_t begin = 0; begin < cols_; begin += block)
        in_block(begin, std::min(begin + block, cols_), [&](std::int64_t row, double* g, double* moves) {
          return tensor_.minima.empty() ? move_scales(row, begin, std::min(begin + block, cols_), g, moves)
                                        : move_minima(row, begin, std::min(begin + block, cols_), g, moves);
        });
    }
    std::erase_if(live_, [&](std::int64_t r) { return !moved_[static_cast<std::size_t>(r)]; });
    return !live_.empty();
  }

 private:
  double scale(std::int64_t row, std::int64_t group) const {
    return static_cast<double>(f16_to_f32(tensor_.scales[static_cast<std::size_t>(row * groups_ + group)]));
  }
  int zero(std::int64_t row, std::int64_t group) const {
    return tensor_.zeros.empty() ? 0 : tensor_.zeros[static_cast<std::size_t>(row * groups_ + group)];
  }
  double minimum(std::int64_t row, std::int64_t group) const {
    return tensor_.minima.empty()
               ? 0.0
               : static_cast<double>(f16_to_f32(tensor_.minima[static_cast<std::size_t>(row * groups_ + group)]));
  }
  std::int8_t* codes(std::int64_t row) { return tensor_.codes.data() + row * cols_; }

  // Runs move(row, gradients of the block, what the dequantized weights of the block change by) for the live rows.
  template <class Move>
  void in_block(std::int64_t begin, std::int64_t end, const Move& move) {
    const std::int64_t width = end - begin;
    for (std::int64_t i = 0; i < width; ++i) {
      const T* from = hessian_ + (begin + i) * cols_ + begin;
      std::copy_n(from, width, corner_.begin() + i * kPolishBlock);
    }
    std::fill(moves_.begin(), moves_.end(), 0.0);
    bool any = false;
    double g[kPolishBlock], moves[kPolishBlock];
    for (const std::int64_t r : live_) {
      for (std::int64_t i = 0; i < width; ++i) g[i] = g_[(begin + i) * kSweepRows + r];
      std::fill(moves, moves + width, 0.0);
      if (!move(tile_.first + r, g, moves)) continue;
      any = moved_[static_cast<std::size_t>(r)] = true;
      for (std::int64_t i = 0; i < width; ++i) {
        g_[(begin + i) * kSweepRows + r] = g[i];
        moves_[static_cast<std::size_t>(i * kSweepRows + r)] = moves[i];
      }
    }
    if (!any) return;
    subtract_products(g_, moves_.data(), hessian_, cols_, begin, end, 0, begin);
    subtract_products(g_ + end * kSweepRows, moves_.data(), hessian_, cols_, begin, end, end, cols_);
  }

  bool move_codes(std::int64_t row, std::int64_t begin, std::int64_t end, double* g, double* moves) {
    bool moved = false;
    std::int8_t* code = codes(row) + begin;
    for (std::int64_t i = 0; i < end - begin; ++i) {
      const double* line = corner_.data() + i * kPolishBlock;
      const double step_size = scale(row, (begin + i) / size_), curvature = line[i];
      const bool zero = !keep_.empty() && keep_[static_cast<std::size_t>(row * cols_ + begin + i)] == 0;
      if (!(step_size != 0 && curvature > 0) || zero) continue;
      const double wanted = static_cast<double>(code[i]) + g[i] / (step_size * curvature);
      const double step =
          std::nearbyint(std::clamp<double>(wanted, range_.low, range_.high)) - static_cast<double>(code[i]);
      const double move = step * step_size;
      if (step == 0 || 2.0 * move * g[i] <= move * move * curvature * (1 + 1e-9)) continue;
      code[i] = static_cast<std::int8_t>(code[i] + static_cast<int>(step));
      moves[i] = move;
      add_scaled(g, line, -moves[i], end - begin);
      moved = true;
    }
    return moved;
  }

  // The step of a group's scale that lowers the error most, as f16 has it; 0: none does. slope: q g, curvature: q H q.
  double move_scale(std::int64_t row, std::int64_t group, double slope, double curvature) {
    if (!(curvature > 0)) return 0;
    const double now = scale(row, group), wanted = now + slope / curvature;
    if (!(std::fabs(wanted) < 65504.0) || (now < 0 ? wanted >= 0 : wanted <= 0)) return 0;  // it keeps its sign
    const std::uint16_t bits = f32_to_f16(static_cast<float>(wanted));
    const double step = static_cast<double>(f16_to_f32(bits)) - now;
    if (bits == 0x8000 || step == 0 || 2.0 * step * slope <= step * step * curvature) return 0;
    tensor_.scales[static_cast<std::size_t>(row * groups_ + group)] = bits;
    return step;
  }

  struct Steps {
    double scale = 0, minimum = 0;
  };
  // The same for scale and minimum together: least squares in two unknowns, rounded one after the other. slopes: q g
  // and 1 g; curvatures: q H q, q H 1, 1 H 1.
  Steps move_minimum(std::int64_t row, std::int64_t group, const Steps& slope, double qq, double q1, double one) {
    const double determinant = qq * one - q1 * q1, now = scale(row, group), base = minimum(row, group);
    if (!(determinant > 1e-9 * qq * one) || !(now > 0)) return {};
    const double wanted = now + (slope.scale * one - slope.minimum * q1) / determinant;
    if (!(wanted > 0 && wanted < 65504.0)) return {};
    const std::uint16_t scale_bits = f32_to_f16(static_cast<float>(wanted));
    Steps step;
    step.scale = static_cast<double>(f16_to_f32(scale_bits)) - now;
    const double wanted_base = base + (slope.minimum - step.scale * q1) / one;
    if (scale_bits == 0 || !(std::fabs(wanted_base) < 65504.0)) return {};
    const std::uint16_t base_bits = f32_to_f16(static_cast<float>(wanted_base));
    step.minimum = static_cast<double>(f16_to_f32(base_bits)) - base;
    const double gain = 2.0 * (step.scale * slope.scale + step.minimum * slope.minimum);
    const double cost = step.scale * step.scale * qq + 2.0 * step.scale * step.minimum * q1 +
                        step.minimum * step.minimum * one;
    if ((step.scale == 0 && step.minimum == 0) || gain <= cost) return {};
    tensor_.scales[static_cast<std::size_t>(row * groups_ + group)] = scale_bits;
    tensor_.minima[static_cast<std::size_t>(row * groups_ + group)] = base_bits;
    return step;
  }

  bool move_minima(std::int64_t row, std::int64_t begin, std::int64_t end, double* g, double* moves) {
    bool moved = false;
    double product[kPolishBlock], ones[kPolishBlock];
    for (std::int64_t first = 0; first < end - begin; first += size_) {
      const std::int64_t group = (begin + first) / size_;
      const std::int8_t* code = codes(row) + begin + first;
      std::fill(product, product + (end - begin), 0.0);  // H q and H 1 over the whole block
      std::fill(ones, ones + (end - begin), 0.0);
      for (std::int64_t i = 0; i < size_; ++i) {
        const double* line = corner_.data() + (first + i) * kPolishBlock;
        if (code[i] != 0) add_scaled(product, line, code[i], end - begin);
        add_scaled(ones, line, 1.0, end - begin);
      }
      Steps slope;
      double qq = 0, q1 = 0, one = 0;
      for (std::int64_t i = 0; i < size_; ++i) {
        slope.scale += code[i] * g[first + i];
        slope.minimum += g[first + i];
        qq += code[i] * product[first + i];
        q1 += product[first + i];
        one += ones[first + i];
      }
      const Steps step = move_minimum(row, group, slope, qq, q1, one);
      if (step.scale == 0 && step.minimum == 0) continue;
      for (std::int64_t i = 0; i < size_; ++i) moves[first + i] = step.scale * code[i] + step.minimum;
      add_scaled(g, product, -step.scale, end - begin);
      add_scaled(g, ones, -step.minimum, end - begin);
      moved = true;
    }
    return moved;
  }

  bool move_scales(std::int64_t row, std::int64_t begin, std::int64_t end, double* g, double* moves) {
    bool moved = false;
    double q[kPolishBlock], product[kPolishBlock];
    for (std::int64_t first = 0; first < end - begin; first += size_) {
      const std::int64_t group = (begin + first) / size_;
      const std::int8_t* code = codes(row) + begin + first;
      for (std::int64_t i = 0; i < size_; ++i) q[i] = code[i] - zero(row, group);
      std::fill(product, product + (end - begin), 0.0);  // H q over the whole block
      for (std::int64_t i = 0; i < size_; ++i) {
        if (q[i] != 0) add_scaled(product, corner_.data() + (first + i) * kPolishBlock, q[i], end - begin);
      }
      double slope = 0, curvature = 0;
      for (std::int64_t i = 0; i < size_; ++i) {
        slope += q[i] * g[first + i];
        curvature += q[i] * product[first + i];
      }
      const double step = move_scale(row, group, slope, curvature);
      if (step == 0) continue;
      for (std::int64_t i = 0; i < size_; ++i) moves[first + i] = step * q[i];
      add_scaled(g, product, -step, end - begin);
      moved = true;
    }
    return moved;
  }

  // Groups wider than a block: those of one number together in all rows.
  void move_wide_scales() {
    std::vector<double> q(static_cast<std::size_t>(size_ * kSweepRows)),
        product(static_cast<std::size_t>(cols_ * kSweepRows));  // - H q
    for (std::int64_t group = 0; group < groups_; ++group) {
      const std::int64_t begin = group * size_;
      std::fill(q.begin(), q.end(), 0.0);
      std::fill(product.begin(), product.end(), 0.0);
      for (const std::int64_t r : live_) {
        const std::int8_t* code = codes(tile_.first + r) + begin;
        const int base = zero(tile_.first + r, group);
        for (std::int64_t i = 0; i < size_; ++i) q[static_cast<std::size_t>(i * kSweepRows + r)] = code[i] - base;
      }
      subtract_products(product.data(), q.data(), hessian_, cols_, begin, begin + size_, 0, cols_);
      double slope[kSweepRows] = {}, curvature[kSweepRows] = {}, step[kSweepRows] = {};
      for (std::int64_t i = 0; i < size_; ++i) {
        for (std::int64_t r = 0; r < kSweepRows; ++r) {
          const double value = q[static_cast<std::size_t>(i * kSweepRows + r)];
          slope[r] += value * g_[(begin + i) * kSweepRows + r];
          curvature[r] -= value * product[static_cast<std::size_t>((begin + i) * kSweepRows + r)];
        }
      }
      for (const std::int64_t r : live_) {
        step[r] = move_scale(tile_.first + r, group, slope[r], curvature[r]);
        if (step[r] != 0) moved_[static_cast<std::size_t>(r)] = true;
      }
      for (std::int64_t j = 0; j < cols_; ++j) {
        for (std::int64_t r = 0; r < kSweepRows; ++r)
          g_[j * kSweepRows + r] += step[r] * product[static_cast<std::size_t>(j * kSweepRows + r)];
      }
    }
  }

  RowTile tile_;
  QuantizedTensor& tensor_;
  const T* hessian_;
  std::span<const std::uint8_t> keep_;
  double* g_;
  std::int64_t cols_, groups_, size_;
  CodeRange range_;
  std::vector<double> moves_, corner_;  // [block][kSweepRows], [block][block]
  std::vector<std::int64_t> live_;      // rows of the tile
  std::array<bool, kSweepRows> moved_{};
};

// Zeros are where `keep` says, or with a mask where that chooses them on the way.
class NearestRule : public SweepRule {
 public:
  NearestRule(QuantizedTensor& tensor, const SweepFactor& factor, std::span<const std::uint8_t> keep, SweepMask* mask)
      : tensor_(tensor),
        factor_(factor),
        keep_(keep),
        mask_(mask),
        range_(code_range(tensor.codec.kind)),
        groups_(tensor.codec.groups(tensor.cols)),
        size_(tensor.cols / groups_) {
    if (factor.group != tensor.codec.group) return;
    for (std::int64_t first = 0; first < tensor.cols; first += size_)
      metrics_.push_back(remaining_hessian(factor, first, size_));
  }

  std::int64_t group() const override {
    if (!metrics_.empty()) return size_;
    return mask_ ? mask_->sparsity().of : 0;
  }
  void open_block(RowTile tile, std::int64_t first, std::int64_t count, const double* current) override {
    if (mask_ && !mask_->sparsity().n_of_m()) mask_->choose(tile, first, count, current);
  }
  void open_group(RowTile tile, std::int64_t first, const double* current) override {
    if (mask_ && mask_->sparsity().n_of_m()) mask_->choose(tile, first, group(), current);
    if (metrics_.empty()) return;
    const std::int64_t group = factor_.order[static_cast<std::size_t>(first)] / size_;
    const double* values = current;
    std::vector<double> kept;
    if (mask_ || !keep_.empty()) {
      kept.assign(current, current + size_ * kSweepRows);
      for (std::int64_t j = 0; j < size_; ++j) {
        const std::int64_t column = factor_.order[static_cast<std::size_t>(first + j)];
        for (std::int64_t r = 0; r < tile.count; ++r)
          if (is_zero(tile.first + r, column))
            kept[static_cast<std::size_t>(j * kSweepRows + r)] = 0;
      }
      values = kept.data();
    }
    search_group(values, kSweepRows, tile.first, tile.count, group,
                 metrics_[static_cast<std::size_t>(first / size_)].data(), tensor_);
  }

  void decide(RowTile tile, std::int64_t column, const double* current, double* decided) override {
    for (std::int64_t r = 0; r < tile.count; ++r) {
      const std::int64_t row = tile.first + r;
      const std::size_t group = static_cast<std::size_t>(row * groups_ + column / size_);
      const float scale = f16_to_f32(tensor_.scales[group]);
      if (!tensor_.minima.empty()) {
        const float minimum = f16_to_f32(tensor_.minima[group]);
        const int code = nearest_code(current[r], static_cast<double>(scale), static_cast<double>(minimum));
        tensor_.codes[static_cast<std::size_t>(row * tensor_.cols + column)] = static_cast<std::int8_t>(code);
        decided[r] = static_cast<double>(static_cast<float>(code) * scale + minimum);
        continue;
      }
      const int zero = tensor_.zeros.empty() ? 0 : tensor_.zeros[group];
      double offset = 0;
      if (scale != 0 && !is_zero(row, column)) {
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
  bool is_zero(std::int64_t row, std::int64_t column) const {
    if (mask_) return !mask_->keeps(row, column);
    return !keep_.empty() && keep_[static_cast<std::size_t>(row * tensor_.cols + column)] == 0;
  }

  QuantizedTensor& tensor_;
  const SweepFactor& factor_;
  std::span<const std::uint8_t> keep_;
  SweepMask* mask_;
  CodeRange range_;
  std::int64_t groups_, size_;
  std::vector<std::vector<double>> metrics_;  // in visiting order; empty: scales stay
};

// Row r as `from` has it.
void copy_row(const QuantizedTensor& from, std::int64_t r, QuantizedTensor& to) {
  const std::int64_t groups = from.codec.groups(from.cols);
  const auto copy = [&](const auto& source, auto& target, std::int64_t width) {
    if (!source.empty()) std::copy_n(source.begin() + r * width, width, target.begin() + r * width);
  };
  copy(from.codes, to.codes, from.cols);
  copy(from.scales, to.scales, groups);
  copy(from.zeros, to.zeros, groups);
  copy(from.minima, to.minima, groups);
}

}  // namespace

template <class T>
GptqResult gptq(const float* weight, const QuantizedTensor& nearest, const T* hessian, const SweepFactor& factor,
                std::span<const std::uint8_t> keep, int threads) {
  QuantizedTensor swept = nearest;
  NearestRule rule(swept, factor, keep, nullptr);
  sweep_columns(weight, nearest.rows, factor, rule, threads);
  return better_rows(weight, nearest, std::move(swept), hessian, threads);
}

QuantizedTensor prune_and_sweep(const float* weight, const QuantizedTensor& nearest, const SweepFactor& factor,
                                SweepMask& mask, int threads) {
  QuantizedTensor swept = nearest;
  NearestRule rule(swept, factor, {}, &mask);
  sweep_columns(weight, nearest.rows, factor, rule, threads);
  return swept;
}

template <class T>
GptqResult better_rows(const float* weight, const QuantizedTensor& nearest, QuantizedTensor swept_codes,
                       const T* hessian, int threads) {
  const std::int64_t rows = nearest.rows, cols = nearest.cols;
  GptqResult result;
  result.tensor = std::move(swept_codes);
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
      copy_row(nearest, r, result.tensor);
    }
  }
  return result;
}

template <class T>
double polish(const float* weight, QuantizedTensor& tensor, const T* hessian, std::span<const std::uint8_t> keep,
              int passes, int threads) {
  const std::int64_t rows = tensor.rows, cols = tensor.cols;
  const QuantizedTensor before = tensor;
  std::vector<float> unpacked(static_cast<std::size_t>(rows * cols));
  before.unpack(unpacked.data());
  std::vector<double> old_errors(static_cast<std::size_t>(rows), 0.0);
  row_products(weight, unpacked.data(), rows, cols, hessian, threads, [&](RowTile tile, std::span<double> products) {
    for (std::int64_t i = 0; i < tile.count; ++i) {
      const std::int64_t r = tile.first + i;
      double error = 0;
      for (std::int64_t j = 0; j < cols; ++j) {
        const std::size_t at = static_cast<std::size_t>(r * cols + j);
        error += (static_cast<double>(weight[at]) - static_cast<double>(unpacked[at])) *
                 products[static_cast<std::size_t>(j * kSweepRows + i)];
      }
      old_errors[static_cast<std::size_t>(r)] = std::max(0.0, error);
    }
    PolishTile<T> polished(tile, tensor, hessian, keep, products);
    for (int pass = 0; pass < passes && polished.pass(); ++pass) {
    }
  });
  tensor.unpack(unpacked.data());
  const std::vector<double> errors = row_errors(weight, unpacked.data(), rows, cols, hessian, threads);
  double sum = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::size_t at = static_cast<std::size_t>(r);
    sum += std::min(errors[at], old_errors[at]);
    if (errors[at] < old_errors[at]) continue;
    copy_row(before, r, tensor);
  }
  return sum;
}

template GptqResult gptq(const float*, const QuantizedTensor&, const double*, const SweepFactor&,
                         std::span<const std::uint8_t>, int);
template GptqResult gptq(const float*, const QuantizedTensor&, const float*, const SweepFactor&,
                         std::span<const std::uint8_t>, int);
template GptqResult better_rows(const float*, const QuantizedTensor&, QuantizedTensor, const double*, int);
template GptqResult better_rows(const float*, const QuantizedTensor&, QuantizedTensor, const float*, int);
template double polish(const float*, QuantizedTensor&, const double*, std::span<const std::uint8_t>, int, int);
template double polish(const float*, QuantizedTensor&, const float*, std::span<const std::uint8_t>, int, int);

bool is_pruned(std::span<const float> weight) {
  const auto zeros = std::count(weight.begin(), weight.end(), 0.0f);
  return !weight.empty() && static_cast<double>(zeros) >= kPrunedShare * static_cast<double>(weight.size());
}

std::vector<std::uint8_t> nonzero(std::span<const float> weight) {
  std::vector<std::uint8_t> out(weight.size());
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = weight[i] != 0.0f ? 1 : 0;
  return out;
}

}  // namespace pare
