#include "quantize/minima.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/codec.h"
#include "model/clones.h"
#include "quantize/lanes.h"

namespace pare {
namespace {

static_assert(kLanes == kMinimaRows);
constexpr double kLargestCode = 15;
// Starts: shares of the range, and in steps how far its centre moves.
constexpr double kFirstShare = 1.02, kShareStep = 0.045;
constexpr int kShares = 12;
constexpr double kShifts[] = {-0.4, 0.0, 0.4};

double to_f16(double value) {
  return static_cast<double>(f16_to_f32(f32_to_f16(static_cast<float>(std::clamp(value, -kF16Max, kF16Max)))));
}

// What the codes of a candidate are to the metric: q A w, q A q and q A 1.
struct Products {
  Lanes qw, qq, q1;
};

// v = A w, ones = A 1
PARE_CLONES void weigh_group(const MinimaGroup& g, double* v, double* ones) {
  for (std::int64_t j = 0; j < g.size; ++j) {
    Double8 sum[kVectors] = {};
    double one = 0;
    const std::int64_t begin = g.block ? 0 : j, end = g.block ? g.size : j + 1;
    for (std::int64_t k = begin; k < end; ++k) {
      const double factor = g.block ? g.block[j * g.stride + k] : (g.diagonal ? g.diagonal[j] : 1.0);
      one += factor;
      for (int i = 0; i < kVectors; ++i) {
        Double8 w;
        std::memcpy(&w, g.w + k * kMinimaRows + i * 8, sizeof w);
        sum[i] += factor * w;
      }
    }
    ones[j] = one;
    std::memcpy(v + j * kMinimaRows, sum, sizeof sum);
  }
}

// The nearest codes under (scale, minimum), and their products.
PARE_CLONES void project_group(const MinimaGroup& g, const double* v, const double* ones, const Lanes& scale,
                               const Lanes& minimum, double* codes, Products& out) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding and taking it away rounds half to even
  Double8 divisor[kVectors], base[kVectors], qw[kVectors] = {}, qq[kVectors] = {}, q1[kVectors] = {};
  const Double8 nothing = {}, top = nothing + kLargestCode;
  for (int i = 0; i < kVectors; ++i) {
    Double8 s;
    std::memcpy(&s, scale.at + i * 8, sizeof s);
    std::memcpy(&base[i], minimum.at + i * 8, sizeof s);
    divisor[i] = s > 0.0 ? s : nothing + INFINITY;  // code 0
  }
  for (std::int64_t j = 0; j < g.size; ++j) {
    for (int i = 0; i < kVectors; ++i) {
      Double8 w, av;
      std::memcpy(&w, g.w + j * kMinimaRows + i * 8, sizeof w);
      std::memcpy(&av, v + j * kMinimaRows + i * 8, sizeof av);
      Double8 q = (w - base[i]) / divisor[i];
      q = q > nothing ? q : nothing;
      q = q < top ? q : top;
      q = (q + kRound) - kRound;
      std::memcpy(codes + j * kMinimaRows + i * 8, &q, sizeof q);
      qw[i] += q * av;
      q1[i] += q * ones[j];
    }
  }
  for (std::int64_t j = 0; j < g.size; ++j) {
    Double8 own[kVectors], inner[kVectors];
    std::memcpy(own, codes + j * kMinimaRows, sizeof own);
    const double corner = 0.5 * (g.block ? g.block[j * g.stride + j] : (g.diagonal ? g.diagonal[j] : 1.0));
    for (int i = 0; i < kVectors; ++i) inner[i] = corner * own[i];
    for (std::int64_t k = j + 1; g.block && k < g.size; ++k) {
      const double factor = g.block[j * g.stride + k];
      for (int i = 0; i < kVectors; ++i) {
        Double8 q;
        std::memcpy(&q, codes + k * kMinimaRows + i * 8, sizeof q);
        inner[i] += factor * q;
      }
    }
    for (int i = 0; i < kVectors; ++i) qq[i] += own[i] * inner[i];
  }
  for (int i = 0; i < kVectors; ++i) qq[i] *= 2.0;
  std::memcpy(out.qw.at, qw, sizeof qw);
  std::memcpy(out.qq.at, qq, sizeof qq);
  std::memcpy(out.q1.at, q1, sizeof q1);
}

class Search {
 public:
  explicit Search(const MinimaGroup& group)
      : g_(group),
        v_(static_cast<std::size_t>(g_.size * kMinimaRows)),
        codes_(v_.size()),
        ones_(static_cast<std::size_t>(g_.size)) {
    weigh_group(g_, v_.data(), ones_.data());
    for (std::int64_t j = 0; j < g_.size; ++j) {
      const double one = ones_[static_cast<std::size_t>(j)];
      one_one_ += one;
      for (int r = 0; r < kMinimaRows; ++r) {
        const double w = g_.w[j * kMinimaRows + r];
        w_one_.at[r] += w * one;
        w_w_.at[r] += w * v_[static_cast<std::size_t>(j * kMinimaRows + r)];
      }
    }
  }

  // Tries scale and minimum in every lane; the best pair for their codes becomes the next candidate.
  void consider(Lanes& scale, Lanes& minimum) {
    Products p;
    project_group(g_, v_.data(), ones_.data(), scale, minimum, codes_.data(), p);
    for (int r = 0; r < kMinimaRows; ++r) {
      const double s = scale.at[r], m = minimum.at[r], qw = p.qw.at[r], qq = p.qq.at[r], q1 = p.q1.at[r];
      const double error =
          w_w_.at[r] - 2 * s * qw - 2 * m * w_one_.at[r] + s * s * qq + 2 * s * m * q1 + m * m * one_one_;
      if (!any_ || error < error_.at[r]) {
        error_.at[r] = error;
        scale_.at[r] = s;
        minimum_.at[r] = m;
      }
      const double determinant = qq * one_one_ - q1 * q1;
      if (!(determinant > 1e-9 * qq * one_one_)) continue;
      const double wanted = to_f16((qw * one_one_ - w_one_.at[r] * q1) / determinant);
      if (!(wanted > 0)) continue;
      scale.at[r] = wanted;
      minimum.at[r] = to_f16((w_one_.at[r] - wanted * q1) / one_one_);
    }
    any_ = true;
  }

  const Lanes& scale() const { return scale_; }
  const Lanes& minimum() const { return minimum_; }

 private:
  const MinimaGroup& g_;
  std::vector<double> v_, codes_, ones_;
  double one_one_ = 0;
  Lanes w_one_, w_w_, scale_, minimum_, error_;
  bool any_ = false;
};

}  // namespace

void choose_minima(const MinimaGroup& g, bool searched, double* scale, double* minimum) {
  Lanes low, high, s, m;
  for (int r = 0; r < kMinimaRows; ++r) {
    low.at[r] = high.at[r] = g.w[r];
    for (std::int64_t j = 1; j < g.size; ++j) {
      low.at[r] = std::min(low.at[r], g.w[j * kMinimaRows + r]);
      high.at[r] = std::max(high.at[r], g.w[j * kMinimaRows + r]);
    }
    s.at[r] = to_f16((high.at[r] - low.at[r]) / kLargestCode);
    m.at[r] = to_f16(low.at[r]);
  }
  const Lanes plain_scale = s, plain_minimum = m;
  Search search(g);
  if (searched) {
    search.consider(s, m);
    search.consider(s, m);
    for (int k = 0; k < kShares; ++k) {
      for (const double shift : kShifts) {
        for (int r = 0; r < kMinimaRows; ++r) {
          s.at[r] = to_f16((high.at[r] - low.at[r]) / kLargestCode * (kFirstShare - kShareStep * k));
          m.at[r] = to_f16((high.at[r] + low.at[r]) / 2 - (kLargestCode / 2 + shift) * s.at[r]);
        }
        search.consider(s, m);
        search.consider(s, m);
      }
    }
    s = search.scale();
    m = search.minimum();
    for (int k = 0; k < 4; ++k) search.consider(s, m);
  }
  const Lanes& best_scale = searched ? search.scale() : plain_scale;
  const Lanes& best_minimum = searched ? search.minimum() : plain_minimum;
  std::copy_n(best_scale.at, kMinimaRows, scale);
  std::copy_n(best_minimum.at, kMinimaRows, minimum);
}

int nearest_code(double weight, double scale, double minimum) {
  if (!(scale > 0)) return 0;
  return static_cast<int>(std::nearbyint(std::clamp((weight - minimum) / scale, 0.0, kLargestCode)));
}

}  // namespace pare
