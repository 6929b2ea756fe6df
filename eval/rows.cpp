#include "eval/rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

// A fused multiply-add on one instruction set and not on another would change the last bits of a report.
#pragma GCC optimize("fp-contract=off")

// Sanitizers are not ready yet when the loader asks which clone to take.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define PARE_ROW_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PARE_ROW_CLONES
#endif
#define PARE_INLINE __attribute__((always_inline)) inline

namespace pare {
namespace {

// Eight lanes everywhere: lane sums are added in lane order, so the width of the machine does not show.
constexpr std::int64_t kLanes = 8;
typedef double Doubles __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(32)));
typedef std::int64_t Ints __attribute__((vector_size(64)));

constexpr double kLowest = -708.0;       // exp stays a normal number above it
constexpr double kRound = 0x1.8p52;      // adding it rounds to an integer, which then stands in the low bits
constexpr double kLog2E = 0x1.71547652b82fep0;
constexpr double kLn2High = 0x1.62e42fefa3800p-1;  // 11 trailing zero bits: n * kLn2High is exact
constexpr double kLn2Low = 0x1.ef35793c76730p-45;

PARE_INLINE void load(const float* from, Floats& out) { std::memcpy(&out, from, sizeof out); }

// Lanes at and after `count` are -inf: probability zero.
PARE_INLINE void load_tail(const float* from, std::int64_t count, Floats& out) {
  float lanes[kLanes];
  for (std::int64_t i = 0; i < kLanes; ++i) lanes[i] = i < count ? from[i] : -std::numeric_limits<float>::infinity();
  std::memcpy(&out, lanes, sizeof out);
}

// exp(x) = 2^n exp(r), |r| <= ln 2 / 2, with the Taylor polynomial of degree 13 (remainder below 1e-17).
PARE_INLINE void exponential(const Doubles& x, Doubles& out) {
  const Doubles shifted = x * kLog2E + kRound;
  const Doubles n = shifted - kRound;
  const Doubles r = (x - n * kLn2High) - n * kLn2Low;
  Doubles p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;
  Doubles scale;
  std::memcpy(&scale, &bits, sizeof scale);
  const Doubles zero = {};
  const Doubles product = p * scale;
  out = x < kLowest ? zero : product;  // NaN fails the comparison and stays NaN through p
}

PARE_INLINE double lane_sum(const Doubles& v) {
  double sum = 0;
  for (std::int64_t i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

PARE_INLINE float row_maximum(const float* row, std::int64_t n) {
  Floats best = {};
  best -= std::numeric_limits<float>::infinity();
  const std::int64_t whole = n / kLanes * kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    Floats x;
    load(row + i, x);
    best = x > best ? x : best;
  }
  float result = -std::numeric_limits<float>::infinity();
  for (std::int64_t i = 0; i < kLanes; ++i) result = std::max(result, static_cast<float>(best[i]));
  for (std::int64_t i = whole; i < n; ++i) result = std::max(result, row[i]);
  return result;
}

PARE_INLINE void accumulate(const Floats& x, const Doubles& maximum, Doubles& z) {
  const Doubles centred = __builtin_convertvector(x, Doubles) - maximum;
  Doubles e;
  exponential(centred, e);
  z += e;
}

PARE_ROW_CLONES
double sum_exp(const float* row, std::int64_t n, float* maximum_out) {
  const float maximum = row_maximum(row, n);
  *maximum_out = maximum;
  Doubles z = {}, centre = {};
  centre += static_cast<double>(maximum);
  const std::int64_t whole = n / kLanes * kLanes;
  Floats x;
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    load(row + i, x);
    accumulate(x, centre, z);
  }
  if (whole < n) {
    load_tail(row + whole, n - whole, x);
    accumulate(x, centre, z);
  }
  return lane_sum(z);
}

PARE_INLINE void accumulate_pair(const Floats& a, const Floats& b, const Doubles& a_centre, const Doubles& b_centre,
                                 Doubles& za, Doubles& zb, Doubles& s) {
  const Doubles u = __builtin_convertvector(a, Doubles) - a_centre;
  const Doubles v = __builtin_convertvector(b, Doubles) - b_centre;
  Doubles ea, eb;
  exponential(u, ea);
  exponential(v, eb);
  za += ea;
  zb += eb;
  const Doubles zero = {};
  const Doubles term = ea * (u - v);
  s += ea == zero ? zero : term;  // also hides (-inf) - (-inf)
}

struct PairSums {
  double za, zb, s;  // s = sum exp(u) (u - v), u and v centred on their maxima
};

PARE_ROW_CLONES
void sum_exp_pair(const float* a, const float* b, std::int64_t n, float* a_maximum, float* b_maximum, PairSums* out) {
  *a_maximum = row_maximum(a, n);
  *b_maximum = row_maximum(b, n);
  Doubles a_centre = {}, b_centre = {}, za = {}, zb = {}, s = {};
  a_centre += static_cast<double>(*a_maximum);
  b_centre += static_cast<double>(*b_maximum);
  const std::int64_t whole = n / kLanes * kLanes;
  Floats x, y;
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    load(a + i, x);
    load(b + i, y);
    accumulate_pair(x, y, a_centre, b_centre, za, zb, s);
  }
  if (whole < n) {
    load_tail(a + whole, n - whole, x);
    load_tail(b + whole, n - whole, y);
    accumulate_pair(x, y, a_centre, b_centre, za, zb, s);
  }
  *out = {lane_sum(za), lane_sum(zb), lane_sum(s)};
}

bool finish(const float* row, std::int64_t n, float maximum, double z, RowSoftmax& out) {
  if (!(z >= 1.0) || !std::isfinite(z)) return false;  // the maximum itself contributes 1
  out.maximum = maximum;
  out.log_z = std::log(z);
  out.argmax = static_cast<std::int32_t>(std::find(row, row + n, maximum) - row);
  return true;
}

}  // namespace

bool row_softmax(const float* row, std::int64_t n, RowSoftmax& out) {
  float maximum = 0;
  const double z = sum_exp(row, n, &maximum);
  return finish(row, n, maximum, z, out);
}

bool row_divergence(const float* p, const float* q, std::int64_t n, RowSoftmax& p_out, RowSoftmax& q_out, double& kl) {
  float p_maximum = 0, q_maximum = 0;
  PairSums sums{};
  sum_exp_pair(p, q, n, &p_maximum, &q_maximum, &sums);
  if (!finish(p, n, p_maximum, sums.za, p_out) || !finish(q, n, q_maximum, sums.zb, q_out)) return false;
  // KL = sum_i softmax(p)_i (u_i - v_i) - log za + log zb; rounding may leave -1e-16.
  kl = std::max(0.0, sums.s / sums.za - (p_out.log_z - q_out.log_z));
  return true;
}

double row_exp(double x) {
  Doubles in = {}, out;
  in += x;
  exponential(in, out);
  return out[0];
}

}  // namespace pare
